"""The benchmark of the loader, on a few clips and items."""

import json
import sys

import numpy as np
import pytest

from benchmarks import loader
from pipeline_steps.common.errors import run_main
from pipeline_steps.streaming.dataset import TokenizedShards


def call(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["loader", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        run_main(loader.main)
    return stop.value.code or 0


def test_both_loaders_decode_the_same_pixels(tmp_path):
    loader.write_clips(tmp_path, 3, 2)
    dataset = TokenizedShards(tmp_path / "shards", tmp_path / "tokens", "train")
    assert len(dataset.shards) == 2
    for number in range(3):
        raw = dataset.read(number)
        assert np.array_equal(loader.decode_clip(raw.jpegs), dataset.decode_item(raw)["frames"])
    assert loader.ours(dataset, 2, loader.PixelsOnly()) == loader.raw([dataset.read(n).jpegs for n in range(3)], 2) == 3


@pytest.mark.slow  # the DataLoader's processes import torch
def test_speed_writes_rates_and_ratios(monkeypatch, tmp_path, capsys):
    options = ("--only", "speed", "--clips", 8, "--rounds", 1, "--num-workers", 1, "--folder", tmp_path)
    assert call(monkeypatch, *options, "--output", tmp_path / "numbers.json") == 0
    result = json.loads((tmp_path / "numbers.json").read_text())["speed"]
    assert set(result["samples_per_second"]) == {"raw", "raw_batches", "pixels", "normalised", "loader", "webdataset"}
    assert all(rate > 0 for rate in result["samples_per_cpu_second"].values())
    rates, ratios = result["samples_per_second"], result["ratio_per_second"]
    assert ratios["loader_to_webdataset"] == pytest.approx(rates["loader"] / rates["webdataset"])
    assert "samples per second raw" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["numbers.json"]


def test_the_index_is_measured_on_as_many_items_as_asked_for(tmp_path):
    loader.write_index(tmp_path, 2_500)
    result = loader.open_index(tmp_path)
    assert (result["items"], result["shards"]) == (2_500, 3)
    assert result["column_bytes_per_item"] <= 40
    assert result["open_seconds"] > 0
    dataset = TokenizedShards(tmp_path / "shards", tmp_path / "tokens", "train", with_frames=False)
    assert dataset.rows[2_499]["key"] == "clip-00002499"
    assert dataset.index.tasks == ("caption", "question", "chart", "chat")
