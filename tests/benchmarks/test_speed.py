"""The speed figures: what is measured, and that both sides do the same work."""

import itertools
import json
import sys
from functools import partial

import pytest
import torch
import yaml

from benchmarks import speed, workload
from benchmarks.workload import MIXTURE, SCALES, clips, embedded_configs, mixture, network_config, read_scale
from model import FoveatedVLMForConditionalGeneration
from model.constants import MODES
from model.frame_step import step_obstacle
from pipeline_steps.backbones.language_model import build_language_model
from pipeline_steps.backbones.schema import Embedded
from pipeline_steps.backbones.tokenizer import train_tokenizer
from pipeline_steps.backbones.vision_encoder import build_vision_encoder
from pipeline_steps.common import params
from pipeline_steps.common.errors import run_main
from pipeline_steps.streaming.batch import Batch
from tests.model.test_published_sizes import NOMINAL

LAYOUTS = ("question_first", "vision_first")


def make_bench(rounds: int = 2, limit: float | None = None) -> speed.Bench:
    return speed.Bench("tiny", "cpu", rounds, seconds=60.0, clock=speed.Clock(limit))


# ---------------------------------------------------------------- sizes and batches


@pytest.mark.parametrize("size", SCALES)
def test_parameters_of_a_size_are_those_of_its_scale(size):
    composed = yaml.safe_load(params.compose([f"scale={SCALES[size]}"]))
    assert {name: value for name, value in read_scale(size).items() if name != "defaults"} == composed


@pytest.mark.parametrize("size", ["tiny", "small_gpu"])
def test_embedded_networks_are_those_that_the_stage_backbones_makes(size):
    embedded = read_scale(size)["backbones"]["embedded"]
    vision, text = embedded_configs(embedded)
    options = Embedded.model_validate(embedded)
    tokenizer = train_tokenizer(embedded["vocabulary_size"], embedded["max_positions"])
    made = build_vision_encoder(options).config, build_language_model(options, tokenizer).config
    ignored = {"architectures", "dtype", "eos_token_id", "pad_token_id", "bos_token_id", "initializer_range"}
    for own, expected in zip((vision, text), made, strict=True):
        pairs = own.to_dict(), expected.to_dict()
        one, other = ({name: value for name, value in pair.items() if name not in ignored} for pair in pairs)
        assert one == other


@pytest.mark.parametrize("size", SCALES)
def test_networks_have_their_nominal_sizes(size):
    config = network_config(size)
    with torch.device("meta"):
        count = FoveatedVLMForConditionalGeneration(config).num_parameters()
    nominal = NOMINAL | {"tiny": 0.5e6, "small_gpu": 20e6}
    assert count == pytest.approx(nominal[size], rel=0.2 if size in ("tiny", "small_gpu") else 0.01)
    assert config.query_update == "add"  # of the recipe


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_mixture_has_clips_of_1_to_64_frames(layout):
    config = network_config("tiny")
    config.layout = layout
    batch = mixture(config, 32)
    assert tuple(batch.num_frames.tolist()) == MIXTURE
    assert (int(batch.num_frames.sum()), min(MIXTURE), max(MIXTURE), MIXTURE.count(8)) == (581, 1, 64, 18)
    counts = batch.counts()
    assert counts["tokens"] == pytest.approx((counts["positions"] - 581) / 2, rel=0.02)
    assert all(sum(MIXTURE[at : at + 8]) > 64 for at in range(25))
    one, other = (mixture(config, 8) for _ in range(2))
    assert torch.equal(one.pixel_values, other.pixel_values)


def test_clips_have_no_padding():
    batch = clips(network_config("tiny"), 3, 5)
    assert bool(batch.attention_mask.all())
    assert batch.num_frames.tolist() == [5, 5, 5]
    assert batch.counts()["tokens"] == 3 * 16


# ---------------------------------------------------------------- measurement


def test_both_sides_of_a_step_compute_the_same():
    losses, norms = [], []
    for side in ("original", "network"):
        bench = make_bench()
        pieces = list(mixture(bench.config, 4).split(2))
        optimizer = torch.optim.AdamW(bench.network.train().parameters(), lr=1e-3, fused=True)
        forward = bench._network_loss
        if side == "original":
            pieces = [speed.pad(bench.config, **piece.inputs(), labels=piece.labels) for piece in pieces]
            forward = bench._original_loss
        both = [bench._step(optimizer, pieces, forward) for _ in range(3)]
        losses.append([loss for loss, _ in both])
        norms.append([norm for _, norm in both])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert losses[0][0] != losses[0][2]  # the weights move


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@torch.no_grad()
def test_inference_needs_no_autocast_and_both_sides_compute_the_same(precision):
    bench = make_bench()
    bench.precision = precision
    network, original = bench.cast
    assert network.dtype == original.network.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    assert bench.network.dtype == torch.float32
    assert step_obstacle(network) is None  # the fast frame step is what is measured
    batch, padded = bench._clips(2, 3)
    for mode in MODES:
        loss = float(network(**batch.inputs(), labels=batch.labels, mode=mode).loss)
        assert loss == pytest.approx(float(original(padded, mode).loss), abs=1e-4 if precision == "fp32" else 0.02)


