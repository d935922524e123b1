"""Time and memory of building the report from the result files of many runs.

    python -m benchmarks.report                        1000 runs, from the results of this checkout
    python -m benchmarks.report --root ELSEWHERE --num-runs 5000

The runs are copies of the finished run under `--root` in the format of `pipeline_steps.report.keep`. Their losses are
multiplied by a factor that differs by ablation and seed: none, A6, B1 and as many invented ablations as needed, with
ten seeds each. Writing them to a temporary folder is not timed; `python -m pipeline_steps.report` on that folder is.
Prints seconds, memory, and the sizes of inputs and page. Cost: a minute for a thousand runs, 300 kB of disk per run.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pipeline_steps.common import params
from pipeline_steps.common.errors import UserError, run_main
from pipeline_steps.common.metrics import KeptRun
from pipeline_steps.common.params import ROOT
from pipeline_steps.report import keep
from pipeline_steps.report.inputs import read_inputs

NUM_SEEDS = 10
COMPARED = ("none", "A6", "B1")  # ablations that the verdicts use
LINKED = ("data", "outputs", "reports/heatmaps", "params.yaml")


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
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of a finished run")
    parser.add_argument("--num-runs", type=int, default=1000)
    return parser.parse_args()


def write_runs(source, root, num_runs):
    """Links the finished run and writes `num_runs` kept runs; returns their total size in bytes."""
    kept = keep.kept_run(read_inputs(source, params.read(source / "params.yaml", *params.RESULT_KEYS)), {})
    (root / "reports/runs").mkdir(parents=True)
    for name in LINKED:
        if (source / name).exists():
            (root / name).symlink_to(source / name)
    num_bytes = 0
    for number in range(num_runs):
        ablation, seed = divmod(number, NUM_SEEDS)
        name = COMPARED[ablation] if ablation < len(COMPARED) else f"X{ablation:03}"
        path = root / f"reports/runs/{name}-seed{seed + 1}.json"
        factor = float((1 + ablation % 7 / 5) * np.random.default_rng(number).uniform(0.95, 1.05))
        document = {**scaled(kept.model_dump(), factor), "ablation": name, "seed": seed + 1}
        path.write_text(keep.as_text(KeptRun.model_validate(document)), encoding="utf-8")
        num_bytes += path.stat().st_size
    return num_bytes


def scaled(value, factor):
    """The kept run with every loss times `factor`. The checkpoint's hash stays: it names the run that was copied."""
    if not isinstance(value, dict):
        return value
    return {
        name: [number * factor for number in entry]
        if name == "loss_sum"
        else entry * factor
        if name == "loss" and isinstance(entry, float)
        else scaled(entry, factor)
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
