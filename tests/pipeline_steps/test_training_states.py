"""Saved states of a stage: kept, damaged, half written, best."""

import json

import pytest
import torch
from safetensors.torch import load_file

from pipeline_steps.common import files
from pipeline_steps.common.errors import UserError
from pipeline_steps.training import checkpoint_io
from tests.model.tiny import make_model


def test_only_the_last_states_are_kept(tmp_path):
    assert checkpoint_io.load_state(tmp_path) is None
    for step in (2, 4, 6):
        tensors = {"model": {"w": torch.full((3,), float(step))}, "optimizer": {"w/step": torch.tensor(float(step))}}
        checkpoint_io.save_state(tmp_path, step, tensors, {"history": [step]}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000006"]
    (tmp_path / ".step-00000008.partial").mkdir()  # a kill during the next write leaves this
    tensors, values = checkpoint_io.load_state(tmp_path)
    assert values["step"] == 6
    assert tensors["model"]["w"].tolist() == [6.0] * 3
    assert tensors["optimizer"]["w/step"].item() == 6.0


def test_tied_weights_are_written_once_and_restored(tmp_path):
    model = make_model()
    checkpoint_io.save_state(tmp_path, 1, {"model": model.state_dict()}, {}, keep=1)
    stored = load_file(tmp_path / "step-00000001" / "model.safetensors")
    assert len(stored) < len(model.state_dict())
    tensors, _ = checkpoint_io.load_state(tmp_path)
    assert tensors["model"].keys() == model.state_dict().keys()
    make_model().load_state_dict(tensors["model"])


def test_a_kill_during_a_deletion_leaves_no_half_of_a_state(tmp_path, monkeypatch):
    def killed(path, ignore_errors=False):
        for file in sorted(path.glob("**/state.json"))[:1]:
            file.unlink()
            raise KeyboardInterrupt

    run = tmp_path / "run"
    tensors = {"model": {"w": torch.ones(1)}}
    checkpoint_io.save_state(run, 1, tensors, {}, keep=1)
    with monkeypatch.context() as patched:
        patched.setattr(files.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint_io.save_state(run, 2, tensors, {}, keep=1)
    assert [path.name for path in run.iterdir() if not path.name.startswith(".")] == ["step-00000002"]
    checkpoint_io.save_state(run, 3, tensors, {}, keep=1)
    assert [path.name for path in run.iterdir()] == ["step-00000003"]
    with monkeypatch.context() as patched:
        patched.setattr(files.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            files.remove_folder(run)
    assert checkpoint_io.load_state(run) is None


def test_a_state_of_another_format_is_rejected(tmp_path):
    checkpoint_io.save_state(tmp_path, 1, {"model": {"w": torch.ones(1)}}, {}, keep=1)
    path = tmp_path / "step-00000001" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(UserError, match=rf"state format 99, but this version reads {checkpoint_io.FORMAT}\. Delete"):
        checkpoint_io.load_state(tmp_path)


def test_a_damaged_state_is_named_in_the_error(tmp_path):
    checkpoint_io.save_state(tmp_path, 1, {"model": {"w": torch.ones(1)}}, {}, keep=1)
    (tmp_path / "step-00000001" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"step-00000001: cannot be read .* resume from the previous state"):
        checkpoint_io.load_state(tmp_path)


def test_a_failed_write_keeps_the_previous_state(tmp_path, monkeypatch):
    checkpoint_io.save_state(tmp_path, 1, {"model": {"w": torch.ones(1)}}, {}, keep=1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_io.os, "rename", full)
    with pytest.raises(UserError, match=r"cannot be written .No space left on device"):
        checkpoint_io.save_state(tmp_path, 2, {"model": {"w": torch.zeros(1)}}, {}, keep=1)
    monkeypatch.undo()
    assert checkpoint_io.load_state(tmp_path)[1]["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_the_best_weights_survive_a_kill_between_two_renames(tmp_path):
    checkpoint_io.save_best(tmp_path, {"model": {"w": torch.ones(1)}}, {"step": 3, "loss": 1.0})
    (tmp_path / "best").rename(tmp_path / ".best.old")
    tensors, values = checkpoint_io.load_best(tmp_path)
    assert (tensors["model"]["w"].item(), values["step"]) == (1.0, 3)


def test_the_best_weights_survive_a_second_kill_while_the_next_are_written(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    checkpoint_io.save_best(tmp_path, {"model": {"w": torch.ones(1)}}, {"step": 3, "loss": 1.0})
    (tmp_path / "best").rename(tmp_path / ".best.old")
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_io, "_save_tensors", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint_io.save_best(tmp_path, {"model": {"w": torch.zeros(1)}}, {"step": 4, "loss": 0.9})
    assert checkpoint_io.load_best(tmp_path)[1]["step"] == 3
