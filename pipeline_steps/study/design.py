"""The design of a study: conf/study/<name>.yaml, and the cells it defines.

A cell is one training run: an arm with one seed each for training, backbones and data, at one training budget.
"""

import copy
import json
import re
from dataclasses import dataclass, replace
from functools import cache, reduce
from itertools import product
from operator import getitem
from typing import Annotated

from pydantic import Field, ValidationError

from pipeline_steps.common import params
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.names import NEW
from pipeline_steps.common.params import ROOT, TRAINING_STAGES, StrictModel
from pipeline_steps.parameters.__main__ import check_network, check_objectives

STUDIES = ROOT / "conf" / "study"
ALL = "all"  # the group of all scored tasks
NAME = re.compile(r"[A-Za-z0-9_.-]+")
SEED_KEYS = {  # which parameters each kind of seed sets
    "training": ("seed",),
    "backbones": ("backbones.embedded.seed",),
    "data": ("sources.procedural.seed", "sources.chat.seed", "shards.seed"),
}


Seed = Annotated[int, Field(ge=0)]
NOT_EMPTY = Field(min_length=1)


class Seeds(StrictModel):
    """The seeds of one replicate; arms with equal seeds share backbones and data, and are compared in pairs."""

    training: Seed
    backbones: Seed
    data: Seed


class Arm(StrictModel):
    """One way of training that the study compares."""

    overrides: tuple[str, ...] = ()
    """Hydra overrides on top of the study's `base`, such as ablation=A6."""
    seeds: Annotated[tuple[Seed | Seeds, ...], NOT_EMPTY] | None = None
    """Seeds of this arm only; null: those of the study."""
    budgets: Annotated[tuple[str, ...], NOT_EMPTY] | None = None
    """Names of the budgets of this arm; null: all."""
    baseline: str | None = None
    """The arm that it is compared with; null: the study's first."""
    sample_factor: float = Field(1.0, gt=0)
    """On its training samples, beside the budget's factor: of two arms with known costs per sample, for equal FLOPs."""
    rate_factor: float = Field(1.0, gt=0)
    """On the learning rates of all groups of parameters in the three stages."""


class EqualFlops(StrictModel):
    """A budget with as many training FLOPs as the arm's baseline has at another budget, seed by seed."""

    flops_of: str
    """Name of that other budget, whose runs of both arms have to be finished first."""


class Flops(StrictModel):
    """A budget of training FLOPs, from which the samples follow by formula, for samples of 8 frames and 128 text tokens
    (`python -m pipeline_steps.flops --budget`). For pretrained backbones."""

    flops: float = Field(gt=0)
    """Forward and backward, all weights trained; divided over the three stages as their samples are."""


class Study(StrictModel):
    """A grid of training runs, every arm with every seed at every budget."""

    question: str = Field(min_length=1)
    """What the runs are to answer, in a sentence."""
    base: tuple[str, ...] = ()
    """Hydra overrides of every run."""
    arms: dict[str, Arm] = Field(min_length=1)
    """{name: arm}; the first is the baseline unless an arm names another."""
    seeds: tuple[Seed | Seeds, ...] = Field(min_length=1)
    """Replicates; a number stands for the seed of training, backbones and data alike."""
    budgets: Annotated[dict[str, float | EqualFlops | Flops], NOT_EMPTY] = {"x1": 1.0}
    """{name: factor on the training samples of the three stages, or `flops_of: NAME`, or `flops: NUMBER`}."""
    groups: dict[str, Annotated[tuple[str, ...], NOT_EMPTY]] = {
        "gaze": ("card", "follow", "ask_colour", "ask_place"),
        "reading": ("caption", "image", "gist"),
    }
    """{name: tasks} that arms are compared on; default: the digit world's tasks that need a gaze, and the others."""
    headline: tuple[str, ...] | None = None
    """Comparisons that get a verdict, as `ARM` or, with several budgets, `ARM, BUDGET`; p-values are corrected for
    their number, the others are exploratory. null: all."""
    series: dict[str, Annotated[tuple[str, ...], NOT_EMPTY]] = {}
    """Of a scaling grid: {way of training: its arms, smallest network first}. Scaling laws are fitted to each arm, and
    the first series' arms are compared with those in the same place of the others."""
    margin: float = Field(default=0.03, gt=0)
    """Differences of token accuracy below it count as none. Arms are equal only if one of them beats itself with grey
    frames by more, where that was measured (`blind_TASK` in runs.csv)."""
    next_frame_margin: float = Field(default=0.01, gt=0)
    """Relative gains of planned over static queries in next-frame loss below it count as none."""
    confirmation_seeds: tuple[Seed, ...] = ()
    """Preregistered seeds of training: of arms that have them, a verdict on next-frame gains counts only if these runs
    alone give it, too."""
    plateau: float = Field(default=0.75, gt=0, lt=1)
    """Mean token accuracy from which a run counts as having left the plateau."""
    memory_gb: float = Field(default=4.0, gt=0)
    """Main memory that a cluster reserves for each job."""


