"""Removes from configuration files of models what names code to download or import.

transformers imports the classes in `auto_map` and `custom_pipelines`, the functions in `custom_generate` and the
attention kernels that `attn_implementation` names, when a folder is loaded with `trust_remote_code`. Backbones bring no
code into a run, and published checkpoints name only the code that they carry.
"""

import json
from pathlib import Path

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.files import write_text

PATTERN = "*config.json"  # config, generation_config, tokenizer_config, processor_config, ...
NAMING_CODE = ("auto_map", "custom_pipelines", "custom_generate", "trust_remote_code", "code_revision")
KERNELS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation")
OWN = {
    "AutoConfig": "configuration_foveated_vlm.FoveatedVLMConfig",
    "AutoModelForImageTextToText": "modeling_foveated_vlm.FoveatedVLMForConditionalGeneration",
    "AutoImageProcessor": "image_processing_foveated_vlm.FoveatedVLMImageProcessor",
    "AutoVideoProcessor": "video_processing_foveated_vlm.FoveatedVLMVideoProcessor",
    "AutoProcessor": "processing_foveated_vlm.FoveatedVLMProcessor",
}


def without_code(value, keep_own: bool, path: str = "") -> tuple[object, list[str]]:
    """(JSON value without keys that name code, dotted keys that were removed). keep_own: keep the entries of OWN in the
    outermost `auto_map`."""
    if isinstance(value, list):
        pairs = [without_code(entry, keep_own, f"{path}{number}.") for number, entry in enumerate(value)]
        return [entry for entry, _ in pairs], [key for _, keys in pairs for key in keys]
    if not isinstance(value, dict):
        return value, []
    found, removed = {}, []
    for name, entry in value.items():
        if name == "auto_map" and keep_own and not path and isinstance(entry, dict):
            found[name] = {key: place for key, place in entry.items() if OWN.get(key) == place}
            removed += [f"{name}.{key}" for key in entry if key not in found[name]]
        elif name in NAMING_CODE or (name in KERNELS and "/" in str(entry)):
            removed.append(f"{path}{name}")
        else:
            found[name], below = without_code(entry, keep_own, f"{path}{name}.")
            removed += below
    return found, removed


def strip_code(folder: Path, keep_own: bool) -> list[str]:
    """Removes keys that name code from the configuration files of a folder. Returns 'file: key' of each. Files without
    such keys keep their bytes. UserError for invalid JSON."""
    lines = []
    for file in sorted(folder.glob(PATTERN)):
        try:
            cleaned, removed = without_code(json.loads(file.read_text(encoding="utf-8")), keep_own)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}: not valid JSON ({error}). Save the model again.") from None
        if removed:
            write_text(file, json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n")
            lines += [f"{file.name}: {key}" for key in removed]
    return lines
