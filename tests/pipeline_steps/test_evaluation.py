"""Statistics and gaze geometry with known answers, and a whole scoring pass of a small network."""

import json
import types

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from tqdm import tqdm
from transformers import Dinov2Config, LlamaConfig

from model import FoveatedVLMConfig, FoveatedVLMForConditionalGeneration
from pipeline_steps.common import metrics, modes, sidecar
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.schemas import PackedSample
from pipeline_steps.evaluation import __main__ as evaluation
from pipeline_steps.evaluation import scoring, statistics, subset_evals, temperature_sweep
from pipeline_steps.inference import gaze
from pipeline_steps.inference.answers import answer_span, up_to_answer
from pipeline_steps.streaming import index, targets
from pipeline_steps.streaming.collate import Collator

GRID = 4
PREFETCH = {"num_workers": 0, "limit": 1, "size_of": lambda job: 1}


# ---------------------------------------------------------------- statistics


def test_every_scored_token_weighs_the_same():
    score = statistics.score(np.array([1.0, 6.0]), np.array([1, 0]), np.array([1, 3]), 50, 1)
    assert score.loss == pytest.approx(7 / 4)
    assert score.accuracy == pytest.approx(1 / 4)
    assert (score.num_items, score.num_tokens) == (2, 4)


def test_interval_of_a_mean_is_that_of_the_normal_law():
    rng = np.random.default_rng(0)
    hits = rng.binomial(1, 0.7, 2000)
    low, high = statistics.ratio_interval(hits, np.ones(2000), 2000, 1)
    error = 1.96 * (hits.mean() * (1 - hits.mean()) / 2000) ** 0.5
    assert (low, high) == pytest.approx((hits.mean() - error, hits.mean() + error), abs=0.003)
    assert statistics.ratio_interval(hits, np.ones(2000), 2000, 1) == (low, high)


def test_questions_of_one_clip_are_resampled_together():
    """Four equal questions per clip are no more evidence than one: the interval stays as wide."""
    hits = np.random.default_rng(0).integers(0, 2, 100).astype(float)
    one = statistics.ratio_interval(hits, np.ones(100), 500, 1)
    clips = np.repeat([f"clip{n}" for n in range(100)], 4)
    four = statistics.ratio_interval(hits.repeat(4), np.ones(400), 500, 1, clips=clips)
    assert four == pytest.approx(one)
    alone = statistics.ratio_interval(hits.repeat(4), np.ones(400), 500, 1)
    assert alone[1] - alone[0] < 0.6 * (one[1] - one[0])


def test_gap_is_paired():
    fine = np.random.default_rng(0).uniform(0.1, 5, 200)
    gap = statistics.gap(1.1 * fine, fine, 500, 1)
    assert gap.loss_ratio == pytest.approx(1.1)
    assert gap.interval == pytest.approx((1.1, 1.1))  # unpaired resampling would spread it


def test_chance_is_the_most_frequent_token_of_each_position():
    guesses = statistics.most_frequent_tokens({(1, 7): 2, (1, 8): 1, (2, 9): 1, (2, 5): 1})
    assert guesses == {1: 7, 2: 5}
    assert statistics.chance_accuracy(guesses, {(1, 7): 1, (1, 8): 1, (2, 5): 1, (3, 7): 1}) == pytest.approx(0.5)


# ---------------------------------------------------------------- gaze


def peak_at(*patches):
    """Weights [1 layer, T, 2 heads, 1 query, 1 + 16] whose strongest patch is given per frame; the class token gets
    most."""
    weights = np.full((1, len(patches), 2, 1, 1 + GRID * GRID), 0.01)
    weights[..., 0] = 0.5
    for t, patch in enumerate(patches):
        weights[0, t, :, 0, 1 + patch] = 0.3
    return weights


def truth_at(*patches):
    target = np.zeros((len(patches), GRID * GRID), bool)
    target[np.arange(len(patches)), patches] = True
    others = target.copy()
    others[:, 15] = True
    return targets.GroundTruth(target, others, np.zeros((len(patches), 4)))


