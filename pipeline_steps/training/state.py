"""Unfinished training: where its state lives, and how it is written so that a kill at any moment loses nothing but
time."""

import os
from importlib.metadata import version
from pathlib import Path

import torch

from pipeline_steps.records import fingerprint, sha256_file, writable

CODE = (
    "model",
    "pipeline_steps/streaming",
    "pipeline_steps/training",
    "pipeline_steps/checkpoint.py",
    "pipeline_steps/params.py",
    "pipeline_steps/records.py",
    "pipeline_steps/sidecar.py",
)


def run_fingerprint(stage: str, parameters: dict, inputs: list[Path]) -> str:
    """16 hex digits of everything that determines the run: parameters, input files, code, libraries."""
    root = Path(__file__).resolve().parents[2]
    code = {file for place in CODE for file in [root / place, *(root / place).rglob("*.py")] if file.is_file()}
    libraries = [version(name) for name in ("torch", "transformers")]
    return fingerprint(stage, parameters, [sha256_file(path) for path in inputs], libraries, *sorted(code))


def save_state(folder: Path, state: dict) -> None:
    """Write `state` beside the old one and put it in its place in one step."""
    partial = folder / "state.partial"
    with writable(folder):
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, folder / "state.pt")


def load_state(folder: Path) -> dict | None:
    """The last complete state, or None at the beginning of a run."""
    path = folder / "state.pt"
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
