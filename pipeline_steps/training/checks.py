"""Checks that stop a run or warn about it: non-finite losses, plateaus, repeated data, GPU memory.

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

UNIFORM_ATTENTION = 0.98  # entropy / maximum entropy above which attention counts as uniform
SAME_TOKEN = 0.98  # cosine similarity above which two visual tokens count as equal
BOUND_ACCURACY = 0.9  # accuracy above which attributes count as bound to their objects


def check_finite(stage: str, step: int, loss: float, norm: float, batch: Batch, folder: Path, rank: int = 0) -> None:
    """UserError if the loss or gradient norm of a step is NaN or infinite. Saves this rank's batch and names its
    samples: every rank has a file of its own."""
    if np.isfinite(loss) and np.isfinite(norm):
        return
    path = folder / f"non_finite-{step:08d}-rank{rank}.safetensors"
    tensors = {name: value.contiguous().cpu() for name, value in batch.tensors().items()}
    with writable(folder):
        save_file(tensors, path)
    write_json(path.with_suffix(".json"), {"keys": batch.keys, "loss": str(loss), "grad_norm": str(norm), "step": step})
    raise UserError(
        f"{stage} step {step}: loss {loss}, gradient norm {norm} on samples {', '.join(batch.keys)} (rank {rank}). The "
        f"weights were not updated. Lower training.{stage}.learning_rate or inspect the batch, {path}, and those of "
        "other ranks beside it; the last state is in the same folder."
    )


def attention_diagnostics(fine, coarse, num_frames: torch.Tensor) -> dict[str, float]:
    """Diagnostics of whether the queries select anything, from a fine and a coarse output with attention weights.

    attention_entropy: nats, last layer, mean over frames and heads. attention_uniformity: the same divided by
    log(N + 1). token_similarity: mean cosine similarity of the visual tokens of different frames of a sample.
    coarse_similarity: mean cosine similarity of a frame's fine and coarse token. num_frames: [B].
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
    """The likely cause of a plateau with advice, or None if the run still improves or no known cause fits.

    losses, accuracies: means of every validation so far. A plateau: the best loss of the last `validations` is not at
    least the share `progress` below the best earlier one.
    """
    if len(losses) <= validations:
        return None
    before, since = min(losses[:-validations]), min(losses[-validations:])
    if since < before * (1 - progress):
        return None
    found = f"validation loss {since:.3f} in the last {validations} validations, {before:.3f} before"
    uniformity, same = diagnostics.get("attention_uniformity", 0), diagnostics.get("coarse_similarity", 0)
    if uniformity > UNIFORM_ATTENTION:
        return (
            f"{found}: uniform attention ({uniformity:.0%} of the maximum entropy), so the queries select nothing. "
            "Raise the connector's learning rate, or warm up the queries with the vision encoder first."
        )
    if same > SAME_TOKEN:
        return (
            f"{found}: coarse = fine (cosine {same:.2f}), so planned queries return the same as the static query. "
            "Raise objective.second_pass_probability or the connector's learning rate."
        )
    if accuracies[-1] < BOUND_ACCURACY:
        return (
            f"{found}, accuracy {accuracies[-1]:.0%}, although attention is selective. Check the answers: if "
            "attributes are right but bound to the wrong object, this is the multiset plateau (tokens list the "
            "attributes of a frame without binding them). Train longer, or start with clips of one object."
        )
    return None


def repeat_warnings(stage: str, mixture: dict[str, dict], warn_above_epochs: float) -> list[str]:
    """One line for every mixture entry whose items the run repeats more than `warn_above_epochs` times."""
    return [
        f"{stage}: {row['epochs']:.1f} epochs of '{name}', more than runtime.warn_above_epochs "
        f"({warn_above_epochs:g}). Add data, or lower its weight or num_samples."
        for name, row in mixture.items()
        if row["epochs"] > warn_above_epochs
    ]


def find_micro_batch_size(batch_size: int, try_size: Callable[[int], None]) -> int:
    """The largest size that fits into GPU memory: batch_size, or a half of the size before, rounded up.

    try_size: runs forward and backward with that many of the largest samples. UserError if a single sample does not
    fit.
    """
    size = batch_size
    while True:
        try:
            try_size(size)
            return size
        except torch.OutOfMemoryError:
            pass
        if torch.cuda.is_available():  # outside the handler: the exception still references the tensors of the attempt
            torch.cuda.empty_cache()
        if size == 1:
            raise UserError(
                "a single sample does not fit into GPU memory (micro-batch size 1). Set "
                "training.common.activation_checkpointing: true or training.common.precision: bf16, or lower "
                "shards.max_frames or tokens.max_tokens."
            )
        size = (size + 1) // 2
