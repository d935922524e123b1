"""Weights & Biases, current and old, and Hugging Face `datasets` on our shards."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from pipeline_steps.monitoring.metrics_logger import start_loggers
from tests.pipeline_steps import packed

SETTINGS = SimpleNamespace(tensorboard=False, dvclive=False, wandb_project="project")


class Run:
    def __init__(self):
        self.rows, self.finished = [], False

    def log(self, values, step=None):
        self.rows.append((step, values))

    def finish(self):
        self.finished = True


def fake(monkeypatch, **attributes):
    """A module `wandb` with `init`, `Image` and these attributes only."""
    runs = []

    def init(**options):
        runs.append((options, Run()))
        return runs[-1][1]

    module = SimpleNamespace(init=init, Image=lambda picture: ("image", picture.size), __spec__=object(), **attributes)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs


@pytest.mark.parametrize(
    "attributes", [{}, {"util": SimpleNamespace(generate_id=lambda: "old")}], ids=["current", "old"]
)
def test_wandb_logs_and_resumes_with_either_api(monkeypatch, tmp_path, attributes):
    runs = fake(monkeypatch, **attributes)
    for _ in range(2):
        (logger,) = start_loggers(SETTINGS, "stage1", tmp_path)
        logger.scalars({"loss": 1.5}, 7)
        logger.picture("attention/a", Image.new("RGB", (4, 4)), 7)
        logger.close()
    (first, run), (second, _) = runs
    assert first["id"] == second["id"] == json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert (first["project"], first["name"], first["resume"]) == ("project", "stage1", "allow")
    assert run.rows == [(7, {"loss": 1.5}), (7, {"attention/a": ("image", (4, 4))})]
    assert run.finished
    (tmp_path / "wandb.json").write_text('{"id": "')  # cut off by a kill
    start_loggers(SETTINGS, "stage1", tmp_path)
    assert runs[2][0]["id"] != first["id"]


def test_wandb_itself_logs_offline(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    (logger,) = start_loggers(SETTINGS, "stage1", tmp_path)
    logger.scalars({"loss": 1.5}, 1)
    logger.picture("attention/a", Image.fromarray(np.zeros((4, 4, 3), np.uint8)), 1)
    logger.close()
    assert list(tmp_path.rglob("*.wandb"))


def test_datasets_loads_the_shards(monkeypatch, tmp_path):
    """Samples of one form, as `datasets` wants them: the same members in each."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    samples = [packed.Clip(f"world-{n}") for n in range(12)]
    root = packed.write(tmp_path / "data", samples, 6)
    files = {"train": sorted(map(str, (root / "shards/train").glob("*.tar")))}
    loaded = datasets.load_dataset("webdataset", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["__key__"] == [clip.key for clip in samples]
    assert loaded[7]["json"]["source"] == "world"
    local = packed.open_split(root)
    for frame in range(2):
        assert np.array_equal(np.asarray(loaded[7][f"{frame:03d}.jpg"]), local[7]["frames"][frame])
