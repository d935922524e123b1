"""Keeps finished runs for later reports, each as one compact file in git.

    python -m pipeline_steps.report.keep                             the run of the workspace
    python -m pipeline_steps.report.keep --experiments [NAME ...]    DVC experiments of the checked-out commit

Reads params.yaml and the results of the stages; writes reports/runs/<ablation>-seed<seed>.json (a
`pipeline_steps.common.metrics.KeptRun`). UserError for results that are outdated (`dvc status`), incomplete or
inconsistent. --experiments reads the results from DVC's cache, so it also collects what a queue made; without names it
keeps every experiment. Cost: seconds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from pipeline_steps.common import metrics, params
from pipeline_steps.common.errors import UserError, run_main
from pipeline_steps.common.files import write_text
from pipeline_steps.common.hashing import sha256_file
from pipeline_steps.report import provenance, summary
from pipeline_steps.report.__main__ import PARAMS
from pipeline_steps.report.inputs import CONFIG, read_inputs

COLUMNS = tuple(metrics.KeptItems.model_fields)
MODE = "autoregressive"
RESULTS = (
    "params.yaml",
    "data/shards/manifest.json",
    "data/tokens/manifest.json",
    "outputs/metrics",
    "outputs/evaluation",
    CONFIG,
)
NOT_KEPT = ("heatmaps", "report")  # stages whose outputs are not part of a kept run


def main():
    arguments = read_arguments()
    if arguments.experiments is None:
        refuse_changed(changed_stages(arguments.root))
        paths = [write_run(finished_run(arguments.root), arguments.root)]
    else:
        paths = keep_experiments(arguments.root, arguments.experiments)
    for path in paths:
        print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")
    print("Next: dvc repro report, then commit")


def read_arguments():
    parser = argparse.ArgumentParser(description="Keep finished runs for later reports.")
    parser.add_argument("--root", type=Path, default=Path(), help="folder of the finished run")
    parser.add_argument(
        "--experiments", nargs="*", metavar="NAME", help="DVC experiments of the checked-out commit (default: all)"
    )
    return parser.parse_args()


def finished_run(root):
    """`metrics.KeptRun` of the results under `root`."""
    parameters = params.read(root / "params.yaml", *PARAMS)
    inputs = read_inputs(root, parameters)
    kept = kept_run(inputs, parameters.as_dict())
    check_origin(kept, root)
    return kept


def file_name(kept):
    return f"{kept.ablation}-seed{kept.seed}.json"


def write_run(kept, root):
    path = root / "reports/runs" / file_name(kept)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, as_text(kept))
    return path


def keep_experiments(root, names):
    """Keeps the named experiments (none named: all) of the checked-out commit; returns the files. UserError for an
    unknown name, and for two experiments with one ablation and seed; nothing is written then."""
    from dvc.repo import Repo  # slow to import

    with Repo(str(root)) as repo:
        found = dict(entry for entries in repo.experiments.ls().values() for entry in entries)
    if unknown := sorted(set(names) - found.keys()):
        raise UserError(
            f"no experiment {', '.join(unknown)} of this commit (there are: {', '.join(sorted(found)) or 'none'}); "
            "`dvc queue status` lists tasks that failed"
        )
    runs = {}
    for name in names or sorted(found):
        with tempfile.TemporaryDirectory() as folder:
            fetch_results(root, found[name], Path(folder))
            kept = finished_run(Path(folder))
        if file_name(kept) in runs:
            raise UserError(
                f"experiments {runs[file_name(kept)][0]} and {name} both are ablation {kept.ablation} with seed "
                f"{kept.seed}: name one of them. What else they vary needs an ablation of its own in conf/ablation."
            )
        runs[file_name(kept)] = name, kept
    if not runs:
        raise UserError("this commit has no experiments: run `dvc exp run` first")
    return [write_run(kept, root) for _, kept in runs.values()]


def fetch_results(root, revision, folder):
    """Copies what a kept run is made of from an experiment's commit and DVC's cache. UserError for what is missing."""
    from dvc.api import DVCFileSystem

    source = DVCFileSystem(str(root), rev=revision)
    for path in RESULTS:
        if not source.exists(path):
            raise UserError(f"experiment {revision[:7]} has no {path}: run it to its end, or `dvc exp pull` it")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        source.get(path, str(folder / path), recursive=source.isdir(path))


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
    missing = [f"outputs/metrics/{name}.json" for name in params.TRAINING_STAGES if name not in inputs.stages]
    if current.items is None:
        missing.append("outputs/evaluation/items.parquet")
    if missing:
        raise UserError(f"missing: {', '.join(missing)}. Run `dvc repro` or `dvc pull` first.")
    if current.budget is None:
        raise UserError(
            f"the training FLOPs are unknown: outputs/metrics/streaming.json or {CONFIG} is missing, or "
            "outputs/metrics/stage*.json are of another version. Rewrite them with `dvc repro`."
        )
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