@dataclass(frozen=True)
class Cell:
    """One training run of a study."""

    arm: str
    budget: str
    seeds: Seeds
    overrides: tuple[str, ...]  # Hydra overrides without those of the budget
    factor: float | None  # on the training samples; None: follows from `flops`, or from the runs of `flops_of`
    flops_of: str | None = None
    baseline: str | None = None  # whose FLOPs those are
    flops: float | None = None
    rate_factor: float = 1.0

    @property
    def name(self):
        """Unique within the study, fit for a file name."""
        return run_name(self.arm, self.budget, self.seeds)


def run_name(arm, budget, seeds):
    return f"{arm}-{budget}-seed{seeds.training}.{seeds.backbones}.{seeds.data}"


def read_study(name):
    """`Study` of conf/study/<name>.yaml. UserError names the file and every problem."""
    path = STUDIES / f"{name}.yaml"
    if not NAME.fullmatch(name) or not path.is_file():
        known = ", ".join(sorted(file.stem for file in STUDIES.glob("*.yaml"))) or "none yet"
        raise UserError(f"conf/study/{name}.yaml: there is no such study (there are: {known})")
    content, path = params.load(path, "keys such as 'question:' and 'arms:'"), path.relative_to(ROOT)
    arms = content.get("arms")
    if empty := [arm for arm, entry in arms.items() if entry is None] if isinstance(arms, dict) else []:
        raise UserError(f"{path}: arm {empty[0]}: nothing follows its name. Write `{empty[0]}: {{}}` for the default")
    try:
        study = Study.model_validate_json(json.dumps(content))  # JSON mode: a yaml list is a valid tuple
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
        raise UserError(f"{path}: " + "\n  ".join(lines)) from None
    check(study, path)
    return study


def check(study, path):
    """UserError for names that are no file names, unknown arms and budgets, factors that are not positive, groups whose
    means would be wrong, and overrides of what the study sets itself."""
    for kind, names in (("arm", study.arms), ("budget", study.budgets)):
        for name in names:
            if not NAME.fullmatch(name):
                raise UserError(f"{path}: {kind} {name!r}: use letters, digits, '_', '.' and '-' only")
    for name, budget in study.budgets.items():
        if isinstance(budget, EqualFlops):
            if not isinstance(study.budgets.get(budget.flops_of), float):
                known = ", ".join(other for other, value in study.budgets.items() if isinstance(value, float)) or "none"
                raise UserError(f"{path}: budget {name}: flops_of is {budget.flops_of!r}, expected one of: {known}")
        elif isinstance(budget, float) and not budget > 0:
            raise UserError(f"{path}: budget {name} is {budget}: expected a factor above 0")
    for name, arm in study.arms.items():
        for budget in arm.budgets or ():
            if budget not in study.budgets:
                known = ", ".join(study.budgets)
                raise UserError(f"{path}: arm {name}: there is no budget {budget!r} (there are: {known})")
        kinds = {type(study.budgets[used]) for used in budgets_of(study, name)}
        if arm.sample_factor != 1 and float not in kinds:
            raise UserError(
                f"{path}: arm {name}: sample_factor {arm.sample_factor:g} changes nothing, as its budgets are FLOPs. "
                "Remove it, or give the arm a budget that is a factor"
            )
        if baseline_of(study, name) not in study.arms:
            raise UserError(f"{path}: arm {name}: its baseline {arm.baseline!r} is no arm of this study")
        keys = [key for group in SEED_KEYS.values() for key in group]
        for override in (*study.base, *arm.overrides):
            if override.split("=")[0].lstrip("+~") in keys:
                raise UserError(f"{path}: arm {name}: {override}: seeds come from `seeds`; remove the override")
    check_groups(study, path)
    check_series(study, path)
    check_equal_flops(study, path)
    labels = [label_of(study, arm, budget) for arm, budget in comparisons_of(study)]
    for label in study.headline or ():
        if label not in labels:
            raise UserError(
                f"{path}: headline {label!r} is no comparison of this study (there are: {', '.join(labels)})"
            )


def check_groups(study, path):
    """UserError for a group with the name of the one of all tasks, and for one that has a task twice."""
    for name, tasks in study.groups.items():
        if name == ALL:
            raise UserError(f"{path}: group {ALL}: this is the name of every scored task. Give the group another one")
        if twice := sorted({task for task in tasks if tasks.count(task) > 1}):
            raise UserError(f"{path}: group {name}: {', '.join(twice)} is listed twice and would count twice")


