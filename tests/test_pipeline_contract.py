"""dvc.yaml against the code: every stage lists exactly the code and the parameters that it reads (found statically)."""

import ast
import re
import subprocess
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from pipeline_steps.common import params
from pipeline_steps.common.params import ROOT, StrictModel

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
SHARED = {"streaming"}  # a stage's package that other stages use too; every other belongs to one stage
LIBRARIES = {"common", "world", "inference", "monitoring"}  # packages without a stage, listed in dvc.yaml file by file
WITHOUT_EFFECT = {  # code that every stage may use and none depends on, because no result can depend on it
    "pipeline_steps/common/errors.py": "how an error is shown",
    "pipeline_steps/common/files.py": "how files are written, not what is in them",
    "pipeline_steps/common/integrity.py": "refuses damaged files, changes none",
    "pipeline_steps/common/params.py": "the values that it reads are the stage's params in dvc.yaml",
    "pipeline_steps/common/workspace.py": "checks before `dvc repro`, of which no stage is a part",
    "pipeline_steps/monitoring": "progress, curves and pictures of a run; it gets values and returns none",
}
RUNTIME = [f"runtime.{name}" for name in params.schema().model_fields["runtime"].annotation.model_fields]
ALSO = {
    "monitoring": {"training"},  # counts what a training step computes
    "parameters": {"training"},  # checks the objectives before any stage starts
    "study": {"report", "flops", "parameters"},  # collects; counts budgets; checks every arm
}
WITHOUT_NETWORK = {
    "model/__init__.py",
    "model/frames.py",
    "model/hdr.py",
    "model/option_checks.py",
    "model/pictures.py",
    "model/video.py",
    "model/video_container.py",
}  # read without the network
EXTRA_CODE = {"shards": {"workflow/Snakefile", "workflow/rules/shards.smk"}}  # read by Snakemake, not imported
DATA = ("conf/", "data/", "outputs/", "reports/", "params.yaml", "${")  # "${": the path in a parameter
ONLY_USED = {"parameters": {"ablation"}, "report": {"seed", "ablation", "report"}}  # the rest: checked or printed
WRITTEN_BY_HAND = {"conf/study", "reports/runs", "reports/study"}


def package(stage):
    """The package of a stage, from its command."""
    return re.match(r"python -m pipeline_steps\.(\w+)", STAGES[stage]["cmd"]).group(1)


def paths(entries):
    """Paths of a dvc.yaml list, whose entries are strings or {path: options}."""
    return {entry if isinstance(entry, str) else next(iter(entry)) for entry in entries}


def outs(stage):
    return paths(STAGES[stage].get("outs", [])) | paths(STAGES[stage].get("metrics", []))


def test_the_summary_is_the_only_metric_and_plots_and_artifacts_are_outs():
    document = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    metrics = {path for stage in STAGES.values() for path in paths(stage.get("metrics", []))}
    assert metrics == {"reports/metrics/summary.json"}
    made = {path for stage in STAGES for path in outs(stage)}
    drawn = {path for plot in document["plots"] for options in plot.values() for path in options["y"]}
    assert all(made & {path, *map(str, Path(path).parents)} for path in drawn)
    assert document["artifacts"]["model"]["path"] in made


def find(module):
    """The file of a module of this repository, or None."""
    place = ROOT / module.replace(".", "/")
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.exists()), None)


