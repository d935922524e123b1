"""Time and memory of building the report from the result files of many runs.

    python -m benchmarks.report                        1000 runs, from the results of this checkout
    python -m benchmarks.report --root ELSEWHERE --num-runs 5000

The runs are copies of the finished run under `--root` (evaluation.json and items.parquet), with losses scaled by a
factor per ablation and seed: none, A6, B1 and synthetic ablations, ten seeds each. They are written to a temporary
folder (not timed); then `python -m pipeline_steps.report` runs on it. Prints seconds, memory, and the sizes of input
and output. Cost: a minute for 1000 runs, 300 kB of disk each.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline_steps.common.errors import UserError, run_main
from pipeline_steps.common.files import write_json
from pipeline_steps.common.params import ROOT

NUM_SEEDS = 10
COMPARED = ("none", "A6", "B1")  # ablations that the verdicts compare
LINKED = ("data", "outputs", "reports/metrics", "reports/heatmaps", "params.yaml")


def main():
    arguments = read_arguments()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        num_bytes = write_runs(arguments.root.resolve(), root, arguments.num_runs)
        seconds, memory, page = measure(root)
    print(
        f"{arguments.num_runs:,} runs, {num_bytes / 1e6:.0f} MB of result files: {seconds:.1f} s, "
        f"{memory:.2f} GB of memory, a page of {page / 1e6:.1f} MB"
    )


def read_arguments():
    parser = argparse.ArgumentParser(description="Time the report with many runs.")
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder of a finished run")
    parser.add_argument("--num-runs", type=int, default=1000)
    return parser.parse_args()


def write_runs(source, root, num_runs):
    """Links the finished run and writes `num_runs` scaled copies; returns their size in bytes."""
    found = {name: source / name for name in ("reports/metrics/evaluation.json", "outputs/evaluation/items.parquet")}
    for path in found.values():
        if not path.exists():
            raise UserError(f"{path} does not exist: run `dvc repro evaluation` first, or set --root to a finished run")
    (root / "reports").mkdir(parents=True)
    for name in LINKED:
        if (source / name).exists():
            (root / name).symlink_to(source / name)
    result, items = (json.loads(next(iter(found.values())).read_text()), pd.read_parquet(list(found.values())[1]))
    num_bytes = 0
    for number in range(num_runs):
        ablation, seed = divmod(number, NUM_SEEDS)
        name = COMPARED[ablation] if ablation < len(COMPARED) else f"X{ablation:03}"
        folder = root / f"reports/runs/{name}-seed{seed + 1}"
        folder.mkdir(parents=True)
        factor = float((1 + ablation % 7 / 5) * np.random.default_rng(number).uniform(0.95, 1.05))
        write_json(folder / "evaluation.json", scaled(result, factor))
        items.assign(loss_sum=items["loss_sum"] * factor).to_parquet(folder / "items.parquet")
        num_bytes += sum(path.stat().st_size for path in folder.iterdir())
    return num_bytes


def scaled(value, factor):
    """The result with every loss multiplied by `factor`. The checkpoint's hash is unchanged."""
    if not isinstance(value, dict):
        return value
    return {
        name: entry * factor if name == "loss" and isinstance(entry, float) else scaled(entry, factor)
        for name, entry in value.items()
    }


def measure(root):
    """(seconds, GB of memory, bytes of report.html) of one run of the report stage on `root`."""
    command = [sys.executable, "-m", "pipeline_steps.report", "--root", root, "--params", root / "params.yaml"]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise UserError(f"the report failed: {done.stderr.strip()}")
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return seconds, memory, (root / "reports/report.html").stat().st_size


if __name__ == "__main__":
    run_main(main)
