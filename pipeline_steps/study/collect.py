"""Collects the finished runs of a study: reports/study/<name>/runs.csv, one row per run, and items.parquet, one row per
run and scored item (autoregressive mode). Both are deterministic for given results, except for the seconds.
"""

import io
import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline_steps.common import params
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.files import read_record, write_bytes, write_text
from pipeline_steps.common.flop_results import FlopsResult
from pipeline_steps.common.hashing import fingerprint
from pipeline_steps.common.metrics import EvaluationResult, StreamingResult, read_json
from pipeline_steps.common.params import RUNTIME, TRAINING_STAGES
from pipeline_steps.common.schemas import ShardsManifest
from pipeline_steps.report.inputs import CONFIG, read_study_items
from pipeline_steps.report.studies import read_runs
from pipeline_steps.report.training_flops import budget_of, read_config
from pipeline_steps.streaming.__main__ import PARAMS as STREAMING_PARAMS
from pipeline_steps.streaming.__main__ import count_stage
from pipeline_steps.streaming.dataset import TokenizedShards
from pipeline_steps.study import caption_parts, next_frame
from pipeline_steps.study.plan import folder_of

MODE = "autoregressive"
STUDY = "make study"
CONVERGED = 0.01  # relative change of the validation loss over the last quarter of stage 3
KEEP_ITEMS = ("task", "key", "item", "num_tokens", "loss_sum", "num_correct")


def finished(run, studies):
    """Whether all jobs of a run (`plan.Run`) are done."""
    return all((studies / folder_of(stage, key) / "done.json").exists() for stage, key in run.jobs.items())


def collect(plan, studies, results):
    """Writes runs.csv and items.parquet of the finished runs of a `Plan` into the folder `results`; returns the table,
    or None if no run is finished. Rows of an earlier collection stay where their run is not finished here."""
    runs = [run for run in plan.runs if finished(run, studies)]
    table, items = earlier_results(results)
    if not runs:
        return table
    names = [run.name for run in runs]
    new = pd.DataFrame([row_of(run, studies) for run in runs])
    new_items = pd.concat([items_of(run, studies) for run in runs], ignore_index=True)
    if table is not None:
        order = {name: number for number, name in enumerate([*(run.name for run in plan.runs), *plan.waiting])}
        new = pd.concat([table[~table["run"].isin(names)], new], ignore_index=True)
        new = new.sort_values("run", key=lambda column: column.map(order), ignore_index=True)
        new_items = pd.concat([items[~items["run"].isin(names)], new_items], ignore_index=True)
    table, items = new, new_items
    content = io.BytesIO()
    items.to_parquet(content, index=False, compression="zstd")
    write_bytes(results / "items.parquet", content.getvalue())  # first: a kill must not leave rows without items
    write_text(results / "runs.csv", as_csv(table))
    return table


def as_csv(table):
    """The text of runs.csv: six significant digits."""
    return table.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def earlier_results(results):
    """(runs.csv, items.parquet) of an earlier collection, or (None, None)."""
    if not (results / "runs.csv").exists():
        return None, None
    if not (results / "items.parquet").exists():
        raise UserError(f"{results / 'items.parquet'}: missing beside runs.csv; delete runs.csv, too, to collect again")
    return read_runs(results / "runs.csv"), read_study_items(results / "items.parquet")


def check_earlier(plan, results):
    """({run: training FLOPs} of an earlier collection with the plan's parameters, names of its runs with others, as of
    an earlier version). UserError if it has runs that the study does not have: they would be lost."""
    table, _ = earlier_results(results)
    if table is None:
        return {}, []
    planned = {run.name: parameters_hash(run.parameters) for run in plan.runs}
    foreign = [name for name in table["run"] if name not in planned and name not in plan.waiting]
    if foreign:
        raise UserError(
            f"{results / 'runs.csv'} has {len(foreign)} run(s) that are not in the study "
            f"({', '.join(foreign[:3])}): give the study another name, or move its results away"
        )
    other = [row.run for row in table.itertuples() if planned.get(row.run, row.parameters) != row.parameters]
    own = table[~table["run"].isin(other)]
    return dict(zip(own["run"], own["training_flops"], strict=True)), other


def parameters_hash(parameters):
    """Identifies what a run's results may depend on."""
    return fingerprint({name: value for name, value in parameters.items() if name != RUNTIME})


