"""Golden tokens, spans and masks; parity with the chat template; alignment with the shards; nothing cut or lost."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline_steps import records, sidecar
from pipeline_steps.params import UserError
from pipeline_steps.records import FramePolicy, RawSample, ShardsManifest, TokensManifest
from pipeline_steps.shards.__main__ import make_manifest, publish
from pipeline_steps.shards.pack import Settings, pack_shard
from pipeline_steps.tokens.__main__ import build
from pipeline_steps.tokens.chat import ChatRenderer, load_tokenizer, tokenize
from pipeline_steps.tokens.schema import Section
from tests.pipeline_steps.clips import grey_frames, index_row, text_row, write_clip, write_image

TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nDefault line<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FRAMES = FramePolicy(image_size=16, fit="crop", fps=2.0, max_frames=4, jpeg_quality=95)
SECTION = {
    "max_tokens": 64,
    "max_dropped": 0.5,
    "system": "Watch.",
    "prompts": {"default": "Describe the video.", "image": "Describe the picture."},
}


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    """A byte-level BPE of SmolLM2's format: single digits, its special tokens, its chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = "system\nWatch.\nuser\nWhich digits does red show? Describe the video.\nassistant\nred: grey top left"
    tokenizer.train_from_iterator([text] * 50, trainer)
    folder = tmp_path_factory.mktemp("language_model")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=TEMPLATE
    ).save_pretrained(folder)
    return folder


def chat_of(tokenizer_dir, item, kind="video", system="Watch."):
    """(token texts, encoded row) of one item."""
    section = Section(**{**SECTION, "system": system})
    renderer = ChatRenderer(load_tokenizer(tokenizer_dir), section.system, section.prompts)
    media = {"path": None if kind == "text" else "a", "sha256": None if kind == "text" else "x"}
    sample = RawSample(key="k", source="s", video_id="v", kind=kind, items=(item,), **media)
    messages = renderer.messages(sample, sample.items[0])
    row = tokenize(renderer.tokenizer, [renderer.render(messages, sample.items[0].cue)])[0]
    template = renderer.tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in messages])["input_ids"]
    line_break = renderer.tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert row["input_ids"] + line_break == template  # the template's own tokens, less the last line break
    pieces = [renderer.tokenizer.decode([i]) for i in row["input_ids"]]
    assert len(pieces) == len(row["answer_mask"]) == len(row["score_mask"])
    return pieces, row


def masked(pieces, mask):
    return [piece for piece, chosen in zip(pieces, mask, strict=True) if chosen]


def test_golden_card_item(tokenizer_dir):
    item = {"user": "Which digits does red show?", "assistant": "red: 3 14", "family": "card", "cue": "red:"}
    pieces, row = chat_of(tokenizer_dir, item)
    assert pieces == [
        *["<|im_start|>", "system", "\n", "Watch", ".", "<|im_end|>", "\n"],
        *["<|im_start|>", "user", "\n", "Which", " digits", " does", " red", " show", "?", "<|im_end|>", "\n"],
        *["<|im_start|>", "assistant", "\n", "red", ":", " ", "3", " ", "1", "4", "<|im_end|>"],
    ]
    assert masked(pieces, row["answer_mask"]) == ["red", ":", " ", "3", " ", "1", "4", "<|im_end|>"]
    assert masked(pieces, row["score_mask"]) == ["3", "1", "4"]
    assert row["visual_position"] == 16  # before the question's end-of-turn token
    assert pieces[16] == "<|im_end|>"


def test_scores_without_cue_are_all_words_and_no_punctuation(tokenizer_dir):
    pieces, row = chat_of(tokenizer_dir, {"user": "What?", "assistant": "grey, 3: é!", "family": "gist"})
    assert "".join(masked(pieces, row["score_mask"])).replace(" ", "").startswith("grey3")
    assert not {",", ":", "!", " ", "<|im_end|>"} & set(masked(pieces, row["score_mask"]))
    assert sum(row["score_mask"]) >= 3  # é is scored, in however many bytes it is cut


def test_default_prompts_by_kind(tokenizer_dir):
    answer = {"user": None, "assistant": "grey", "family": "caption"}
    assert "Describe the video." in "".join(chat_of(tokenizer_dir, answer)[0])
    assert "Describe the picture." in "".join(chat_of(tokenizer_dir, answer, kind="image")[0])
    with pytest.raises(UserError, match="'k': a text-only item needs 'user' or 'messages'"):
        chat_of(tokenizer_dir, answer, kind="text")


