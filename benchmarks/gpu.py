"""Checks and measurements on a machine with one GPU, as one JSON file.

    python -m benchmarks.gpu                              writes outputs/gpu.json
    python -m benchmarks.gpu --minutes 5 --sizes 135M tiny --output gpu.json

1. The reference of the speed figures (benchmarks/original.py) against the network, in fp32 on the GPU.
2. The tests marked `gpu` (tests/gpu, and those of the captured frame step), where pytest is installed.
3. `benchmarks.speed` for every size, in the order of --sizes, and for the first one compiled too; each in a process of
   its own that gets a share of the time that is left.

Needs torch, transformers and Pillow only; no data, no weights. Without pytest no tests run, and without pydantic,
pyarrow and simplejpeg those that train a stage are skipped, and without pandas that of the evaluation; the file says
so. For a GPU machine without a network, carry them as wheels of its version of Python:

    packages="pillow pytest pydantic pyarrow simplejpeg pandas"
    python -m pip download --only-binary=:all: --python-version 3.12 --dest wheels $packages
    python -m pip install --no-index --find-links wheels $packages    # on the GPU machine

Exit code 1 if a test, a check or a measurement failed. Without a GPU: one sentence and exit code 1.
Cost: at most 8 minutes.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from traceback import format_exc

import torch

from benchmarks.original import Original, pad
from benchmarks.speed import PARTS, about
from benchmarks.workload import SCALES, mixture, network_config
from model import FoveatedVLMForConditionalGeneration
from model.constants import MODES
from pipeline_steps.common.device import choose_device
from pipeline_steps.common.errors import UserError, run_main
from pipeline_steps.common.files import check_outputs, write_json

ROOT = Path(__file__).resolve().parent.parent
# Share of the time, most important first
SIZES = {"135M": 4.0, "small_gpu": 1.5, "1.7B": 2.5, "360M": 1.5, "tiny": 1.0}
COMPILED = 2.5
SECONDS = 1.5  # per figure, where a call is shorter
TESTS = (
    "tests/model/test_frame_step.py",  # captured graphs, before what takes long: compilation
    "tests/gpu",
    "--confcutdir=tests/gpu",
    "--override-ini=addopts=--import-mode=importlib",
    "-m",
    "gpu",
)
TESTS_SHARE = 0.25  # of the time, at most
RESERVE = 15.0  # seconds for the end
TAIL = 3000  # characters of a failed process's output
TOLERANCE = 1e-4  # of losses in fp32: GPU kernels sum in other orders


def run_process(command: list[str], seconds: float) -> tuple[int | None, str]:
    """(exit code, or None where it ran out of time and was killed with its children; output)."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **options)
    try:
        output, _ = process.communicate(timeout=max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]
    return process.returncode, output


def run_tests(seconds: float) -> dict:
    """The tests marked gpu. Only their own conftest.py is read: that of all tests needs what is missing here."""
    if find_spec("pytest") is None:
        return {"ok": True, "reasons": ["pytest is not installed"]}
    started = time.monotonic()
    code, output = run_process([sys.executable, "-m", "pytest", *TESTS, "-v", "-rs"], seconds)
    outcomes = re.findall(r"^tests/\S.* (PASSED|FAILED|ERROR|SKIPPED)\b", output, re.MULTILINE)
    counts = {name.lower(): outcomes.count(name) for name in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    result = {"ok": code == 0, "exit_code": code, "seconds": round(time.monotonic() - started, 1), **counts}
    result |= {"reasons": re.findall(r"^SKIPPED .*$", output, re.MULTILINE)}
    return result if code == 0 else result | {"output": output[-TAIL:]}


@torch.no_grad()
def check_equality(device: str) -> dict:
    """Difference of the losses of reference and network in every mode, on the embedded scale's network."""
    config = network_config("tiny")
    torch.manual_seed(0)
    network = FoveatedVLMForConditionalGeneration(config).to(device).eval()
    batch = mixture(config, 8)
    padded, own = pad(config, **batch.inputs(), labels=batch.labels).to(device), batch.to(device)
    differences = {}
    for mode in MODES:
        loss = network(**own.inputs(), labels=own.labels, mode=mode, options={"return_logits": False}).loss
        differences[mode] = abs(float(loss - Original(network)(padded, mode).loss))
    return {"ok": max(differences.values()) <= TOLERANCE, "differences": differences}


def measure_size(size: str, seconds: float, parts: tuple[str, ...], device: str, num_samples: int) -> dict:
    """What `benchmarks.speed` writes for a size within `seconds`, or what it had written when it was killed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "figures.json")
        command = [sys.executable, "-m", "benchmarks.speed", "--size", size, "--device", device, "--only", *parts]
        command += ["--limit", str(0.85 * seconds), "--num-threads", str(torch.get_num_threads())]
        command += ["--samples", str(num_samples), "--seconds", str(SECONDS)]
        code, output = run_process([*command, "--output", str(path)], seconds)
        written = json.loads(path.read_text()) if path.exists() else {}
    result = {"ok": code == 0, **written}
    if code is None:
        return result | {"error": f"killed after {seconds:.0f} s"}
    return result if code == 0 else result | {"exit_code": code, "output": output[-TAIL:]}


def run_all(
    sizes: list[str],
    minutes: float,
    output: Path,
    device: str = "cuda",
    parts: tuple[str, ...] = PARTS,
    num_samples: int = 32,
) -> bool:
    """Everything, in order; the file is written after every step. Returns whether all is well."""
    end = time.monotonic() + 60 * minutes - RESERVE
    result: dict = {**about(device), "sizes": {}}

    def left() -> float:
        return end - time.monotonic()

    try:
        result["equality"] = check_equality(device)
    except (RuntimeError, ValueError) as error:  # the rest is measured, and the file says so
        result["equality"] = {"ok": False, "error": f"{type(error).__name__}: {error}", "output": format_exc()[-TAIL:]}
    write_json(output, result)
    result["tests"] = run_tests(TESTS_SHARE * left())
    print("tests:", {name: value for name, value in result["tests"].items() if name != "output"}, flush=True)
    write_json(output, result)
    eager = tuple(part for part in parts if part != "compiled")
    jobs = [(size, size, eager, SIZES[size]) for size in sizes]
    if "compiled" in parts:
        jobs.insert(1, (f"{sizes[0]} compiled", sizes[0], ("compiled",), COMPILED))
    for number, (name, size, own, share) in enumerate(jobs):
        seconds = left() * share / sum(later[-1] for later in jobs[number:])
        found = result["sizes"][name] = measure_size(size, seconds, own, device, num_samples)
        write_json(output, result)
        print(f"{name}: {'measured' if found['ok'] else found.get('error') or found['output']}", flush=True)
    steps = [result["equality"], result["tests"], *result["sizes"].values()]
    return all(step["ok"] for step in steps)


def main() -> int:
    parser = argparse.ArgumentParser(description="Checks and measurements on a machine with one GPU.")
    parser.add_argument("--minutes", type=float, default=8.0, help="at most")
    parser.add_argument("--sizes", nargs="+", choices=tuple(SCALES), default=list(SIZES), metavar="SIZE")
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu.json"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("benchmarks.gpu needs a CUDA device and torch finds none: on a CPU run `make bench`.")
    choose_device("cuda")
    check_outputs(files=[arguments.output])
    if not run_all(arguments.sizes, arguments.minutes, arguments.output):
        print(f"error: a test, a check or a measurement failed: see {arguments.output}.", file=sys.stderr)
        return 1
    print(f"all is well: {arguments.output}")
    return 0


if __name__ == "__main__":
    run_main(main)
