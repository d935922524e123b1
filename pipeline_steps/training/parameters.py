"""The one place that says what is trainable, with which learning rate and by which optimizer."""

from torch import nn

GROUPS = ("connector", "vision", "language")


def group_of(name: str) -> str:
    """Learning-rate group of a parameter: pretrained backbone weights have their own, everything else is connector."""
    if name.startswith("vision_encoder."):
        return "vision"
    return "language" if name.startswith("language_model.") else "connector"


def weight_matrices(model: nn.Module, heads: nn.Module | None = None) -> set[int]:
    """ids of the two-dimensional weights of the linear maps of network and heads, which Muon is made for.

    Not among them: embeddings of tokens (also where they are the output layer), embeddings of positions, the class
    token and learned queries, whose rows are looked up or added one by one; convolutions; maps to a single number.
    """
    linear = {
        id(module.weight)
        for module in [*model.modules(), *(heads.modules() if heads is not None else ())]
        if isinstance(module, nn.Linear) and min(module.weight.shape) > 1
    }
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return linear - embeddings - {id(model.language_model.get_output_embeddings().weight)}


def trainable_parameters(
    model: nn.Module, settings, weight_decay: float, optimizer: str, heads: nn.Module | None = None
) -> tuple[list[dict], list[dict]]:
    """Optimizer groups and the table that is printed and saved.

    model: the network. heads: the objectives' own modules, which belong to the connector.

    `settings`: the stage's learning_rate (peaks of GROUPS), freeze_vision and freeze_language. A group that is frozen
    or has the rate 0 no longer requires gradients, unless its rate rises later (converging). Weight decay applies to
    matrices only. `optimizer`: `adamw` for everything, or `muon` for `weight_matrices` and AdamW for the rest. Raises
    ValueError when nothing is left to train.
    """
    frozen = {"vision": settings.freeze_vision, "language": settings.freeze_language}
    for_muon = weight_matrices(model, heads) if optimizer == "muon" else set()
    own = [(f"objective.{name}", p) for name, p in heads.named_parameters()] if heads is not None else []
    parameters = [*model.named_parameters(), *own]
    optimizer_groups, table = [], []
    for group in GROUPS:
        peak = getattr(settings.learning_rate, group)
        later = getattr(settings.converged_learning_rate, group, 0) if settings.schedule == "converging" else 0
        trained = bool(peak or later) and not frozen.get(group, False)
        members = [(name, p) for name, p in parameters if group_of(name) == group]
        for _, parameter in members:
            parameter.requires_grad_(trained)
        orthogonalized = [p for _, p in members if id(p) in for_muon]
        matrices = [p for _, p in members if p.ndim >= 2 and id(p) not in for_muon]
        vectors = [p for _, p in members if p.ndim < 2]
        common = {"peak": peak, "name": group}
        if trained:
            optimizer_groups += [
                {"params": orthogonalized, "weight_decay": weight_decay, "optimizer": "muon", **common},
                {"params": matrices, "weight_decay": weight_decay, "optimizer": "adamw", **common},
                {"params": vectors, "weight_decay": 0.0, "optimizer": "adamw", **common},
            ]
        count, by_muon = (sum(p.numel() for p in some) for some in ([p for _, p in members], orthogonalized))
        row = {"group": group, "parameters": count, "trainable": count if trained else 0}
        row |= {"muon": by_muon, "adamw": count - by_muon} if trained else {"muon": 0, "adamw": 0}
        table.append(row | {"learning_rate": peak if trained else 0.0})
    if not optimizer_groups:
        raise ValueError("all learning rates are 0 or their groups frozen: nothing is trained")
    return [group for group in optimizer_groups if group["params"]], table


def format_table(table: list[dict]) -> str:
    """One line per group: its parameters, how many are trained, how many by each optimizer, the peak learning rate."""
    counts = ("parameters", "trainable", "muon", "adamw")
    lines = [f"  {'group':<10}{''.join(f'{name:>15}' for name in counts)}{'learning rate':>15}"]
    for row in table:
        lines.append(f"  {row['group']:<10}{''.join(f'{row[n]:>15,}' for n in counts)}{row['learning_rate']:>15.1e}")
    return "\n".join(lines)
