"""Multiple choice: the scores of options against scoring each alone, and summaries with known answers."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from pipeline_steps.backbones.tokenizer import save_tokenizer, train_tokenizer
from pipeline_steps.common import params
from pipeline_steps.common.errors import UserError
from pipeline_steps.evaluation import multiple_choice
from pipeline_steps.inference.answers import answer_batch, answer_span
from pipeline_steps.inference.likelihood import answer_ids, check_answer_fits
from pipeline_steps.shards.__main__ import make_manifest, publish
from pipeline_steps.shards.pack import Settings, pack_shard
from pipeline_steps.sources import folder
from pipeline_steps.streaming.collate import Collator
from pipeline_steps.streaming.dataset import TokenizedShards
from pipeline_steps.tokens.__main__ import build
from pipeline_steps.tokens.chat import load_tokenizer
from tests import checkpoints
from tests.model import tiny
from tests.pipeline_steps.chats import FORMATS
from tests.pipeline_steps.chats import save_tokenizer as save_format

QUESTIONS = (
    ("a.png", "Which colour?", ("red", "a very dark green", "blue"), 1),
    ("b.png", "How many digits?", ("3", "14"), 0),
    ("c.png", "Which place?", ("top left", "top right", "bottom left", "bottom right", "none of them"), 3),
)
SETTINGS = SimpleNamespace(batch_size=2, max_answer_tokens=4, seed=1)
PREFETCH = {"num_workers": 0, "limit": 1, "size_of": lambda job: 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(TokenizedShards of three pictures with a question with options each and one without, tokenizer)."""
    root = tmp_path_factory.mktemp("choices")
    rows = [{"file_name": "a.png", "question": "What is it?", "answer": "A picture of noise."}]
    for number, (name, question, options, correct) in enumerate(QUESTIONS):
        pixels = np.random.default_rng(number).integers(0, 255, (60, 60, 3)).astype(np.uint8)
        (root / "raw").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(root / "raw" / name)
        rows.append(
            {"file_name": name, "question": question, "options": options, "answer": options[correct], "split": "train"}
        )
    (root / "raw/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = folder.read(root / "raw", "mine", relative_to=root / "raw").samples
    save_tokenizer(train_tokenizer(checkpoints.VOCABULARY, checkpoints.MAX_POSITIONS), root / "language_model")
    settings = Settings(raw_dir=str(root / "raw"), frames=checkpoints.FRAMES)
    (root / "shards").mkdir()
    report = pack_shard(samples, settings, root / "packed/train/000000")
    manifest = make_manifest({("train", "000000"): report}, len(samples), checkpoints.FRAMES)
    publish(manifest, root / "packed", root / "shards")
    section = params.read(params.ROOT / "params.yaml", "tokens").tokens
    build(section, root / "shards", root / "language_model", root / "tokens")
    return TokenizedShards(root / "shards", root / "tokens", "train"), load_tokenizer(root / "language_model")


def measured(data, model, **changes):
    dataset, tokenizer = data
    collate = Collator.for_model(model.config, loss="answer_only", image_replication=checkpoints.STILL_FRAMES)
    chosen = {name: numbers.tolist() for name, numbers in dataset.tasks().items()}
    settings = SimpleNamespace(**(vars(SETTINGS) | changes))
    return multiple_choice.measure(model, tokenizer, collate, dataset, chosen, settings, PREFETCH)


@pytest.mark.parametrize("layout", ["question_first", "vision_first"])
def test_scores_are_those_of_each_option_alone(data, layout):
    dataset, tokenizer = data
    model = checkpoints.make_lively_model(layout=layout)
    collate = Collator.for_model(model.config, loss="answer_only", image_replication=checkpoints.STILL_FRAMES)
    table = measured(data, model)
    asked = {question.number: question for question in multiple_choice.questions(dataset, tokenizer, range(4))}
    assert len(table) == len(asked) == 3
    for number, question in asked.items():
        item = dataset[number]
        row = table[(table["key"] == item["key"]) & (table["item"] == item["item"])].iloc[0]
        assert (row["num_options"], row["correct"]) == (len(question.options), question.correct)
        for name, answers, mean in (("letter", question.letters, False), ("likelihood", question.texts, True)):
            for blind in (False, True):
                alone = [log_prob(model, collate, item, ids, blind) for ids in answers]
                alone = np.array(alone) / ([len(ids) for ids in answers] if mean else 1)
                prefix = "blind_" if blind else ""
                assert row[f"{prefix}{name}_scores"] == pytest.approx(alone, abs=1e-5)
                assert row[f"{prefix}chosen_{name}"] == alone.argmax()
        generated = answer_batch(model, tokenizer, collate, [item], longest(asked))[0]
        assert row["answer"] == generated
    assert table["answer"].nunique() == 3
    assert not np.allclose(table["letter_scores"][0], table["blind_letter_scores"][0], atol=1e-4)


def log_prob(model, collate, item, ids, blind):
    """The log-probability of an answer by the whole network's own loss, that answer alone."""
    start, _ = answer_span(item)
    answer = [False] * start + [True] * len(ids)
    one = item | {"input_ids": [*item["input_ids"][:start], *ids], "answer_mask": answer, "score_mask": answer}
    batch = collate([one]).to("cpu")
    inputs = batch.inputs() | {"pixel_values": batch.pixel_values * (0 if blind else 1)}
    with torch.inference_mode():
        output = model(**inputs, labels=batch.labels, mode="autoregressive")
    return -output.token_loss.double().sum().item()


def longest(asked):
    return max(SETTINGS.max_answer_tokens, *(len(ids) + 1 for question in asked.values() for ids in question.texts))


def test_frames_are_encoded_once_for_all_options(data, monkeypatch):
    model, calls = checkpoints.make_lively_model(), []
    encode = model.encode_frames
    monkeypatch.setattr(model, "encode_frames", lambda *args, **options: calls.append(1) or encode(*args, **options))
    measured(data, model, batch_size=3)
    assert len(calls) == 2  # of the frames and of the grey ones


def test_scores_do_not_depend_on_the_batch(data):
    model = checkpoints.make_lively_model()
    one, all_at_once = measured(data, model, batch_size=1), measured(data, model, batch_size=3)
    for name in ("letter_scores", "likelihood_scores", "blind_letter_scores"):
        for left, right in zip(one[name], all_at_once[name], strict=True):
            assert left == pytest.approx(right, abs=1e-5)
    assert one["answer"].tolist() == all_at_once["answer"].tolist()


def test_a_model_that_knows_nothing_gives_every_token_the_same_share(data):
    """One token for a letter, the mean of its tokens for a text: the end-of-turn token does not count."""
    model = checkpoints.make_lively_model()
    model.language_model.model.norm.weight.data.zero_()
    table = measured(data, model)
    for row in table.itertuples():
        assert row.letter_scores == pytest.approx([-math.log(checkpoints.VOCABULARY)] * row.num_options, abs=1e-5)
        assert row.likelihood_scores == pytest.approx([-math.log(checkpoints.VOCABULARY)] * row.num_options, abs=1e-5)


def test_items_without_options_are_not_asked(data):
    dataset, tokenizer = data
    plain = [n for n in range(len(dataset)) if dataset.rows[n]["task"] != "choice"]
    assert len(plain) == 1
    assert multiple_choice.questions(dataset, tokenizer, plain) == []
    collate = Collator.for_model(tiny.make_model().config, loss="answer_only", image_replication=1)
    assert multiple_choice.measure(None, tokenizer, collate, dataset, {"x": plain}, SETTINGS, PREFETCH) is None


def test_tokens_of_another_rendering_are_refused(data, monkeypatch):
    dataset, tokenizer = data
    monkeypatch.setattr(multiple_choice.choices, "LETTERS", "BCDEFGH")
    with pytest.raises(UserError, match="Run `dvc repro tokens`"):
        multiple_choice.questions(dataset, tokenizer, range(len(dataset)))


@pytest.mark.parametrize("name", FORMATS)
def test_answer_ids_are_those_of_the_whole_chat(tmp_path, name):
    tokenizer = load_tokenizer(save_format(tmp_path, name))
    chat = [{"role": "user", "content": "Which digits does red show?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    for answer in ("A", "top left", "314 red"):
        whole = tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": answer}])["input_ids"]
        ids = answer_ids(tokenizer, prompt, answer, "here")
        assert whole[: len(prompt) + len(ids) + 1] == [*prompt, *ids, tokenizer.eos_token_id]


def test_answers_that_do_not_fit_are_named(tmp_path):
    tokenizer = load_tokenizer(save_format(tmp_path, "chatml"))
    with pytest.raises(UserError, match="here: the tokenizer merges the answer ''"):
        answer_ids(tokenizer, [1, 5], "", "here")
    config = SimpleNamespace(text_config=SimpleNamespace(max_position_embeddings=10))
    check_answer_fits(config, "here", 7, 3)
    with pytest.raises(UserError, match=r"here: .*.7 tokens. .*.4. exceed .* 10 tokens"):
        check_answer_fits(config, "here", 7, 4)


# ---------------------------------------------------------------- what an answer chooses


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", 1),
        ("B.", 1),
        ("a cat", 1),
        ("A cat.", 1),
        ("b. A cat", 1),
        ("A", 0),
        ("a", -1),
        ("D", -1),
        ("It is a cat", -1),
        ("", -1),
        ("C", 2),
        ("b", 2),  # the third option's text is B: its letter C chooses it, and so does its text in lower case
    ],
)
def test_generated_answers_choose_by_letter_or_text(answer, expected):
    assert multiple_choice.option_of(answer, ("a dog", "A cat.", "B")) == expected


def test_of_equal_texts_the_first_is_chosen():
    assert multiple_choice.option_of("red", ("blue", "red", "Red")) == 1


# ---------------------------------------------------------------- summaries


def table_of(chosen, blind, correct, num_options=4, source="s", task="f"):
    keys = [f"k{number}" for number in range(len(correct))]
    rows = {"key": keys, "source": source, "task": task, "num_options": num_options, "correct": correct}
    for name in multiple_choice.SCORINGS:
        rows |= {f"chosen_{name}": chosen, f"blind_chosen_{name}": blind}
    return pd.DataFrame(rows)


def test_summary_has_chance_blind_and_paired_gain():
    correct = [0, 1, 2, 3] * 50
    table = table_of(correct, [0] * 200, correct)
    found = multiple_choice.summarise(table, 200, 1)["s/f"]
    score = found.scorings["letter"]
    assert (found.num_items, found.chance) == (200, 0.25)
    assert (score.accuracy, score.interval) == (1, (1, 1))
    assert (score.blind, score.gain) == (0.25, 0.75)
    assert score.blind_interval == pytest.approx((0.19, 0.31), abs=0.02)
    assert score.gain_interval == pytest.approx((1 - score.blind_interval[1], 1 - score.blind_interval[0]))


def test_chance_is_averaged_over_items_of_several_lengths():
    tables = [
        table_of([0, 0], [0, 0], [0, 1], num_options=2, task="two"),
        table_of([0], [0], [0], num_options=5, task="five"),
    ]
    found = multiple_choice.summarise(pd.concat(tables), 20, 1)
    assert set(found) == {"all", "s/two", "s/five"}
    assert found["all"].chance == pytest.approx((0.5 + 0.5 + 0.2) / 3)
    assert found["all"].scorings["letter"].accuracy == pytest.approx(2 / 3)


def test_position_bias_is_how_far_the_choices_are_from_the_right_letters():
    correct = [0, 1, 2, 3]
    assert multiple_choice.position_bias(correct, correct) == 0
    assert multiple_choice.position_bias([3, 2, 1, 0], correct) == 0  # all wrong, but without preference
    assert multiple_choice.position_bias([0, 0, 0, 0], correct) == 0.75
    assert multiple_choice.position_bias([-1, -1], [0, 1]) is None
    found = multiple_choice.summarise(table_of([0, 0, 0, -1], [0] * 4, correct), 20, 1)["all"]
    assert found.letters["generation"] == {"A": 0.75, "B": 0, "C": 0, "D": 0}
    assert found.letters["correct"] == {"A": 0.25, "B": 0.25, "C": 0.25, "D": 0.25}
    assert (found.no_option, found.blind_no_option) == (0.25, 0)
    assert found.position_bias["generation"] == pytest.approx(2 / 3)  # among the three that choose: A, A, A for A, B, C
