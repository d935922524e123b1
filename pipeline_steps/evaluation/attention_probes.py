"""Probes of the forward pass for the diagnostics: queries, visual tokens, and the sharpness of the attention.

Shapes: F frames, L layers, H heads, K queries and P visual tokens per frame, N patches, Q query width, E language
width.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from pipeline_steps.common.modes import GAZE_MODES
from pipeline_steps.evaluation import scoring
from pipeline_steps.inference.gaze import normalized_entropy

RANDOM = "random_query"
STEP = 0.01  # norm of the perturbation of a hidden state, relative to the norm of the state


@dataclass
class ModeProbes:
    """Probes of one mode over the frames of all clips; None where the network has no queries."""

    tokens: np.ndarray  # [F, P * E]
    queries: np.ndarray | None  # [F, K * Q]
    entropy: np.ndarray | None  # [L, H], divided by its maximum, mean over frames and queries
    peak: np.ndarray | None  # [L, H], the largest weight, mean over frames and queries
    focus: float | None  # largest patch weight / mean patch weight; last layer, mean over heads and frames


@dataclass
class ProbeResults:
    modes: dict[str, ModeProbes]  # by mode; includes RANDOM if the network has queries
    num_frames: list[int]  # per clip
    num_places: int  # N + 1, the keys of the attention: patches and class token
    sensitivity: float | None  # relative change of a planned query / relative change of its input hidden state

    @property
    def clips(self):
        """Clip index of every frame: [F]."""
        return np.repeat(np.arange(len(self.num_frames)), self.num_frames)

    @property
    def times(self):
        """Position of every frame in its clip: [F]."""
        return np.concatenate([np.arange(count) for count in self.num_frames])


@dataclass
class ProbeAccumulator:
    """Collects the batches of one mode for a `ModeProbes`."""

    tokens: list = field(default_factory=list)
    queries: list = field(default_factory=list)
    sharpness: list = field(default_factory=list)  # (frames, entropy, peak, focus)

    def add(self, output):
        self.tokens.append(array(output.visual_tokens.flatten(1)))
        if output.queries is not None:
            self.queries.append(array(output.queries.flatten(1)))
            self.sharpness.append((len(output.queries), *sharpness(array(output.attention_weights))))

    def result(self):
        tokens = np.concatenate(self.tokens)
        if not self.queries:
            return ModeProbes(tokens, None, None, None, None)
        frames, *values = zip(*self.sharpness, strict=True)
        entropy, peak, focus = (np.average(np.stack(value), axis=0, weights=frames) for value in values)
        return ModeProbes(tokens, np.concatenate(self.queries), entropy, peak, float(focus))


def observe(model, loaded, seed, progress):
    """`ProbeResults` of batches of clips (`scoring.batches`), or None without clips."""
    config = model.config
    has_queries = config.architecture == "foveated"
    modes = (*GAZE_MODES, RANDOM) if has_queries else GAZE_MODES
    sums, counts, changes, places = {mode: ProbeAccumulator() for mode in modes}, [], [], 0
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for _, items, batch, _ in loaded:
        counts += batch.num_frames.tolist()
        places = (batch.pixel_values.shape[-1] // config.vision_config.patch_size) ** 2 + 1
        for mode in modes:
            own, source = ("autoregressive", "random") if mode == RANDOM else (mode, None)
            with planned_from(model) as hidden:
                output = scoring.forward(model, batch, own, source, generator, has_queries)
            sums[mode].add(output)
            if mode == "fine" and hidden:
                changes.append((len(hidden[-1]), sensitivity(model.planner, hidden[-1], generator)))
        progress.update(len(items))
    if not counts:
        return None
    frames, values = zip(*changes, strict=True) if changes else ((), ())
    change = float(np.average(values, weights=frames)) if changes else None
    return ProbeResults({mode: one.result() for mode, one in sums.items()}, counts, places, change)


def array(tensor):
    return tensor.detach().float().cpu().numpy().astype(np.float64)


def sharpness(weights):
    """weights [L, F, H, K, N + 1] -> (entropy [L, H] divided by log(N + 1), peak [L, H], focus)."""
    patches = weights[-1, ..., 1:].mean(axis=(1, 2))  # [F, N]
    focus = (patches.max(-1) / np.maximum(patches.mean(-1), 1e-12)).mean()
    return normalized_entropy(weights).mean(axis=(1, 3)), weights.max(-1).mean(axis=(1, 3)), focus


@contextmanager
def planned_from(model):
    """Yields a list that collects the planner's input hidden states [frames, P, E] during forward passes."""
    hidden = []
    if not hasattr(model, "planner"):
        yield hidden
        return
    hook = model.planner.register_forward_hook(lambda _, inputs, output: hidden.append(inputs[0]))
    try:
        yield hidden
    finally:
        hook.remove()


@torch.inference_mode()
def sensitivity(planner, hidden, generator):
    """Mean over frames of (relative change of the planned queries) / STEP, when the hidden states [F, P, E] move by
    STEP of their norm in a random direction. 0: the queries ignore them; 1: the queries change as much."""
    noise = torch.randn(hidden.shape, generator=generator, device=hidden.device, dtype=hidden.dtype)
    step = STEP * noise * hidden.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    before, after = planner(hidden).flatten(1), planner(hidden + step).flatten(1)
    change = (after - before).norm(dim=-1) / before.norm(dim=-1).clamp_min(1e-12)
    return change.mean().item() / STEP
