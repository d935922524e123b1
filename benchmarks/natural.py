"""Pretrained backbones on the world of objects: data, training, evaluation and a table of arms and seeds.

    python -m benchmarks.natural --cutouts CUTOUTS                              arms none, A6 and B1 on a GPU
    python -m benchmarks.natural --cutouts CUTOUTS --minutes 9.5                a piece: repeat until it says "finished"
    python -m benchmarks.natural --cutouts CUTOUTS --preset cpu --arms none A6  112 px, 3,200 samples, one core

Needs the backbones of `make pretrained` (--pretrained names another folder with vision_encoder and language_model) and
a folder of cut-outs (docs/world_objects.md; without --cutouts the photographs of tuxpaint are downloaded). The recipe
is conf/data/objects.yaml or objects_cpu.yaml; --set changes single parameters. The text-only samples are --chats, a
.jsonl (without it: the language model's own answers, which pipeline_steps.backbones.own_chats writes first).

The stages run as `python -m pipeline_steps.<stage>`, each in a folder of its own below --output; what arms share is
made once. Killed, stopped by --minutes or by Ctrl-C, the same command continues: training from its last state, other
stages from their start. Results, in --output/results: runs.csv and items.parquet as of a study, scores.json (learning
curves, accuracy with blind and chance, gaze against chance), scores.md with its tables, and heatmaps of every run.
--keep NAME copies them to reports/study/NAME, which the report shows, with comparisons of the arms as in any study and
heatmap.png, a clip of the first run: as docs/heatmap.png it is the README's picture.

Neither DVC nor Snakemake is used. Parameters are composed with Hydra; on a machine without it, copy plan.json, which
`--dry-run` writes, into --output. Making data needs PyAV, ImageHash and SciPy; training and evaluation need torch,
transformers, pydantic, pyarrow, PyYAML and pandas; heatmaps, left out where it is missing, Matplotlib.
Cost: meant for 25 minutes of one H100 for three arms and one seed (not measured yet); on a CPU about an hour an arm.
"""

import argparse
import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from pipeline_steps.backbones import own_chats
from pipeline_steps.backbones.pretrained import cache_folder, default_output
from pipeline_steps.common.errors import UserError, run_main
from pipeline_steps.common.files import write_json, write_text
from pipeline_steps.common.hashing import fingerprint, sha256_file
from pipeline_steps.common.metrics import EvaluationResult, read_json
from pipeline_steps.common.params import ROOT
from pipeline_steps.common.processes import ends_with_this_process
from pipeline_steps.study import job as study_job
from pipeline_steps.study.collect import MODE, collect, finished
from pipeline_steps.study.design import TRAINING_STAGES, Cell, Seeds, Study, parameters_of
from pipeline_steps.study.plan import LIBRARIES, RESULTS, TARGETS, Job, Plan, Run, folder_of, jobs_of, read_stages
from pipeline_steps.world.objects import GAZE_KINDS, KINDS, NEW

PRESETS = {"gpu": "objects", "cpu": "objects_cpu"}  # conf/data/
DEVICES = {"gpu": "cuda", "cpu": "cpu"}
BASE = ("scale=smollm2_135m", "backbones.kind=local", "runtime.tensorboard=false", "runtime.dvclive=false")
BASE += ("runtime.heatmaps_every=null",)
HEATMAPS = "heatmaps"
STOPPED = 75  # exit code (EX_TEMPFAIL): not finished, run the same command again
GRACE = 45.0  # seconds that stages get to save their state
POINTS = 10  # of a stage's learning curve in summary.json
SUFFIXES = (".json", ".jsonl", ".safetensors", ".png", ".jpg", ".jpeg", ".webp", ".jinja", ".txt")


def make_plan(arguments) -> Plan:
    """The `Plan` of all runs, written to plan.json. Without Hydra: the one that is there. UserError if it is missing or
    of other arguments or code."""
    code, path = code_files(), arguments.output / "plan.json"
    inputs = link_inputs(arguments)
    wanted = {"inputs": inputs, "code": fingerprint(code), "arms": arguments.arms, "seeds": arguments.seeds}
    wanted |= {"preset": arguments.preset, "device": arguments.device, "set": list(arguments.set)}
    if find_spec("hydra") is None:
        return read_plan(path, wanted)
    stages, libraries = read_stages(), installed_versions()
    plan = Plan("natural", commit())
    targets = (*TARGETS, HEATMAPS) if find_spec("matplotlib") else TARGETS
    for cell in cells_of(arguments, inputs):
        parameters = parameters_of(cell)
        jobs = jobs_of(stages, parameters, code, targets, libraries)
        plan.jobs |= {(job.stage, job.key): job for job in jobs.values() if (job.stage, job.key) not in plan.jobs}
        keys = {stage: job.key for stage, job in jobs.items()}
        plan.runs.append(Run(cell.name, cell.arm, cell.budget, cell.seeds.model_dump(), parameters, keys))
    write_json(path, wanted | plan.as_dict())
    return plan


