"""Existing WebDataset archives: every field, token ids as text again, and the stages that read them."""

import io
import json
import tarfile

import pytest
from PIL import Image

from pipeline_steps.common import params
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.schemas import read_samples
from pipeline_steps.shards.pack import Settings, pack_shard
from pipeline_steps.sources import tars
from pipeline_steps.sources.__main__ import collect
from pipeline_steps.tokens.chat import ChatRenderer, load_tokenizer
from pipeline_steps.tokens.rows import tokenize_samples
from pipeline_steps.tokens.shard import read_shard
from tests.pipeline_steps.archives import CHAT, MORE, POLICY, QUESTION, entry, frames, only, read_tars, write_tar
from tests.pipeline_steps.chats import save_tokenizer
from tests.pipeline_steps.clips import grey_frames, index_of, write_clip
from tests.pipeline_steps.test_chatml import CHATS, ids_of


def reason(path, members, **changes):
    """Why the one sample of these members is quarantined."""
    samples, reasons, _ = read_tars(write_tar(path / "000000.tar", members), **changes)
    assert samples == {}
    (found,) = reasons.values()
    return found


# ---------------------------------------------------------------- fields


def item_of(tmp_path, contents, with_frames=True, **changes):
    media = [("k.jpg", b"picture")] if with_frames else []
    return only(tmp_path, [*media, ("k.json", contents)], **changes).items[0].model_dump(exclude_defaults=True)


PREFERENCE = {"user": "A?", "chosen_assistant": "B.", "rejected_assistant": "No."}


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        ({"user": "A?", "assistant": "B."}, {"user": "A?", "assistant": "B.", "task": "question"}),
        ({"user": " ", "assistant": "B.", "task": "x"}, {"assistant": "B.", "task": "x"}),
        ({"caption": "B.", "user": None}, {"assistant": "B.", "task": "caption"}),
        ({"messages": CHAT}, {"user": "A?", "assistant": "B.", "task": "question"}),
        ({"messages": MORE}, {"messages": tuple(MORE), "task": "question"}),
        (PREFERENCE, {"user": "A?", "assistant": "B.", "rejected": "No.", "task": "preference"}),
        (
            {"messages": MORE[:3], "chosen_assistant": "D.", "rejected_assistant": "E."},
            {"messages": tuple(MORE), "rejected": "E.", "task": "preference"},
        ),
    ],
)
def test_text_fields_become_one_item(tmp_path, contents, expected):
    assert item_of(tmp_path, contents) == expected


def test_source_split_and_video_id(tmp_path):
    contents = QUESTION | {"source": "youtube", "yt_id": 17, "split": "val"}
    sample = only(tmp_path, [("k.json", contents)], split="validation")
    assert (sample.source, sample.split, sample.video_id) == ("youtube", "validation", "17")
    contents |= {"split": "test", "video_id": 17}  # an id that another entry may use for another video
    sample = only(tmp_path, [("k.json", contents)])
    assert (sample.split, sample.video_id) == ("test", "old-17")
    sample = only(tmp_path, [("k.json", QUESTION)])
    assert (sample.source, sample.split, sample.video_id) == ("old", None, sample.key)


