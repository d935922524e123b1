"""`training.init_from`: a stage that starts from a finished checkpoint, and what it refuses."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from dvc.repo import Repo
from safetensors.torch import load_file

from model import FoveatedVLMForConditionalGeneration
from pipeline_steps.backbones.local import copy_backbones
from pipeline_steps.backbones.schema import Local
from pipeline_steps.common.params import ROOT
from tests import pipeline, repository

pytestmark = pytest.mark.slow  # a whole run
SLOW = "{connector: 1.0e-9, vision: 1.0e-9, language: 1.0e-9}"


@pytest.fixture
def folder(finished_run, tmp_path):
    """Data in a folder of its own, and beside it a finished checkpoint."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work/data").symlink_to(finished_run / "data")
    shutil.copytree(finished_run / "outputs/stage3", tmp_path / "checkpoint")
    return tmp_path / "work"


def start(folder, *overrides):
    """stage1 in `folder`, from the checkpoint beside it unless an override says otherwise."""
    if not any(override.startswith("training.init_from=") for override in overrides):
        overrides = (f"training.init_from={folder.parent / 'checkpoint'}", *overrides)
    pipeline.write_params(folder, *overrides)
    return pipeline.run(folder, "stage1")


def test_training_goes_on_from_a_checkpoint(folder):
    done = start(folder, f"training.stage1.learning_rate={SLOW}", "training.stage1.num_samples=8")
    assert done.returncode == 0, done.stderr
    places = (folder.parent / "checkpoint", folder / "outputs/stage1")
    before, after = (load_file(place / "model.safetensors") for place in places)
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    seen = [json.loads((place / "training.json").read_text())["sources"] for place in places]
    assert set(seen[0]) == {"procedural", "chat"}
    assert [sum(counts.values()) for counts in seen] == [100, 108]  # of three stages, and of this one too


@pytest.mark.parametrize(
    ("override", "messages"),
    [
        ("model.query_dim=32", ("model.query_dim is 64, but params.yaml has 32", "or set training.init_from")),
        ("training.init_from=outputs/stage3", ("training.init_from is outputs/stage3, a folder that this run itself",)),
        ("training.init_from=nowhere", ("nowhere/vision_encoder/model.safetensors: missing", "init_from is nowhere")),
    ],
)
def test_what_does_not_fit_is_refused(folder, override, messages):
    done = start(folder, override)
    assert done.returncode == 1
    assert all(message in done.stderr for message in messages), done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "outputs/stage1").exists()


def test_data_of_another_tokenizer_are_refused(folder):
    path = folder.parent / "checkpoint/tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] = content["added_tokens"][:-1]
    path.write_text(json.dumps(content))
    done = start(folder)
    assert done.returncode == 1
    assert "tokenized with a tokenizer whose sha256 is" in done.stderr
    assert "backbones.kind=local" in done.stderr


def test_backbones_are_taken_out_of_a_checkpoint(finished_run, tmp_path):
    checkpoint = finished_run / "outputs/stage3"
    copy_backbones(Local(vision_path=str(checkpoint), language_path=str(checkpoint)), tmp_path)
    model = FoveatedVLMForConditionalGeneration.from_backbones(tmp_path / "vision_encoder", tmp_path / "language_model")
    whole, own = load_file(checkpoint / "model.safetensors"), model.state_dict()
    backbones = {name for name in whole if name.startswith(("vision_encoder.", "language_model."))}
    assert len(backbones) > 50
    assert all(torch.equal(own[name], whole[name]) for name in backbones)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["language_model", "vision_encoder"]
    places = (tmp_path / "language_model", finished_run / "data/backbones/language_model")
    assert len({(place / "tokenizer.json").read_bytes() for place in places}) == 1