def row_of(run, studies):
    """The row of runs.csv of a finished run."""

    def file_of(stage, path):
        return studies / folder_of(stage, run.jobs[stage]) / path

    result = read_json(file_of("evaluation", "outputs/metrics/evaluation.json"), EvaluationResult, STUDY)
    flops = read_json(file_of("flops", "outputs/metrics/flops.json"), FlopsResult, STUDY)
    stages = {stage: load(file_of(stage, f"outputs/metrics/{stage}.json")) for stage in TRAINING_STAGES}
    done = {stage: load(file_of(stage, "done.json")) for stage in run.jobs}
    shards, tokens = file_of("shards", "data/shards"), file_of("tokens", "data/tokens")
    own = file_of("stage3", "params.yaml")
    counted = counts_of(shards, tokens, params.read(own, *STREAMING_PARAMS))
    training = params.read(own, "training").training
    size = read_record(ShardsManifest, shards / "manifest.json", "shards").frames.image_size
    config = read_config(file_of("stage3", CONFIG), size)
    budget = budget_of(stages, counted, flops, config, training)
    if budget is None:
        raise UserError(f"{run.name}: its stages' results are of another version; remove them and run the study again")
    change, converged = convergence(file_of("stage3", "outputs/metrics/stage3.csv"))
    return {
        "run": run.name,
        "arm": run.arm,
        "budget": run.budget,
        **{f"{kind}_seed": value for kind, value in run.seeds.items()},
        "training_samples": budget.num_samples,
        "training_flops": budget.flops,
        "training_seconds": sum(done[stage]["seconds"] for stage in TRAINING_STAGES),
        "attempts": max(done[stage]["attempts"] for stage in TRAINING_STAGES),
        "mean_token_accuracy": result.mean[MODE].accuracy,
        "exact_match_accuracy": result.mean_exact_match,
        "mean_loss": result.mean[MODE].loss,
        **{f"accuracy_{task}": scores[MODE].accuracy for task, scores in sorted(result.tasks.items())},
        **{f"exact_match_{task}": found.exact_match for task, found in sorted(result.generation.items())},
        **next_frame.columns_of(result.next_frame),
        **caption_parts.columns_of(result.caption_parts),
        "blind_accuracy": result.mean["blind"].accuracy,
        **{f"blind_{task}": scores["blind"].accuracy for task, scores in sorted(result.tasks.items())},
        "validation_loss_change": change,
        "converged": converged,
        "commit": done["stage3"]["commit"][:12],
        "parameters": parameters_hash(run.parameters),
    }


def counts_of(shards, tokens, parameters):
    """`StreamingResult` of a run: what its training stages read, from the plan and the index."""
    items = training_items(shards, tokens)
    return StreamingResult(stages={stage: count_stage(items, parameters, stage, None) for stage in TRAINING_STAGES})


@lru_cache(maxsize=8)
def training_items(shards, tokens):
    """The items of the training split, which the runs of a seed share."""
    return TokenizedShards(shards, tokens, "train", with_frames=False)


def load(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def items_of(run, studies):
    """The scored items of a finished run, tasks in order."""
    path = studies / folder_of("evaluation", run.jobs["evaluation"]) / "outputs/evaluation/items.parquet"
    table = pd.read_parquet(path)
    table = table[table["mode"] == MODE].sort_values(["task", "key", "item"], kind="stable")
    table = table[list(KEEP_ITEMS)].astype({"loss_sum": np.float32, "num_tokens": np.int16, "num_correct": np.int16})
    table.insert(0, "run", run.name)
    return table


def convergence(curve):
    """(relative fall of the mean validation loss, fine mode, over the last quarter of the stage, whether that is below
    CONVERGED or the loss rose), of a stage's csv; (None, None) without a validation before that quarter."""
    table = pd.read_csv(curve)
    rows = table[(table["event"] == "validation") & (table["mode"] == "fine")]
    loss = rows.groupby(["step", "task"])["loss"].mean().groupby("step").mean()
    start = 0.75 * loss.index[-1] if len(loss) else 0
    if len(loss) < 2 or loss.index[0] > start:
        return None, None
    before = float(np.interp(start, loss.index, loss))
    change = (before - float(loss.iloc[-1])) / before
    return (change, bool(change < CONVERGED)) if np.isfinite(change) else (None, None)
