"""ADAPTERS: {module name: its `Adapter`} for all modules in `adapters/`."""

from importlib import import_module

from pipeline_steps.sources.hub import adapters

ADAPTERS = {name: import_module(f"{adapters.__name__}.{name}").ADAPTER for name in adapters.NAMES}
