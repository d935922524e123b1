"""Regional compilation: torch.compile for one layer at a time.

All layers of a stack run the same code object with their weights as inputs, so that one compilation serves them all.
Sizes that change between calls (frames, samples, rows, sequence) become dynamic when they first change; all others, the
widths and heads, stay static. What depends on values of the batch (masks, rotary angles, indices) is made between the
layers, outside of every graph.
"""

from collections.abc import Iterable
from functools import wraps

import torch
from torch import nn

# Graphs of one layer's code: with and without gradients, mask and attention weights, one sample or frame and several,
# the last layer's. With `fullgraph` one more than the limit (torch's own is 8) is an error.
MAX_GRAPHS = 64


def compile_layers(vision_layers: Iterable[nn.Module], language_layers: Iterable[nn.Module], **options) -> None:
    """Replaces `forward` (and `attend` of vision layers) by compiled ones; module hooks and checkpointing stay outside.

    options: torch.compile's; `fullgraph` unless given otherwise. The process's recompile_limit is raised to MAX_GRAPHS.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
    options = {"fullgraph": True, **options}
    for layer in vision_layers:
        layer.forward = torch.compile(layer.forward, **options)
        layer.attend = torch.compile(layer.attend, **options)
    for layer in language_layers:
        layer.forward = _compiled_without_cache(layer.forward, options)


def _compiled_without_cache(forward, options: dict):
    """A layer's forward that is compiled unless it is given a key-value cache."""
    compiled = torch.compile(forward, **options)

    @wraps(forward)
    def run(*arguments, past_key_values=None, **others):
        if past_key_values is not None:
            return forward(*arguments, past_key_values=past_key_values, **others)
        return compiled(*arguments, **others)

    return run
