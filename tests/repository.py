"""A copy of this repository, for tests that run DVC."""

import shutil
import subprocess
from pathlib import Path

import yaml

from pipeline_steps.common.params import ROOT

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def copy_to(root: Path) -> None:
    """Copy the working tree without dvc.lock, docs and tests to `root`, a git repository without commits."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.split("\0"):
        if name and name != "dvc.lock" and not name.startswith(("docs/", "tests/")) and (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, root / name)
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)


def paths(entries: list) -> list[str]:
    """Paths of a dvc.yaml list, whose entries are strings or {path: options}."""
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def write_fakes(root: Path) -> None:
    """A small file for every out, and for every dependency inside an out."""
    wanted = [
        path for stage in STAGES.values() for kind in ("outs", "metrics", "deps") for path in paths(stage.get(kind, []))
    ]
    wanted = [path for path in wanted if not path.startswith("${")]  # training.init_from: data/backbones
    for path in sorted(wanted, key=len, reverse=True):  # first what lies inside of others
        target = root / path
        if not target.exists():
            target = target if target.suffix else target / "fake.txt"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(f"fake of {path}\n")
    (root / "outputs/parameters.json").write_text('{\n "valid": true\n}\n')
