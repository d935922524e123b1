"""Training in several CPU processes: the curve of one process, whatever the number of processes and pieces."""

import shutil
import signal
import subprocess
import sys

import pandas as pd
import pytest
from safetensors.torch import load_file

from tests import pipeline
from tests.pipeline_steps import packed

pytestmark = pytest.mark.slow
EVERY_STEP = ("training.common.record_every=1", "runtime.dvclive=false")
EVERY_STEP += ("runtime.tensorboard=false", "training.stage1.num_samples=40")
MUON = "training.common.optimizer=muon"


def folder_for(finished_run, tmp_path, *overrides):
    (tmp_path / "data").symlink_to(finished_run / "data")
    pipeline.write_params(tmp_path, *EVERY_STEP, *overrides)
    return tmp_path


def curve(folder):
    return pd.read_csv(folder / "outputs/metrics/stage1.csv")


@pytest.fixture(scope="module")
def alone(finished_run, tmp_path_factory):
    """The stage in one process and one piece."""
    folder = folder_for(finished_run, tmp_path_factory.mktemp("alone"))
    pipeline.train(folder, "stage1")
    return folder


@pytest.fixture(scope="module")
def alone_with_muon(finished_run, tmp_path_factory):
    folder = folder_for(finished_run, tmp_path_factory.mktemp("alone_with_muon"), MUON)
    pipeline.train(folder, "stage1")
    return folder


def assert_same_run(found, expected):
    """Losses, gradient norms and scores within 1e-4, the same tokens, weights that differ by roundings only."""
    one, other = curve(expected), curve(found)
    assert len(one) == len(other)
    assert (one["event"] == other["event"]).all()
    for name in ("loss", "grad_norm", "accuracy"):
        assert (one[name] - other[name]).abs().max() < 1e-4, name
    assert one["tokens"].equals(other["tokens"])
    before, after = (load_file(place / "outputs/stage1/model.safetensors") for place in (expected, found))
    assert before.keys() == after.keys()
    assert max((before[name] - after[name]).abs().max().item() for name in before) < 1e-3
    config = (found / "outputs/stage1/config.json").read_text()
    assert config == (expected / "outputs/stage1/config.json").read_text()
    assert not list(found.glob(".scratch/stage1/*/"))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_learning_curve_does_not_depend_on_micro_batches(alone, finished_run, tmp_path, size):
    checkpointed = f"training.common.activation_checkpointing={'true' if size == 4 else 'false'}"
    folder = folder_for(finished_run, tmp_path, f"training.common.micro_batch_size={size}", checkpointed)
    pipeline.train(folder, "stage1")
    assert_same_run(folder, alone)


@pytest.mark.parametrize(
    ("num_processes", "overrides"),
    [
        (2, ()),
        (2, ("training.common.micro_batch_size=1", "training.common.ema_decay=0.0")),
        (4, ("training.common.micro_batch_size=1",)),
        (2, ("training.common.sharding=fsdp", "runtime.checkpoint_every=2")),
    ],
    ids=["2", "2, one by one", "4, one by one", "fsdp"],
)
def test_the_learning_curve_does_not_depend_on_the_number_of_processes(
    alone, finished_run, tmp_path, num_processes, overrides
):
    folder = folder_for(finished_run, tmp_path, *overrides)
    pipeline.train(folder, "stage1", num_processes)
    assert_same_run(folder, alone)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_the_muon_learning_curve_does_not_depend_on_the_number_of_processes(
    alone_with_muon, finished_run, tmp_path, sharding
):
    """FSDP2 divides the matrices by rows, which Muon orthogonalizes whole."""
    folder = folder_for(finished_run, tmp_path, MUON, f"training.common.sharding={sharding}")
    pipeline.train(folder, "stage1", 2)
    assert_same_run(folder, alone_with_muon)


