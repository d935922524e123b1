"""Backbones of the Hugging Face Hub, at one revision each; then the same checks as for folders that exist already."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

from pipeline_steps.common.errors import UserError

from .local import copy_backbones
from .schema import Hub, Local, Repository

# what a backbone consists of; repositories also hold other formats of the same weights, some in folders of their own
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def download_backbones(hub: Hub, folder: Path) -> dict:
    """Download both repositories into the Hub's cache (HF_HOME), check and copy them below `folder`. Returns where
    they are from and their files' sizes and sha256. UserError for one that cannot be had or is unfit."""
    paths = {role: download(getattr(hub, role), role) for role in ("vision", "language")}
    local = Local(vision_path=paths["vision"], language_path=paths["language"])
    return copy_backbones(local, folder) | {"kind": "hub", "repositories": hub.model_dump()}


def download(source: Repository, role: str) -> str:
    """The folder of a repository's files in the cache. They are not asked for again when they are there."""
    try:
        return snapshot_download(source.repository, revision=source.revision, allow_patterns=list(FILES))
    except (HTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"backbones.hub.{role}: {source.repository} at revision {source.revision} cannot be downloaded ({reason}). "
            "Check the name, the revision and the network. Where there is none, save the files elsewhere (`hf download "
            f"{source.repository} --revision {source.revision} --local-dir FOLDER`), bring the folder here, and set "
            f"backbones.kind: local and backbones.local.{role}_path."
        ) from None
