"""The plan of `benchmarks.natural`: a job for every stage of every arm and seed, what arms share made once.

The plan is written to --output/plan.json, so that a machine without Hydra can follow it.
"""

import json
import subprocess
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.files import check_outputs, writable, write_json
from pipeline_steps.common.hashing import fingerprint, sha256_file
from pipeline_steps.common.params import ROOT
from pipeline_steps.study.design import Cell, Seeds, parameters_of
from pipeline_steps.study.plan import LIBRARIES, TARGETS, Job, Plan, Run, jobs_of, read_stages

PRESETS = {"gpu": "objects", "cpu": "objects_cpu"}  # conf/data/
BASE = ("scale=smollm2_135m", "backbones.kind=local", "runtime.tensorboard=false", "runtime.dvclive=false")
BASE += ("runtime.heatmaps_every=null",)
HEATMAPS = "heatmaps"
FOLDERS = {"vision": "vision_encoder", "language": "language_model"}  # of --pretrained


def make_plan(arguments) -> Plan:
    """The `Plan` of all runs, written to plan.json. Without Hydra: the one that is there. UserError if it is missing or
    of other arguments or code."""
    code, path = code_files(), arguments.output / "plan.json"
    links = links_of(arguments)
    inputs = {name: f"../../../inputs/{link}" for name, (link, _) in links.items()}  # from jobs/<stage>/<key>
    wanted = {"inputs": inputs, "code": fingerprint(code), "arms": arguments.arms, "seeds": arguments.seeds}
    wanted |= {"preset": arguments.preset, "device": arguments.device, "set": list(arguments.set)}
    if find_spec("hydra") is None:
        plan = read_plan(path, wanted)
        link_inputs(arguments.output, links)
        return plan
    stages, libraries = read_stages(), installed_versions()
    plan = Plan("natural", commit())
    targets = (*TARGETS, HEATMAPS) if find_spec("matplotlib") else TARGETS
    for cell in cells_of(arguments, inputs):
        try:
            parameters = parameters_of(cell)
        except UserError as error:
            raise UserError(f"{error}\n  Check --set {' '.join(arguments.set)}" if arguments.set else error) from None
        jobs = jobs_of(stages, parameters, code, targets, libraries)
        plan.jobs |= {(job.stage, job.key): job for job in jobs.values() if (job.stage, job.key) not in plan.jobs}
        keys = {stage: job.key for stage, job in jobs.items()}
        plan.runs.append(Run(cell.name, cell.arm, cell.budget, cell.seeds.model_dump(), parameters, keys))
    check_outputs(files=[path, arguments.output / "results" / "runs.csv"])
    link_inputs(arguments.output, links)
    write_json(path, wanted | plan.as_dict())
    return plan


def check_arms(arms: list[str]) -> None:
    """UserError for an arm that conf/ablation lacks."""
    known = sorted(path.stem for path in (ROOT / "conf/ablation").glob("*.yaml"))
    if unknown := [arm for arm in arms if arm not in known]:
        raise UserError(f"--arms {unknown[0]}: there is no conf/ablation/{unknown[0]}.yaml (there are: {known})")


def cells_of(arguments, inputs: dict[str, str]) -> list[Cell]:
    """A `Cell` for every arm and seed; a seed is that of training and data, as the backbones are given."""
    base = (f"data={PRESETS[arguments.preset]}", *BASE, f"training.common.device={arguments.device}")
    for name, folder in FOLDERS.items():
        base += (f"backbones.local.{name}_path={inputs['pretrained']}/{folder}",)
    base += (f"sources.procedural.objects.cutouts={inputs['cutouts']}",)
    if "backgrounds" in inputs:
        base += (f"sources.procedural.objects.backgrounds={inputs['backgrounds']}",)
    if "chats" in inputs:
        base += (f"sources.chat.path={inputs['chats']}",)
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


def links_of(arguments) -> dict[str, tuple[str, Path]]:
    """{name of an input: (name of its link, its path)}. The link's name contains the content's hash, so that other
    content is other work."""
    folders = {"pretrained": arguments.pretrained, "cutouts": arguments.cutouts}
    if arguments.backgrounds is not None:
        folders["backgrounds"] = arguments.backgrounds
    links = {name: (f"{name}-{folder_hash(folder)}", folder) for name, folder in folders.items()}
    if arguments.chats is not None:
        links["chats"] = f"chats-{sha256_file(arguments.chats)[:16]}.jsonl", arguments.chats
    return links


def link_inputs(output: Path, links: dict[str, tuple[str, Path]]) -> None:
    """Links to the inputs in output/inputs. UserError if they cannot be written."""
    with writable(output):
        for name, path in links.values():
            link = output / "inputs" / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(path.resolve())


def folder_hash(folder: Path) -> str:
    """16 hex digits of the names and contents of a folder's files."""
    return fingerprint([(str(path.relative_to(folder)), sha256_file(path)) for path in files_of(folder)])


def files_of(folder: Path) -> list[Path]:
    """The files in a folder but hidden ones. UserError if there are none."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    if not files:
        raise UserError(f"{folder}: no such folder, or nothing in it.")
    return files


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
