import os

import pytest
import torch

from tests import checkpoints, pipeline


def pytest_configure(config):
    """One thread for torch in every process of pytest-xdist, and in what it starts: the processes share the cores.

    transformers loads weights without its thread pool: a pool waits for its threads even after a test's time is up.
    """
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    if hasattr(config, "workerinput"):
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


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
