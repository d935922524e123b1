"""The one place that says what is trainable and with which learning rate."""

from torch import nn

GROUPS = ("connector", "vision", "language")


def group_of(name: str) -> str:
    """Learning-rate group of a parameter: pretrained backbone weights have their own, everything else is connector."""
    if name.startswith("vision_encoder."):
        return "vision"
    return "language" if name.startswith("language_model.") else "connector"


def trainable_parameters(model: nn.Module, settings, weight_decay: float) -> tuple[list[dict], list[dict]]:
    """Optimizer groups and the table that is printed and saved.

    `settings`: the stage's learning_rate (peaks of GROUPS), freeze_vision and freeze_language. A group that is frozen
    or has the rate 0 no longer requires gradients, unless its rate rises later (converging). Weight decay applies to
    matrices only. Raises ValueError when nothing is left to train.
    """
    frozen = {"vision": settings.freeze_vision, "language": settings.freeze_language}
    optimizer_groups, table = [], []
    for group in GROUPS:
        peak = getattr(settings.learning_rate, group)
        later = getattr(settings.converged_learning_rate, group, 0) if settings.schedule == "converging" else 0
        trained = bool(peak or later) and not frozen.get(group, False)
        members = [(name, p) for name, p in model.named_parameters() if group_of(name) == group]
        for _, parameter in members:
            parameter.requires_grad_(trained)
        matrices = [p for _, p in members if p.ndim >= 2]
        vectors = [p for _, p in members if p.ndim < 2]
        if trained:
            optimizer_groups += [
                {"params": matrices, "weight_decay": weight_decay, "peak": peak, "name": group},
                {"params": vectors, "weight_decay": 0.0, "peak": peak, "name": group},
            ]
        count = sum(p.numel() for _, p in members)
        row = {"group": group, "parameters": count, "trainable": count if trained else 0}
        table.append(row | {"learning_rate": peak if trained else 0.0})
    if not optimizer_groups:
        raise ValueError("all learning rates are 0 or their groups frozen: nothing is trained")
    return [group for group in optimizer_groups if group["params"]], table


def format_table(table: list[dict]) -> str:
    rows = [f"  {'group':<10} {'parameters':>14} {'trainable':>14} {'learning rate':>14}"]
    rows += [
        f"  {r['group']:<10} {r['parameters']:>14,} {r['trainable']:>14,} {r['learning_rate']:>14.1e}" for r in table
    ]
    return "\n".join(rows)
