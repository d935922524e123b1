"""The results of `benchmarks.natural`: learning curves, scores and gaze of every run, and what --keep copies."""

import csv
import shutil
from importlib.util import find_spec
from pathlib import Path

from benchmarks.natural_plan import HEATMAPS
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.files import check_outputs, write_json, write_text
from pipeline_steps.common.metrics import EvaluationResult, read_json
from pipeline_steps.common.names import NEW
from pipeline_steps.common.params import ROOT, TRAINING_STAGES
from pipeline_steps.study.collect import MODE, collect, finished
from pipeline_steps.study.design import NAME, STUDIES, Seeds, Study
from pipeline_steps.study.plan import RESULTS, Plan, Run, folder_of
from pipeline_steps.world.objects import GAZE_KINDS, KINDS

SCORES = "scores.json"  # which studies of conf/study lack
REPEAT = "python -m benchmarks.natural"
POINTS = 10  # of a stage's learning curve in it


def summarise(run: Run, output: Path) -> dict:
    """What a finished run shows: learning curves, scores by task with blind and chance, and gaze against chance."""

    def file_of(stage, path):
        return output / folder_of(stage, run.jobs[stage]) / path

    result = read_json(file_of("evaluation", "outputs/metrics/evaluation.json"), EvaluationResult, REPEAT)
    tasks = {
        task: {
            "accuracy": scores[MODE].accuracy,
            "interval": scores[MODE].accuracy_interval,
            "loss": scores[MODE].loss,
            "blind": scores["blind"].accuracy if "blind" in scores else None,
            "chance": result.chance[task],
            "exact_match": result.generation[task].exact_match if task in result.generation else None,
            "num_items": scores[MODE].num_items,
        }
        for task, scores in sorted(result.tasks.items())
    }
    gaze = {
        task: {
            "peak_on_target": modes[MODE].peak_on_target,
            "interval": modes[MODE].peak_on_target_interval,
            "chance": modes[MODE].chance,
            "chance_among_objects": modes[MODE].chance_among_objects,
            "num_frames": modes[MODE].num_frames,
        }
        for task, modes in sorted(result.gaze.items())
        if MODE in modes
    }
    curves = {stage: curve(file_of(stage, f"outputs/metrics/{stage}.csv")) for stage in TRAINING_STAGES}
    text = None if result.text is None else result.text.accuracy
    return {"run": run.name, "tasks": tasks, "text_accuracy": text, "gaze": gaze, "curves": curves}


def curve(path: Path) -> dict[str, list[list[float]]]:
    """{"train": [[samples, mean loss]], "validation": [[step, loss, accuracy]]} of a stage's csv: POINTS means of the
    training loss, and the mean over tasks of every validation (fine mode)."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    train = [(int(row["samples"]), float(row["loss"])) for row in rows if row["event"] == "train"]
    size = -(-len(train) // POINTS)
    parts = [train[start : start + size] for start in range(0, len(train), size)]
    validations: dict[int, list] = {}
    for row in rows:
        if row["event"] == "validation" and row["mode"] == "fine":
            validations.setdefault(int(row["step"]), []).append((float(row["loss"]), float(row["accuracy"])))
    return {
        "train": [[part[-1][0], round(sum(loss for _, loss in part) / len(part), 4)] for part in parts],
        "validation": [
            [step, *(round(sum(values) / len(values), 4) for values in zip(*found, strict=True))]
            for step, found in sorted(validations.items())
        ],
    }


def write_results(plan: Plan, output: Path) -> list[str]:
    """Writes --output/results of the finished runs; returns their names."""
    results, done = output / "results", [run for run in plan.runs if finished(run, output)]
    if not done:
        return []
    collect(plan, output, results)
    summaries = [summarise(run, output) for run in done]
    write_json(results / SCORES, summaries)
    write_text(results / "scores.md", "\n".join(line for entry in summaries for line in tables(entry)) + "\n")
    for run in done:
        drawn = output / folder_of(HEATMAPS, run.jobs.get(HEATMAPS, "")) / "reports/heatmaps"
        if HEATMAPS in run.jobs and any(drawn.glob("*.png")):
            shutil.copytree(drawn, results / run.name, dirs_exist_ok=True)
    return [run.name for run in done]


def check_kept_name(name: str, studies: Path = ROOT / RESULTS, designs: Path = STUDIES) -> None:
    """UserError for a name that is no folder's, or that of other results, which would be lost; or if a package that
    `keep` needs is missing."""
    if not NAME.fullmatch(name) or name.startswith("."):
        raise UserError(f"--keep {name}: expected a name of letters, digits, _, . and -, with no . at its beginning")
    folder = studies / name
    foreign = folder.is_dir() and any(folder.iterdir()) and not (folder / SCORES).is_file()
    if foreign or (designs / f"{name}.yaml").exists():
        raise UserError(f"--keep {name}: {folder} is for the results of another study. Choose another name.")
    check_outputs(files=[folder / SCORES]) if folder.exists() else check_outputs(folders=[folder])
    if missing := [package for package in ("matplotlib", "scipy") if find_spec(package) is None]:
        raise UserError(
            f"--keep {name}: comparisons of the arms need {' and '.join(missing)}, not installed here. Run `python -m "
            f"pip install {' '.join(missing)}`, or leave --keep out; the same command with it can follow."
        )


def keep(plan: Plan, output: Path, name: str, command: str, studies: Path = ROOT / RESULTS) -> Path:
    """Copies the results of the finished runs, but for most pictures, to `studies`/name and compares the arms there;
    returns the folder. command: what made them, for its README.md."""
    from pipeline_steps.study.summary import write_summary  # needs Matplotlib and SciPy

    results, folder = output / "results", studies / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in (SCORES, "runs.csv", "items.parquet", "scores.md"):  # first what tells whose folder it is
        shutil.copyfile(results / file, folder / file)
    drawn = [results / run.name / "overview.png" for run in plan.runs]
    for picture in [path for path in drawn if path.exists()][:1]:
        shutil.copyfile(picture, folder / "heatmap.png")
    groups = {"gaze": GAZE_KINDS, "reading": tuple(kind for kind in KINDS if kind not in GAZE_KINDS)}
    study = Study(
        question="How do the arms compare on photographic objects, with pretrained backbones?",
        arms={run.arm: {} for run in plan.runs},
        seeds=tuple({run.name.split("-seed")[1]: Seeds(**run.seeds) for run in plan.runs}.values()),
        groups=groups | {"gaze, new names": tuple(f"{kind}{NEW}" for kind in GAZE_KINDS)},
    )
    write_summary(name, study, studies, command)
    return folder


def tables(entry: dict) -> list[str]:
    """The lines of a run's tables in Markdown."""

    def percent(value):
        return "-" if value is None else f"{100 * value:.0f}"

    lines = [f"## {entry['run']}", "", "|task|accuracy|blind|chance|exact match|items|gaze|chance|", "|-|" + "-:|" * 7]
    for task, score in entry["tasks"].items():
        gaze = entry["gaze"].get(task, {})
        shares = [percent(score[name]) for name in ("accuracy", "blind", "chance", "exact_match")]
        shares += [str(score["num_items"]), *(percent(gaze.get(name)) for name in ("peak_on_target", "chance"))]
        lines.append(f"|{task}|{'|'.join(shares)}|")
    losses = [
        f"{stage} " + " ".join(f"{loss:.2f}" for _, loss in found["train"]) for stage, found in entry["curves"].items()
    ]
    return [*lines, "", f"Training loss: {'; '.join(losses)}.", ""]
