"""The one place that says what is trainable and with which learning rate."""

from torch import nn

GROUPS = ("connector", "vision", "language")


def group_of(name: str) -> str:
    """Learning-rate group of a parameter: pretrained backbone weights have their own, everything else is connector."""
    if name.startswith("vision_encoder."):
        return "vision"
    return "language" if name.startswith("language_model.") else "connector"


def trainable_parameters(
    model: nn.Module, learning_rate: dict[str, float], weight_decay: float
) -> tuple[list[dict], list[dict]]:
    """Optimizer groups and the table that is printed and saved.

    `learning_rate`: peak of each of GROUPS; 0 freezes the group (its parameters no longer require gradients). Weight
    decay applies to matrices only. Raises ValueError when nothing is left to train.
    """
    optimizer_groups, table = [], []
    for group in GROUPS:
        rate = learning_rate[group]
        members = [(name, p) for name, p in model.named_parameters() if group_of(name) == group]
        for _, parameter in members:
            parameter.requires_grad_(rate > 0)
        matrices = [p for _, p in members if p.ndim >= 2]
        vectors = [p for _, p in members if p.ndim < 2]
        if rate > 0:
            optimizer_groups += [
                {"params": matrices, "weight_decay": weight_decay, "peak": rate, "name": group},
                {"params": vectors, "weight_decay": 0.0, "peak": rate, "name": group},
            ]
        count = sum(p.numel() for _, p in members)
        table.append(
            {"group": group, "parameters": count, "trainable": count if rate > 0 else 0, "learning_rate": rate}
        )
    if not optimizer_groups:
        raise ValueError("all learning rates are 0: nothing is trained")
    return [group for group in optimizer_groups if group["params"]], table


def format_table(table: list[dict]) -> str:
    rows = [f"  {'group':<10} {'parameters':>12} {'trainable':>12} {'learning rate':>14}"]
    rows += [
        f"  {r['group']:<10} {r['parameters']:>12,} {r['trainable']:>12,} {r['learning_rate']:>14.1e}" for r in table
    ]
    return "\n".join(rows)