OWN = {"kind": "text", "split": "test", "duration": 0.0}
REFUSED = {
    "frame count": (
        [*frames("k.{:03d}.jpg"), ("k.json", QUESTION | {"frame_count": 8})],
        "frame_count is 8, found 3 frames",
    ),
    "frames are gone": ([("k.json", QUESTION | {"frame_count": 8})], "frame_count 8, found 0 frames"),
    "frames are promised": ([("k.json", QUESTION | {"has_frames": True})], "claims frames, found 0 frames"),
    "no text only": ([("k.json", QUESTION | {"is_text_only": False})], "claims frames, found 0 frames"),
    "frames are denied": (
        [("k.jpg", b"x"), ("k.json", QUESTION | {"is_text_only": True})],
        "claims no frames, found 1",
    ),
    "a placeholder of no picture": (
        [("k.json", QUESTION | {"user": "<image>\nWhat?"})],
        "names a picture or video (such as <image>), found 0 frames",
    ),
    "a chat about no video": (
        [("k.json", {"conversations": [{"from": "human", "value": "<video> A?"}, {"from": "gpt", "value": "B."}]})],
        "names a picture or video",
    ),
    "a part that is no picture": (
        [("k.json", {"messages": [CHAT[0] | {"content": [{"type": "image"}, "A?"]}, CHAT[1]]})],
        "names a picture or video",
    ),
    "an unknown split": ([("k.json", QUESTION | {"split": "val"})], "split: Input should be 'train', 'validation'"),
    "a hole": ([*frames("k.{:03d}.jpg"), *frames("k.{:03d}.jpg", 1, 4), ("k.json", QUESTION)], "frame 3 is missing"),
    "a late start": ([*frames("k.{:03d}.jpg", 3, 2), ("k.json", QUESTION)], "frame 0 is missing"),
    "a frame twice": ([*frames("k.{:03d}.jpg"), ("k.001.png", b"x"), ("k.json", QUESTION)], "frame 1 occurs twice"),
    "a member twice": ([("k.jpg", b"x"), ("k.jpg", b"x"), ("k.json", QUESTION)], "both 'k.jpg' and 'k.jpg'"),
    "json twice": ([("k.json", QUESTION), ("k.json", QUESTION)], "both 'k.json' and 'k.json'"),
    "still and frames": ([("k.jpg", b"x"), ("k.000.jpg", b"x"), ("k.json", QUESTION)], "a picture and numbered"),
    "still and video": ([("k.jpg", b"x"), ("k.mp4", b"x"), ("k.json", QUESTION)], "a picture and a video file"),
    "no json": ([("k.jpg", b"x")], "no .json"),
    "frames without json": (frames("k_{:03d}.jpg"), "no .json"),
    "dots in the key": ([("v1.2.jpg", b"x"), ("v1.2.json", QUESTION)], "up to the first dot: 'v1'"),
    "empty picture": ([("k.jpg", b""), ("k.json", QUESTION)], "'k.jpg' is empty"),
    "no texts": ([("k.jpg", b"x"), ("k.json", {})], "found no user and assistant"),
    "user only": ([("k.json", {"user": "A?"})], "user without assistant"),
    "caption without frames": ([("k.json", {"caption": "A dog."})], "without frames and without a question"),
    "blank answer": ([("k.json", {"user": "A?", "assistant": " \u200b"})], "assistant is blank"),
    "chat of one": ([("k.json", {"messages": CHAT[:1]})], "start with user and end with assistant, found user"),
    "empty chat": ([("k.json", {"messages": []})], "found no message"),
    "blank turn": ([("k.json", {"messages": [*CHAT[:1], {"role": "assistant", "content": ""}]})], "assistant is blank"),
    "unknown role": ([("k.json", {"messages": [{"role": "tool", "content": "x"}]})], "messages.0.role"),
    "two answers": ([("k.json", PREFERENCE | {"assistant": "C."})], "assistant and chosen_assistant differ"),
    "same answers": ([("k.json", PREFERENCE | {"rejected_assistant": "B. "})], "are the same"),
    "wrong type": ([("k.json", QUESTION | {"user": 3})], "user: Input should be a valid string, found 3"),
    "task of text": ([("k.jpg", b"x"), ("k.json", QUESTION | {"task": "text"})], "the task 'text'"),
    "blank source": ([("k.json", QUESTION | {"source": "?"})], "source is '?'"),
    "token ids": ([("k.json", {"token_ids": [1, 2]})], "set `tokenizer` of this entry"),
    "bad items": (
        [("k.json", {"kind": "text", "split": "test", "duration": 0.0, "items": [{"user": "A?"}]})],
        "task: Field required",
    ),
}


@pytest.mark.parametrize(("members", "expected"), REFUSED.values(), ids=REFUSED.keys())
def test_contradictory_samples_are_quarantined(tmp_path, members, expected):
    assert expected in reason(tmp_path, members)


