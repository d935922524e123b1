"""Loading of pretrained backbone folders in Hugging Face format. Incomplete or mismatched weights are errors."""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig


def backbone_config(path: str | Path, expected: str):
    """The configuration of a backbone folder. Raises ValueError unless its model_type is the expected one."""
    if not (Path(path) / "config.json").exists():
        raise ValueError(f"{path} has no config.json. Pass the folder of a saved {expected!r} model")
    config = AutoConfig.from_pretrained(path)
    if config.model_type != expected:
        raise ValueError(
            f"{path} contains a {config.model_type!r} model, expected {expected!r}. Pass the folder of such a backbone"
        )
    for name in ("auto_map", "custom_pipelines"):  # a backbone's own code is not used, so nothing may name it
        config.__dict__.pop(name, None)
    return config


def check_weights(path: str | Path, missing, unexpected, mismatched=()) -> None:
    """Raises ValueError unless the weights of a folder match its configuration. Arguments: names of the weights."""
    if missing or unexpected or mismatched:
        names = [*sorted(missing), *sorted(unexpected), *map(str, sorted(mismatched))]
        raise ValueError(
            f"{path}: the weights do not match config.json: {len(missing)} missing, {len(unexpected)} unexpected, "
            f"{len(mismatched)} of another shape ({', '.join(names[:3])}). Save weights and configuration of the same "
            "model"
        )


def load_whole(module: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Loads all weights of a module. ValueError if a name or shape does not match."""
    own = module.state_dict()
    shared = own.keys() & weights.keys()
    mismatched = [name for name in shared if weights[name].shape != own[name].shape]
    check_weights(path, own.keys() - weights.keys(), weights.keys() - own.keys(), mismatched)
    module.load_state_dict(weights)


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a model folder: those of its index, or its only one. ValueError if one is missing or the
    index is damaged."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        try:
            names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f"{index}: not a JSON object with a weight_map of weights and file names. Copy the backbone again"
            ) from None
    files = [folder / name for name in names]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise ValueError(
            f"{folder} has no {missing[0]} ({len(missing)} of {len(files)} files of weights are missing). Save the "
            "weights there as safetensors (save_pretrained does)"
        )
    return files


def damaged(file: Path, error: SafetensorError) -> str:
    """The message about a safetensors file that cannot be read."""
    return f"{file}: not a whole safetensors file ({error}). Copy it again"


def read_vision_weights(path: str | Path) -> dict[str, Tensor]:
    """{published key name: fp32 tensor} of a DINOv2 folder. ValueError if a safetensors file is missing or damaged."""
    weights = {}
    for file in weight_files(path):
        try:
            weights.update(load_file(file))
        except SafetensorError as error:
            raise ValueError(damaged(file, error)) from None
    return {key.removeprefix("dinov2."): value.float() for key, value in weights.items()}
