"""Checkpoints: the folder of a trained model with its processor, as every stage writes and reads it."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast

from model import FoveatedVLMConfig, FoveatedVLMForConditionalGeneration, FoveatedVLMProcessor
from pipeline_steps.common.errors import UserError


def save_checkpoint(folder: Path, model, tokenizer_dir: Path, **options) -> None:
    """Model, code and processor into `folder`. `options`: FoveatedVLMProcessor's, beyond what the network determines.

    The tokenizer is read as its tokenizer.json says: the library's class of that name may split text in its own way.
    """
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    FoveatedVLMProcessor.for_model(model.config, tokenizer, **options).save_pretrained(folder)


def load_model(folder: Path) -> FoveatedVLMForConditionalGeneration:
    """The model of a checkpoint, in fp32, in evaluation mode. UserError when the folder does not hold a whole one."""
    _check_type(folder)
    try:
        return FoveatedVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be loaded: {' '.join(str(error).split())}") from None


def load_checkpoint(folder: Path) -> tuple[FoveatedVLMForConditionalGeneration, FoveatedVLMProcessor]:
    """`load_model`, and the processor beside it."""
    model = load_model(folder)
    if not (folder / "processor_config.json").exists():
        raise UserError(f"{folder} holds a model without processor_config.json: train it again, or copy the file there")
    return model, FoveatedVLMProcessor.from_pretrained(folder)


def _check_type(folder: Path) -> None:
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text()).get("model_type")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path}: missing, so {folder} holds no model. Train it first (`dvc repro`) or name another folder."
        ) from None
    except (ValueError, AttributeError):
        raise UserError(f"{path}: not the configuration of a model. Save the model again.") from None
    if found != FoveatedVLMConfig.model_type:
        raise UserError(
            f"{path}: model_type is {found!r}, expected {FoveatedVLMConfig.model_type!r}. Name a trained checkpoint, "
            "not a backbone."
        )
