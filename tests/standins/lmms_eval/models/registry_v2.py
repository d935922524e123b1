"""lmms_eval.models.registry_v2: what an entry point registers, and how its class is found."""

import importlib
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.simple_class_path is None and self.chat_class_path is None:
            raise ValueError(f"ModelManifest('{self.model_id}') requires at least one class path")


class ModelRegistryV2:
    def __init__(self) -> None:
        self._manifests = {}

    def register_manifest(self, manifest, *, overwrite=False) -> None:
        self._manifests[manifest.model_id] = manifest

    def get_model_class(self, model_name, force_simple=False):
        from lmms_eval.api.model import lmms

        module, name = self._manifests[model_name].simple_class_path.rsplit(".", 1)
        cls = getattr(importlib.import_module(module), name)
        if not issubclass(cls, lmms) or not cls.is_simple:
            raise TypeError(f"{cls} is not a simple lmms")
        return cls