def check_series(study, path):
    """UserError for series with unknown arms, of different lengths, or that share an arm."""
    for name, arms in study.series.items():
        if unknown := [arm for arm in arms if arm not in study.arms]:
            known = ", ".join(study.arms)
            raise UserError(f"{path}: series {name}: there is no arm {', '.join(unknown)} (there are: {known})")
    if len({len(arms) for arms in study.series.values()}) > 1:
        counts = ", ".join(f"{name} {len(arms)}" for name, arms in study.series.items())
        raise UserError(
            f"{path}: series: arms in the same place are compared, but they have different numbers: {counts}"
        )
    listed = [arm for arms in study.series.values() for arm in arms]
    if twice := sorted({arm for arm in listed if listed.count(arm) > 1}):
        raise UserError(
            f"{path}: series: an arm belongs to one place of one series, but {', '.join(twice)} has several"
        )


def check_equal_flops(study, path):
    """UserError where runs of equal FLOPs would wait for runs that the study does not have."""
    for name in study.arms:
        for budget in budgets_of(study, name):
            if not isinstance(study.budgets[budget], EqualFlops) or baseline_of(study, name) == name:
                continue
            needed = study.budgets[budget].flops_of
            for other in {name, baseline_of(study, name)}:
                absent = [seeds for seeds in seeds_of(study, name) if seeds not in seeds_of(study, other)]
                if needed not in budgets_of(study, other) or absent:
                    what = f"budget {needed}" if needed not in budgets_of(study, other) else f"seeds {absent[0]}"
                    raise UserError(f"{path}: arm {name}: budget {budget} needs {what} of arm {other}: add it there")


def baseline_of(study, arm):
    """The arm that `arm` is compared with."""
    return study.arms[arm].baseline or next(iter(study.arms))


def budgets_of(study, arm):
    own = study.arms[arm].budgets
    return tuple(study.budgets) if own is None else own


def seeds_of(study, arm):
    own = study.arms[arm].seeds
    return [as_seeds(entry) for entry in (study.seeds if own is None else own)]


def comparisons_of(study):
    """(arm, budget) of every comparison with a baseline."""
    return [(arm, budget) for arm in study.arms if baseline_of(study, arm) != arm for budget in budgets_of(study, arm)]


def reference_budget(study, budget):
    """The budget whose runs of the baseline are compared with an arm's runs at `budget`: for equal FLOPs, the one that
    they follow."""
    entry = study.budgets.get(budget)
    return entry.flops_of if isinstance(entry, EqualFlops) else budget


def label_of(study, arm, budget):
    """How a comparison is named."""
    return arm if len(study.budgets) == 1 else f"{arm}, {budget}"


def cells_of(study):
    """Every `Cell` of the study, arm by arm; a baseline has none of equal FLOPs, as it would repeat itself. UserError
    for a cell that occurs twice."""
    cells = []
    for name, arm in study.arms.items():
        for budget, entry in product(budgets_of(study, name), seeds_of(study, name)):
            value, overrides = study.budgets[budget], (*study.base, *arm.overrides)
            cell = Cell(name, budget, entry, overrides, None, rate_factor=arm.rate_factor)
            if isinstance(value, Flops):
                cells.append(replace(cell, flops=value.flops))
            elif not isinstance(value, EqualFlops):
                cells.append(replace(cell, factor=value * arm.sample_factor))
            elif (baseline := baseline_of(study, name)) != name:
                cells.append(replace(cell, flops_of=value.flops_of, baseline=baseline))
    names = [cell.name for cell in cells]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"the study has {len(twice)} run(s) twice: {', '.join(twice)}")
    return cells


def with_factors(cells, flops):
    """(cells with a factor, cells that wait), given {run name: training FLOPs} of finished runs: a cell of equal FLOPs
    gets the baseline's FLOPs divided by its own arm's, of the runs with its seeds at the budget `flops_of`."""
    ready, waiting = [], []
    for cell in cells:
        if cell.flops is not None:
            ready.append(replace(cell, factor=factor_of(cell)))
            continue
        if cell.flops_of is None:
            ready.append(cell)
            continue
        base, own = (flops.get(run_name(arm, cell.flops_of, cell.seeds)) for arm in (cell.baseline, cell.arm))
        if base is None or own is None:
            waiting.append(cell)
        else:
            before = next(c.factor for c in cells if (c.arm, c.budget) == (cell.arm, cell.flops_of))
            ready.append(replace(cell, factor=before * base / own))
    return ready, waiting


