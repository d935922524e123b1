import os
import stat

import pytest
import torch
import yaml

from pipeline_steps.common import params
from pipeline_steps.common.params import ROOT
from tests import checkpoints, pipeline

SLOW_SECONDS = 900  # .ci/watched.py waits a little longer for a line of output


def pytest_configure(config):
    """One thread for torch in every process of pytest-xdist, and in what it starts: the processes share the cores.

    transformers loads weights without its thread pool: a pool waits for its threads even after a test's time is up.
    """
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    if hasattr(config, "workerinput"):
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
        _leave_to_this_process([descriptor for descriptor in range(3, 256) if _is_pipe(descriptor)])


def pytest_collection_modifyitems(items):
    """Slow tests have the time that a busy machine needs; a quiet one needs a tenth."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_SECONDS))


def _is_pipe(descriptor: int) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(descriptor).st_mode)
    except OSError:
        return False


def _leave_to_this_process(pipes: list[int]) -> None:
    """Close the pipes to the controller in forked children (a DataLoader's): they would hide the end of this process,
    and the controller would wait for it without end and without a word."""

    def close():
        while pipes:  # once: a child's own child has other files at these numbers
            os.close(pipes.pop())

    os.register_at_fork(after_in_child=close)


@pytest.fixture(autouse=True)
def real_time_priority_is_refused():
    """A codec may raise the priority of the thread that calls it (tests/pipeline_steps/clips.py)."""
    yield
    if hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        pytest.fail("the test left its process with a real-time priority")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A folder in which every stage but the report has run, at a size of seconds. Read-only for the tests."""
    folder = tmp_path_factory.mktemp("run")
    pipeline.write_params(folder)
    pipeline.run_all(folder, *pipeline.STAGES)
    return folder


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A checkpoint of an untrained network, raw media, shards and tokens (tests/checkpoints.py). Read-only."""
    return checkpoints.make(tmp_path_factory.mktemp("made"))


@pytest.fixture
def edited(tmp_path):
    """Writes params.yaml with some edits and returns its path: edited("model.layout", "left", ...), None deletes."""

    def write(*edits):
        content = params.load(ROOT / "params.yaml")
        for key, value in zip(edits[::2], edits[1::2], strict=True):
            *parents, name = key.split(".")
            place = content
            for parent in parents:
                place = place[parent]
            if value is None:
                del place[name]
            else:
                place[name] = value
        path = tmp_path / "params.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write