# ---------------------------------------------------------------- token ids


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("language_model"), "smollm2")


def test_token_ids_are_decoded_to_text(tmp_path, tokenizer_dir):
    ids = ids_of(tokenizer_dir, CHATS[0])
    contents = {"token_ids": ids, "loss_mask": [0] * len(ids), "source": "cauldron", "frame_count": 1}
    item = item_of(tmp_path, contents, tokenizer=str(tokenizer_dir))
    assert item == {"user": "Which digits?", "assistant": "red: 31415", "task": "question"}
    caption = item_of(tmp_path, contents | {"caption": "red: 31415"}, tokenizer=str(tokenizer_dir))
    assert caption == {"assistant": "red: 31415", "task": "caption"}  # the old run's prompt is not kept
    text = item_of(tmp_path, contents | {"user": "A?", "assistant": "B."}, tokenizer=str(tokenizer_dir))
    assert (text["user"], text["assistant"]) == ("A?", "B.")
    chat = item_of(
        tmp_path, {"token_ids": ids_of(tokenizer_dir, CHATS[1])}, with_frames=False, tokenizer=str(tokenizer_dir)
    )
    assert [(m["role"], m["content"]) for m in chat["messages"]] == CHATS[1]
    assert chat["task"] == "text"


def test_invalid_token_ids_are_quarantined(tmp_path, tokenizer_dir):
    ids = ids_of(tokenizer_dir, CHATS[0])
    contents = {"token_ids": ids, "loss_mask": [1]}
    assert "loss_mask has 1 entries" in reason(tmp_path, [("k.json", contents)], tokenizer=str(tokenizer_dir))