def cells_of(arguments, inputs: dict[str, str]) -> list[Cell]:
    """A `Cell` for every arm and seed; a seed is that of training and data, as the backbones are given."""
    base = (f"data={PRESETS[arguments.preset]}", *BASE, f"training.common.device={arguments.device}")
    for name in ("vision", "language"):
        folder = {"vision": "vision_encoder", "language": "language_model"}[name]
        base += (f"backbones.local.{name}_path={inputs['pretrained']}/{folder}",)
    base += (f"sources.procedural.objects.cutouts={inputs['cutouts']}",)
    if "backgrounds" in inputs:
        base += (f"sources.procedural.objects.backgrounds={inputs['backgrounds']}",)
    if "chats" in inputs:
        base += (f"sources.chat.path={inputs['chats']}",)
    known = sorted(path.stem for path in (ROOT / "conf/ablation").glob("*.yaml"))
    if unknown := [arm for arm in arguments.arms if arm not in known]:
        raise UserError(f"--arms {unknown[0]}: there is no conf/ablation/{unknown[0]}.yaml (there are: {known})")
    return [
        Cell(arm, "x1", Seeds(training=seed, backbones=1, data=seed), (*base, *arguments.set, f"ablation={arm}"), 1.0)
        for seed in arguments.seeds
        for arm in arguments.arms
    ]


def read_plan(path: Path, wanted: dict) -> Plan:
    """The `Plan` of plan.json, for a machine without Hydra."""
    if not path.exists():
        raise UserError(
            f"{path}: missing, and Hydra, which composes parameters, is not installed. Run the same command with "
            "--dry-run where it is, and copy the file."
        )
    content = json.loads(path.read_text(encoding="utf-8"))
    other = [
        f"{name} {content.get(name)!r}, here {value!r}" for name, value in wanted.items() if content.get(name) != value
    ]
    if other:
        raise UserError(
            f"{path}: a plan of other work ({'; '.join(other)}), and Hydra is not installed here. Write it again with "
            "--dry-run, from the same code and inputs."
        )
    jobs = []
    for job in content["jobs"]:
        makers = {path: tuple(maker) for path, maker in job["inputs"].items()}
        jobs.append(Job(**job | {"inputs": makers, "outs": tuple(job["outs"])}))
    runs = [Run(**run) for run in content["runs"]]
    return Plan(content["study"], content["commit"], runs, [], {(job.stage, job.key): job for job in jobs})


def link_inputs(arguments) -> dict[str, str]:
    """{name: path of an input as seen from a job's folder}. The path contains the content's hash, so that other
    content is other work."""
    folders = {"pretrained": arguments.pretrained, "cutouts": arguments.cutouts}
    if arguments.backgrounds is not None:
        folders["backgrounds"] = arguments.backgrounds
    hashes = {name: (folder, folder_hash(folder)) for name, folder in folders.items()}
    if arguments.chats is not None:
        hashes["chats"] = arguments.chats, f"{sha256_file(arguments.chats)[:16]}.jsonl"
    found = {}
    for name, (path, content) in hashes.items():
        link = arguments.output / "inputs" / f"{name}-{content}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(path.resolve())
        found[name] = f"../../../inputs/{link.name}"  # jobs/<stage>/<key>
    return found


