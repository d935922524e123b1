"""Checkpoints: folders with a trained model and its processor, written and read by the stages."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast

from model import FoveatedVLMConfig, FoveatedVLMForConditionalGeneration, FoveatedVLMProcessor
from pipeline_steps.common.code_keys import strip_code
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.integrity import CHECKSUMS, verify_folder


def save_checkpoint(folder: Path, model, tokenizer_dir: Path, **options) -> None:
    """Saves model, code and processor to `folder`. options: of FoveatedVLMProcessor that the network does not
    determine.

    The tokenizer is loaded from tokenizer.json as a generic fast tokenizer, because a model-specific tokenizer class
    may split text differently. The saved configurations name no other code than that of the folder.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    model.generation_config.eos_token_id = tokenizer.eos_token_id  # answers end as in training, in any pipeline
    model.generation_config.pad_token_id = (
        tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    FoveatedVLMProcessor.for_model(model.config, tokenizer, **options).save_pretrained(folder)
    strip_code(folder, keep_own=True)


def load_model(folder: Path) -> FoveatedVLMForConditionalGeneration:
    """The model of a checkpoint in fp32 and evaluation mode. UserError if the checkpoint is missing, incomplete or
    damaged."""
    _check_type(folder)
    verify_folder(folder, f"Copy or train the checkpoint again, or delete {CHECKSUMS} if you changed it on purpose.")
    try:
        return FoveatedVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be loaded: {' '.join(str(error).split())}") from None


def load_checkpoint(folder: Path) -> tuple[FoveatedVLMForConditionalGeneration, FoveatedVLMProcessor]:
    """(model as from `load_model`, processor)."""
    model = load_model(folder)
    if not (folder / "processor_config.json").exists():
        raise UserError(f"{folder} has a model but no processor_config.json. Train it again, or copy the file there.")
    return model, FoveatedVLMProcessor.from_pretrained(folder)


def _check_type(folder: Path) -> None:
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text()).get("model_type")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path}: missing, so {folder} has no model. Train it first (`dvc repro`) or pass another folder."
        ) from None
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{path}: not a valid model configuration. Save the model again.") from None
    if found != FoveatedVLMConfig.model_type:
        raise UserError(
            f"{path}: model_type is {found!r}, expected {FoveatedVLMConfig.model_type!r}. Pass a trained checkpoint, "
            "not a backbone."
        )
