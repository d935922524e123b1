"""The Snakemake side: small, and a dry run of the fan-out finds exactly the planned jobs."""

import subprocess
import sys

import pytest
import yaml

from pipeline_steps.common import snakemake as control
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.params import ROOT
from pipeline_steps.shards import fan_out

SNAKEFILE = ROOT / "workflow" / "Snakefile"


def snakemake(scratch, profile, *arguments):
    profile = ROOT / "workflow" / "profiles" / profile
    command = [sys.executable, "-m", "snakemake", "shards", "--snakefile", SNAKEFILE, "--directory", scratch]
    command += ["--workflow-profile", "none", "--profile", profile, "--nolock", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120, check=False)


def test_snakefile_is_short():
    assert len(SNAKEFILE.read_text().splitlines()) <= 40


@pytest.mark.parametrize("profile", ["default", "slurm"])
def test_dry_run_plans_one_job_per_shard_and_skips_finished_ones(tmp_path, profile):
    (tmp_path / "settings.json").write_text("{}")
    for place in ("train/p0", "train/p1", "test/p"):
        path = tmp_path / "plan" / f"{place}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for suffix in ("tar", "npz", "json"):
        path = tmp_path / "packed" / "train" / f"p0.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    done = snakemake(tmp_path, profile, "--dry-run", "--rerun-triggers", "mtime", "--quiet", "progress")
    assert done.returncode == 0, done.stderr + done.stdout
    outputs = [line.split()[1].rstrip(",") for line in done.stdout.splitlines() if line.strip().startswith("output:")]
    assert sorted(outputs) == ["packed/test/p.tar", "packed/train/p1.tar"]


def test_profiles_are_valid():
    contents = {
        name: yaml.safe_load((ROOT / f"workflow/profiles/{name}/config.yaml").read_text())
        for name in ("default", "slurm")
    }
    assert contents["default"]["cores"] == "all"
    assert contents["slurm"]["executor"] == "slurm"
    assert contents["slurm"]["retries"] >= 1


def test_profile_is_chosen_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("SNAKEMAKE_PROFILE", raising=False)
    assert control.snakemake_profile() == ROOT / "workflow/profiles/default"
    for chosen in ("slurm", "workflow/profiles/slurm", str(ROOT / "workflow/profiles/slurm")):
        for folder in (ROOT, tmp_path):
            monkeypatch.chdir(folder)
            monkeypatch.setenv("SNAKEMAKE_PROFILE", chosen)
            assert control.snakemake_profile() == ROOT / "workflow/profiles/slurm"
    (tmp_path / "mine").mkdir()
    monkeypatch.setenv("SNAKEMAKE_PROFILE", "mine")
    assert control.snakemake_profile() == tmp_path / "mine"
    monkeypatch.setenv("SNAKEMAKE_PROFILE", "/elsewhere/cluster")
    assert control.snakemake_profile() == "/elsewhere/cluster"


# ---------------------------------------------------------------- jobs that a killed run left in a queue


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """Commands `squeue` and `scancel` that work on files; the scratch folder of a run of two jobs and its queue."""
    queue = tmp_path / "queue"
    queue.write_text("1\n2\n")
    commands = {
        "squeue": f'echo "$@" >> {tmp_path}/calls; cat {queue}',
        "scancel": f'echo scancel "$@" >> {tmp_path}/calls; : > {queue}',
    }
    for name, text in commands.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    (tmp_path / control.LOG).write_text("Building DAG of jobs...\nSLURM run ID: 12-ab\nUsing shell\n")
    return queue


def test_leftover_slurm_jobs_are_cancelled_by_run_name(queue, capsys):
    control.cancel_leftover_jobs(queue.parent)
    assert queue.read_text() == ""
    calls = (queue.parent / "calls").read_text().splitlines()
    assert calls == [
        "--noheader --name=12-ab --format=%i",
        "scancel --name=12-ab",
        "--noheader --name=12-ab --format=%i",
    ]
    assert "cancelling 2 SLURM jobs of run 12-ab" in capsys.readouterr().err
    control.cancel_leftover_jobs(queue.parent)
    assert (queue.parent / "calls").read_text().count("scancel") == 1  # none are left


def test_local_runs_do_not_query_slurm(queue):
    (queue.parent / control.LOG).write_text("Building DAG of jobs...\n")
    control.cancel_leftover_jobs(queue.parent)
    assert not (queue.parent / "calls").exists()


def test_failing_slurm_command_is_named(queue, monkeypatch, capsys):
    (queue.parent / "bin/squeue").write_text("#!/bin/sh\necho no controller >&2; exit 1\n")
    with pytest.raises(UserError, match=r"squeue .* failed with exit code 1: no controller"):
        control.cancel_leftover_jobs(queue.parent)
    monkeypatch.setenv("PATH", str(queue.parent))
    control.cancel_leftover_jobs(queue.parent)  # another machine than the one that submitted them
    assert "scancel --name=12-ab" in capsys.readouterr().err


def test_slurm_error_message_reaches_the_user(tmp_path):
    log = tmp_path / ".snakemake/slurm_logs/rule_pack_shard/train_p0/7.log"
    log.parent.mkdir(parents=True)
    log.write_text("Building DAG\nslurmstepd: error: *** JOB 7 ON node1 CANCELLED AT DUE TO TIME LIMIT ***\n")
    assert "a job failed: slurmstepd: error: *** JOB 7 ON node1 CANCELLED" in fan_out._explain(tmp_path, 1, log)
