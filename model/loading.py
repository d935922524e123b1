"""Loading of a model from two pretrained backbones or from a checkpoint."""

import hashlib
import inspect
import json
import os
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from .backbones import backbone_config, check_weights, load_whole, read_vision_weights
from .configuration_foveated_vlm import FoveatedVLMConfig

CHECKSUMS = "checksums.json"  # {file name: sha256} of a folder, by the pipeline's training stages
OWN = Path(__file__).parent

logger = logging.get_logger(__name__)


class LoadingMixin:
    """Loading, saving and embeddings of `FoveatedVLMForConditionalGeneration`."""

    @classmethod
    def from_backbones(cls, vision_path: str | Path, language_path: str | Path, **options):
        """A new model from two pretrained folders in Hugging Face format. options: fields of FoveatedVLMConfig.

        ValueError if a folder has another architecture or its weights do not match its configuration.
        """
        unknown = sorted(set(options) - set(inspect.signature(FoveatedVLMConfig).parameters))
        if unknown:
            raise ValueError(f"FoveatedVLMConfig has no option {', '.join(unknown)}. Check the spelling")
        vision_config, text_config = backbone_config(vision_path, "dinov2"), backbone_config(language_path, "llama")
        vision_config.dtype = text_config.dtype = torch.float32  # fp32 master weights, whatever the dtype of the folder
        vision_config.name_or_path = text_config.name_or_path = ""  # keep local paths out of the checkpoint
        language_model, loaded = AutoModelForCausalLM.from_pretrained(
            language_path, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
        check_weights(language_path, *(loaded[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched")))
        if options.get("visual_scale", "auto") == "auto":
            options["visual_scale"] = float(language_model.get_input_embeddings().weight.detach().std())
        options.setdefault("visual_token_id", text_config.vocab_size)
        model = cls(FoveatedVLMConfig(vision_config, text_config, **options))
        model.language_model.load_state_dict(language_model.state_dict())
        load_whole(model.vision_encoder, read_vision_weights(vision_path), vision_path)
        return model

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **options) -> nn.Module:
        """As in transformers. ValueError if the vocabulary would include the id of the visual placeholder."""
        if new_num_tokens is not None and new_num_tokens > self.config.visual_token_id:
            raise ValueError(
                f"a vocabulary of {new_num_tokens} tokens would include the visual placeholder, id "
                f"{self.config.visual_token_id}. To add tokens, build the model with "
                f"from_backbones(..., visual_token_id={new_num_tokens}) or a larger id"
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **options)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.lm_head = new_embeddings

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **options):
        """A saved model, like `from_pretrained` of transformers, but missing weights are an error.

        ValueError with names and counts if the checkpoint lacks weights, has unknown ones, or has other shapes, and for
        a folder whose code was changed after it was recorded. Logs a warning if the folder's code differs from the code
        in use.
        """
        if os.path.isdir(pretrained_model_name_or_path):
            check_code(Path(pretrained_model_name_or_path, options.get("subfolder") or ""))
        with_report = options.pop("output_loading_info", False)
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # reported as an error below
        model, report = super().from_pretrained(pretrained_model_name_or_path, *args, **options)
        shapes = {name: f"{name} {list(found)} for {list(needed)}" for name, found, needed in report["mismatched_keys"]}
        missing, unexpected = set(report["missing_keys"]) - shapes.keys(), report["unexpected_keys"]
        check_weights(pretrained_model_name_or_path, missing, unexpected, shapes.values())
        return (model, report) if with_report else model


def check_code(folder: Path) -> None:
    """Compares the code of a checkpoint folder with the sha256 that the folder records, if it does, and with this code.

    None of it is run. ValueError that names the first file that is not as recorded, with both hashes. Logs a warning
    once if the folder's code differs from the code in use.
    """
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.py"))}
    recorded = {}
    if (folder / CHECKSUMS).exists():
        try:
            recorded = dict(json.loads((folder / CHECKSUMS).read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError):
            raise ValueError(f"{folder / CHECKSUMS}: not valid JSON. Copy the checkpoint again") from None
    for name, value in found.items():
        if name in recorded and recorded[name] != value:
            raise ValueError(
                f"{folder / name}: the code was changed: sha256 {value[:12]}..., recorded "
                f"{str(recorded[name])[:12]}... ({CHECKSUMS}). Copy the checkpoint again, or delete {CHECKSUMS} if you "
                "changed it on purpose"
            )
    own = {name: OWN / name for name in found if (OWN / name).exists()}
    other = [name for name, path in own.items() if hashlib.sha256(path.read_bytes()).hexdigest() != found[name]]
    if other:
        logger.warning_once(
            f"{folder} was saved with another version of the code than the one that it is loaded with ({OWN}): "
            f"{', '.join(other)} differ. Outputs may differ from those of its own code"
        )
