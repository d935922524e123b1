"""Reads all inputs of the report.

Required: evaluation.json, flops.json and the manifests of shards and tokens; a missing one is a UserError. Everything
else is optional; `Inputs.missing` lists what is missing, and the page shows that list.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from pandas.api.types import is_numeric_dtype

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.files import read_record
from pipeline_steps.common.flop_results import FlopsResult
from pipeline_steps.common.metrics import EvaluationResult, KeptRun, StreamingResult, read_json
from pipeline_steps.common.params import TRAINING_STAGES
from pipeline_steps.common.schemas import ShardsManifest, TokensManifest
from pipeline_steps.report.budgets import Budget
from pipeline_steps.report.training_flops import budget_of, read_config

DIAGNOSTICS = ("attention_entropy", "attention_uniformity", "token_similarity", "coarse_similarity")
CURVE_COLUMNS = ("event", "step", "samples", "source", "task", "mode", "loss", "accuracy", *DIAGNOSTICS, "message")
NUMBERS = ("step", "samples", "loss", "accuracy", *DIAGNOSTICS)  # columns of a curve
ITEM_COLUMNS = ["key", "item", "task", "mode", "num_tokens", "loss_sum", "num_correct"]
ANSWER_KEYS = ("task", "question", "expected", "generated")
CONFIG = "outputs/stage3/config.json"
RUN_NAME = re.compile(r"(?P<ablation>[A-Za-z0-9_.]+)-seed(?P<seed>\d+)")


@dataclass(eq=False)  # hashable by identity, for lru_cache
class Run:
    """The evaluation of one trained model."""

    name: str
    ablation: str  # "none": the default recipe
    seed: int
    result: EvaluationResult | KeptRun  # a kept run has tasks, mean and provenance only
    items: pd.DataFrame | None  # one row per item and mode; None: not available
    budget: Budget | None = None  # training budget; None: unknown


@dataclass
class Inputs:
    current: Run
    runs: list[Run]  # other runs, from reports/runs
    flops: FlopsResult
    shards: ShardsManifest
    tokens: TokensManifest
    curves: dict[str, pd.DataFrame] = field(default_factory=dict)  # stage -> its csv
    stages: dict[str, dict] = field(default_factory=dict)  # stage -> its json
    streaming: StreamingResult | None = None  # what the training stages read, counted before training
    backbones: dict | None = None
    heatmaps: dict | None = None
    answers: list[dict] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def read_inputs(root, parameters):
    """`Inputs` from the folders under `root`. parameters: with `ablation`, `seed` and `training`. Raises UserError for
    a missing required file or a malformed one."""
    root, missing = Path(root), []
    metrics = root / "outputs/metrics"
    evaluation = root / "outputs/evaluation"
    current = Run(
        name="this run",
        ablation=parameters.ablation,
        seed=parameters.seed,
        result=read_json(metrics / "evaluation.json", EvaluationResult, "dvc repro evaluation"),
        items=read_items(evaluation / "items.parquet", missing),
    )
    inputs = Inputs(
        current=current,
        runs=read_runs(root / "reports/runs"),
        flops=read_json(metrics / "flops.json", FlopsResult, "dvc repro flops"),
        shards=read_record(ShardsManifest, root / "data/shards/manifest.json", "shards"),
        tokens=read_record(TokensManifest, root / "data/tokens/manifest.json", "tokens"),
        streaming=read_streaming(metrics / "streaming.json", missing),
        backbones=read_optional(metrics / "backbones.json", missing),
        heatmaps=read_optional(root / "reports/heatmaps/index.json", missing),
        missing=missing,
    )
    for stage in TRAINING_STAGES:
        if (metrics / f"{stage}.csv").exists():
            inputs.curves[stage] = read_curve(metrics / f"{stage}.csv", stage)
        else:
            missing.append(f"outputs/metrics/{stage}.csv (learning curve; `dvc repro {stage}`)")
        if values := read_optional(metrics / f"{stage}.json", missing):
            inputs.stages[stage] = values
    config = read_config(root / CONFIG, inputs.shards.frames.image_size)
    if config is None:
        missing.append(f"{CONFIG} (training FLOPs; `dvc repro stage3`)")
    current.budget = budget_of(inputs.stages, inputs.streaming, inputs.flops, config, parameters.training)
    inputs.answers = read_answers(evaluation / "answers.jsonl", missing)
    return inputs


def read_optional(path, missing):
    """The content of a JSON file, or None after adding its name to `missing`. UserError unless it is an object."""
    if not path.exists():
        missing.append(path.name)
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise UserError(f"{path}: not valid JSON ({error}). Rewrite it with `dvc repro`.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON {type(content).__name__}, expected an object. Rewrite it with `dvc repro`.")
    return content


def read_answers(path, missing):
    """The rows of answers.jsonl, or [] after adding its name to `missing`. UserError names the malformed line."""
    if not path.exists():
        missing.append("outputs/evaluation/answers.jsonl (generated answers; `dvc repro evaluation`)")
        return []
    answers = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line:
            continue
        try:
            answer = json.loads(line)
        except ValueError as error:  # no JSON, or no UTF-8
            raise UserError(f"{path}, line {number}: not valid JSON ({error}). Run `dvc repro evaluation`.") from None
        absent = [key for key in ANSWER_KEYS if not isinstance(answer, dict) or key not in answer]
        if absent:
            raise UserError(f"{path}, line {number}: no {', '.join(absent)}. Run `dvc repro evaluation`.")
        answers.append(answer)
    return answers


def read_streaming(path, missing):
    if path.exists():
        return read_json(path, StreamingResult, "dvc repro streaming")
    missing.append("outputs/metrics/streaming.json (what the training stages read; `dvc repro streaming`)")
    return None


def read_curve(path, stage):
    """The metrics table of a training stage. UserError if it is damaged, lacks a column or training steps, or has text
    among its numbers."""
    advice = f"Run `dvc repro {stage}`."
    try:
        table = pd.read_csv(path)
    except ValueError as error:  # pandas: empty, no table, or no UTF-8
        raise UserError(f"{path}: {str(error).splitlines()[0].rstrip('.')}. {advice}") from None
    if absent := [name for name in CURVE_COLUMNS if name not in table.columns]:
        raise UserError(f"{path}: no column {', '.join(absent)}; it was written by another version. {advice}")
    if not (table["event"] == "train").any():
        raise UserError(f"{path}: {len(table)} rows, none of a training step (event train). {advice}")
    if textual := [name for name in NUMBERS if not is_numeric_dtype(table[name])]:
        raise UserError(f"{path}: not only numbers in column {', '.join(textual)}. {advice}")
    return table


def read_items(path, missing):
    """The item table, or None after adding its name to `missing`."""
    if path.exists():
        return read_parquet(path, ITEM_COLUMNS, "Run `dvc repro evaluation`.")
    missing.append(f"outputs/{path.parent.name}/{path.name} (paired intervals; `dvc repro evaluation`)")
    return None


def read_study_items(path, columns=None):
    """items.parquet of a study, all columns or these."""
    advice = f"Restore it (`git checkout {path}`), or delete it and runs.csv, and run the command in README.md beside "
    return read_parquet(path, columns, f"{advice}them, which collects both again")


def read_parquet(path, columns, advice):
    """A table of a Parquet file, all columns or these. UserError with `advice` if it is damaged, empty, or lacks one of
    them."""
    try:
        table = pd.read_parquet(path, columns=columns)
    except (ValueError, OSError) as error:  # pyarrow: no such column, or not a whole Parquet file
        raise UserError(f"{path}: {str(error).splitlines()[0].rstrip('.')}. {advice}") from None
    if table.empty:
        raise UserError(f"{path}: no rows. {advice}")
    return table


def read_runs(folder):
    """All reports/runs/<ablation>-seed<k>.json as `Run`s. UserError for another name, format or version."""
    runs = []
    for path in sorted(folder.glob("*.json")):
        match = RUN_NAME.fullmatch(path.stem)
        if not match:
            raise UserError(f"{path}: name the file <ablation>-seed<number>.json, for example A6-seed2.json")
        kept = read_json(path, KeptRun, "python -m pipeline_steps.report.keep")
        if (kept.ablation, kept.seed) != (match["ablation"], int(match["seed"])):
            raise UserError(
                f"{path}: holds ablation {kept.ablation}, seed {kept.seed}. Rename it to "
                f"{kept.ablation}-seed{kept.seed}.json."
            )
        runs.append(
            Run(
                name=path.stem,
                ablation=kept.ablation,
                seed=kept.seed,
                result=kept,
                items=items_of(kept),
                budget=Budget(kept.budget.num_samples, kept.budget.flops),
            )
        )
    return runs


def items_of(kept):
    """The item table of a `KeptRun` in the format of `read_items`, with autoregressive rows only."""
    tables = [
        pd.DataFrame({**columns.model_dump(), "task": task, "mode": "autoregressive"})
        for task, columns in kept.items.items()
    ]
    return pd.concat(tables, ignore_index=True) if tables else None