def test_boxes_fall_on_their_patches():
    assert np.flatnonzero(targets.box_patches((0.27, 0.02, 0.48, 0.23), GRID)).tolist() == [1]
    assert np.flatnonzero(targets.box_patches((0.5, 0.5, 1, 1), GRID)).tolist() == [10, 11, 14, 15]
    assert np.flatnonzero(targets.box_patches((0.2, 0.2, 0.3, 0.3), GRID)).tolist() == [
        0,
        1,
        4,
        5,
    ]  # on a corner of four
    assert not targets.box_patches((1, 0.2, 1, 0.3), GRID).any()


def test_boxes_move_with_the_centre_crop():
    assert targets.square_box((0.25, 0, 0.75, 1), 200, 100, "crop") == pytest.approx([0, 0, 1, 1])
    assert targets.square_box((0, 0.5, 0.25, 0.75), 200, 100, "crop")[2] == 0  # cut off
    assert targets.square_box((0.1, 0.2, 0.3, 0.4), 112, 112, "crop") == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert targets.square_box((0, 0, 1, 1), 200, 100, "letterbox") == pytest.approx([0, 0.25, 1, 0.75])
    assert targets.square_box((0, 0.5, 0.25, 0.75), 200, 100, "letterbox") == pytest.approx([0, 0.5, 0.25, 0.625])
    assert targets.square_box((0, 0.5, 1, 1), 100, 200, "letterbox") == pytest.approx([0.25, 0.5, 0.75, 1])


def test_frames_keep_their_source():
    assert [targets.source_frame(t, 6, 6) for t in range(6)] == list(range(6))
    assert [targets.source_frame(t, 3, 6) for t in range(3)] == [1, 3, 5]


def test_peak_on_and_off_the_target():
    maps = gaze.attention_maps(peak_at(0, 3, 5, 15))
    assert maps.sum(-1) == pytest.approx(np.ones((1, 4)))  # without the class token
    seen = gaze.summary(maps, truth_at(0, 3, 6, 6))
    assert (seen["gaze_frames"], seen["peak_on_target"], seen["peak_on_any_object"]) == (3, 1, 2)  # frame 0 is left out
    assert seen["per_frame"] == [1, 1, 0, 0]
    assert seen["chance"] == pytest.approx(3 / 16)
    assert seen["chance_among_objects"] == pytest.approx(3 / 2)
    assert seen["mass_on_target"] == pytest.approx(0.3 / 0.45 + 2 * 0.01 / 0.45)


def test_aggregate_weighs_frames():
    rows = [
        gaze.summary(gaze.attention_maps(peak_at(0, *hit)), truth_at(0, *[3] * len(hit))) for hit in ((3, 3, 3), (5,))
    ]
    result = gaze.aggregate(pd.DataFrame(rows).assign(key=["a", "b"]), lambda top, bottom, clips: (0.0, 1.0))
    assert result.peak_on_target == pytest.approx(3 / 4)
    assert result.per_frame == [1.0, 0.5, 1.0, 1.0]
    assert gaze.aggregate(pd.DataFrame(rows).assign(gaze_frames=0), None) is None


# ---------------------------------------------------------------- scoring


