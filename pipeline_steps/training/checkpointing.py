"""Saving during a run: the state to resume from, the best weights, and the weights to publish."""

from model import FoveatedVLMForConditionalGeneration
from pipeline_steps.training import checkpoint_io
from pipeline_steps.training.context import TrainContext, TrainState, averaged


def save_state(run: TrainContext, state: TrainState, step: int) -> None:
    """Saves the state after a step. The main process writes it; every rank must call this to gather the tensors.

    UserError if the ranks have skipped too many unreadable samples together.
    """
    quarantined = all_quarantined(run)
    run.loader.check_quarantined(quarantined)
    loader = run.loader.state_dict() | {"quarantined": quarantined}
    tensors = stage_weights(run) | {"optimizer": state.optimizer.tensors(state.names)}
    if state.ema is not None:
        tensors["average"] = {name: checkpoint_io.full_tensor(value) for name, value in state.ema.values.items()}
    if run.distributed.is_main:
        values = {"history": run.history, "best": run.best, "loader": loader}
        checkpoint_io.save_state(run.folder, step, tensors, values, run.runtime.keep_checkpoints)
    run.distributed.wait()


def stage_weights(run: TrainContext) -> dict[str, dict]:
    """{"model": weights of the network, "objective": weights of the objectives' own modules, if there are any}."""
    found = {"model": checkpoint_io.weights(run.model)}
    heads = checkpoint_io.weights(run.training_model.objective)
    return found | {"objective": heads} if heads else found


def load_weights(run: TrainContext, tensors: dict[str, dict]) -> None:
    """Loads weights from `stage_weights`."""
    run.model.load_state_dict(tensors["model"])
    run.training_model.objective.load_state_dict(tensors.get("objective", {}))


def all_quarantined(run: TrainContext) -> dict[str, dict]:
    """{key: {reason, times}} of the samples that any rank could not read."""
    together: dict[str, dict] = {}
    for own in run.distributed.gather(run.loader.quarantined):
        for key, entry in own.items():
            known = together.setdefault(key, {"reason": entry["reason"], "times": 0})
            known["times"] += entry["times"]
    return together


def save_if_best(run: TrainContext, state: TrainState, rows: list[dict]) -> None:
    """Saves the weights if this validation has the lowest mean loss so far (mode fine, mean over the rows)."""
    losses = [row["loss"] for row in rows if row["event"] == "validation" and row["mode"] == "fine"]
    if not losses or run.common.publish != "best":
        return
    loss = sum(losses) / len(losses)
    if run.best is not None and loss >= run.best["loss"]:
        return
    run.best = {"step": rows[0]["step"], "loss": loss}
    with averaged(state):
        weights = stage_weights(run)
        if run.distributed.is_main:
            checkpoint_io.save_best(run.folder, weights, run.best)
    run.distributed.wait()


def publish_weights(run: TrainContext, state: TrainState) -> None:
    """Sets `run.published` (network) and `run.published_heads` (tensors of the objectives' own modules) in the main
    process, from the last, the averaged or the best weights as `publish` and `ema_decay` say."""
    if run.common.publish == "last" and state.ema is None and not run.is_sharded:
        run.published, run.published_heads = run.model, stage_weights(run).get("objective", {})
        return
    with averaged(state):
        weights = {
            part: {name: value.detach().clone() for name, value in tensors.items()}
            for part, tensors in stage_weights(run).items()
        }
    if run.common.publish == "best" and run.best is not None:
        weights = checkpoint_io.load_best(run.folder)[0]
    if run.distributed.is_main:
        run.published = FoveatedVLMForConditionalGeneration(run.model.config)
        run.published.load_state_dict(weights["model"])
        run.published_heads = weights.get("objective", {})
