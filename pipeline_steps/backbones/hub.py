"""Download backbones from the Hugging Face Hub at pinned revisions, then check them like local folders."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

from pipeline_steps.common.errors import UserError

from .local import copy_backbones
from .schema import Hub, Local, Repository

# the files of a backbone; repositories also hold the same weights in other formats, some in subfolders
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
    """Download both repositories into the Hub's cache (HF_HOME), check them and copy them below `folder`.

    Returns the repositories, and the size and sha256 of every file. Raises UserError if a repository cannot be
    downloaded or is not a usable backbone.
    """
    paths = {role: download(getattr(hub, role), role) for role in ("vision", "language")}
    local = Local(vision_path=paths["vision"], language_path=paths["language"])
    return copy_backbones(local, folder) | {"kind": "hub", "repositories": hub.model_dump()}


def download(source: Repository, role: str) -> str:
    """Return the cache folder of a repository. Cached files are not downloaded again."""
    try:
        return snapshot_download(source.repository, revision=source.revision, allow_patterns=list(FILES))
    except (HTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"backbones.hub.{role}: {source.repository} at revision {source.revision} cannot be downloaded ({reason}). "
            "Check the name, the revision and the network. Without network, download the files on another machine "
            f"(`hf download {source.repository} --revision {source.revision} --local-dir FOLDER`), copy the folder "
            f"here, and set backbones.kind: local and backbones.local.{role}_path."
        ) from None