class Data:
    """Six items of two tasks and one text-only item, in memory, with the interface of `TokenizedShards`."""

    tokens_dir, split = "data/tokens", "test"

    def __init__(self, numbers=range(7)):
        rows = [dict.fromkeys(sidecar.SCHEMA.names) | {"truncated_turns": 0} | self.row(number) for number in numbers]
        table = pa.RecordBatch.from_pylist(rows, schema=sidecar.SCHEMA)
        self.rows, self.index = index.Rows([table]), index.build([table])
        self.scored = index.has_true(table.column("score_mask"))
        self.scored_tokens = lambda: [index.scored_tokens(table)]

    def __len__(self):
        return len(self.rows)

    def tasks(self):
        return self.index.numbers_by(self.index.task, self.index.tasks)

    def row(self, number):
        text = number == 6
        ids = [1, 20 + number, 21, 2, 1, 30, 31, 32, 2]
        return {
            "key": f"k{number}",
            "item": 0,
            "source": "test",
            "task": "text" if text else ("card", "gist")[number % 2],
            "kind": "text" if text else "video",
            "num_frames": 0 if text else 2 + number % 3,
            "frame_times": [] if text else [0.5 * frame for frame in range(2 + number % 3)],
            "input_ids": ids,
            "visual_position": 3,
            "answer_mask": [False] * 5 + [True] * 4,
            "score_mask": [False] * 6 + [True] * 2 + [False],
        }

    resize_mode = "crop"

    def __getitem__(self, number):
        row = self.rows[number]
        frames = np.random.default_rng(number).integers(0, 255, (row["num_frames"], 56, 56, 3)).astype(np.uint8)
        return {**row, "frames": frames}

    def sample(self, number):
        key = self.rows[number]["key"]
        frames = self.rows[number]["num_frames"]
        card = number % 2 == 0 and number < 6
        entry = {
            "colour": "red",
            "place": "top left",
            "digits": [1] * frames,
            "boxes": [[0.02, 0.02, 0.23, 0.23]] * frames,
        }
        return PackedSample(
            key=key,
            source="test",
            split="test",
            video_id=key,
            path=None if number == 6 else "x",
            kind=self.rows[number]["kind"],
            sha256=None if number == 6 else "x",
            items=[{"assistant": "a", "task": "card", "target": 0 if card else None}],
            objects=[entry] if card else None,
            frame_count=frames,
            duration=frames / 2,
            timestamps=[0.0] * frames,
            width=112,
            height=112,
        )


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    vision = Dinov2Config(image_size=56, patch_size=14, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )
    config = FoveatedVLMConfig(vision, text, query_dim=16, visual_scale=0.5, visual_token_id=64)
    return FoveatedVLMForConditionalGeneration(config).eval()


def score(network, batch_size):
    data = Data()
    collate = Collator.for_model(network.config, loss="answer_only", image_replication=1)
    chosen = scoring.choose_items(data, 100, 1)
    with tqdm(disable=True) as progress:
        table = scoring.score_items(
            network, collate, data, chosen, batch_size=batch_size, seed=1, prefetch=PREFETCH, progress=progress
        )
    return data, chosen, table


def test_scores_cover_all_modes_and_do_not_depend_on_the_batch(network):
    _, chosen, table = score(network, 4)
    assert chosen == {"card": [0, 2, 4], "gist": [1, 3, 5], "text": [6]}
    counts = table.groupby(["task", "mode"]).size().to_dict()
    assert counts == {
        **{(task, mode): 3 for task in ("card", "gist") for mode in modes.SCORED_MODES},
        ("text", "text"): 1,
    }
    assert set(table["num_tokens"]) == {2}
    single = score(network, 1)[2]
    fixed = table["mode"] != "random_query"  # its queries are drawn batch by batch
    assert table["loss_sum"][fixed].to_numpy() == pytest.approx(single["loss_sum"][fixed].to_numpy(), abs=1e-4)
    assert table.equals(score(network, 4)[2])


def test_scored_loss_is_the_networks_own(network):
    data, _, table = score(network, 4)
    collate = Collator.for_model(network.config, loss="answer_only", image_replication=1)
    batch = collate([data[0]])
    with torch.no_grad():
        logits = network(**batch.inputs(), mode="fine", options={"return_logits": True}).logits
    scored = batch.score_mask[0, 1:]
    losses = torch.nn.functional.cross_entropy(logits[0, :-1][scored], batch.input_ids[0, 1:][scored], reduction="sum")
    row = table[(table["key"] == "k0") & (table["mode"] == "fine")].iloc[0]
    assert row["loss_sum"] == pytest.approx(losses.item(), abs=1e-4)


def test_controls_differ_and_gaze_is_measured_where_the_truth_is(network):
    table = score(network, 4)[2]
    losses = table[table["task"] == "card"].groupby("mode")["loss_sum"].sum()
    assert losses["blind"] != losses["autoregressive"] != losses["random_query"]
    measured = table[table["gaze_frames"] > 0]
    assert set(measured["task"]) == {"card"}
    assert set(measured["mode"]) == set(modes.GAZE_MODES)
    assert measured["gaze_frames"].tolist() == [n - 1 for n in measured["num_frames"]]