def test_training_clips_are_scored_and_drawn_like_held_out_ones(finished_run, tmp_path):
    """What shows the result on one's own training clips beside the held-out ones (docs/training.md)."""
    (tmp_path / "data").symlink_to(finished_run / "data")
    shutil.copytree(finished_run / "outputs/metrics", tmp_path / "outputs/metrics")
    (tmp_path / "outputs/stage3").symlink_to(finished_run / "outputs/stage3")
    splits = ["evaluation.split=train", "heatmaps.split=train", "heatmaps.num_sheet_clips=3"]
    pipeline.write_params(tmp_path, *splits, "evaluation.max_items_per_task=3")
    pipeline.run_all(tmp_path, "evaluation", "heatmaps")
    scores = [json.loads((place / "outputs/metrics/evaluation.json").read_text()) for place in (finished_run, tmp_path)]
    assert [entry["provenance"]["split"] for entry in scores] == ["test", "train"]
    assert scores[0]["tasks"].keys() == scores[1]["tasks"].keys()
    index = json.loads((tmp_path / "reports/heatmaps/index.json").read_text())
    assert index["split"] == "train"
    raw = [json.loads(line) for line in (finished_run / "data/raw/index.jsonl").read_text().splitlines()]
    training = {sample["key"] for sample in raw if sample["split"] == "train"}
    drawn = {clip["key"] for clip in (*index["clips"], *index["contact_sheet"]["clips"])}
    assert drawn
    assert drawn <= training


@pytest.fixture
def reproduced(finished_run, tmp_path, monkeypatch):
    """A repository after `dvc repro` at the size of `finished_run`, everything committed."""
    root = tmp_path / "repository"
    root.mkdir()
    repository.copy_to(root)
    for name in ("data", "outputs", "reports/heatmaps"):
        shutil.copytree(finished_run / name, root / name)
    shutil.copy(finished_run / "params.yaml", root / "params.yaml")
    repository.write_fakes(root)
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    with chdir(root):
        Repo().commit(force=True)
    for words in (("config", "user.name", "Test"), ("config", "user.email", "test@localhost"), ("add", "--all")):
        subprocess.run(["git", *words], cwd=root, check=True)
    subprocess.run(["git", "commit", "--quiet", "--message", "Reproduced"], cwd=root, check=True)
    return root


def write_clips(finished_run, folder):
    """Clips of the digit world with a question each, as one's own folder."""
    folder.mkdir()
    rows, left = [], {"train": 12, "validation": 3, "test": 3}
    for line in (finished_run / "data/raw/index.jsonl").read_text().splitlines():
        sample = json.loads(line)
        item, split = sample["items"][0], sample["split"]
        if sample["kind"] == "video" and item["user"] and left[split]:
            left[split] -= 1
            shutil.copy(finished_run / "data/raw" / sample["path"], folder / f"{sample['key']}.mp4")
            asked = {"question": item["user"], "answer": item["assistant"]}
            rows.append({"file_name": f"{sample['key']}.mp4", "split": split, **asked})
    assert not any(left.values())
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_documented_lines_fine_tune_a_checkpoint(finished_run, reproduced, tmp_path):
    """The lines of docs/training.md as they stand there, but for the paths and the size."""
    write_clips(finished_run, tmp_path / "clips")
    section = (ROOT / "docs/training.md").read_text().split("\n## Fine-tune a checkpoint\n")[1].split("\n## ")[0]
    lines = re.findall(r"^ {4}(.+)$", section, re.MULTILINE)
    at = next(number for number, line in enumerate(lines) if line.startswith("mine=("))
    assert "-S training.init_from=/path/to/start" in lines[at]
    assert "-S sources.folder.path=/path/to/clips" in lines[at]
    small = " ".join(f"-S {override}" for override in (*pipeline.SECONDS, "heatmaps.num_sheet_clips=2"))
    script = "\n".join([*lines[: at + 1], f"mine+=({small})", *lines[at + 1 :]]).replace("/path/to", str(tmp_path))
    variables = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", script], cwd=reproduced, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    ran = re.findall(r"^Running stage '(\w+)'", done.stdout, re.MULTILINE)
    trained = ["sources", "shards", "tokens", "streaming", "stage1", "stage2", "stage3", "flops"]
    assert {name: ran.count(name) for name in ["backbones", *trained]} == {"backbones": 0} | dict.fromkeys(trained, 1)
    assert ran.count("evaluation") == ran.count("heatmaps") == ran.count("report") == 2
    assert "reports/metrics/summary.json" in done.stdout  # of `dvc metrics diff`
    tuned, start = (load_file(place / "model.safetensors") for place in (reproduced / "mine", tmp_path / "start"))
    assert tuned.keys() == start.keys()
    assert any(not torch.equal(tuned[name], start[name]) for name in start)
    changed = ["git", "status", "--porcelain", "--untracked-files=no"]
    assert subprocess.run(changed, cwd=reproduced, capture_output=True, text=True, check=True).stdout == ""
    for path in (finished_run / "outputs/stage3").iterdir():
        assert (reproduced / "outputs/stage3" / path.name).read_bytes() == path.read_bytes()
