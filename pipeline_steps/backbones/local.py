"""Check and copy existing backbones: two folders in Hugging Face format, a GGUF file of the language model, or the
backbones within a trained checkpoint.

Supported are any `facebook/dinov2-*` and any Llama with a ChatML tokenizer (`HuggingFaceTB/SmolLM2-*-Instruct`).
"""

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import FoveatedVLMConfig
from model.backbones import damaged, weight_files
from pipeline_steps.common.checkpoint import load_model
from pipeline_steps.common.code_keys import strip_code
from pipeline_steps.common.errors import UserError

from .convert import language_model_from_gguf
from .schema import Local

SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>")
COPIED = ("*.json", "*.safetensors", "*.jinja", "merges.txt")
# (model_type, required files, a weight that identifies the architecture)
VISION = ("dinov2", ("config.json",), "embeddings.patch_embeddings.projection.weight")
LANGUAGE = ("llama", ("config.json", "tokenizer.json", "tokenizer_config.json"), "model.embed_tokens.weight")


def copy_backbones(local: Local, folder: Path) -> dict:
    """Check both folders and copy them below `folder`, without keys that name code. Returns size and sha256 of every
    file.

    A `.gguf` file in place of the language model's folder is converted (needs the extra `pretrained`); of a trained
    checkpoint the vision encoder, or the language model with its tokenizer, is taken. Raises UserError if a folder is
    not a usable backbone.
    """
    paths = {"vision_encoder": local.vision_path, "language_model": local.language_path}
    for role, key in (("vision_encoder", "vision_path"), ("language_model", "language_path")):
        if paths[role] is None:
            raise UserError(
                f"backbones.local.{key} is null, expected the folder of the {role}. Set it or use kind embedded."
            )
        paths[role] = Path(paths[role]).expanduser()
    for role, key in (("vision_encoder", "vision_path"), ("language_model", "language_path")):
        if is_checkpoint(paths[role]):
            with tempfile.TemporaryDirectory(dir=folder) as parts:
                save_backbones(paths[role], Path(parts))
                return copy_backbones(local.model_copy(update={key: str(Path(parts) / role)}), folder)
    check_folder(paths["vision_encoder"], *VISION)
    if paths["language_model"].suffix == ".gguf":
        with tempfile.TemporaryDirectory(dir=folder) as converted:
            language_model_from_gguf(paths["language_model"], Path(converted))
            return copy_backbones(local.model_copy(update={"language_path": converted}), folder)
    check_folder(paths["language_model"], *LANGUAGE)
    check_chat_format(paths["language_model"])
    metrics = {"kind": "local"}
    for role, path in paths.items():
        (folder / role).mkdir(parents=True)
        metrics[role] = {}
        names = sorted(file.name for pattern in COPIED for file in path.glob(pattern))
        for name in names:
            shutil.copyfile(path / name, folder / role / name)
        removed = strip_code(folder / role, keep_own=False)
        if removed:
            print(f"{path}: removed what names code ({', '.join(removed)})", file=sys.stderr)
        for name in names:
            with open(folder / role / name, "rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            metrics[role][name] = {"size": (folder / role / name).stat().st_size, "sha256": digest}
    return metrics


def is_checkpoint(folder: Path) -> bool:
    """Whether it is the folder of a trained network of this project."""
    path = folder / "config.json"
    return path.exists() and read_json(path).get("model_type") == FoveatedVLMConfig.model_type


def save_backbones(checkpoint: Path, folder: Path) -> None:
    """Write the backbones of a trained checkpoint as `folder`/vision_encoder and `folder`/language_model."""
    model = load_model(checkpoint)
    model.language_model.save_pretrained(folder / "language_model")
    for pattern in ("tokenizer*.json", "*.jinja"):
        for file in checkpoint.glob(pattern):
            shutil.copyfile(file, folder / "language_model" / file.name)
    model.config.vision_config.save_pretrained(folder / "vision_encoder")
    save_file(model.vision_encoder.state_dict(), folder / "vision_encoder" / "model.safetensors")


def check_folder(folder: Path, model_type: str, required: tuple[str, ...], weight: str) -> None:
    """Check model type, required files and one characteristic weight. Raises UserError."""
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder, expected a {model_type} model. Correct the path in backbones.local."
        )
    files = sorted(file.name for file in folder.iterdir())
    missing = [name for name in required if name not in files]
    if missing:
        found = ", ".join(files) or "nothing"
        raise UserError(f"{folder}: {', '.join(missing)} missing, found {found}. Save the complete model there.")
    found = read_json(folder / "config.json").get("model_type")
    if found != model_type:
        raise UserError(f"{folder}: model_type is {found!r}, expected {model_type!r}. Correct backbones.local.")
    names = weight_names(folder)
    if weight not in {name.removeprefix("dinov2.") for name in names}:
        raise UserError(
            f"{folder}: expected a weight {weight!r}, found {len(names)} others ({', '.join(sorted(names)[:3])}, ...). "
            f"Save the bare {model_type} backbone."
        )


def weight_names(folder: Path) -> list[str]:
    """The names of all weights in the safetensors files of a folder. UserError if one is missing or damaged."""
    try:
        files = weight_files(folder)
    except ValueError as error:
        raise UserError(f"{error}.") from None
    names = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                names += weights.keys()
        except SafetensorError as error:
            raise UserError(f"{damaged(file, error)}.") from None
    return names


def check_chat_format(folder: Path) -> None:
    """Check for the chat template and the ChatML tokens that all later stages use. Raises UserError."""
    settings = read_json(folder / "tokenizer_config.json")
    if not (folder / "chat_template.jinja").exists() and not settings.get("chat_template"):
        raise UserError(
            f"{folder}: the tokenizer has no chat template, expected chat_template.jinja or the key chat_template in "
            f"tokenizer_config.json, found {', '.join(sorted(settings)) or 'no keys'}. Use an instruction-tuned model."
        )
    added = [token.get("content") for token in read_json(folder / "tokenizer.json").get("added_tokens", [])]
    missing = [token for token in SPECIAL_TOKENS if token not in added]
    if missing:
        raise UserError(
            f"{folder}: tokenizer.json lacks {', '.join(missing)} among its added tokens, found "
            f"{', '.join(added) or 'none'}. Use a ChatML tokenizer, such as the one of SmolLM2-Instruct."
        )


def read_json(path: Path) -> dict:
    """Read a JSON file. Raises UserError if it is invalid or holds no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}). Save the model again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}. Save the model again.")
    return content