def test_result_is_valid_and_deterministic(network, tmp_path):
    data, chosen, table = score(network, 4)
    settings = types.SimpleNamespace(bootstrap_samples=50, seed=1)
    chance = evaluation.chance(Data(range(5)), data, chosen)
    assert chance == {"card": 1.0, "gist": 1.0, "text": None}
    assert evaluation.chance(Data(range(5)), data, {"card_new": chosen["card"]}) == {"card_new": 1.0}
    answers = [
        {"task": "card", "generated": "a", "expected": "a"},
        {"task": "card", "generated": "b", "expected": "a"},
    ]
    result = evaluation.summarise(table, answers, chance, settings, {"seed": 1})
    assert result.generation["card"].exact_match == 0.5
    assert result.text.num_items == 1
    assert set(result.gaze) == {"card"}
    for name in ("a", "b"):
        metrics.write_json(tmp_path / f"{name}.json", result)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    metrics.read_json(tmp_path / "a.json", metrics.EvaluationResult, "evaluation")


def test_a_part_of_the_items_is_measured_further(network, tmp_path):
    data, chosen, table = score(network, 4)
    limits = {
        "max_control_items_per_task": 2,
        "max_temporal_clips_per_task": 2,
        "max_diagnostic_clips": 3,
        "max_items_per_task": 100,
    }
    settings = types.SimpleNamespace(bootstrap_samples=50, seed=1, batch_size=2, **limits)
    collate = Collator.for_model(network.config, loss="answer_only", image_replication=1)
    parts = subset_evals.choose(data, chosen, settings)
    with tqdm(disable=True) as progress:
        more = subset_evals.measure(network, collate, data, chosen, settings, PREFETCH, progress)
    table = pd.concat([table, more.controls], ignore_index=True)
    (tmp_path / "stage2.csv").write_text("event,token_similarity\ndiagnostics,0.5\n")
    checks = subset_evals.diagnose(network, more.observed, table, tmp_path)
    result = evaluation.summarise(table, [], {}, settings, {}, views=more.views, diagnostics=checks)
    counts = [{name: len(numbers) for name, numbers in part.items()} for part in parts]
    assert counts == [{"card": 2, "gist": 2}] * 2 + [{"card": 2, "gist": 1}]
    assert {name: effect.num_items for name, effect in result.controls["gist"].items()} == {
        "blind": 3,
        "random_query": 3,
        "static_query": 2,
        "shuffled_frames": 2,
        "first_frame": 2,
    }
    assert set(result.controls["card"]) - set(result.controls["gist"]) == {"oracle_query"}
    assert result.gaze["card"]["oracle_query"].peak_on_target == 1
    assert np.shape(result.gaze["card"]["autoregressive"].per_head) == (2, 2)
    assert result.diagnostics.checks["path_agreement"].verdict == "ok"
    assert result.diagnostics.checks["collapse_in_training"].value == 0.5
    assert [score.factor for score in more.temperatures] == list(temperature_sweep.FACTORS)
    assert result.temporal["card"]["second_half"].num_items == 2
    assert result.sources["test"]["card"] == result.tasks["card"]
    assert result.sources["test"]["text"]["text"] == result.text
    assert set(result.mean) == {*modes.SCORED_MODES, "static_query", "shuffled_frames", "first_frame"}
    metrics.write_json(tmp_path / "a.json", result)
    metrics.read_json(tmp_path / "a.json", metrics.EvaluationResult, "evaluation")


@pytest.mark.parametrize(("limit", "counts"), [(1, [1, 0]), (3, [2, 1]), (4, [2, 2]), (20, [3, 3])])
def test_the_limit_of_diagnostic_clips_is_that_of_all_tasks(network, limit, counts):
    data, chosen, _ = score(network, 4)
    limits = {"max_control_items_per_task": 2, "max_temporal_clips_per_task": 2, "max_diagnostic_clips": limit}
    probed = subset_evals.choose(data, chosen, types.SimpleNamespace(seed=1, **limits))[2]
    assert [len(numbers) for numbers in probed.values()] == counts


def test_nothing_further_is_measured_where_nothing_is_asked_for(network):
    data, chosen, _ = score(network, 4)
    limits = ("max_control_items_per_task", "max_temporal_clips_per_task", "max_diagnostic_clips")
    settings = types.SimpleNamespace(seed=1, batch_size=2, **dict.fromkeys(limits, 0))
    with tqdm(disable=True) as progress:
        more = subset_evals.measure(network, None, data, chosen, settings, PREFETCH, progress)
    assert (len(more.controls), more.views, more.observed, more.temperatures) == (0, None, None, [])