def test_torchrun_starts_training(alone, finished_run, tmp_path):
    folder = folder_for(finished_run, tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += pipeline.command("stage1")[1:]
    options = {"cwd": folder, "env": pipeline.environment(), "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(folder, alone)


@pytest.mark.parametrize(
    ("sharding", "optimizer"), [("ddp", "adamw"), ("fsdp", "adamw"), ("ddp", "muon"), ("fsdp", "muon")]
)
def test_two_processes_resume_after_a_kill(finished_run, tmp_path, sharding, optimizer):
    options = (f"training.common.sharding={sharding}", f"training.common.optimizer={optimizer}")
    options += ("runtime.checkpoint_every=2",)
    expected, folder = tmp_path / "expected", tmp_path / "killed"
    for place in (expected, folder):
        place.mkdir()
        folder_for(finished_run, place, *options)
    pipeline.train(expected, "stage1", 2)
    processes = pipeline.start_training(
        folder, "stage1", 2, hold_at="train_loop.validate"
    )  # of step 3, before its state is saved
    pipeline.wait_until_held(folder, processes)
    for process in processes:
        process.kill()
        process.join()
    assert not (folder / "outputs/stage1").exists()
    pipeline.train(folder, "stage1", 2)
    assert "resuming from step 2 of 5" in (folder / "log-0.txt").read_text()
    for name in ("outputs/stage1/model.safetensors", "outputs/metrics/stage1.csv"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name


def test_a_failing_process_stops_all_processes_with_its_error(finished_run, tmp_path):
    folder = folder_for(finished_run, tmp_path, "streaming.max_quarantined=0.0")
    (folder / "data").unlink()
    shutil.copytree(finished_run / "data", folder / "data")
    for tar in (folder / "data/shards/train").glob("*.tar"):
        content = bytearray(tar.read_bytes())
        for start in range(0, len(content), 512):  # tar members begin at blocks
            if content[start : start + 3] == b"\xff\xd8\xff":
                content[start : start + 64] = bytes(64)
        tar.write_bytes(content)
    packed.rewrite_hashes(folder / "data")  # as if the files had been packed like this
    processes = pipeline.start_training(folder, "stage1", 2)
    for process in processes:
        process.join(120)
    assert all(process.exitcode not in (0, None) for process in processes)
    logs = "".join((folder / f"log-{rank}.txt").read_text() for rank in range(2))
    assert "unreadable, more than streaming.max_quarantined allows" in logs
    assert not (folder / "outputs/stage1").exists()


def held_beside_a_whole_run(finished_run, tmp_path, options, num_processes, hold_at):
    """(folder of a finished run of stage 1, folder of one that waits at the function `hold_at`, its processes)."""
    expected, folder = tmp_path / "expected", tmp_path / "stopped"
    for place in (expected, folder):
        place.mkdir()
        folder_for(finished_run, place, *options)
    pipeline.train(expected, "stage1", num_processes)
    processes = pipeline.start_training(folder, "stage1", num_processes, hold_at=hold_at)
    pipeline.wait_until_held(folder, processes)
    return expected, folder, processes


@pytest.mark.parametrize("num_processes", [1, 2])
def test_sigterm_saves_a_state_and_the_run_resumes_from_it(finished_run, tmp_path, num_processes):
    options = ("runtime.checkpoint_every=1000",)
    expected, folder, processes = held_beside_a_whole_run(
        finished_run, tmp_path, options, num_processes, "train_loop.launch_step"
    )
    processes[-1].terminate()  # one of them is enough
    pipeline.release(folder)
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [143] * num_processes
    assert "stopped by SIGTERM after step 1." in (folder / "log-0.txt").read_text()
    assert len(list(folder.glob(".scratch/stage1/*/step-*"))) == 1
    pipeline.train(folder, "stage1", num_processes)
    for name in ("outputs/stage1/model.safetensors", "outputs/metrics/stage1.csv"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.mark.parametrize("num_processes", [1, 2])
def test_sigterm_after_the_last_step_loses_only_the_final_validation(finished_run, tmp_path, num_processes):
    options = ("runtime.checkpoint_every=1000", "training.common.validate_every=1000")  # only the final validation
    expected, folder, processes = held_beside_a_whole_run(
        finished_run, tmp_path, options, num_processes, "train_loop.validate"
    )
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [-signal.SIGTERM] * num_processes
    assert not (folder / "outputs/stage1").exists()
    pipeline.train(folder, "stage1", num_processes)
    assert "resuming from step 5 of 5" in (folder / "log-0.txt").read_text()
    for name in ("outputs/stage1/model.safetensors", "outputs/metrics/stage1.csv"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
