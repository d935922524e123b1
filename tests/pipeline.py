"""The whole pipeline at a size of seconds, in a folder of its own."""

import importlib
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pipeline_steps.common import params
from pipeline_steps.common.errors import run_main

ROOT = Path(__file__).resolve().parent.parent
FORKS = multiprocessing.get_context("forkserver")  # a process that has imported all, and has run nothing of it
STAGES = (
    "backbones",
    "sources",
    "shards",
    "tokens",
    "streaming",
    "stage1",
    "stage2",
    "stage3",
    "evaluation",
    "flops",
    "heatmaps",
)
IMPORTED = ("training", *(stage for stage in STAGES if not stage.startswith("stage")), "report")
SET_BY_STAGES = ("MKL_DYNAMIC",)  # environment variables that stages set when they are imported
LIMIT = 600  # seconds of a stage
RELEASED = "released"
FORKS.set_forkserver_preload([f"pipeline_steps.{package}.__main__" for package in IMPORTED])
SECONDS = (
    "backbones.embedded.vision_steps=4",
    "backbones.embedded.language_steps=4",
    "sources.procedural.num_train_clips=36",
    "sources.procedural.num_validation_clips=2",
    "sources.procedural.num_test_clips=3",
    "sources.chat.num_train=20",
    "sources.chat.num_validation=4",
    "sources.chat.num_test=4",
    "shards.samples_per_shard=30",
    "training.common.batch_size=8",
    "training.common.num_threads=1",
    "runtime.checkpoint_every=2",
    "training.common.validate_every=3",
    "training.common.max_validation_items=2",
    "training.stage1.num_samples=20",
    "training.stage2.num_samples=60",
    "training.stage3.num_samples=20",
    "evaluation.batch_size=16",
    "evaluation.max_answers_per_task=2",
    "evaluation.bootstrap_samples=50",
    "evaluation.num_threads=1",
    "heatmaps.num_clips=1",
)


def write_params(folder: Path, *overrides: str) -> None:
    (folder / "params.yaml").write_text(params.compose([*SECONDS, *overrides]))


def command(stage: str) -> list[str]:
    words = ["training", "--stage", stage] if stage.startswith("stage") else [stage]
    words += ["--stats"] if stage == "streaming" else []
    return [sys.executable, "-m", f"pipeline_steps.{words[0]}", *words[1:]]


def interruptible(*command) -> list[str]:
    """The command line of `command` where Ctrl-C is not ignored, as it is in a shell's background jobs."""
    listen = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    return [sys.executable, "-I", "-S", "-c", listen, *map(str, command)]


def environment() -> dict:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RUN_SCRATCH": ""}


def run(folder: Path, stage: str) -> subprocess.CompletedProcess:
    """What `command(stage)` does in `folder`, without the ten seconds of importing."""
    with tempfile.TemporaryDirectory() as logs:
        out, err = Path(logs, "out"), Path(logs, "err")
        (code,) = _exit_codes([_start(folder, stage, environment(), out, err)], LIMIT)
        if code is None:
            raise subprocess.TimeoutExpired(command(stage), LIMIT, out.read_text(), err.read_text())
        return subprocess.CompletedProcess(command(stage), code, out.read_text(), err.read_text())


def run_command(folder: Path, stage: str) -> subprocess.CompletedProcess:
    """Run one stage's command in `folder`, as DVC would."""
    return subprocess.run(command(stage), cwd=folder, env=environment(), capture_output=True, text=True, timeout=LIMIT)


def run_all(folder: Path, *stages: str, run=run) -> None:
    """run: `run` or `run_command`."""
    for stage in stages:
        done = run(folder, stage)
        assert done.returncode == 0, f"{stage}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def start_training(
    folder: Path,
    stage: str,
    num_processes: int = 1,
    folders: dict[int, Path] | None = None,
    hold_at: str | None = None,
) -> list[multiprocessing.Process]:
    """`run` of a training stage in `num_processes` processes, as torchrun starts them but without the seconds of
    importing; each writes its output to log-<rank>.txt in `folder`. `join` them, or kill them.

    folders: {rank: its own working folder} of ranks that work elsewhere.
    hold_at: "module.function" of pipeline_steps.training. Every process waits at its first call of it, until it is
    killed or `release`d. `wait_until_held` returns when all do.
    """
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(listener.getsockname()[1])}
    processes = []
    for rank in range(num_processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
        variables = (environment() | address | place) if num_processes > 1 else environment()
        own = (folders or {}).get(rank, folder)
        processes.append(_start(own, stage, variables, own / f"log-{rank}.txt", own / f"log-{rank}.txt", hold_at))
    return processes


def wait_until_held(folder: Path, processes: list[multiprocessing.Process], seconds: float = 120) -> None:
    """Until all processes wait at the function of `hold_at`."""
    end = time.monotonic() + seconds
    while len(list(folder.glob("held-*"))) < len(processes):
        assert all(process.is_alive() for process in processes), (folder / "log-0.txt").read_text()[-3000:]
        assert time.monotonic() < end
        time.sleep(0.01)


def release(folder: Path) -> None:
    """Lets the processes of `hold_at` go on."""
    (folder / RELEASED).touch()


def _start(
    folder: Path, stage: str, variables: dict, out: Path, err: Path, hold_at: str | None = None
) -> multiprocessing.Process:
    process = FORKS.Process(target=_run_stage, args=(folder, command(stage)[2:], variables, out, err, hold_at))
    process.start()
    return process


def _exit_codes(processes: list[multiprocessing.Process], seconds: float) -> list[int | None]:
    """Waits up to `seconds` for each; None for one that was still running. None is left running, also if a test's time
    is up meanwhile."""
    try:
        for process in processes:
            process.join(seconds)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _run_stage(folder: Path, arguments: list[str], variables: dict, out: Path, err: Path, hold_at: str | None) -> None:
    """The stage's `main` with these command line arguments; what it prints is added to the files `out` and `err`."""
    os.chdir(folder)
    imported = {name: os.environ[name] for name in SET_BY_STAGES if name in os.environ}
    os.environ.clear()
    os.environ.update(imported | variables)
    for number, path in ((1, out), (2, err)):
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, number)
        os.close(log)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    sys.argv = arguments
    main = importlib.import_module(f"{arguments[0]}.__main__").main
    if hold_at is not None:
        _hold(*hold_at.split("."))
    run_main(main)


def _hold(module_name: str, name: str) -> None:
    """Makes the first call of this function wait for the file RELEASED."""
    module, place = importlib.import_module(f"pipeline_steps.training.{module_name}"), f"held-{os.environ.get('RANK')}"
    function = getattr(module, name)

    def held(*args, **kwargs):
        if not Path(place).exists():
            Path(place).touch()
            while not Path(RELEASED).exists():
                time.sleep(0.01)
        return function(*args, **kwargs)

    setattr(module, name, held)


def train(folder: Path, stage: str, num_processes: int = 1, seconds: float = 300) -> None:
    """`start_training`, to its end."""
    processes = start_training(folder, stage, num_processes)
    codes = _exit_codes(processes, seconds)
    logs = "\n".join((folder / f"log-{rank}.txt").read_text()[-3000:] for rank in range(num_processes))
    assert codes == [0] * num_processes, f"{stage}: exit codes {codes}\n{logs}"