def folder_hash(folder: Path) -> str:
    """16 hex digits of the names and contents of a folder's weights, settings and pictures."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise UserError(f"{folder}: no such folder, or nothing in it (expected {', '.join(SUFFIXES)}).")
    return fingerprint([(str(path.relative_to(folder)), sha256_file(path)) for path in files])


def code_files() -> dict[str, str]:
    """{path: sha256} of the code that dvc.yaml lists for any stage, as it is in this folder, committed or not."""
    places = sorted({place for stage in read_stages().values() for place in stage.code})
    files = [file for place in places for file in [ROOT / place, *(ROOT / place).rglob("*")]]
    files = [file for file in files if file.is_file() and "__pycache__" not in file.parts]
    return {str(file.relative_to(ROOT)): sha256_file(file) for file in files}


def installed_versions() -> dict[str, str | None]:
    """{library: its version, None where it is missing}."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str:
    """Short hash of the commit, with a plus where tracked files differ from it; "unknown" without git."""
    try:
        words = ["git", "describe", "--always", "--abbrev=8", "--exclude=*", "--dirty=+"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


# ---------------------------------------------------------------- running


class Stop(Exception):
    """SIGTERM was received."""


def run_jobs(plan: Plan, output: Path, num_jobs: int, device: str, end: float | None) -> bool:
    """Runs what is not done, `num_jobs` at a time, until `end` (of time.monotonic). Returns whether all is done.
    UserError if a job fails; the others are stopped."""
    running: dict[tuple[str, str], tuple[subprocess.Popen, float]] = {}
    try:
        while waiting := [job for job in plan.jobs.values() if not is_done(job, output)]:
            for key, (process, started) in list(running.items()):
                if process.poll() is not None:
                    del running[key]
                    finish(plan.jobs[key], output, process.returncode, started, plan.commit)
            for job in waiting:
                key = (job.stage, job.key)
                ready = all(is_done(plan.jobs[before], output) for before in job.inputs.values())
                if len(running) < num_jobs and ready and key not in running and not is_done(job, output):
                    running[key] = start(job, output, device), time.monotonic()
            if end is not None and time.monotonic() > end:
                return False
            time.sleep(0.5)
        return True
    finally:
        stop(process for process, _ in running.values())


def is_done(job, output: Path) -> bool:
    return (output / folder_of(job.stage, job.key) / "done.json").exists()


def start(job, output: Path, device: str) -> subprocess.Popen:
    """Starts a stage in its folder, as `pipeline_steps.study.job` does; stdout and stderr go to its log.txt."""
    folder = output / folder_of(job.stage, job.key)
    folder.mkdir(parents=True, exist_ok=True)
    study_job.prepare(asdict(job), folder, output)
    words = shlex.split(job.command)[1:]
    if job.stage == "shards":
        words += ["--processes", str(len(os.sched_getaffinity(0)))]
    variables = study_job.environment(folder)
    if device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    print(f"{time.strftime('%H:%M:%S')} {job.stage} {job.parameters['ablation']}: {folder}/log.txt", flush=True)
    with open(folder / "log.txt", "a") as log:
        command = [sys.executable, *words]
        return subprocess.Popen(
            ends_with_this_process(command), cwd=folder, env=variables, stdout=log, stderr=subprocess.STDOUT
        )


def finish(job, output: Path, code: int, started: float, commit: str) -> None:
    """Records a job's end in done.json. UserError with the end of its log if it failed."""
    folder = output / folder_of(job.stage, job.key)
    missing = [path for path in job.outs if not (folder / path).exists()]
    if code or missing:
        lines = (folder / "log.txt").read_text(errors="replace").replace("\r", "\n").splitlines()
        tail = " / ".join([line for line in lines if line.strip()][-5:])
        reason = f"exit code {code}" if code else f"not written: {', '.join(missing)}"
        raise UserError(f"{job.stage} failed, {reason}: {tail} (log: {folder}/log.txt)")
    record = {"commit": commit, "seconds": round(time.monotonic() - started, 1)}
    write_json(folder / "done.json", record | {"attempts": study_job.count_attempt(folder, add=0)})


def stop(processes: Iterable[subprocess.Popen]) -> None:
    """Asks the processes to end, which training stages do after saving their state; kills them after GRACE."""
    processes = list(processes)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    end = time.monotonic() + GRACE
    for process in processes:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# ---------------------------------------------------------------- results


def summarise(run: Run, output: Path) -> dict:
    """What a finished run shows: learning curves, scores by task with blind and chance, and gaze against chance."""

    def file_of(stage, path):
        return output / folder_of(stage, run.jobs[stage]) / path

    result = read_json(file_of("evaluation", "outputs/metrics/evaluation.json"), EvaluationResult, "evaluation")
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
    write_json(results / "scores.json", summaries)
    write_text(results / "scores.md", "\n".join(line for entry in summaries for line in tables(entry)) + "\n")
    for run in done:
        drawn = output / folder_of(HEATMAPS, run.jobs.get(HEATMAPS, "")) / "reports/heatmaps"
        if HEATMAPS in run.jobs and any(drawn.glob("*.png")):
            shutil.copytree(drawn, results / run.name, dirs_exist_ok=True)
    return [run.name for run in done]


def keep(plan: Plan, output: Path, name: str, studies: Path = ROOT / RESULTS) -> Path:
    """Copies the results of the finished runs, but for most pictures, to `studies`/name and compares the arms there;
    returns the folder."""
    from pipeline_steps.study.summary import write_summary  # needs Matplotlib

    results, folder = output / "results", studies / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("runs.csv", "items.parquet", "scores.json", "scores.md"):
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
    write_summary(name, study, studies)
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


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=["none", "A6", "B1"], metavar="ARM", help="names in conf/ablation")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], metavar="SEED", help="of training and data")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="gpu")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: as the preset is called")
    parser.add_argument("--jobs", type=int, help="stages side by side (default: 3 on a GPU, else 1)")
    parser.add_argument("--minutes", type=float, help="stop and save after this time; run again to continue")
    parser.add_argument("--cutouts", type=Path, help="folder of cut-outs (default: tuxpaint's, in the user's cache)")
    parser.add_argument("--backgrounds", type=Path, help="folder of photographs (default: textures)")
    parser.add_argument("--chats", type=Path, help=".jsonl of text-only chats (default: the language model's own)")
    parser.add_argument("--pretrained", type=Path, default=default_output(), help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="default: outputs/natural/PRESET")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="Hydra overrides of every run")
    parser.add_argument("--keep", metavar="NAME", help="copy the results to reports/study/NAME")
    parser.add_argument("--dry-run", action="store_true", help="write plan.json and list the jobs")
    arguments = parser.parse_args()
    arguments.device = arguments.device or DEVICES[arguments.preset]
    arguments.jobs = arguments.jobs or (3 if arguments.device == "cuda" else 1)
    arguments.output = (arguments.output or ROOT / "outputs" / "natural" / arguments.preset).resolve()
    return arguments