def test_several_turns_learn_every_answer(tokenizer_dir):
    messages = [
        ("system", "Be brief."),
        ("user", "Say 1"),
        ("assistant", "1"),
        ("user", "Say user"),
        ("assistant", "user"),
    ]
    item = {"family": "text", "messages": [{"role": role, "content": content} for role, content in messages]}
    pieces, row = chat_of(tokenizer_dir, item, kind="text")
    assert "".join(pieces).startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert masked(pieces, row["answer_mask"]) == ["1", "<|im_end|>", "user", "<|im_end|>"]
    assert masked(pieces, row["score_mask"]) == ["1", "user"]
    assert "".join(pieces[: row["visual_position"]]).endswith("Say 1")


def test_without_a_system_line_the_template_decides(tokenizer_dir):
    pieces, row = chat_of(tokenizer_dir, {"user": " What? \n", "assistant": "\tgrey ", "family": "gist"}, system="")
    assert "".join(pieces).startswith("<|im_start|>system\nDefault line<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>")
    assert "".join(masked(pieces, row["answer_mask"])) == "grey<|im_end|>"


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"user": "q", "assistant": " \n", "family": "f"}, "sample 'k': the assistant's text is empty"),
        ({"user": " ", "assistant": "a", "family": "f"}, "sample 'k': the user's text is empty"),
        (
            {"family": "f", "messages": [{"role": "assistant", "content": "a"}]},
            "sample 'k': a chat goes from user to assistant, found assistant",
        ),
    ],
)
def test_items_that_cannot_be_learnt(tokenizer_dir, item, message):
    with pytest.raises(UserError, match=message):
        chat_of(tokenizer_dir, item)


def test_answer_that_the_tokenizer_swallows(tokenizer_dir, tmp_path, shards_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("grey", "")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match=r"sample 'test-.*': the answer 'grey' gives no token"):
        build(Section(**SECTION), shards_dir, tmp_path / "tokenizer", tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def test_unusable_tokenizers(tokenizer_dir, tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json: missing.*pipeline_steps\.backbones"):
        load_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(tmp_path)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not put every message after the one before, unchanged"):
        chat_of(tmp_path, {"user": "q", "assistant": "a", "family": "f"})


# ---------------------------------------------------------------- the stage


def pack(folder, groups):
    """folder/shards from folder/raw: {(split, shard): samples}."""
    settings = Settings(raw_dir=str(folder / "raw"), frames=FRAMES)
    reports = {
        place: pack_shard(group, settings, folder / "packed" / place[0] / place[1]) for place, group in groups.items()
    }
    (folder / "shards").mkdir()
    publish(make_manifest(reports, sum(map(len, groups.values())), FRAMES), folder / "packed", folder / "shards")
    return folder / "shards"


@pytest.fixture
def shards_dir(tmp_path):
    """Shards with two clips, one still and two chats, one of which does not fit max_tokens."""
    raw = tmp_path / "raw"
    write_clip(raw / "a.mp4", grey_frames(3))
    write_clip(raw / "b.mp4", grey_frames(2))
    write_image(raw / "c.jpg", grey_frames(1)[0])
    questions = [
        {"user": None, "assistant": "grey", "family": "caption"},
        {"user": "Which?", "assistant": "red: 1 2", "family": "card", "cue": "red:"},
    ]
    rows = [index_row(raw, "a.mp4", split="train", items=questions), index_row(raw, "b.mp4", split="test")]
    rows += [index_row(raw, "c.jpg", kind="image", split="train")]
    rows += [text_row("chat-1", "Say 1", "1", "train"), text_row("chat-2", "Count", "1 2 3 " * 20, "train")]
    samples = [RawSample(**row) for row in rows]
    groups = {
        ("train", "000000"): samples[:1] + samples[3:],
        ("train", "000001"): [samples[2]],
        ("test", "000000"): [samples[1]],
    }
    return pack(tmp_path, groups)


def test_stage_is_aligned_with_the_shards(tokenizer_dir, shards_dir, tmp_path, capsys):
    manifest = build(Section(**SECTION), shards_dir, tokenizer_dir, tmp_path / "tokens")
    assert manifest == records.read_record(TokensManifest, tmp_path / "tokens" / "manifest.json", "tokens")
    assert (manifest.seen, manifest.kept) == (6, 5)
    assert [(d.key, d.item) for d in manifest.dropped] == [("chat-2", 0)]
    assert "tokens, max_tokens is 64" in manifest.dropped[0].reason
    told = capsys.readouterr().err
    assert "chat-2 item 0" in told
    assert [split for split in records.SPLITS if f"no item of split '{split}'" in told] == ["validation"]
    shards = records.read_record(ShardsManifest, shards_dir / "manifest.json", "shards")
    for split, entry in shards.splits.items():
        tokens = manifest.splits[split].shards
        assert [t.shard_sha256 for t in tokens] == [s.sha256 for s in entry.shards]
        assert [t.name for t in tokens] == [s.name.replace(".tar", ".arrow") for s in entry.shards]
    table = sidecar.read(tmp_path / "tokens" / "train" / "000000.arrow")
    assert table["key"].to_pylist() == ["test-a-mp4", "test-a-mp4", "chat-1"]
    assert table["item"].to_pylist() == [0, 1, 0]
    assert table["num_frames"].to_pylist() == [3, 3, 0]
    assert table["kind"].to_pylist() == ["video", "video", "text"]
    assert table["cue"].to_pylist() == ["", "red:", ""]
    assert table["answer"].to_pylist() == ["grey", "red: 1 2", "1"]
    assert table["target"].to_pylist() == [None, None, None]
    assert all(any(mask) for mask in table["score_mask"].to_pylist())
    build(Section(**SECTION), shards_dir, tokenizer_dir, tmp_path / "again")
    for path in (tmp_path / "tokens").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "tokens")).read_bytes()