def module_of(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports(file):
    """Names of this repository's modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = module_of(file).split(".")
            if node.level:
                above = above[: len(above) - node.level + (file.name == "__init__.py")]
            base = ".".join((above if node.level else []) + ([node.module] if node.module else []))
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        if names[0] == "model" and any(name[6:7].isupper() for name in names):
            names.append("model.registration")  # classes that the package loads on first use
        found |= {name for name in names if name.split(".")[0] in ("model", "pipeline_steps") and find(name)}
    return found


def closure(files):
    """These files and all that they import of this repository, with the __init__.py of packages on the way; what only
    code WITHOUT_EFFECT imports is left out."""
    found, todo = set(), list(files)
    while todo:
        file = todo.pop()
        if file not in found:
            found.add(file)
            if unit(file) in WITHOUT_EFFECT:
                continue  # nothing that it imports has an effect either
            names = {".".join(name.split(".")[: n + 1]) for name in imports(file) for n in range(name.count(".") + 1)}
            todo += [find(name) for name in names]
    return found


def unit(file):
    """The path under which dvc.yaml lists a file: a stage's package, or the file itself in LIBRARIES and in `model`."""
    top, *rest = file.relative_to(ROOT).parts
    if top == "pipeline_steps" and len(rest) > 1 and rest[0] == "monitoring":
        return f"{top}/{rest[0]}"
    return str(file.relative_to(ROOT)) if top == "model" or rest[0] in LIBRARIES else f"{top}/{rest[0]}"


@cache
def code_of(stage):
    """What dvc.yaml has to list: all that the stage's package imports, less WITHOUT_EFFECT and packages' empty
    __init__.py. `model` stands for all of its files where more than WITHOUT_NETWORK is used."""
    files = closure((ROOT / "pipeline_steps" / package(stage)).rglob("*.py"))
    units = {unit(file) for file in files if file.name != "__init__.py" or file.read_text().strip()}
    network = {name for name in units if name.startswith("model/")}
    if network - WITHOUT_NETWORK:
        units = units - network | {"model"}
    return units - WITHOUT_EFFECT.keys() - {"pipeline_steps/__init__.py", "model/__init__.py"}


def constant(name, stage):
    """The value of a constant of the stage's entry module."""
    return getattr(import_module(f"pipeline_steps.{package(stage)}.__main__"), name)


def leaves(model, prefix=""):
    """Dotted keys of all values that a schema describes."""
    for name, field in model.model_fields.items():
        inner = [
            part
            for part in (field.annotation, *getattr(field.annotation, "__args__", ()))
            if isinstance(part, type) and issubclass(part, StrictModel)
        ]
        if inner:
            yield from leaves(inner[0], f"{prefix}{name}.")
        else:
            yield prefix + name


def readers(key):
    """Stages whose params in dvc.yaml hold this dotted key, but for those that only check or print it."""
    section = key.split(".")[0]
    return [
        name
        for name, stage in STAGES.items()
        if section in ONLY_USED.get(name, {section}) and any(f"{key}.".startswith(f"{own}.") for own in stage["params"])
    ]


@pytest.mark.parametrize("stage", STAGES)
def test_code_dependencies_are_the_imports(stage):
    listed = {path for path in paths(STAGES[stage]["deps"]) if not path.startswith(DATA)}
    assert listed == code_of(stage) | EXTRA_CODE.get(stage, set())


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_the_constant(stage):
    assert set(STAGES[stage]["params"]) == {key.format(stage=stage) for key in constant("PARAMS", stage)}


@pytest.mark.parametrize("key", [key for key in leaves(params.schema()) if key not in RUNTIME])
def test_every_parameter_is_read(key):
    """Some stage lists the key, and the code of such a stage uses its name (outside schemas)."""
    stages = readers(key)
    assert stages, f"no stage of dvc.yaml has {key} in its params"
    name = re.compile(rf"\b{key.split('.')[-1]}\b")
    for place in {place for stage in stages for place in code_of(stage)}:
        for file in (ROOT / place).rglob("*.py") if (ROOT / place).is_dir() else [ROOT / place]:
            if not file.name.endswith("schema.py") and name.search(file.read_text()):
                return
    pytest.fail(f"{key}: listed by {', '.join(stages)}, but its name is nowhere in their code")


@pytest.mark.parametrize("key", RUNTIME)
def test_every_runtime_parameter_is_used_and_no_stage_depends_on_it(key):
    section, name = key.split(".")
    listed = {own for stage in STAGES.values() for own in stage["params"]}
    assert not {own for own in listed if own.split(".")[0] == section}
    used = re.compile(rf"\b(runtime|settings)\.{name}\b")  # settings: in monitoring, which is given the section
    files = (ROOT / "pipeline_steps").rglob("*.py")
    assert any(used.search(re.sub(r'"[^"\n]*"', "", file.read_text())) for file in files), f"no code reads {key}"


def test_the_state_of_a_run_depends_on_the_code_that_its_stage_lists():
    """No line of code outside of the stage's dependencies discards a killed run's state."""
    tree = ast.parse((ROOT / "pipeline_steps/training/checkpoint_io.py").read_text()).body
    (code,) = (node.value for node in tree if isinstance(node, ast.Assign) and node.targets[0].id == "CODE")
    assert set(ast.literal_eval(code)) == code_of("stage1")


@pytest.mark.parametrize("folder", sorted({unit(file) for file in (ROOT / "pipeline_steps").rglob("*.py")} | {"model"}))
def test_imports_point_one_way(folder):
    """model imports nothing of pipeline_steps; a package imports no other stage's package but those in SHARED."""
    place = ROOT / folder
    own = Path(folder).parts[1] if folder != "model" else None
    for file in place.rglob("*.py") if place.is_dir() else [place]:
        for name in imports(file):
            top, *rest = name.split(".")
            if folder == "model":
                assert top == "model", f"{file} imports {name}"
            elif top == "pipeline_steps" and rest:
                assert rest[0] in {own} | SHARED | LIBRARIES | ALSO.get(own, set()), (
                    f"{file} imports {name}, which belongs to another stage"
                )


@pytest.mark.parametrize(("package_name", "allowed"), [
    ("common", {"common"}),
    ("world", {"common", "world"}),
    ("monitoring", {"common", "monitoring", "streaming", "training"}),
    ("streaming", {"common", "streaming"}),
    ("inference", {"common", "inference", "streaming"}),
])  # fmt: skip
def test_libraries_import_no_stage(package_name, allowed):
    for file in (ROOT / "pipeline_steps" / package_name).rglob("*.py"):
        used = {name.split(".")[1] for name in imports(file) if name.startswith("pipeline_steps.")}
        assert used <= allowed, f"{file} imports {', '.join(sorted(used - allowed))}"


def test_every_stage_has_its_package_and_every_package_its_stage():
    with_entry = {file.parent.name for file in (ROOT / "pipeline_steps").glob("*/__main__.py")}
    assert {package(stage) for stage in STAGES} | {"study"} == with_entry  # a study runs the stages
    with_code = {file.parent.name for file in (ROOT / "pipeline_steps").glob("*/__init__.py")}
    assert with_code == with_entry | LIBRARIES
    shared = ast.walk(ast.parse((ROOT / "pipeline_steps/__init__.py").read_text()))  # in no stage's deps: Ctrl-C only
    names = {name.name for node in shared if isinstance(node, ast.Import | ast.ImportFrom) for name in node.names}
    assert names == {"signal", "sys"}


@pytest.mark.parametrize("stage", STAGES)
def test_data_dependencies_are_outs_of_other_stages(stage):
    made = {out for other in STAGES if other != stage for out in outs(other)}
    for path in paths(STAGES[stage]["deps"]):
        if path.startswith(DATA) and path not in WRITTEN_BY_HAND and not path.startswith("${"):
            assert made & {path, *map(str, Path(path).parents)}, f"{path} is no stage's out"


def test_all_parameters_are_checked_before_any_other_stage():
    checked = set(STAGES["parameters"]["params"])
    assert checked == params.schema().model_fields.keys() - {"runtime"}
    (out,) = outs("parameters")
    depending = {"parameters"}
    while more := {
        name
        for name in STAGES.keys() - depending
        for path in paths(STAGES[name]["deps"])
        if any({path, *map(str, Path(path).parents)} & outs(other) for other in depending)
    }:
        depending |= more
    assert depending == STAGES.keys()
    others = {path for name in STAGES if name != "parameters" for path in paths(STAGES[name]["deps"])}
    assert out in others


@pytest.mark.parametrize("stage", STAGES)
def test_git_ignores_what_dvc_caches_and_nothing_else(stage):
    entries = [*STAGES[stage].get("outs", []), *STAGES[stage].get("metrics", [])]
    for entry in entries:
        path = next(iter(paths([entry])))
        cached = isinstance(entry, str) or entry[path].get("cache", True)
        ignored = subprocess.run(["git", "check-ignore", "-q", f"{path}/x"], cwd=ROOT, check=False).returncode == 0
        assert ignored == cached, f"{path}: cache is {cached}, ignored by git is {ignored}"
        assert isinstance(entry, str) or "persist" not in entry[path]


def test_the_lock_file_knows_every_stage():
    lock = ROOT / "dvc.lock"
    if not lock.exists():
        pytest.skip("no run has been committed yet")
    assert set(yaml.safe_load(lock.read_text())["stages"]) == set(STAGES)
    for stage in yaml.safe_load(lock.read_text())["stages"].values():
        for entry in stage.get("outs", []):
            if entry["path"].startswith(("reports/metrics/summary", "reports/report.md", "reports/tables")):
                assert (ROOT / entry["path"]).exists(), entry["path"]


def test_messages_name_a_stage_as_dvc_runs_it():
    """A stage that is run past DVC leaves dvc.lock behind its outputs. Commands with options are no stage's."""
    found, packages = [], {package(stage) for stage in STAGES}
    for file in (ROOT / "pipeline_steps").rglob("*.py"):
        tree = ast.parse(file.read_text(), str(file))
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        docs = [ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, documented)]
        texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        for text in (text for text in texts if isinstance(text, str) and text not in docs):
            named = re.findall(r"`python -m pipeline_steps\.(\w*)(?=`|$)", text)
            found += [f"{file.relative_to(ROOT)}: {text}" for name in named if name in {"", *packages}]
    assert found == []
