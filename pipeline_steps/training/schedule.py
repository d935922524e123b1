"""Learning rate over a stage."""

import math


def learning_rate_factor(step: int, num_steps: int, warmup_share: float, final: float) -> float:
    """Linear warm-up to 1, then a cosine that ends at `final` on the last step. `step` counts from 0."""
    warmup = round(warmup_share * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - 1 - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