def find_inputs(arguments) -> None:
    """Fills in --cutouts and --chats. UserError for what is missing."""
    if not (arguments.pretrained / "language_model").is_dir():
        raise UserError(f"{arguments.pretrained}: no pretrained backbones there. Run `make pretrained`.")
    if arguments.cutouts is None:
        arguments.cutouts = cache_folder() / "tuxpaint"
        if not (arguments.cutouts / "metadata.jsonl").exists():
            from pipeline_steps.world import tuxpaint

            print(f"{arguments.cutouts}: downloading {tuxpaint.PACKAGE}", flush=True)
            tuxpaint.build(arguments.cutouts, None)
    if arguments.chats is None:
        language = arguments.pretrained / "language_model"
        arguments.chats = cache_folder() / "chats" / f"{folder_hash(language)}.jsonl"
        if not arguments.chats.exists():
            print(f"{arguments.chats}: asking {language}", flush=True)
            own_chats.write_chats(language, arguments.chats, device=arguments.device)
    if not arguments.chats.is_file():
        raise UserError(f"--chats {arguments.chats}: no such file. docs/data.md says what belongs there.")
    if not (arguments.cutouts / "metadata.jsonl").exists():
        raise UserError(f"{arguments.cutouts}/metadata.jsonl: missing. docs/world_objects.md says what belongs there.")


def main() -> int:
    arguments = read_arguments()
    began = time.monotonic()
    find_inputs(arguments)
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available() and not arguments.dry_run:
            raise UserError("torch finds no CUDA device. On a CPU run with --preset cpu.")
    plan = make_plan(arguments)
    left = [job for job in plan.jobs.values() if not is_done(job, arguments.output)]
    print(f"{arguments.output}: {len(plan.runs)} runs, {len(left)} of {len(plan.jobs)} jobs to do", flush=True)
    if HEATMAPS not in {stage for stage, _ in plan.jobs}:
        print("no heatmaps: Matplotlib is not installed", flush=True)
    if arguments.dry_run:
        print("\n".join(f"{job.stage} {job.key}" for job in left))
        return 0
    signal.signal(signal.SIGTERM, _raise_stop)
    end = None if arguments.minutes is None else began + 60 * arguments.minutes - GRACE
    try:
        is_finished = run_jobs(plan, arguments.output, arguments.jobs, arguments.device, end)
    except (KeyboardInterrupt, Stop):
        is_finished = False
    names = write_results(plan, arguments.output)
    print(f"{len(names)} of {len(plan.runs)} runs: {arguments.output / 'results'}")
    if arguments.keep and names:
        print(f"kept in {keep(plan, arguments.output, arguments.keep)}")
    print("finished" if is_finished else "stopped: run the same command to continue")
    return 0 if is_finished else STOPPED


def _raise_stop(*_):
    raise Stop


if __name__ == "__main__":
    run_main(main)
