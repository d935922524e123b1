"""The network and its processor: nothing here knows of shards or stages.

`save_pretrained` copies these files beside the weights, so that a checkpoint loads without this repository
(`trust_remote_code=True`). Each file imports its neighbours by `from .name import ...` only, which is what the library
follows. The classes below are loaded on first use: `model.frames`, `model.pictures` and `model.video` import neither
torch nor transformers.
"""

from importlib import import_module

_CLASSES = {
    "FoveatedVLMConfig": "configuration_foveated_vlm",
    "FoveatedVLMForConditionalGeneration": "modeling_foveated_vlm",
    "FoveatedVLMOutput": "outputs",
    "FoveatedVLMProcessor": "processing_foveated_vlm",
    "FoveationOptions": "options",
}
__all__ = list(_CLASSES)


def __getattr__(name: str):
    """The class `name`, after registering all of them with the library's Auto classes."""
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module(".registration", __name__)
    return getattr(import_module(f".{_CLASSES[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *_CLASSES])