def factor_of(cell):
    """The factor on the samples of a cell with a budget of training FLOPs. UserError for backbones whose shape is not
    known before they are trained, and for less than a sample per stage."""
    from pipeline_steps.flops import iso, scales  # seconds of imports that no job of a study needs

    parameters = composed(cell.overrides)
    network = scales.scale_of(parameters)
    if network is None:
        known = ", ".join(scales.LANGUAGE_MODELS)
        raise UserError(
            f"arm {cell.arm}: budget {cell.budget} gives training FLOPs, which are counted for SmolLM2 of {known} from "
            "the Hub only, with DINOv2-small and frames of 224 px. Give a factor on the samples instead."
        )
    config = scales.scaled(network, parameters["model"])
    objective = params.check(f"conf/ ({' '.join(cell.overrides)})", parameters).training.stage3.objective
    (found,) = iso.budget_samples([cell.flops], {network: {cell.arm: config}}, iso.BUDGET_SAMPLE, objective)
    if found.num_samples < len(TRAINING_STAGES):
        raise UserError(
            f"arm {cell.arm}: budget {cell.budget} has {cell.flops:.3g} FLOPs, but a training sample costs "
            f"{found.flops_per_sample:.3g}, and each of {len(TRAINING_STAGES)} stages needs one"
        )
    return found.num_samples / total_samples(parameters)


def total_samples(parameters):
    """Training samples of the three stages; parameters: a nested dict."""
    return sum(parameters["training"][stage]["num_samples"] for stage in TRAINING_STAGES)


def as_seeds(entry):
    return entry if isinstance(entry, Seeds) else Seeds(training=entry, backbones=entry, data=entry)


@cache
def composed(overrides, rate_factor=1.0):
    """Valid parameters of these Hydra overrides, which the runs of an arm share up to seeds and budgets, with all
    learning rates times `rate_factor`. Read-only."""
    source, content = f"conf/ ({' '.join(overrides)})", params.parse("conf/", params.compose_checked(overrides))
    params.check(source, content)
    for stage, name in product(TRAINING_STAGES, ("learning_rate", "converged_learning_rate")):
        settings = content["training"][stage]
        if settings[name] is not None:
            settings[name] = {group: rate * rate_factor for group, rate in settings[name].items()}
    params.check(f"{source}, learning rates x {rate_factor:g}", content)
    return content


def arm_parameters(study, arm):
    """Parameters of an arm's runs, but for seeds and budget; read-only."""
    return composed((*study.base, *study.arms[arm].overrides), study.arms[arm].rate_factor)


def check_tasks(study):
    """UserError for a group of the study with a task that the world of an arm does not render. Tasks of collected data
    are known only when they were scored."""
    if "groups" not in study.model_fields_set:
        return
    from pipeline_steps.world import digits, objects  # a drawing library that no job of a study needs

    worlds = {"digits": digits.KINDS, "objects": (*objects.KINDS, *(f"{kind}{NEW}" for kind in objects.KINDS))}
    for arm in study.arms:
        sources = arm_parameters(study, arm)["sources"]
        known = worlds[sources["procedural"]["world"]]
        for name, tasks in study.groups.items() if set(sources["collect"]) <= {"procedural", "chat"} else ():
            if absent := [task for task in tasks if task not in known]:
                raise UserError(
                    f"group {name}: arm {arm} has no task {', '.join(absent)} (there are: {', '.join(known)})"
                )


def split_of(study):
    """The split that the study's runs are scored on. UserError for arms on different ones."""
    splits = {arm: arm_parameters(study, arm)["evaluation"]["split"] for arm in study.arms}
    first, split = next(iter(splits.items()))
    for arm, other in splits.items():
        if other != split:
            raise UserError(
                f"arm {arm}: evaluation.split is {other}, but {split} in arm {first}, so they cannot be compared. "
                "Set it in `base`"
            )
    return split


def parameters_of(cell):
    """The cell's parameters as a nested dict, checked like params.yaml. UserError names the arm."""
    try:
        content = copy.deepcopy(composed(cell.overrides, cell.rate_factor))
        for kind, value in cell.seeds:
            for key in SEED_KEYS[kind]:
                *sections, name = key.split(".")
                reduce(getitem, sections, content)[name] = value
        for stage in TRAINING_STAGES:
            settings = content["training"][stage]
            settings["num_samples"] = max(round(settings["num_samples"] * cell.factor), 1)
        source = f"conf/ ({' '.join(cell.overrides)})"
        checked = params.check(source, content)
        check_network(source, checked)
        check_objectives(source, checked)
    except UserError as error:
        raise UserError(f"arm {cell.arm}: {error}") from None
    return content
