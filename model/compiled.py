"""Regional compilation: torch.compile for one layer at a time.

All layers of a stack share one code object with their weights as inputs, so one compilation serves all of them. Sizes
that vary between calls (frames, samples, rows, sequence length) become dynamic at their first change; widths and head
counts stay static. Tensors that depend on batch values (masks, rotary angles, indices) are computed outside the graphs.
"""

from collections.abc import Iterable
from functools import wraps

import torch
from torch import nn

# Graphs of one layer: with and without gradients, mask and attention weights; one sample or frame and several; the last
# layer. With `fullgraph`, exceeding the limit (torch's default: 8) is an error.
MAX_GRAPHS = 64


def compile_layers(vision_layers: Iterable[nn.Module], language_layers: Iterable[nn.Module], **options) -> None:
    """Compiles `forward` of all layers, and `attend` of vision layers, in place. Module hooks and activation
    checkpointing stay outside the graphs.

    options: of torch.compile, with `fullgraph=True` by default. Raises the process's recompile_limit to MAX_GRAPHS.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
    options = {"fullgraph": True, **options}
    for layer in vision_layers:
        layer.forward = torch.compile(layer.forward, **options)
        layer.attend = torch.compile(layer.attend, **options)
    for layer in language_layers:
        layer.forward = _compiled_without_cache(layer.forward, options)


def _compiled_without_cache(forward, options: dict):
    """A forward that runs compiled, or eagerly if it gets a key-value cache."""
    compiled = torch.compile(forward, **options)

    @wraps(forward)
    def run(*arguments, past_key_values=None, **others):
        if past_key_values is not None:
            return forward(*arguments, past_key_values=past_key_values, **others)
        return compiled(*arguments, **others)

    return run
