"""Training from shards at a URL, in one process and in two."""

import json
import shutil

import pandas as pd
import pytest

from tests import pipeline

pytestmark = pytest.mark.slow
EVERYTHING = "training.stage1.mixture=[{source: '*', task: '*', weight: 1.0}]"


def folder_for(finished_run, tmp_path, published, *overrides):
    """A folder that trains from the data set at `published`; it validates with local data."""
    (tmp_path / "data").symlink_to(finished_run / "data")
    url = f"streaming.url='pipe:cat {published}/{{path}}'"
    settings = ("streaming.reader=webdataset", url, EVERYTHING, "streaming.shuffle_samples=8")
    pipeline.write_params(tmp_path, "runtime.dvclive=false", "runtime.tensorboard=false", *settings, *overrides)
    return tmp_path


@pytest.mark.parametrize("num_processes", [1, 2])
def test_training_from_a_url_counts_what_was_transferred(finished_run, tmp_path, num_processes):
    folder = folder_for(finished_run, tmp_path, finished_run / "data", "training.stage1.num_samples=96")
    pipeline.train(folder, "stage1", num_processes)
    rows = pd.read_csv(folder / "outputs/metrics/stage1.csv")
    assert rows["loss"].notna().any()
    result = json.loads((folder / "outputs/metrics/stage1.json").read_text())
    assert sum(entry["num_samples"] for entry in result["mixture"].values()) == 96
    remote = json.loads((folder / "outputs/timings/stage1.json").read_text())["remote"]
    assert remote["attempts"] > 2
    assert (remote["failures"], remote["retries"], remote["success_rate"]) == (0, 0, 1.0)
    assert remote["megabytes"] > 0
    assert remote["megabytes_per_second"] > 0


def test_a_damaged_tar_at_the_url_stops_training_and_is_named(finished_run, tmp_path):
    shutil.copytree(finished_run / "data", tmp_path / "published")
    for tar in (tmp_path / "published/shards/train").glob("*.tar"):
        content = bytearray(tar.read_bytes())
        content[content.index(b"\xff\xd8\xff") + 300] ^= 1
        tar.chmod(0o644)
        tar.write_bytes(content)
    (tmp_path / "run").mkdir()
    folder = folder_for(finished_run, tmp_path / "run", tmp_path / "published", "runtime.retries=0")
    (process,) = pipeline.start_training(folder, "stage1")
    process.join(200)
    assert process.exitcode == 1
    log = (folder / "log-0.txt").read_text()
    assert "cannot read shards/train/00000" in log
    assert "(its sha256 is " in log
    assert not (folder / "outputs/stage1").exists()
