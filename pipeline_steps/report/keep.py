"""Keeps the finished run of the workspace for later reports, as one compact file in git.

    python -m pipeline_steps.report.keep

Reads params.yaml and the results of the stages; writes reports/runs/<ablation>-seed<seed>.json (a
`pipeline_steps.common.metrics.KeptRun`). UserError for results that are outdated (`dvc status`), incomplete or
inconsistent. Cost: seconds.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from pipeline_steps.common import metrics, params
from pipeline_steps.common.errors import UserError, run_main
from pipeline_steps.common.files import write_text
from pipeline_steps.common.hashing import sha256_file
from pipeline_steps.report import provenance, summary
from pipeline_steps.report.__main__ import PARAMS
from pipeline_steps.report.inputs import read_inputs

COLUMNS = tuple(metrics.KeptItems.model_fields)
MODE = "autoregressive"
NOT_KEPT = ("heatmaps", "report")  # stages whose outputs are not part of a kept run


def main():
    arguments = read_arguments()
    parameters = params.read(arguments.root / "params.yaml", *PARAMS)
    refuse_changed(changed_stages(arguments.root))
    inputs = read_inputs(arguments.root, parameters.ablation, parameters.seed)
    kept = kept_run(inputs, parameters.as_dict())
    check_origin(kept, arguments.root)
    path = arguments.root / f"reports/runs/{kept.ablation}-seed{kept.seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, as_text(kept))
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB. Next: dvc repro report, then commit it")


def read_arguments():
    parser = argparse.ArgumentParser(description="Keep the workspace's finished run for later reports.")
    parser.add_argument("--root", type=Path, default=Path(), help="folder of the finished run")
    return parser.parse_args()


def changed_stages(root):
    """Names of the stages that `dvc status` reports as changed. UserError if it fails."""
    command = [sys.executable, "-m", "dvc", "status", "--json"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"`dvc status` failed in {root.resolve()}: {done.stderr.strip()}")
    return sorted(json.loads(done.stdout))


def refuse_changed(stages):
    """UserError if a stage is changed, except those in NOT_KEPT."""
    if changed := [name for name in stages if name not in NOT_KEPT]:
        raise UserError(
            f"`dvc status`: {len(changed)} stage(s) changed ({', '.join(changed)}), so their results do not match the "
            "current code, data and parameters. Run `dvc repro` first."
        )


def kept_run(inputs, parameters):
    """`metrics.KeptRun` of the report's `Inputs`; parameters: nested dict. UserError for missing or inconsistent
    results."""
    current = inputs.current
    missing = [f"outputs/metrics/{name}.json" for name in ("stage1", "stage2", "stage3") if name not in inputs.stages]
    if current.items is None:
        missing.append("outputs/evaluation/items.parquet")
    if missing:
        raise UserError(f"missing: {', '.join(missing)}. Run `dvc repro` or `dvc pull` first.")
    if current.budget is None:
        raise UserError("outputs/metrics/stage*.json have no `mixture`. Rewrite them with `dvc repro`.")
    rows = current.items[current.items["mode"] == MODE]
    items = {}
    for task, scores in current.result.tasks.items():
        own = rows[rows["task"] == task].sort_values(["key", "item"], kind="stable")
        found, expected = (len(own), int(own["num_tokens"].sum())), (scores[MODE].num_items, scores[MODE].num_tokens)
        if found != expected:
            raise UserError(
                f"outputs/evaluation/items.parquet has {found[0]} items with {found[1]} tokens of task {task}, but "
                f"outputs/metrics/evaluation.json has {expected[0]} with {expected[1]}. Run `dvc repro evaluation`."
            )
        items[task] = metrics.KeptItems(**{name: own[name].tolist() for name in COLUMNS})
    return metrics.KeptRun(
        ablation=current.ablation,
        seed=current.seed,
        provenance={**current.result.provenance, "seeds": provenance.seeds(parameters)},
        summary=summary.headline(current.result, inputs),
        budget=metrics.KeptBudget(num_samples=current.budget.num_samples, flops=current.budget.flops),
        mean=current.result.mean,
        tasks=current.result.tasks,
        items=items,
    )


def check_origin(kept, root):
    """UserError if the evaluation used other shards or tokens than those of the workspace."""
    for name in ("shards", "tokens"):
        path = root / f"data/{name}/manifest.json"
        found, expected = sha256_file(path), kept.provenance.get(f"{name}_sha256")
        if found != expected:
            raise UserError(
                f"{path} has hash {found[:12]}, but the evaluation used {str(expected)[:12]}. Run `dvc repro "
                "evaluation`."
            )


def as_text(kept):
    """Deterministic JSON with one line per key, and one per task of `items`."""
    document = metrics.rounded(kept.model_dump(mode="json"))
    items = document.pop("items")

    def line(value):
        return json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=False, allow_nan=False)

    lines = [f"{line(name)}: {line(value)}" for name, value in sorted(document.items())]
    tasks = [f"  {line(task)}: {line(columns)}" for task, columns in sorted(items.items())]
    return "{\n" + ",\n".join([*lines, '"items": {\n' + ",\n".join(tasks) + "\n}"]) + "\n}\n"


if __name__ == "__main__":
    run_main(main)
