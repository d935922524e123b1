"""Damaged files are found where they are read: shards, sidecars, checkpoints and training states."""

import os
import shutil

import pytest
import torch

from pipeline_steps.common import integrity
from pipeline_steps.common.checkpoint import load_model
from pipeline_steps.common.errors import UserError
from pipeline_steps.training import checkpoint_io
from tests.pipeline_steps import packed


@pytest.fixture(autouse=True)
def scratch(monkeypatch, tmp_path):
    monkeypatch.setenv("RUN_SCRATCH", str(tmp_path / "scratch"))


def flip(path, place=-100):
    """Changes one byte and nothing else."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["shards/train/000001.tar", "tokens/train/000001.arrow"])
def test_a_changed_byte_of_the_data_is_found_when_it_is_opened(tmp_path, name):
    root = packed.write(tmp_path / "data", packed.clips(18), 6)
    packed.open_split(root)  # cached as intact
    path = root / name
    flip(path, path.read_bytes().index(b"\xff\xd8\xff") + 300 if path.suffix == ".tar" else 9)
    with pytest.raises(UserError, match=rf"{path}: its content has changed since it was written: sha256 .*expected"):
        packed.open_split(root)


def test_a_file_is_hashed_once_until_it_changes(tmp_path, monkeypatch):
    hashed, path = [], tmp_path / "file"
    path.write_bytes(b"content")
    expected = integrity.sha256_file(path)
    monkeypatch.setattr(
        integrity, "sha256_file", lambda path, own=integrity.sha256_file: hashed.append(path) or own(path)
    )
    for _ in range(3):
        integrity.verify([(path, expected)], "manifest.json", "Copy it again.")
    assert hashed == [path]
    os.utime(path, ns=(1, 1))
    integrity.verify([(path, expected)], "manifest.json", "Copy it again.")
    assert hashed == [path, path]
    for cut in (tmp_path / "scratch").rglob("*.json"):
        cut.write_text(cut.read_text()[:9])  # as after a kill
    integrity.verify([(path, expected)], "manifest.json", "Copy it again.")
    assert len(hashed) == 3


def test_files_are_verified_where_no_cache_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "scratch").write_text("a file in place of the folder")
    path = tmp_path / "file"
    path.write_bytes(b"content")
    integrity.verify([(path, integrity.sha256_file(path))], "manifest.json", "Copy it again.")
    with pytest.raises(UserError, match="Copy it again"):
        integrity.verify([(path, "0" * 64)], "manifest.json", "Copy it again.")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: flip(folder / "model.safetensors"), r"model.safetensors: its content has changed"),
        (
            lambda folder: flip(folder / "modeling_foveated_vlm.py"),
            r"modeling_foveated_vlm.py: its content has changed",
        ),
        (lambda folder: (folder / "video.py").unlink(), r"video.py missing, but recorded in checksums.json"),
        (lambda folder: (folder / "checksums.json").write_text("{"), r"checksums.json: not valid JSON"),
        (lambda folder: (folder / "checksums.json").write_text("[" * 5000), r"checksums.json: not valid JSON"),
    ],
)
def test_a_damaged_checkpoint_is_refused(made, tmp_path, damage, message):
    folder = tmp_path / "checkpoint"
    shutil.copytree(made.checkpoint, folder)
    integrity.write_checksums(folder)
    load_model(folder)
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_model(folder)


def save(folder, step, keep=3):
    tensors = {"model": {"w": torch.full((500,), float(step))}, "optimizer": {"w/m": torch.zeros(500)}}
    checkpoint_io.save_state(folder, step, tensors, {"history": [step]}, keep)


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: (state / "optimizer.safetensors").unlink(),
        lambda state: flip(state / "model.safetensors"),
        lambda state: (state / "state.json").unlink(),
        lambda state: (state / "state.json").write_text('{"step": 6, "form'),
        lambda state: (state / "model.safetensors").write_bytes(b""),
    ],
    ids=["missing", "one byte", "no state.json", "cut off", "empty"],
)
def test_a_damaged_state_falls_back_to_the_one_before(tmp_path, capsys, damage):
    for step in (2, 4, 6):
        save(tmp_path, step)
    damage(tmp_path / "step-00000006")
    tensors, values = checkpoint_io.load_state(tmp_path)
    assert values == {"history": [4], "step": 4, "format": checkpoint_io.FORMAT}
    assert tensors["model"]["w"][0] == 4
    assert "step-00000006: damaged" in (error := capsys.readouterr().err)
    assert "Resuming from the state before" in error
    save(tmp_path, 5, keep=1)  # the damaged state, although later, does not displace a new one
    assert checkpoint_io.load_state(tmp_path)[1]["step"] == 5


def test_only_damaged_states_are_an_error(tmp_path):
    for step in (2, 4):
        save(tmp_path, step)
        (tmp_path / f"step-{step:08d}/model.safetensors").unlink()
    with pytest.raises(UserError, match=r"step-00000002: cannot be read .*model.safetensors"):
        checkpoint_io.load_state(tmp_path)


def test_the_state_of_a_given_step_has_no_fallback(tmp_path):
    for step in (2, 4):
        save(tmp_path, step)
    assert checkpoint_io.load_state(tmp_path, 2)[1]["step"] == 2
    flip(tmp_path / "step-00000004/model.safetensors")
    with pytest.raises(UserError, match="step-00000004"):
        checkpoint_io.load_state(tmp_path, 4)
