"""Learning-rate schedules."""

import math


def learning_rate(step: int, num_steps: int, peak: float, group: str, settings) -> float:
    """The learning rate of a parameter group at a step (counted from 0) out of `num_steps`.

    Linear warm-up to `peak` over `warmup_ratio` of the steps, then by `settings.schedule`:
    constant     stays at `peak`
    cosine       half-cosine decay to min_lr_ratio * peak at the last step
    wsd          warmup-stable-decay: stays at `peak`, then decays linearly to min_lr_ratio * peak over the last
                 decay_share of all steps
    converging   half-cosine to the group's converged_learning_rate, which may be above or below `peak`, so that
                 groups that start at a ratio of 100:1 may end at 1:1
    """
    warmup = round(settings.warmup_ratio * num_steps)
    if step < warmup:
        return (step + 1) / warmup * peak
    progress = min(1.0, (step - warmup) / max(1, num_steps - 1 - warmup))
    half_cosine = 0.5 * (1 + math.cos(math.pi * progress))
    if settings.schedule == "constant":
        return peak
    if settings.schedule == "converging":
        end = getattr(settings.converged_learning_rate, group)
        return end + (peak - end) * half_cosine
    final = settings.min_lr_ratio
    if settings.schedule == "cosine":
        return (final + (1 - final) * half_cosine) * peak
    first_of_decay = num_steps - round(settings.decay_share * num_steps)
    if step < first_of_decay:
        return peak
    return (1 - (1 - final) * (step + 1 - first_of_decay) / (num_steps - first_of_decay)) * peak