def test_ratios_are_medians_over_alternating_rounds(monkeypatch):
    bench, called = make_bench(rounds=3), []
    wall = {"original": iter((6.0, 40.0, 4.0)), "network": iter((2.0, 10.0, 4.0))}
    monkeypatch.setattr(bench, "_seconds", lambda run: (next(wall[run()]), 1.0 if run() == "network" else 2.0))

    def side(name):
        return lambda: called.append(name) or name

    found = bench.compare(side("original"), side("network"), count=8, resident=1000)
    assert found["ratio"] == 3.0  # of 3, 4 and 1
    assert found["ratio_range"] == [1.0, 4.0]
    assert found["seconds"] == {"original": 6.0, "network": 4.0}
    assert found["per_second"] == {"original": 8 / 6, "network": 2.0}
    assert found["processor_ratio"] == 2.0
    assert found["memory_ratio"] == 1.0
    order = [name for name, _ in itertools.groupby(called[2:])]
    assert order == ["network", "original", "network", "original"]  # who begins changes from round to round


def test_memory_is_the_peak_beside_what_stays():
    bench = make_bench()
    found = bench.compare(lambda: torch.zeros(4000), lambda: torch.zeros(1000), count=1, resident=4000)
    assert found["peak_bytes"] == {"original": 20_000, "network": 8_000}
    assert found["memory_ratio"] == 0.4


@pytest.mark.slow
def test_every_figure_is_measured(monkeypatch):
    """At a size of seconds."""
    monkeypatch.setattr(workload, "MIXTURE", (2, 1))
    monkeypatch.setattr(speed, "FRAMES", (1, 2))
    monkeypatch.setattr(speed, "SAMPLES", (1,))
    saved = []
    found = speed.measure(make_bench(), speed.PARTS[:3], 4, lambda figures: saved.append(json.dumps(figures)))
    assert list(found) == ["train", "modes", "first_token"]
    assert list(found["train"]) == ["4 x 1", "1 x 4"]
    assert list(found["modes"]) == [f"{mode} B=1 T={t}" for t in (1, 2) for mode in speed.MODES]
    assert list(found["first_token"]) == ["T=2"]
    figures = [figure for own in found.values() for figure in own.values()]
    assert all(figure["rounds"] == 2 and figure["ratio"] > 0 for figure in figures)
    assert found["train"]["4 x 1"]["flops"] == found["train"]["1 x 4"]["flops"] > 0
    assert len(saved) == len(figures)
    assert json.loads(saved[-1]) == json.loads(json.dumps(found))


@pytest.mark.slow
def test_the_reference_of_compiled_figures_is_not_compiled(monkeypatch):
    monkeypatch.setattr(workload, "MIXTURE", (2, 1))
    bench, ran, by_side = make_bench(), [], {"original": 0, "network": 0}

    def backend(graph, inputs):
        return lambda *values: ran.append(graph) or graph.forward(*values)

    def counted(side, loss):
        def run(piece):
            before = len(ran)
            value = loss(piece)
            by_side[side] += len(ran) - before
            return value

        return run

    monkeypatch.setattr(bench.network, "compile_hot_paths", partial(bench.network.compile_hot_paths, backend=backend))
    monkeypatch.setattr(bench, "_original_loss", counted("original", bench._original_loss))
    monkeypatch.setattr(bench, "_network_loss", counted("network", bench._network_loss))
    found = speed.measure(bench, ("compiled",), 4, lambda figures: None)
    assert list(found["compiled"]) == ["4 x 1", "1 x 4"]
    assert by_side["original"] == 0
    assert by_side["network"] > 0


def test_a_figure_without_time_or_memory_says_so(monkeypatch):
    def no_room(*_):
        raise torch.OutOfMemoryError("tried to allocate 3 GiB\nmore")

    bench = make_bench()
    monkeypatch.setattr(bench, "train", no_room)
    found = speed.measure(bench, ("train",), 4, lambda figures: None)
    assert found["train"]["4 x 1"] == "not measured: out of memory (tried to allocate 3 GiB)"
    assert "not measured: out of memory" in speed.table("tiny", found)
    late = speed.measure(make_bench(limit=0.0), ("first_token",), 4, lambda figures: None)
    assert set(late["first_token"].values()) == {"not measured: the time limit was reached"}


def test_pinned_batches_are_the_same_batches(monkeypatch):
    bench = make_bench()
    bench.device = "cuda"
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    batch = mixture(bench.config, 2)
    assert isinstance(bench.host(batch), Batch)
    assert any(tensor is batch.pixel_values for tensor in pinned)
    padded = speed.pad(bench.config, **batch.inputs())
    assert bench.host(padded).num_before == padded.num_before
    assert any(tensor is padded.pixel_values for tensor in pinned)


def call(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["speed", *map(str, arguments)])
    threads = torch.get_num_threads()
    try:
        with pytest.raises(SystemExit) as stop:
            run_main(speed.main)
    finally:
        torch.set_num_threads(threads)
    return stop.value.code or 0


def test_command_prints_a_table_and_writes_json(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(speed, "FRAMES", (1, 2))
    path = tmp_path / "speed.json"
    assert call(monkeypatch, "--only", "first_token", "--rounds", 2, "--output", path) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split() == ["tiny", "original", "network", "ratio", "range", "processor", "memory", "ratio"]
    assert line.split()[:2] == ["first_token", "T=2"]
    written = json.loads(path.read_text())
    assert (written["torch"], written["size"], written["precision"]) == (torch.__version__, "tiny", "fp32")
    assert written["figures"]["first_token"]["T=2"]["ratio"] > 0
    assert {"device", "transformers", "commit", "dirty", "num_threads", "num_parameters"} <= set(written)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rounds", 0), "--rounds is 0, expected 1 or more"),
        (("--device", "cuda"), "--device is cuda, but torch finds"),
    ],
)
def test_wrong_arguments_are_named(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert call(monkeypatch, *arguments) == 1
    assert message in capsys.readouterr().err


def test_the_commit_is_that_of_the_repository():
    found = speed.commit()
    assert found["commit"] is None or len(found["commit"]) == 40
    assert (found["dirty"] is None) == (found["commit"] is None)
