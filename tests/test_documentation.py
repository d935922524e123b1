"""Commands of docs/: they leave the checkout clean, as studies refuse one that is not, and show what they announce."""

import os
import re
import shlex
import subprocess
import sys

from pipeline_steps.common.params import ROOT

OUTPUT = re.compile(r"^ {4}.* (?:--out|-o|--output|--local-dir) ([a-z]\w*)", re.MULTILINE)


def test_what_the_documented_commands_write_into_the_checkout_is_ignored():
    written = {name for page in ROOT.glob("docs/*.md") for name in OUTPUT.findall(page.read_text())}
    assert {"mine", "plots"} <= written
    paths = [*(f"{name}/file" for name in written), "clip.heatmap.gif", "world_objects.jpg"]  # defaults
    done = subprocess.run(["git", "check-ignore", *paths], cwd=ROOT, capture_output=True, text=True)
    assert set(paths) - set(done.stdout.split()) == set()


def test_the_table_of_experiments_names_them(tmp_path):
    (line,) = re.findall(r"^ {4}dvc (exp show .*)$", (ROOT / "docs/experiments.md").read_text(), re.MULTILINE)
    (tmp_path / "dvc.yaml").write_text("metrics: [summary.json]\n")
    (tmp_path / "summary.json").write_text('{"mean_loss": 0.25, "exact_match_accuracy": 0.5, "accuracy_card": 0.75}')
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    environment = os.environ | {"DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": str(tmp_path / ".dvc/site")}
    options = {"cwd": tmp_path, "env": environment, "check": True}
    for command in (
        ["git", "init", "--quiet", "--initial-branch", "main"],
        [sys.executable, "-m", "dvc", "init", "--quiet"],
        [sys.executable, "-m", "dvc", "config", "core.check_update", "false"],
        ["git", "add", "--all"],
        ["git", *author, "commit", "--quiet", "--message", "metrics"],
    ):
        subprocess.run(command, **options)
    show = [sys.executable, "-m", "dvc", *shlex.split(line), "--md"]
    done = subprocess.run(show, **options, capture_output=True, text=True)
    header, _, *rows = ([cell.strip() for cell in row.strip("|").split("|")] for row in done.stdout.split("\n") if row)
    assert header == ["Experiment", "mean_loss", "exact_match_accuracy"]
    assert rows == [["workspace", "0.25", "0.5"], ["main", "0.25", "0.5"]]
