"""A finished network with other attention temperatures, without training it again: scores and sharpness of attention.

Shapes: L layers, F frames, H heads, K queries per frame, N patches.
"""

import math
from contextlib import contextmanager

import numpy as np

from pipeline_steps.common.diagnostic_results import TemperatureScore
from pipeline_steps.evaluation import scoring
from pipeline_steps.evaluation.attention_probes import array, sharpness

FACTORS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)  # of the trained temperature; those that the predecessor tried at 1
TOP = 0.1  # share of the places of a frame


@contextmanager
def scaled_temperature(model, factor):
    """Multiplies the attention temperature of a foveated network while the context is open."""
    config, learned = model.config, getattr(model, "log_temperature", None)
    before = config.attention_temperature if learned is None else learned.detach().clone()
    try:
        if learned is None:
            config.attention_temperature = before * factor
        else:
            learned.data += math.log(factor)
        yield
    finally:
        if learned is None:
            config.attention_temperature = before
        else:
            learned.data.copy_(before)


def measure(model, loaded):
    """[`TemperatureScore`] of FACTORS on batches of clips (`scoring.batches`) in autoregressive mode; [] without clips
    or queries."""
    if model.config.architecture != "foveated":
        return []
    sums = {factor: [] for factor in FACTORS}
    for _, _, batch, _ in loaded:
        for factor, rows in sums.items():
            with scaled_temperature(model, factor):
                output = scoring.forward(model, batch, "autoregressive", output_attentions=True)
            rows.append(batch_sums(output, batch.score_mask))
    return [score(factor, np.sum(rows, axis=0)) for factor, rows in sums.items() if rows]


def batch_sums(output, scored):
    """(nats, correct, scored tokens; entropy, peak and top tenth summed over frames, frames) of a forward pass.
    scored: bool [B, S]."""
    weights = array(output.attention_weights[-1:])  # [1, F, H, K, N + 1]
    entropy, peak, _ = sharpness(weights)
    shares = (entropy.mean(), peak.mean(), top_share(weights))
    frames = weights.shape[1]
    tokens = (
        output.token_loss.double()[scored].sum().item(),
        (output.correct & scored).sum().item(),
        scored.sum().item(),
    )
    return [*tokens, *(frames * value for value in shares), frames]


def top_share(weights):
    """Mean weight of the strongest TOP of all places together; weights [..., N + 1]."""
    count = math.ceil(TOP * weights.shape[-1])
    return np.sort(weights, axis=-1)[..., -count:].sum(-1).mean()


def score(factor, sums):
    """`TemperatureScore` of the sums of `batch_sums` over all batches."""
    loss, correct, tokens, *shares, frames = sums.tolist()
    entropy, peak, top_tenth = (min(1.0, value / frames) for value in shares)  # rounding can exceed 1
    return TemperatureScore(
        factor=factor, loss=loss / tokens, accuracy=correct / tokens, entropy=entropy, peak=peak, top_tenth=top_tenth
    )
