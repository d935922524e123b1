"""Counts what a network starts on a device, by a dispatch trace on the CPU.

Root mean squares count as one operation forward and one backward: CUDA has them as `_fused_rms_norm` and
`_fused_rms_norm_backward` (tests/gpu/test_network.py holds that), a CPU as about six and fourteen operations.
"""

from contextlib import contextmanager
from unittest import mock

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Dinov2Config, LlamaConfig

from model import FoveatedVLMConfig, FoveatedVLMForConditionalGeneration


class Launches(TorchDispatchMode):
    """Counts the operations that start work on a device, and those for which the host waits.

    On a CPU a copy to the host starts no operation. It is seen where it is asked for by name (`HostCopies`), in `to` by
    the string "cpu", but not in `to` with a torch.device, nor in `copy_` to a tensor of the host.
    """

    WAITS = (
        "_local_scalar_dense",  # item(), int(), bool()
        *("equal", "allclose", "is_nonzero", "nonzero", "masked_select", "bincount"),
        *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
    )
    IDLE = ("_unsafe_view", "detach", "lift_fresh", "empty", "new_empty", "profiler::")  # views; memory alone; marks

    def __init__(self):
        super().__init__()
        self.count, self.waits = 0, []
        self._copies = HostCopies(self.waits)

    def __enter__(self):
        self._fused = mock.patch.object(F, "rms_norm", lambda *arguments: FusedRMSNorm.apply(self, *arguments))
        self._fused.start()
        self._copies.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._copies.__exit__(*error)
        self._fused.stop()

    @contextmanager
    def as_one(self):
        """Operations inside the block count as one."""
        before = self.count
        yield
        self.count = before + 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        by_mask = name.startswith(("index", "_index_put")) and any(
            torch.is_tensor(index) and index.dtype == torch.bool
            for arg in args
            if isinstance(arg, list | tuple)
            for index in arg
        )
        of_unknown_size = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in self.WAITS or by_mask or of_unknown_size:
            self.waits.append(name)
        idle = function.is_view or name.startswith(self.IDLE)
        self.count += not idle
        return function(*args, **(kwargs or {}))


class HostCopies(TorchFunctionMode):
    """Notes the names of the methods by which a tensor is copied to the host."""

    METHODS = (torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.tolist)

    def __init__(self, waits: list[str]):
        super().__init__()
        self._waits = waits

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_move = function is torch.Tensor.to and any(
            isinstance(value, str) and value == "cpu" for value in (*args, *kwargs.values())
        )
        if is_move or function in self.METHODS:
            self._waits.append(function.__name__)
        return function(*args, **kwargs)


class FusedRMSNorm(torch.autograd.Function):
    """`F.rms_norm` whose operations count as one."""

    @staticmethod
    def forward(ctx, launches, rows, shape, weight, epsilon):
        ctx.launches, ctx.options = launches, (shape, epsilon)
        ctx.save_for_backward(rows, weight)
        with launches.as_one():
            return torch.rms_norm(rows, shape, weight, epsilon)

    @staticmethod
    def backward(ctx, gradient):
        (shape, epsilon), inputs = ctx.options, [saved.detach().requires_grad_() for saved in ctx.saved_tensors]
        with ctx.launches.as_one(), torch.enable_grad():
            found = torch.autograd.grad(torch.rms_norm(inputs[0], shape, inputs[1], epsilon), inputs, gradient)
        return None, found[0], None, found[1], None


def true_depths(**options):
    """12 vision and 30 language layers with the head ratio of SmolLM2-135M, narrow."""
    vision = Dinov2Config(hidden_size=24, num_hidden_layers=12, num_attention_heads=2, image_size=28, patch_size=14)
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=36,
        intermediate_size=48,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    config = FoveatedVLMConfig(vision, text, query_dim=24, visual_scale=0.1, visual_token_id=64, **options)
    return FoveatedVLMForConditionalGeneration(config).eval()