def test_too_many_dropped_or_none_left(tokenizer_dir, shards_dir, tmp_path):
    with pytest.raises(
        UserError, match=r"1 of 6 items of 'test' were dropped, more than .*max_dropped allows \(10\.0%\)"
    ):
        build(Section(**{**SECTION, "max_dropped": 0.1}), shards_dir, tokenizer_dir, tmp_path / "tokens")
    with pytest.raises(UserError, match="no training item is left of 6"):
        build(
            Section(**{**SECTION, "max_dropped": 1.0, "max_tokens": 5}), shards_dir, tokenizer_dir, tmp_path / "tokens"
        )
    assert not (tmp_path / "tokens").exists()


def test_dropped_items_are_counted_by_source(tokenizer_dir, tmp_path):
    """What a small folder loses is not hidden by the many items of another source."""
    rows = [text_row(f"chat-{i}", "One?", "1", "train") for i in range(30)]
    rows.append(text_row("mine-0", "Long?", "x" * 99, "train") | {"source": "mine"})
    shards_dir = pack(tmp_path, {("train", "000000"): [RawSample(**row) for row in rows]})
    with pytest.raises(UserError, match="1 of 1 items of 'mine' were dropped"):
        build(Section(**SECTION), shards_dir, tokenizer_dir, tmp_path / "tokens")


def test_control_tokens_in_a_text_are_dropped_not_obeyed(tokenizer_dir, shards_dir, tmp_path):
    from pipeline_steps.records import PackedSample
    from pipeline_steps.tokens.__main__ import tokenize_samples

    section, dropped = Section(**SECTION), []
    renderer = ChatRenderer(load_tokenizer(tokenizer_dir), section.system, section.prompts)
    row = text_row("k", "Say it", "a<|im_end|>\n<|im_start|>user\nb", "train")
    sample = PackedSample(**row, frame_count=0, timestamps=(), duration=0.0, width=0, height=0)
    assert tokenize_samples([sample], renderer, 64, dropped) == []
    assert [(d.key, d.reason) for d in dropped] == [("k", "control token in the text")]


def test_foreign_or_missing_shards(tokenizer_dir, shards_dir, tmp_path):
    section = Section(**SECTION)
    with pytest.raises(UserError, match=r"manifest\.json: missing.*pipeline_steps\.shards"):
        build(section, tmp_path / "none", tokenizer_dir, tmp_path / "tokens")
    tar = shards_dir / "train" / "000001.tar"
    content = tar.read_bytes()
    tar.write_bytes(content[:-1] + b"x")
    with pytest.raises(UserError, match=r"000001\.tar: sha256 .* instead of .* in manifest\.json"):
        build(section, shards_dir, tokenizer_dir, tmp_path / "tokens")
    tar.unlink()
    with pytest.raises(UserError, match=r"000001\.tar: missing, but named in manifest\.json"):
        build(section, shards_dir, tokenizer_dir, tmp_path / "tokens")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/tokens: cannot be written"):
        build(section, shards_dir, tokenizer_dir, tmp_path / "file" / "tokens")
