"""Attention of packed sequences as `torch.nn.attention.varlen.varlen_attn` computes it, without its CUDA kernel, with
the arguments of torch 2.13 that the network may use (`attend_causally`) and with those of torch 2.11."""

import torch
from torch import Tensor
from torch.nn import functional as F


def attend_causally(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    key_starts: Tensor,
    longest: int,
    longest_keys: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """Causal attention of queries [tokens, heads, width] to keys and values [tokens, key-value heads, width], one
    sequence after the other: [tokens, heads, width]. starts, key_starts: int32 [sequences + 1]. AssertionError for
    arguments that the kernel does not take, or unless they ask for causal attention."""
    assert (starts.dtype, key_starts.dtype, len(starts)) == (torch.int32, torch.int32, len(key_starts))
    assert window_size == (-1, 0)
    assert enable_gqa or queries.shape[1] == keys.shape[1]
    repeats, rest = divmod(queries.shape[1], keys.shape[1])
    assert (rest, keys.shape) == (0, values.shape)
    keys, values = (part.repeat_interleave(repeats, 1) for part in (keys, values))
    found, starts, key_starts = [], starts.tolist(), key_starts.tolist()
    assert (starts[0], starts[-1], key_starts[0], key_starts[-1]) == (0, len(queries), 0, len(keys))
    for start, end, key_start, key_end in zip(starts, starts[1:], key_starts, key_starts[1:], strict=False):
        size, num_keys = end - start, key_end - key_start
        assert (size <= longest, num_keys <= longest_keys) == (True, True)
        seen = torch.ones(size, num_keys, dtype=torch.bool, device=queries.device).tril(num_keys - size)
        own = (queries[start:end], keys[key_start:key_end], values[key_start:key_end])
        mixed = F.scaled_dot_product_attention(*(part.transpose(0, 1) for part in own), seen, scale=scale)
        found.append(mixed.transpose(0, 1))
    return torch.cat(found)


def attend_equal_heads(
    *tensors_and_lengths, scale: float | None = None, window_size: tuple[int, int] = (-1, -1)
) -> Tensor:
    """`attend_causally` for as many key-value heads as heads, without the argument that says otherwise."""
    return attend_causally(*tensors_and_lengths, scale=scale, window_size=window_size)
