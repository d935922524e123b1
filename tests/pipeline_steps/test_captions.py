"""Measures of free answers with known values, and a whole measurement on a few clips."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from pipeline_steps.common import modes, params
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.schemas import SceneObject
from pipeline_steps.evaluation import __main__ as evaluation
from pipeline_steps.evaluation import caption_metrics, caption_parts, captions
from pipeline_steps.inference.answers import answer_batch, as_text, prompt_batch
from pipeline_steps.streaming.collate import Collator
from pipeline_steps.streaming.dataset import TokenizedShards
from pipeline_steps.tokens.chat import load_tokenizer
from tests import checkpoints

TEXTS = (
    "a dog runs on the wet beach",
    "a man plays a red guitar on stage",
    "two cats sleep",
    "a woman a woman cuts an onion with a knife",
)
REFERENCES = (
    "a brown dog runs along the beach",
    "a man is playing a guitar on stage",
    "two cats sleep on a sofa",
    "a woman cuts an onion with a sharp knife",
)
SETTINGS = SimpleNamespace(
    batch_size=2,
    max_answer_tokens=4,
    seed=1,
    caption_min_words=5,
    max_captions_per_task=60,
    max_temporal_clips_per_task=40,
    bootstrap_samples=20,
)
PREFETCH = {"num_workers": 0, "limit": 1, "size_of": lambda job: 1}
INTERVAL = {"num_samples": 20, "seed": 1}


def thing(colour, *digits):
    return SceneObject(colour=colour, place="top left", digits=digits, boxes=((0, 0, 1, 1),) * len(digits))


# ---------------------------------------------------------------- against the reference


def test_words_are_lower_case_without_punctuation():
    assert caption_metrics.words("A dog's 2 red-ish_balls, été!") == ["a", "dog's", "2", "red", "ish", "balls", "été"]
    assert caption_metrics.words(" ... ") == []


def test_cider_is_that_of_the_published_scorer():
    """Values of pycocoevalcap 1.2: `Cider().compute_score({i: [reference]}, {i: [text]})`."""
    published = [2.1984082794161623, 3.0357142857142856, 4.3520855036946955, 6.609800730250836]
    assert caption_metrics.cider(TEXTS, REFERENCES) == pytest.approx(published, rel=1e-12)
    texts, references = ["", "a", "b b b b b", "red 7, blue 3"], ["a", "a c d", "b b", "red 7, blue 3"]
    published = [0.0, 0.7882995574223046, 1.4340574666999675, 10.0]
    assert caption_metrics.cider(texts, references) == pytest.approx(published, rel=1e-12)


def test_cider_of_one_text_is_refused():
    with pytest.raises(ValueError, match="at least two"):
        caption_metrics.cider(["a"], ["a"])


def test_bleu_of_known_texts():
    assert caption_metrics.bleu(TEXTS, REFERENCES) == pytest.approx(0.4009033103, abs=1e-9)  # pycocoevalcap 1.2, Bleu_4
    assert caption_metrics.bleu(REFERENCES, REFERENCES) == pytest.approx(1)
    # 4 words of the reference's 5: every n-gram is right, so that the brevity penalty alone is left
    assert caption_metrics.bleu(["One two, three four."], ["one two three four five"]) == pytest.approx(
        math.exp(1 - 5 / 4)
    )


def test_meteor_of_known_texts():
    equal, stem, none = caption_metrics.meteor(["two cats sleep", "two cat sleeping", "red"], ["two cats sleep"] * 3)
    assert equal == pytest.approx(1 - 0.5 * (1 / 3) ** 3)  # one chunk of three matches
    assert stem == equal
    assert none == 0
    (half,) = caption_metrics.meteor(["a b"], ["a c"])
    precision = recall = 0.5
    assert half == pytest.approx(precision * recall / (0.9 * precision + 0.1 * recall) * (1 - 0.5))


def test_overlap_counts_words_that_are_shared():
    assert caption_metrics.overlap("red 7, blue 3", "Red 7") == pytest.approx(2 * 2 / 6)
    assert caption_metrics.overlap("a a a", "a") == pytest.approx(2 / 4)
    assert caption_metrics.overlap("a", "b") == 0
    assert caption_metrics.overlap("", "b") == 0
    assert caption_metrics.overlap("", "...") == 1


# ---------------------------------------------------------------- style


def test_style_of_known_texts():
    texts = ["a man walks in a park", "a man walks", "A man walks.", "", "dogs bark"]
    found = caption_metrics.style(texts)
    assert found.num_words == pytest.approx((6 + 3 + 3 + 0 + 2) / 5)
    assert found.empty == 0.2
    assert found.same_opening == 0.6
    assert found.same_text == 0.4
    assert found.distinct_1 == pytest.approx(len({"a", "man", "walks", "in", "park", "dogs", "bark"}) / 14)
    assert found.distinct_2 == pytest.approx(6 / 10)
    assert found.repetition == 0


def test_repetition_is_within_a_text():
    once, loop = "one two three four", "go on go on go on go on"
    assert caption_metrics.style([once, once]).repetition == 0  # said by two texts, by neither twice
    assert caption_metrics.style([loop]).repetition == pytest.approx(3 / 5)  # five phrases, two different ones
    assert caption_metrics.style([once, loop]).repetition == pytest.approx(3 / 6)


def test_style_of_silence():
    found = caption_metrics.style(["", ""])
    assert (found.empty, found.same_opening, found.same_text, found.repetition) == (1, 0, 1, 0)
    assert found.distinct_1 is found.distinct_2 is None


def test_sentences_and_their_ends():
    texts = ["A man walks. He stops!", "A 3.5 m wave", 'He said: "Go."', "", "...", "Why? (Because.)"]
    assert [caption_metrics.num_sentences(text) for text in texts] == [2, 1, 1, 0, 0, 2]
    assert [caption_metrics.ends_properly(text) for text in texts] == [True, False, True, False, False, True]
    found = caption_metrics.style(texts)
    assert found.num_sentences == 1
    assert found.proper_end == 0.5


def test_distinct_words_of_a_text_and_repeated_pairs():
    found = caption_metrics.style(["a b a b", "a c", ""])
    assert found.type_token_ratio == pytest.approx((2 / 4 + 2 / 2) / 2)
    assert found.repetition_2 == pytest.approx(1 / 4)  # pairs: a b, b a, a b; a c


def test_technical_terms_are_whole_words():
    texts = ["4K intro, 4k, 30 fps", "UHD 3840x2160 at 60fps.", "Kids fly 10k kites at 4 pm in HDMI", "1080p or 720i"]
    found = caption_metrics.style(texts)
    assert found.technical_terms == {"1080p": 1, "3840x2160": 1, "4k": 1, "60fps": 1, "720i": 1, "fps": 1, "uhd": 1}
    assert found.technical == 0.75
    assert found.technical_words == pytest.approx((3 + 3 + 0 + 2) / (5 + 4 + 9 + 3))
    of_predecessor = ["4k", "1080p", "720p", "fps", "60fps", "30fps", "hd", "uhd", "2160", "3840", "2560"]
    assert list(caption_metrics.technical([of_predecessor])["technical_terms"]) == sorted(of_predecessor)


# ---------------------------------------------------------------- what is to be seen


def test_attributes_are_colours_digits_and_their_binding():
    objects = (thing("red", 7, 8), thing("dark blue", 3))
    found = caption_metrics.attributes(objects)
    assert found == {
        "colour": {("red",), ("dark", "blue")},
        "digit": {("7",), ("8",), ("3",)},
        "bound": {("red", "7"), ("red", "8"), ("dark", "blue", "3")},
    }
    assert caption_metrics.attributes((thing("red"),)) == {"colour": {("red",)}}
    assert caption_metrics.attributes(()) == {}


def test_missed_counts_texts_that_name_nothing():
    objects = [(thing("red", 7), thing("blue", 3))] * 4 + [None]
    texts = ["red 7, blue 3", "Red 3, blue 7", "green 5", "reddish 77", "red 7"]
    found = captions.missed(texts, objects, list("abcde"), INTERVAL)
    assert {kind: value.num_items for kind, value in found.items()} == {"colour": 4, "digit": 4, "bound": 4}
    assert {kind: value.complete_miss for kind, value in found.items()} == {"colour": 0.5, "digit": 0.5, "bound": 0.75}
    assert {kind: value.named for kind, value in found.items()} == {"colour": 0.5, "digit": 0.5, "bound": 0.25}
    assert captions.missed(["red 7"], [None], ["a"], INTERVAL) == {}


# ---------------------------------------------------------------- whole measurements


def rows_of(expected, **modes):
    return [
        {"key": f"clip-{place}", "task": "caption", "expected": text}
        | {mode: texts[place] for mode, texts in modes.items()}
        for place, text in enumerate(expected)
    ]


def test_summary_sets_modes_beside_each_other():
    wrong = ["green 0"] * 4
    truth = ["red 7, blue 3", "blue 1, cyan 4", "cyan 9, red 2", "blue 5, red 6"]
    objects = [tuple(thing(part.split()[0], int(part.split()[1])) for part in text.split(", ")) for text in truth]
    rows = rows_of(truth, fine=truth, coarse=wrong, autoregressive=[*truth[:2], *wrong[2:]], blind=wrong)
    found = captions.summarise(rows, objects, 200, 1)["caption"]
    assert found.num_items == 4
    assert found.modes["fine"].cider == pytest.approx(10)
    assert found.modes["coarse"].cider == 0
    assert found.modes["autoregressive"].cider == pytest.approx(5)
    assert found.modes["autoregressive"].cider_interval[0] < 5 < found.modes["autoregressive"].cider_interval[1]
    assert found.modes["autoregressive"].missed["bound"].complete_miss == 0.5
    assert found.modes["blind"].style.same_opening == 1
    assert found.reference.same_opening == 0.25
    assert (found.overlap_fine_coarse, found.same_fine_coarse) == (0, 0)


def test_captions_of_one_clip_are_resampled_together():
    """Four equal captions per clip are no more evidence than one: the intervals stay as wide."""
    truth, wrong = ["red 7", "blue 3"] * 10, ["red 7", "green 0", "green 0", "blue 3"] * 5
    objects = [(thing(*text.split()[:1], int(text.split()[1])),) for text in truth]
    answers = dict.fromkeys(("coarse", "fine", "autoregressive", "blind"), wrong)
    one, four = (
        captions.summarise([row for row in rows_of(truth, **answers) for _ in range(count)], seen, 200, 1)["caption"]
        for count, seen in ((1, objects), (4, [own for own in objects for _ in range(4)]))
    )
    assert four.num_items == 4 * one.num_items
    for name in ("coarse", "fine"):
        assert four.modes[name].meteor_interval == pytest.approx(one.modes[name].meteor_interval)
        assert four.modes[name].missed["bound"].interval == pytest.approx(one.modes[name].missed["bound"].interval)
    assert four.overlap_interval == pytest.approx(one.overlap_interval)


def test_one_item_has_no_cider():
    texts = ["a b c d e"]
    rows = rows_of(texts, fine=texts, coarse=texts, autoregressive=texts, blind=texts)
    found = captions.summarise(rows, [None], 20, 1)["caption"]
    assert found.modes["fine"].cider is found.modes["fine"].cider_interval is None
    assert (found.modes["fine"].missed, found.same_fine_coarse) == ({}, 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return checkpoints.make(tmp_path_factory.mktemp("captions"))


def measured(made, model, **changes):
    dataset = TokenizedShards(made.shards, made.tokens, "test")
    tokenizer = load_tokenizer(made.tokenizer)
    collate = Collator.for_model(model.config, loss="answer_only", image_replication=checkpoints.STILL_FRAMES)
    chosen = {name: numbers.tolist() for name, numbers in dataset.tasks().items()}
    settings = SimpleNamespace(**(vars(SETTINGS) | changes))
    return dataset, tokenizer, collate, captions.measure(model, tokenizer, collate, dataset, chosen, settings, PREFETCH)


def test_free_answers_of_every_mode_are_those_of_the_model(made):
    model = checkpoints.make_lively_model()
    dataset, tokenizer, collate, (rows, objects) = measured(made, model)
    assert [row["task"] for row in rows] == ["caption", "image"]  # of eight tasks, those with five words or more
    numbers = {dataset.rows[number]["key"]: number for number in range(len(dataset))}
    for row, seen in zip(rows, objects, strict=True):
        item = dataset[numbers[row["key"]]]
        for mode in ("coarse", "fine", "autoregressive"):
            assert row[mode] == answer_batch(model, tokenizer, collate, [item], SETTINGS.max_answer_tokens, mode)[0]
        with torch.no_grad():
            batch = prompt_batch(collate, [item]).to("cpu")
            inputs = batch.inputs() | {"pixel_values": 0 * batch.pixel_values}
            grey = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert row["blind"] == as_text(tokenizer, grey)[0]
        assert row["expected"] == ", ".join(f"{entry.colour} {entry.digits[0]}" for entry in seen)
    assert rows[0]["blind"] != rows[0]["autoregressive"] != rows[0]["coarse"] != ""
    found = captions.summarise(rows, objects, 20, 1)
    assert set(found) == {"caption", "image"}
    assert all(set(value.modes) == set(modes.CAPTION_MODES) for value in found.values())


def test_which_answers_are_free_is_a_parameter(made):
    model = checkpoints.make_lively_model()
    tasks = [row["task"] for row in measured(made, model, caption_min_words=3)[3][0]]
    assert {"caption", "image", "ask_place", "follow"} <= set(tasks)
    assert "text" not in tasks
    assert {row["task"] for row in measured(made, model, caption_min_words=99)[3][0]} == {"caption"}
    assert measured(made, model, max_captions_per_task=0)[3] == ([], [])


# ---------------------------------------------------------------- parts of a clip


@pytest.fixture
def evaluate(made, monkeypatch, tmp_path):
    """A function of changes of the section `evaluation`: runs the stage up to where scoring begins, a RuntimeError."""

    def scored(*arguments, **options):
        raise RuntimeError("scoring begins")

    def run(**changes):
        document = yaml.safe_load((params.ROOT / "params.yaml").read_text())
        document["evaluation"] |= {"max_answers_per_task": 0, "caption_min_words": 2} | changes
        places["params"].write_text(yaml.safe_dump(document))
        evaluation.main()

    places = {"checkpoint": made.checkpoint, "shards": made.shards, "tokens": made.tokens, "outputs": tmp_path / "out"}
    places |= {"params": tmp_path / "params.yaml", "metrics": tmp_path / "metrics"}
    monkeypatch.setattr(sys, "argv", ["evaluation", *(f"--{name}={place}" for name, place in places.items())])
    monkeypatch.setattr(evaluation, "score_items", scored)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    return run


@pytest.mark.parametrize(("lacking", "names"), [(["nltk"], "nltk"), (["nltk", "sacrebleu"], "nltk and sacrebleu")])
def test_packages_that_score_captions_are_missed_before_anything_is_scored(evaluate, lacking, names, monkeypatch):
    monkeypatch.setattr(captions, "find_spec", lambda name: None if name in lacking else name)
    command = f"python -m pip install {' '.join(lacking)}"
    message = f"max_captions_per_task is 60, .* without {names}. Run `{command}`, or set it to 0"
    with pytest.raises(UserError, match=message):
        evaluate()
    with pytest.raises(RuntimeError, match="scoring begins"):
        evaluate(max_captions_per_task=0)


def test_what_scores_next_frames_is_missed_before_anything_is_scored(evaluate, monkeypatch):
    def load_predictor(checkpoint, model):
        raise UserError("needs the package diffusers")

    monkeypatch.setattr(evaluation.next_frame, "load_predictor", load_predictor)
    with pytest.raises(UserError, match="needs the package diffusers"):
        evaluate()


def test_parts_are_of_sixteen_frames():
    assert caption_parts.places("frames_16", 16).tolist() == list(range(16))
    assert caption_parts.places("frames_16", 32).tolist() == list(range(1, 32, 2))
    assert caption_parts.places("frames_4", 16).tolist() == [2, 6, 10, 14]
    assert caption_parts.places("first_half", 32).tolist() == list(range(1, 16, 2))
    assert caption_parts.places("second_half", 16).tolist() == list(range(8, 16))


def test_overlap_of_parts_is_that_of_their_words():
    texts = {"frames_4": "a", "frames_8": "a b", "first_half": "a b c", "second_half": "d", "frames_16": "a b c d"}
    other = dict.fromkeys(texts, "a b")
    rows = [{"key": "x", "task": "caption", "expected": "a b", **texts}]
    rows += [{"key": "y", "task": "caption", "expected": "a b", **other}]
    found = caption_parts.summarise(rows, {"caption": 20, "chat": 6}, SETTINGS)
    pairs = found["caption"].pairs
    assert pairs["frames_4 / frames_16"].overlap == pytest.approx((2 / 5 + 1) / 2)
    assert pairs["frames_8 / frames_16"].overlap == pytest.approx((4 / 6 + 1) / 2)
    assert pairs["first_half / second_half"].overlap == pytest.approx((0 + 1) / 2)
    assert pairs["frames_4 / frames_8"].same == 0.5
    assert pairs["frames_4 / frames_16"].interval[0] >= 2 / 5 - 1e-9
    assert found["caption"].reference["first_half"] == pytest.approx((4 / 5 + 1) / 2)
    assert found["caption"].other_clip == pytest.approx(4 / 6)
    assert (found["caption"].num_items, found["caption"].reason) == (2, None)
    assert found["chat"].reason == "the longest clip has 6 frames, 16 are needed"
    assert (found["chat"].num_items, found["chat"].longest, found["chat"].pairs) == (0, 6, {})


def test_items_of_the_same_clip_are_no_other_clip():
    row = {"key": "x", "task": "caption", "expected": "a"} | dict.fromkeys(caption_parts.PARTS, "a")
    assert caption_parts.summary([row, row], 16, INTERVAL).other_clip is None


class LongClips:
    """`TokenizedShards` whose clips have NUM frames: the packed ones, backwards and again."""

    NUM = 20

    def __init__(self, dataset):
        self.dataset, self.rows = dataset, dataset.rows
        num_frames = np.full(len(dataset), self.NUM)
        self.index = SimpleNamespace(kind=dataset.index.kind, num_frames=num_frames)

    def __getitem__(self, number):
        item = self.dataset[number]
        order = (len(item["frames"]) - 1 - np.arange(self.NUM)) % len(item["frames"])
        times = np.arange(self.NUM, dtype=np.float32) / 2
        return item | {"frames": item["frames"][order], "frame_times": times, "num_frames": self.NUM}


def parts_measured(made, model, wrap=lambda dataset: dataset, **changes):
    dataset = wrap(TokenizedShards(made.shards, made.tokens, "test"))
    tokenizer = load_tokenizer(made.tokenizer)
    collate = Collator.for_model(model.config, loss="answer_only", image_replication=checkpoints.STILL_FRAMES)
    numbers = [number for number, row in enumerate(dataset.rows) if row["task"] in ("caption", "image")]
    settings = SimpleNamespace(**(vars(SETTINGS) | changes))
    chosen = {dataset.rows[number]["task"]: [number] for number in numbers}
    rows, lengths = caption_parts.measure(model, tokenizer, collate, dataset, chosen, settings, PREFETCH)
    return dataset, tokenizer, collate, chosen, rows, lengths, caption_parts.summarise(rows, lengths, settings)


def test_short_clips_have_no_parts_and_a_reason(made):
    *_, rows, lengths, found = parts_measured(made, checkpoints.make_lively_model())
    assert (rows, lengths) == ([], {"caption": 4})  # a still is no clip
    assert found["caption"].reason == "the longest clip has 4 frames, 16 are needed"


def check_targets_reach_the_network(made, item, tokenizer):
    """Of a network with the query source oracle."""
    model, targets = checkpoints.make_lively_model(query_source="oracle"), []
    item = item | {"target_patches": np.eye(LongClips.NUM, 16, dtype=bool)}
    encode_frames = model.encode_frames

    def noted(*arguments, options=None, **inputs):
        targets.append(options.target_patches)
        return encode_frames(*arguments, options=options, **inputs)

    model.encode_frames = noted
    collate = Collator.for_model(model.config, loss="answer_only", image_replication=1)
    caption_parts.texts_of(model, tokenizer, collate, "caption", [item], "frames_8", SETTINGS)
    shown = caption_parts.places("frames_8", LongClips.NUM)
    assert [own.tolist() for own in targets] == [item["target_patches"][shown].tolist()]


def test_answers_to_parts_are_those_of_the_model(made):
    model = checkpoints.make_lively_model()
    dataset, tokenizer, collate, chosen, rows, lengths, found = parts_measured(made, model, LongClips)
    assert lengths == {"caption": LongClips.NUM}
    (row,) = rows
    item = dataset[chosen["caption"][0]]
    for part in caption_parts.PARTS:
        places = caption_parts.places(part, LongClips.NUM)
        shown = item | {name: item[name][places] for name in ("frames", "frame_times")} | {"num_frames": len(places)}
        assert row[part] == answer_batch(model, tokenizer, collate, [shown], SETTINGS.max_answer_tokens)[0], part
    assert len({row[part] for part in caption_parts.PARTS}) > 1
    check_targets_reach_the_network(made, item, tokenizer)
    assert found["caption"].num_items == 1
    *_, nothing = parts_measured(made, model, LongClips, max_temporal_clips_per_task=0)
    assert nothing["caption"].reason == "evaluation.max_temporal_clips_per_task is 0"
