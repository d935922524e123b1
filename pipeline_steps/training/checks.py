"""What stops a run or warns of one that cannot end well, with the name of what is wrong.

F frames, P visual tokens per frame, N patches.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.files import writable, write_json
from pipeline_steps.streaming.batch import Batch
from pipeline_steps.training.objectives.entropy import attention_entropy

UNIFORM = 0.98  # of the entropy of attention to everything alike
SAME = 0.98  # cosine similarity of two looks that see the same
BOUND = 0.9  # accuracy above which things are bound to their objects


def refuse_non_finite(stage: str, step: int, loss: float, norm: float, batch: Batch, folder: Path) -> None:
    """UserError when the loss or the gradient of a step is no number: names the samples and keeps the batch."""
    if np.isfinite(loss) and np.isfinite(norm):
        return
    path = folder / f"non_finite-{step:08d}.safetensors"
    tensors = {name: value.contiguous().cpu() for name, value in batch.tensors().items()}
    with writable(folder):
        save_file(tensors, path)
    write_json(path.with_suffix(".json"), {"keys": batch.keys, "loss": str(loss), "grad_norm": str(norm), "step": step})
    raise UserError(
        f"{stage} step {step}: loss {loss}, gradient norm {norm} on samples {', '.join(batch.keys)}. Lower "
        f"training.{stage}.learning_rate or look at these samples: the batch is {path}, and the last "
        "state, if there is one, is beside it."
    )


def attention_diagnostics(fine, coarse, num_frames: torch.Tensor) -> dict[str, float]:
    """Numbers that tell a run that looks from one that does not, from a fine and a coarse output with attention.

    attention_entropy: nats, last layer, mean over frames and heads; attention_uniformity: the same as a share of
    log(N + 1). token_similarity: mean cosine of the visual tokens of different frames of a sample;
    coarse_similarity: mean cosine of a frame's fine and coarse token. num_frames [B].
    """
    weights = fine.attention_weights[-1].float()  # [F, H, K, N + 1]
    entropy = attention_entropy(weights).mean()
    tokens = F.normalize(fine.visual_tokens.float().flatten(1), dim=-1)  # [F, P * E]
    pairs = [piece @ piece.T for piece in tokens.split(num_frames.tolist()) if len(piece) > 1]
    others = [pair[~torch.eye(len(pair), dtype=torch.bool, device=pair.device)] for pair in pairs]
    same = F.cosine_similarity(fine.visual_tokens.float(), coarse.visual_tokens.float(), dim=-1)
    return {
        "attention_entropy": entropy.item(),
        "attention_uniformity": entropy.item() / np.log(weights.shape[-1]),
        "token_similarity": torch.cat(others).mean().item() if others else float("nan"),
        "coarse_similarity": same.mean().item(),
    }


def plateau(
    losses: list[float], accuracies: list[float], diagnostics: dict, validations: int, progress: float
) -> str | None:
    """Why a run that has stopped learning has stopped, in words, or None while it learns, or where nothing is known.

    losses, accuracies: means of every validation so far. A plateau: over the last `validations` of them the best loss
    is not lower by the share `progress` than the best one before.
    """
    if len(losses) <= validations:
        return None
    before, since = min(losses[:-validations]), min(losses[-validations:])
    if since < before * (1 - progress):
        return None
    found = f"validation loss {since:.3f} in the last {validations} validations, {before:.3f} before"
    uniformity, same = diagnostics.get("attention_uniformity", 0), diagnostics.get("coarse_similarity", 0)
    if uniformity > UNIFORM:
        return (
            f"{found}: uniform attention ({uniformity:.0%} of its greatest entropy), the queries choose nothing. Raise "
            "the connector's learning rate, or warm up queries with the vision encoder first."
        )
    if same > SAME:
        return (
            f"{found}: coarse = fine (cosine {same:.2f}), planned queries find what the static one finds. Raise "
            "objective.second_pass_probability or the connector's learning rate."
        )
    if accuracies[-1] < BOUND:
        return (
            f"{found}, accuracy {accuracies[-1]:.0%}, though attention chooses: the multiset plateau, if answers hold "
            "the right things of the wrong object (tokens list what there is without binding it). Train longer, or "
            "begin with clips of one object."
        )
    return None


def warn_of_repeats(stage: str, mixture: dict[str, dict], warn_above_epochs: float) -> list[str]:
    """A line for every group of the mixture that the run would serve more than `warn_above_epochs` times."""
    return [
        f"{stage}: '{name}' is served {row['epochs']:.1f} times, more than runtime.warn_above_epochs "
        f"({warn_above_epochs:g}): collect more of it, or lower its weight or num_samples"
        for name, row in mixture.items()
        if row["epochs"] > warn_above_epochs
    ]


def find_micro_batch_size(batch_size: int, try_size: Callable[[int], None]) -> int:
    """The largest of batch_size, its half, its quarter ... with which `try_size`, a forward and a backward pass of that
    many of the largest samples, does not run out of memory. UserError when a single one does."""
    size = batch_size
    while True:
        try:
            try_size(size)
            return size
        except torch.OutOfMemoryError:
            pass
        if torch.cuda.is_available():  # outside of the handler, whose error still holds what the attempt made
            torch.cuda.empty_cache()
        if size == 1:
            raise UserError(
                "a single sample is too large for the GPU's memory. Set training.common.activation_checkpointing: true "
                "or training.common.precision: bf16, or lower shards.max_frames or tokens.max_tokens."
            )
        size = (size + 1) // 2
