"""The network and its processor. This package is independent of shards and pipeline stages.

`save_pretrained` copies these files into the checkpoint, which then loads without this repository
(`trust_remote_code=True`). Files import each other by `from .name import ...` only, because transformers follows only
such imports. The classes are loaded on first use, so `model.frames`, `model.pictures` and `model.video` can be imported
without torch and transformers.
"""

from importlib import import_module

_CLASSES = {
    "FoveatedVLMConfig": "configuration_foveated_vlm",
    "FoveatedVLMForConditionalGeneration": "modeling_foveated_vlm",
    "FoveatedVLMImageProcessor": "image_processing_foveated_vlm",
    "FoveatedVLMOutput": "outputs",
    "FoveatedVLMProcessor": "processing_foveated_vlm",
    "FoveatedVLMVideoProcessor": "video_processing_foveated_vlm",
    "FoveationOptions": "options",
}
__all__ = list(_CLASSES)


def __getattr__(name: str):
    """The class `name`, after registering all classes with the Auto classes of transformers."""
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module(".registration", __name__)
    return getattr(import_module(f".{_CLASSES[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *_CLASSES])
