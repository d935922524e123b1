"""The gradient of one step, from micro-batches and processes, equal to that of one batch in one piece.

The losses of a model's output are means over what one micro-batch holds: labelled tokens, frames, or pairs of answers.
Each is weighted by its share of what the whole step holds, over all micro-batches and processes, so that every token
counts the same wherever it is computed.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

IGNORE_INDEX = -100
PER_SAMPLE = (
    "input_ids",
    "attention_mask",
    "labels",
    "rejected_input_ids",
    "rejected_attention_mask",
    "rejected_labels",
)
TEXTS = {"": "attention_mask", "rejected_": "rejected_attention_mask"}


def counts(batch: dict) -> tuple[int, int, int]:
    """What a batch's losses are means over: (labelled tokens, frames, samples)."""
    # the first token of a sequence has no state before it that would predict it
    labelled = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    return labelled, int(batch["num_frames"].sum()), len(batch["input_ids"])


def shares(of: tuple[int, int, int], total: Sequence[float]) -> list[float]:
    """What part of a step's `counts` (`total`, maybe with more after them) a micro-batch's `of` are."""
    return [own / max(full_tensor, 1) for own, full_tensor in zip(of, total, strict=False)]


def weighted_loss(output, config, of: tuple[int, int, int], total: Sequence[float]) -> Tensor:
    """This micro-batch's part of the step's loss. `of`: its own `counts`; `total`: those of the whole step."""
    tokens, frames, samples = shares(of, total)
    if output.reward_margin is not None:
        return output.loss * samples
    loss = output.loss_text * tokens
    if output.loss_coarse is not None:
        loss = loss + config.lambda_coarse * output.loss_coarse * tokens
    if output.loss_entropy is not None:
        loss = loss + config.lambda_entropy * output.loss_entropy * frames
    if output.loss_contrastive is not None:
        loss = loss + config.lambda_contrastive * output.loss_contrastive * frames
    return loss


def micro_batches(batch: dict, size: int | None) -> Iterator[dict]:
    """The batch in pieces of at most `size` samples (None: in one), each without the padding that it does not need."""
    num_samples = len(batch["input_ids"])
    if size is None or size >= num_samples:
        yield batch
        return
    ends = batch["num_frames"].cumsum(0).tolist()
    for start in range(0, num_samples, size):
        stop = min(start + size, num_samples)
        frames = slice(ends[start - 1] if start else 0, ends[stop - 1])
        piece = {"num_frames": batch["num_frames"][start:stop], "keys": batch["keys"][start:stop]}
        piece |= {name: batch[name][frames] for name in ("pixel_values", "target_patches") if name in batch}
        for prefix, mask in TEXTS.items():
            if mask in batch:
                length = int(batch[mask][start:stop].sum(1).max())  # padding is on the right
                names = [name for name in PER_SAMPLE if name in batch and name.startswith("rejected_") == bool(prefix)]
                piece |= {name: batch[name][start:stop, :length] for name in names}
        yield piece
