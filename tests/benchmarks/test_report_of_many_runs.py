"""The benchmark of the report, on a few runs."""

import json
import shutil
import sys

import pytest

from benchmarks import report as benchmark
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.params import ROOT
from tests.pipeline_steps.reported import write_root


@pytest.mark.slow  # a page of 31 runs, in a process of its own
def test_synthetic_runs_have_different_losses_and_are_all_reported(tmp_path):
    write_root(tmp_path / "run")
    shutil.copy(ROOT / "params.yaml", tmp_path / "run/params.yaml")
    num_bytes = benchmark.write_runs(tmp_path / "run", tmp_path / "runs", 31)
    files = sorted((tmp_path / "runs/reports/runs").iterdir())
    assert [path.stem for path in files if path.stem.endswith("seed1")] == [
        *("A6-seed1", "B1-seed1", "X003-seed1", "none-seed1"),
    ]
    assert num_bytes == sum(path.stat().st_size for path in files)
    kept = [json.loads(path.read_text()) for path in files]
    losses = [run["mean"]["fine"]["loss"] for run in kept]
    assert len(set(losses)) == 31
    sums = [sum(sum(items["loss_sum"]) for items in run["items"].values()) for run in kept]
    assert sums == pytest.approx([sums[0] * loss / losses[0] for loss in losses], rel=1e-5)
    seconds, memory, page = benchmark.measure(tmp_path / "runs")
    assert seconds > 0
    assert memory > 0
    assert page > 100_000
    table = (tmp_path / "runs/reports/tables/ablations_iso_sample.md").read_text()
    assert [line.split(" | ")[0] for line in table.split("\n") if line.startswith("| ")][2:] == [
        "| A6",
        "| B1",
        "| X003",
    ]


def test_a_missing_finished_run_is_an_error(tmp_path, monkeypatch):
    shutil.copyfile(ROOT / "params.yaml", tmp_path / "params.yaml")
    monkeypatch.setattr(sys, "argv", ["report", "--root", str(tmp_path)])
    with pytest.raises(UserError, match="run `dvc repro evaluation` first"):
        benchmark.main()
