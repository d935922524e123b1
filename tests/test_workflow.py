"""The Snakemake side: small, and a dry run of the fan-out finds exactly the planned jobs."""

import subprocess
import sys

import yaml

from pipeline_steps.params import ROOT
from pipeline_steps.shards import fan_out

SNAKEFILE = ROOT / "workflow" / "Snakefile"


def snakemake(scratch, *arguments):
    profile = ROOT / "workflow" / "profiles" / "default"
    command = [sys.executable, "-m", "snakemake", "shards", "--snakefile", SNAKEFILE, "--directory", scratch]
    command += ["--workflow-profile", "none", "--profile", profile, "--nolock", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120, check=False)


def test_snakefile_is_short():
    assert len(SNAKEFILE.read_text().splitlines()) <= 40


def test_dry_run_plans_one_job_per_shard_and_skips_finished_ones(tmp_path):
    (tmp_path / "settings.json").write_text("{}")
    for place in ("train/p0", "train/p1", "test/p"):
        path = tmp_path / "plan" / f"{place}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for suffix in ("tar", "npz", "json"):
        path = tmp_path / "packed" / "train" / f"p0.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    done = snakemake(tmp_path, "--dry-run", "--rerun-triggers", "mtime", "--quiet", "progress")
    assert done.returncode == 0, done.stderr + done.stdout
    outputs = [line.split()[1].rstrip(",") for line in done.stdout.splitlines() if line.strip().startswith("output:")]
    assert sorted(outputs) == ["packed/test/p.tar", "packed/train/p1.tar"]


def test_profiles():
    content = yaml.safe_load((ROOT / "workflow/profiles/default/config.yaml").read_text())
    assert content["cores"] == "all"


def test_profile_from_the_environment(monkeypatch):
    monkeypatch.delenv("SNAKEMAKE_PROFILE", raising=False)
    assert fan_out._profile() == ROOT / "workflow/profiles/default"
    monkeypatch.setenv("SNAKEMAKE_PROFILE", "default")
    assert fan_out._profile() == ROOT / "workflow/profiles/default"
    monkeypatch.setenv("SNAKEMAKE_PROFILE", "/elsewhere/cluster")
    assert fan_out._profile() == "/elsewhere/cluster"
