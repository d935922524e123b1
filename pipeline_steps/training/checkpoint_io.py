"""Reads and writes the training states that an interrupted run resumes from.

A state is a folder `step-00000200` with model.safetensors, optimizer.safetensors and state.json (step, learning curves,
best validation, sha256 of the other files; version FORMAT). It is written under another name, synced and then renamed,
so a kill or a full disk leaves the previous states intact. Loading a state unpickles nothing.
"""

import json
import os
import re
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.files import remove_folder, writable
from pipeline_steps.common.hashing import fingerprint, sha256_file

FORMAT = 2
ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("torch", "transformers")  # whose version a result depends on
BEST = "best"
CODE = (  # the code dependencies of the training stages in dvc.yaml
    "model",
    "pipeline_steps/streaming",
    "pipeline_steps/training",
    "pipeline_steps/common/autoencoder.py",
    "pipeline_steps/common/checkpoint.py",
    "pipeline_steps/common/code_keys.py",
    "pipeline_steps/common/device.py",
    "pipeline_steps/common/hashing.py",
    "pipeline_steps/common/markdown.py",
    "pipeline_steps/common/model_card.py",
    "pipeline_steps/common/next_frame.py",
    "pipeline_steps/common/next_frame_schema.py",
    "pipeline_steps/common/schemas.py",
    "pipeline_steps/common/sidecar.py",
)


class DamagedState(UserError):
    """A state with a missing or changed file. `reason` says which."""

    def __init__(self, folder: Path, reason: object):
        super().__init__(
            f"{folder}: cannot be read ({reason}). Delete this folder to resume from the previous state, or to start "
            "over if it is the only one (runtime.keep_checkpoints)."
        )
        self.reason = reason


def run_fingerprint(stage: str, parameters: dict, inputs: list[Path]) -> str:
    """16 hex digits that identify the run: parameters (`Parameters.as_dict`), input files, code, library versions."""
    libraries = [version(name) for name in LIBRARIES]
    return fingerprint(stage, parameters, [sha256_file(path) for path in inputs], libraries, *code_files())


def code_files() -> list[Path]:
    """The files of CODE, sorted."""
    return sorted({file for place in CODE for file in [ROOT / place, *(ROOT / place).rglob("*.py")] if file.is_file()})


def save_state(folder: Path, step: int, tensors: dict[str, dict], values: dict, keep: int) -> None:
    """Writes the state of a step, then deletes all but the last `keep` states.

    tensors: {"model": {name: tensor}, "optimizer": {...}, ...}, one file each. values: JSON-serialisable. UserError if
    writing fails; the older states then remain.
    """
    _write_whole(folder / f"step-{step:08d}", tensors, values | {"step": step, "format": FORMAT})
    for old in _states(folder)[:-keep]:
        remove_folder(old)


def load_state(folder: Path, step: int | None = None) -> tuple[dict[str, dict], dict] | None:
    """(tensors, values) of the last intact state, or of `step`; None if there is no state.

    Without `step`, a damaged state is reported on stderr and renamed, and the one before is read. UserError if all
    states are damaged, or the one of `step` is.
    """
    if step is not None:
        return _read(folder / f"step-{step:08d}")
    states = _states(folder)
    for number, path in enumerate(reversed(states), start=1):
        try:
            return _read(path)
        except DamagedState as error:
            if number == len(states):
                raise
            print(f"{path}: damaged ({error.reason}). Resuming from the state before.", file=sys.stderr)
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
    return None


def save_best(folder: Path, tensors: dict[str, dict], values: dict) -> None:
    """Replaces the best weights so far. tensors: as in `save_state`."""
    _write_whole(folder / BEST, tensors, values | {"format": FORMAT})


def load_best(folder: Path) -> tuple[dict[str, dict], dict] | None:
    """(tensors, values) of the best weights so far, or None."""
    if not (folder / BEST).exists() and (folder / f".{BEST}.old").exists():  # killed between the two renames
        os.rename(folder / f".{BEST}.old", folder / BEST)
    return _read(folder / BEST) if (folder / BEST).is_dir() else None


def _states(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))


def _write_whole(target: Path, tensors: dict[str, dict], values: dict) -> None:
    partial, old = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.old")
    with writable(target.parent):
        shutil.rmtree(partial, ignore_errors=True)
        if target.exists():  # else a kill between the two renames left `old` alone
            shutil.rmtree(old, ignore_errors=True)
        partial.mkdir(parents=True)
    try:
        for name, group in tensors.items():
            _save_tensors(group, partial / f"{name}.safetensors")
        with writable(target):
            hashes = {file.name: sha256_file(file) for file in sorted(partial.iterdir())}
            (partial / "state.json").write_text(json.dumps(values | {"files": hashes}))
            for file in partial.iterdir():
                _sync(file)
            _sync(partial)
            if target.exists():
                os.rename(target, old)
            os.rename(partial, target)
            _sync(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _save_tensors(tensors: dict, path: Path) -> None:
    """Writes tied tensors once and their other names as metadata, because safetensors rejects shared memory."""
    first, names = {}, {}
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name
        if place in first:
            names[name] = first[place][0]
        else:
            first[place] = name, tensor.detach().cpu()
    try:
        save_file({name: tensor.contiguous() for name, tensor in first.values()}, path, metadata=names or None)
    except SafetensorError as error:
        raise UserError(
            f"{path}: cannot be written ({error}). Free disk space and run again; the older states are intact."
        ) from None


def _read(folder: Path) -> tuple[dict[str, dict], dict]:
    try:
        values = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise DamagedState(folder, error) from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise UserError(
            f"{folder}: state format {found}, but this version reads {FORMAT}. Delete {folder.parent} to start over."
        )
    hashes = values.pop("files")
    try:
        for name, expected in hashes.items():
            found = sha256_file(folder / name)
            if found != expected:
                raise ValueError(f"{name} has changed since it was written: sha256 {found[:12]}, not {expected[:12]}")
        return {Path(name).stem: _load_tensors(folder / name) for name in hashes}, values
    except (OSError, ValueError, SafetensorError) as error:
        raise DamagedState(folder, error) from None


def _load_tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        return tensors | {name: tensors[same] for name, same in (file.metadata() or {}).items() if same in tensors}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, gathered from all ranks if it is sharded. Every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's state_dict with full (unsharded) tensors."""
    return {name: full_tensor(value) for name, value in model.state_dict().items()}


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, torch.Tensor]:
    """{"<parameter name>/<state name>": full tensor} of an optimizer's state. names: {id(parameter): name}."""
    return {
        f"{names[id(parameter)]}/{what}": full_tensor(value)
        for parameter, state in optimizer.state.items()
        for what, value in state.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict, names: dict[int, str]) -> None:
    """Loads tensors from `optimizer_tensors` into the optimizer, by parameter name."""
    of_parameter: dict[str, dict] = {}
    for key, value in tensors.items():
        name, _, what = key.rpartition("/")
        of_parameter.setdefault(name, {})[what] = value
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        number: {what: shard_like(value, parameter) for what, value in of_parameter[names[id(parameter)]].items()}
        for number, parameter in enumerate(parameters)
        if names[id(parameter)] in of_parameter
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def shard_like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """`value`, sharded like the parameter."""
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value