def test_unusable_tokenizers_fail_the_stage(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json: missing"):
        read_tars(write_tar(tmp_path / "0.tar", [("k.json", QUESTION)]), tokenizer=str(tmp_path))


# ---------------------------------------------------------------- the stage, and the stages after it


def section(*entries):
    content = params.load(params.ROOT / "params.yaml")
    content["sources"] |= {"collect": ["tars"], "tars": list(entries)}
    return params.check("test", content).sources


def tars_entry(path, **changes):
    return vars(entry(path, **changes))


def test_text_of_archives_reaches_the_tokens_stage(tmp_path, tokenizer_dir):
    """JSON alone is a sample: the original project read such archives and delivered nothing of them."""
    ids = ids_of(tokenizer_dir, CHATS[0])
    members = [(f"t{i}.json", {"user": f"Question {i}?", "assistant": f"Answer {i}."}) for i in range(20)]
    members += [("flagged.json", QUESTION | {"is_text_only": True, "has_frames": False, "frame_count": 0})]
    members += [("ids.json", {"token_ids": ids, "loss_mask": [1] * len(ids), "is_text_only": True})]
    members += [("chat.json", {"messages": MORE, "source": "smoltalk"})]
    write_tar(tmp_path / "text.tar", members)
    summary = collect(section(tars_entry(tmp_path, tokenizer=str(tokenizer_dir))), tmp_path / "raw")
    assert summary["num_samples"] == 23
    assert summary["sources"]["old"]["kinds"] == {"text": 22}

    samples = [s.model_copy(update={"split": "train"}) for s in read_samples(tmp_path / "raw" / "index.jsonl")]
    report = pack_shard(samples, Settings(raw_dir=str(tmp_path / "raw"), frames=POLICY), tmp_path / "packed" / "0")
    assert report.quarantined == ()
    packed, _ = read_shard(tmp_path / "packed" / "0.tar", report.shard)
    tokens = params.read(params.ROOT / "params.yaml", "tokens").tokens
    outcome = tokenize_samples(packed, ChatRenderer(load_tokenizer(tokenizer_dir), tokens), 512)
    assert (outcome.dropped, outcome.truncated) == ([], [])
    rows = outcome.rows
    assert {row["key"] for row in rows} == {sample.key for sample in samples}
    assert all(row["kind"] == "text" and any(row["answer_mask"]) for row in rows)
    assert {"Answer 7.", "red: 31415", "D.", "A dog."} <= {row["answer"] for row in rows}


def test_pictures_and_videos_of_archives_reach_the_shards(tmp_path):
    """Frame i of a video that is stored as pictures is grey in its own shade: the right ones arrive, in their order."""

    def jpeg(pixels):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
        return buffer.getvalue()

    pictures = [(f"clip_{i:03d}.jpg", jpeg(frame)) for i, frame in enumerate(grey_frames(8))]
    movie = write_clip(tmp_path / "movie.mp4", grey_frames(8), fps=1).read_bytes()
    members = [*reversed(pictures), ("clip.json", QUESTION | {"frame_count": 8}), ("movie.mp4", movie)]
    members += [("movie.txt", b"Grey."), ("still.jpg", jpeg(grey_frames(8)[5])), ("still.json", QUESTION)]
    found, reasons, _ = read_tars(write_tar(tmp_path / "0.tar", members), picture_fps=1.0)
    assert reasons == {}
    samples = [sample.model_copy(update={"split": "train"}) for sample in found.values()]
    report = pack_shard(samples, Settings(raw_dir=str(tmp_path), frames=POLICY), tmp_path / "packed" / "0")
    assert report.quarantined == ()
    frames = {}
    with tarfile.open(tmp_path / "packed" / "0.tar") as tar:
        for member in tar:
            if member.name.endswith(".jpg"):
                image = Image.open(io.BytesIO(tar.extractfile(member).read()))
                frames.setdefault(member.name.split(".")[0], []).append(index_of(image, 8))
    assert frames == {"old-0-clip": [1, 3, 5, 7], "old-0-movie": [1, 3, 5, 7], "old-0-still": [5]}


def test_stage_counts_quarantined_samples_and_enforces_the_limit(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.json", QUESTION), ("b.json", {}), ("c.json", QUESTION), ("d.json", QUESTION)])
    summary = collect(section(tars_entry(tmp_path, max_quarantined=0.25)), tmp_path / "out" / "raw")
    found = summary["sources"]["old"]
    assert (found["seen"], found["taken"], found["quarantined"]["count"]) == (4, 3, 1)
    assert found["quarantined"]["first"][0]["key"] == "old-0-b"
    (row,) = (tmp_path / "out" / "raw" / "quarantined.jsonl").read_text().splitlines()
    assert json.loads(row)["path"] == str(tmp_path / "0.tar")
    assert sorted(path.name for path in (tmp_path / "out" / "raw").iterdir()) == [
        "index.jsonl",
        "quarantined.jsonl",
        "summary.json",
    ]
    with pytest.raises(UserError, match=r"1 of 4 samples of the source 'old'.*\(25.0%\).*\(24.0%\)"):
        collect(section(tars_entry(tmp_path, max_quarantined=0.24)), tmp_path / "out" / "raw")
    with pytest.raises(UserError, match=r"sources.tars is empty"):
        collect(section(), tmp_path / "out" / "raw")


def test_example_config_group_is_valid():
    content = params.parse("conf/", params.compose(["data=tars"]))
    entries = params.check("conf/", content).sources.tars
    assert [entry.name for entry in entries] == ["openvid", "smoltalk", "benchmark"]
    assert params.check("conf/", content).sources.collect == ["tars"]
    content["sources"]["tars"][1]["name"] = "openvid"
    with pytest.raises(UserError, match="two sources have the name 'openvid'"):
        params.check("conf/", content)


def test_compressed_archives_are_rejected_not_skipped(tmp_path):
    (tmp_path / "train-0.tar").write_bytes(b"")
    (tmp_path / "train-1.TAR.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 compressed archive.s. in .*train-1\.TAR\.gz.*Decompress them"):
        tars.find_tars(entry(tmp_path))
    assert [name for _, name in tars.find_tars(entry(tmp_path / "*.tar"))] == ["train-0"]
