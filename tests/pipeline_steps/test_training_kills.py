"""A stage that is killed again and again ends with the weights of one that was left alone, bit by bit."""

import random
import shutil
import time

import pytest

from tests import pipeline

pytestmark = pytest.mark.slow
RESULTS = ("outputs/stage2/model.safetensors", "outputs/metrics/stage2.csv", "outputs/metrics/stage2.json")
OPTIONS = ("runtime.checkpoint_every=1", "runtime.keep_checkpoints=2", "training.common.publish=best")
OPTIONS += ("training.common.ema_decay=0.9", "runtime.tensorboard=false", "runtime.num_workers=2")
MAX_TRIES = 10  # per kill


def folder_for(finished_run, folder, *overrides):
    folder.mkdir()
    (folder / "data").symlink_to(finished_run / "data")
    shutil.copytree(finished_run / "outputs/stage1", folder / "outputs/stage1")
    pipeline.write_params(folder, *OPTIONS, *overrides)
    return folder


def wait_for(process, pattern, folder, seconds=120):
    """Until there is a path like this that is newer than the call, or the process has ended."""
    called, deadline = time.time() - 0.01, time.monotonic() + seconds
    while not any(changed(path) > called for path in folder.glob(pattern)):
        if not process.is_alive() or time.monotonic() > deadline:
            break
        time.sleep(0.001)


def changed(path):
    try:
        return path.stat().st_ctime
    except FileNotFoundError:
        return 0.0


def kill_at(moment, folder, rng):
    """Start the stage and kill it at this moment; False when it was too late."""
    if moment == "while the states are deleted":
        shutil.rmtree(folder / "outputs/stage2", ignore_errors=True)
    (process,) = pipeline.start_training(folder, "stage2")
    if moment == "any time":
        process.join(rng.uniform(0.2, 4.0))
    elif moment == "while a state is written":
        wait_for(process, ".scratch/stage2/*/.step-*.partial", folder)
        time.sleep(rng.uniform(0, 0.02))
    elif moment == "while the best weights are written":
        wait_for(process, ".scratch/stage2/*/.best*", folder)
    elif moment == "while the states are deleted":
        wait_for(process, "outputs/stage2/model.safetensors", folder)
        time.sleep(rng.uniform(0, 0.005))
    else:  # publish
        wait_for(process, "outputs/.stage2.partial/*", folder)
        time.sleep(rng.uniform(0, 0.1))
    alive = process.is_alive()
    process.kill()
    process.join()
    return alive


def test_twenty_kills_do_not_change_the_result(finished_run, tmp_path):
    expected = folder_for(finished_run, tmp_path / "expected")
    pipeline.train(expected, "stage2")
    folder, rng = folder_for(finished_run, tmp_path / "killed"), random.Random(1)
    moments = ["any time"] * 6 + ["while a state is written"] * 7
    rng.shuffle(moments)
    late = ["publish", "publish", "publish", *["while the states are deleted"] * 3]
    for moment in [*moments, "while the best weights are written", *late]:
        for _ in range(MAX_TRIES):
            if kill_at(moment, folder, rng):
                break
            shutil.rmtree(folder / "outputs/stage2", ignore_errors=True)  # too late: once more from the start
        else:
            pytest.fail(f"the stage was never killed: {moment}")
    shutil.rmtree(folder / "outputs/stage2", ignore_errors=True)
    pipeline.train(folder, "stage2")
    for name in RESULTS:
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    assert not list(folder.glob(".scratch/stage2/*/"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_resumes_with_other_workers_and_loggers(finished_run, tmp_path, optimizer):
    chosen = f"training.common.optimizer={optimizer}"
    expected = folder_for(finished_run, tmp_path / "expected", chosen)
    pipeline.train(expected, "stage2")
    folder = folder_for(finished_run, tmp_path / "other", chosen)
    processes = pipeline.start_training(
        folder, "stage2", hold_at="train_loop.validate"
    )  # of step 3, before its state is saved
    pipeline.wait_until_held(folder, processes)
    processes[0].kill()
    processes[0].join()
    other = ("runtime.num_workers=0", "runtime.checkpoint_every=3", "runtime.dvclive=false", "runtime.log_every=3")
    pipeline.write_params(folder, *OPTIONS, chosen, *other)
    pipeline.train(folder, "stage2")
    assert "resuming from step 2 of 8" in (folder / "log-0.txt").read_text()
    for name in RESULTS:
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
