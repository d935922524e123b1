"""Training with torchrun on CPU processes: the curve of one process, whatever the number of processes and pieces."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from safetensors.torch import load_file

from tests import pipeline

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
EVERY_STEP = ("training.common.watch.log_every=1", "training.common.watch.dvclive=false")
EVERY_STEP += ("training.common.watch.tensorboard=false", "training.stage1.num_samples=40")


def folder_for(finished_run, tmp_path, *overrides):
    (tmp_path / "data").symlink_to(finished_run / "data")
    pipeline.write_params(tmp_path, *EVERY_STEP, *overrides)
    return tmp_path


def torchrun(folder, num_processes, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    command += pipeline.command("stage1")[1:]
    settings = {"cwd": folder, "env": pipeline.environment(), "text": True, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, **settings)


def finish(process, seconds=300):
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output, errors


def curve(folder):
    return pd.read_csv(folder / "reports/metrics/stage1.csv")


@pytest.fixture(scope="module")
def alone(finished_run, tmp_path_factory):
    """The stage in one process and one piece."""
    folder = folder_for(finished_run, tmp_path_factory.mktemp("alone"))
    pipeline.run_all(folder, "stage1")
    return folder


@pytest.mark.parametrize(
    ("num_processes", "overrides"),
    [
        (1, ("training.common.micro_batch_size=1",)),
        (1, ("training.common.micro_batch_size=3", "training.common.activation_checkpointing=true")),
        (2, ()),
        (2, ("training.common.micro_batch_size=1",)),
        (4, ("training.common.micro_batch_size=1",)),
        (2, ("training.common.sharding=fsdp",)),
    ],
    ids=["1 by 1", "3 by 3, checkpointed", "2 processes", "2 processes, 1 by 1", "4 processes, 1 by 1", "fsdp"],
)
def test_the_curve_does_not_depend_on_pieces_and_processes(alone, finished_run, tmp_path, num_processes, overrides):
    folder = folder_for(finished_run, tmp_path, *overrides)
    if num_processes == 1:
        pipeline.run_all(folder, "stage1")
    else:
        code, _, errors = finish(torchrun(folder, num_processes))
        assert code == 0, errors[-3000:]
    expected, found = curve(alone), curve(folder)
    assert len(found) == len(expected)
    assert (found["event"] == expected["event"]).all()
    for name in ("loss", "grad_norm", "accuracy"):
        assert (found[name] - expected[name]).abs().max() < 1e-4, name
    assert found["tokens"].equals(expected["tokens"])
    one, other = (load_file(place / "outputs/stage1/model.safetensors") for place in (alone, folder))
    assert one.keys() == other.keys()
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-3
    assert not list(folder.glob(".scratch/stage1/*/"))
    config = (folder / "outputs/stage1/config.json").read_text()
    assert config == (alone / "outputs/stage1/config.json").read_text()


def test_a_failing_process_stops_all_with_its_error(finished_run, tmp_path):
    folder = folder_for(finished_run, tmp_path, "streaming.max_quarantined=0.0")
    (folder / "data").unlink()
    shutil.copytree(finished_run / "data", folder / "data")
    for tar in (folder / "data/shards/train").glob("*.tar"):
        content = bytearray(tar.read_bytes())
        for start in range(512, len(content) - 512, 512):  # every block that looks like the start of a JPEG
            if content[start : start + 3] == b"\xff\xd8\xff":
                content[start : start + 64] = bytes(64)
        tar.write_bytes(content)
    began = time.monotonic()
    code, output, errors = finish(torchrun(folder, 2), seconds=120)
    assert code != 0
    assert "could not be read, more than streaming.max_quarantined allows" in output + errors
    assert time.monotonic() - began < 100
    assert not (folder / "outputs/stage1").exists()


@pytest.mark.parametrize("num_processes", [1, 2])
def test_sigterm_saves_a_state_from_which_the_run_goes_on(alone, finished_run, tmp_path, num_processes):
    folder = folder_for(finished_run, tmp_path, "training.common.checkpoint_every=1000")
    if num_processes == 1:
        process = subprocess.Popen(
            pipeline.command("stage1"), cwd=folder, env=pipeline.environment(), text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
    else:
        process = torchrun(folder, num_processes)
    for line in process.stdout:
        if "learning rate" in line:  # the table: training is about to begin
            break
    time.sleep(0.5)
    process.terminate()
    code, output, errors = finish(process)
    states = list(folder.glob(".scratch/stage1/*/step-*"))
    if (folder / "outputs/stage1").exists():
        pytest.skip("the run was over before the signal came")
    assert code == (143 if num_processes == 1 else 1), errors[-3000:]
    assert "ended by SIGTERM after step" in output + errors
    assert len(states) == 1
    if num_processes == 1:
        pipeline.run_all(folder, "stage1")
        for name in ("outputs/stage1/model.safetensors", "reports/metrics/stage1.csv"):
            assert (folder / name).read_bytes() == (alone / name).read_bytes(), name
