"""The benchmark of the modes, on a tiny network with few frames."""

import json
import sys

import pytest
import torch

from benchmarks import modes
from pipeline_steps.common.errors import run_main
from tests.model.tiny import MODES, make_model

FRAMES = (4, 8, 16, 32)


@pytest.fixture(scope="module")
def result():
    return modes.measure(make_model().config, FRAMES, image_size=56, device="cpu", repeats=2)


def test_memory_is_linear_in_the_frames(result):
    """B26: memory ran out from 300 frames on."""
    assert list(result) == list(MODES)
    for values in result.values():
        assert values["memory_exponent"] == pytest.approx(1.0, abs=0.1)
        assert min(values["peak_bytes"]) > 4 * 17 * 32 * 4  # at least the rows of one layer for four frames
        assert max(values["peak_bytes"]) < 8 * 2**20
        assert all(value > 0 for value in values["seconds"])
        assert values["time_exponent"] == modes.exponent(FRAMES, values["seconds"])


@torch.no_grad()
def test_autoregressive_mode_reads_every_token_once_before_the_answer():
    """What makes its time linear: no token is read again for a later frame."""
    model, read = make_model(), []
    first = model.language_model.model.layers[0]
    first.register_forward_hook(lambda module, args, output: read.append(args[0].shape[-2]))  # [.., tokens, width]
    for count in FRAMES:
        read.clear()
        model(**modes.make_sample(model.config, count, 56, "cpu"), mode="autoregressive")
        assert read == [modes.TEXT_BEFORE, *[1] * count, modes.TEXT_BEFORE + count + modes.TEXT_AFTER]


def test_exponents_of_known_growth():
    frames = (1, 2, 8, 16, 32)
    assert modes.exponent(frames, [7.0, 7.0, *(3.0 * t**2 for t in frames[2:])]) == pytest.approx(2.0)
    assert modes.exponent(frames, [5.0 * t for t in frames]) == pytest.approx(1.0)
    assert modes.exponent((1, 2, 8), [1.0, 2.0, 3.0]) is None


def test_peak_memory_is_the_maximum_not_the_sum():
    def run():
        for _ in range(5):
            torch.zeros(1000, 1000).add_(1)

    assert modes.peak_bytes(run, "cpu") == pytest.approx(4e6, rel=0.01)


def call(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["modes", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        run_main(modes.main)
    return stop.value.code or 0


def test_command_prints_a_table_and_writes_only_to_output(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    make_model().config.save_pretrained(tmp_path / "model")
    options = ("--config", "model", "--image-size", 56, "--frames", 2, 1, "--repeats", 1)
    assert call(monkeypatch, *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["frames", "1", "2", "exponent"]
    assert [line.split()[0] for line in lines[1::2]] == list(MODES)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert call(monkeypatch, *options, "--output", tmp_path / "numbers.json") == 0
    written = json.loads((tmp_path / "numbers.json").read_text())
    assert written["frames"] == [1, 2]
    assert list(written["modes"]) == sorted(MODES)


def test_the_fovea_is_compared_in_the_same_run(monkeypatch, tmp_path, capsys):
    make_model().config.save_pretrained(tmp_path / "model")
    options = ("--config", tmp_path / "model", "--image-size", 112, "--frames", 3, "--repeats", 2)
    assert call(monkeypatch, *options, "--fovea", 4, 2, "--output", tmp_path / "numbers.json") == 0
    assert capsys.readouterr().out.split()[:3] == ["full", "fovea", "ratio"]
    found = json.loads((tmp_path / "numbers.json").read_text())["modes"]
    assert list(found) == ["autoregressive", "fine"]
    for values in found.values():
        flops = values["vision_flops_per_frame"]
        assert values["vision_flops_ratio"] == pytest.approx(flops["full"] / flops["fovea"])
        assert values["vision_flops_ratio"] > 4  # 65 rows against 5 and 4
        assert all(milliseconds > 0 for milliseconds in values["milliseconds_per_frame"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--fovea", 3, 2), "--fovea 3 2: expected a factor of 2 or more by which 8 patches"),
        (("--fovea", 2, 9), "--fovea 2 9: expected"),
        (("--frames", 1, 65), "--frames goes up to 65, the network takes at most 64"),
        (("--config", "nowhere"), "nowhere/config.json does not exist"),
        (("--image-size", 100), "--image-size is 100, expected a multiple of the patch size 14"),
    ],
)
def test_invalid_arguments_are_named(monkeypatch, capsys, arguments, message):
    assert call(monkeypatch, *arguments) == 1
    assert message in capsys.readouterr().err