def test_results_of_before_say_not_measured(network, tmp_path):
    table = score(network, 4)[2]
    settings = types.SimpleNamespace(bootstrap_samples=50, seed=1)
    result = evaluation.summarise(table, [], {}, settings, {}).model_dump(mode="json")
    new = ("sources", "controls", "per_frame", "temporal", "diagnostics", "gaze_difference")
    old = {name: value for name, value in result.items() if name not in new}
    for by_mode in old["gaze"].values():
        for seen in by_mode.values():
            del seen["per_head"], seen["mass_per_head"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    read = metrics.read_json(tmp_path / "old.json", metrics.EvaluationResult, "evaluation")
    assert all(getattr(read, name) is None for name in new)
    assert read.gaze["card"]["fine"].per_head is None


def test_an_answer_beyond_the_context_is_an_error_before_scoring(network):
    data, settings = Data(), types.SimpleNamespace(caption_min_words=2, max_captions_per_task=0)
    config, tokenizer = network.config, types.SimpleNamespace(decode=lambda ids, **_: "a")
    settings.max_answers_per_task, settings.max_answer_tokens = 2, 20
    for layout, bos in (("question_first", 0), ("vision_first", 1)):
        collate = Collator.for_model(config, loss="answer_only", image_replication=1)
        collate.layout = layout
        longest = len(collate([up_to_answer(data[2])]).input_ids[0])
        assert longest == 5 + 4 + bos  # item k2 has most frames of those that are answered
        for limit, fits in ((longest + 20, True), (longest + 19, False)):
            short = types.SimpleNamespace(text_config=types.SimpleNamespace(max_position_embeddings=limit))
            check = (short, tokenizer, collate, data, scoring.choose_items(data, 100, 1), settings)
            if fits:
                evaluation.check_answers_fit(*check)
                continue
            with pytest.raises(UserError, match=r"sample 'k2', item 0: .*\(20\).*evaluation\.max_answer_tokens"):
                evaluation.check_answers_fit(*check)


@pytest.mark.parametrize("tokens_per_frame", [1, 4])
def test_prefetch_counts_all_visual_tokens(tokens_per_frame):
    seen = []
    data = types.SimpleNamespace(batch_bytes=lambda numbers, *sizes: seen.append((numbers.tolist(), *sizes)))
    collate = types.SimpleNamespace(image_replication=3, tokens_per_frame=tokens_per_frame)
    runtime = types.SimpleNamespace(num_workers=2, prefetch_megabytes=1)
    scoring.prefetch(runtime, data, collate)["size_of"](("card", [1, 2]))
    assert seen == [([1, 2], 3, tokens_per_frame)]


def test_sample_of_large_tasks_is_seeded():
    data = Data()
    assert scoring.choose_items(data, 2, 1) == scoring.choose_items(data, 2, 1)
    assert all(len(numbers) <= 2 for numbers in scoring.choose_items(data, 2, 1).values())


def test_nothing_to_score_is_a_user_error():
    data = Data([6])
    with pytest.raises(UserError, match="0 items to score, expected at least 1"):
        scoring.choose_items(data, 2, 1)


def test_prompt_ends_where_the_last_answer_starts():
    item = {
        "input_ids": list(range(8)),
        "answer_mask": [False, True, True, False, False, True, True, True],
        "score_mask": [False] * 8,
    }
    assert answer_span(item) == (5, 8)
    assert up_to_answer(item)["input_ids"] == [0, 1, 2, 3, 4]


def test_results_keep_six_decimals_and_six_digits_but_no_noise():
    values = [123456.7891234, 0.1234567, 0.01234567, -1.2345678e-5, 3e-17, -1e-18, 0.0]
    shown = "[123456.789123, 0.123457, 0.0123457, -1.23457e-05, 0.0, 0.0, 0.0]"
    assert str(metrics.rounded(values)) == shown
    assert metrics.rounded({1: [None, True, 7]}) == {"1": [None, True, 7]}
