"""Which parameters are trained, with which learning rate and by which optimizer."""

from torch import nn

GROUPS = ("connector", "vision", "language")


def group_of(name: str) -> str:
    """Learning-rate group of a parameter: vision or language for the backbones, connector for everything else."""
    if name.startswith("vision_encoder."):
        return "vision"
    return "language" if name.startswith("language_model.") else "connector"


def weight_matrices(model: nn.Module, heads: nn.Module | None = None) -> set[int]:
    """ids of the weights that Muon trains: the matrices of linear layers in network and heads.

    Excluded are token embeddings (also when tied to the output layer) and the output layer, position embeddings, the
    class token, learned queries, convolutions and linear layers with a single output or input.
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
    """(optimizer groups, table for printing and saving). Sets `requires_grad` of every parameter.

    model: the network. settings: training.<stage> (learning_rate with the peaks of GROUPS, freeze_vision,
    freeze_language). A group is frozen if settings freeze it or its rate is 0 throughout; with the schedule
    `converging` a rate of 0 may rise later. Weight decay applies to matrices only. optimizer: `adamw` for all
    parameters, or `muon` for `weight_matrices` and AdamW for the rest. heads: the objectives' own modules, which belong
    to the connector. ValueError if nothing is trained.
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
        raise ValueError(
            "nothing to train: every parameter group is frozen or has learning rate 0. Raise one in learning_rate."
        )
    return [group for group in optimizer_groups if group["params"]], table


def format_table(table: list[dict]) -> str:
    """One line per group: parameters, trainable ones, those of each optimizer, and the peak learning rate."""
    counts = ("parameters", "trainable", "muon", "adamw")
    lines = [f"  {'group':<10}{''.join(f'{name:>15}' for name in counts)}{'learning rate':>15}"]
    for row in table:
        lines.append(f"  {row['group']:<10}{''.join(f'{row[n]:>15,}' for n in counts)}{row['learning_rate']:>15.1e}")
    return "\n".join(lines)
