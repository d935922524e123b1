"""A study's jobs on SLURM: what they ask for, and a run through commands that stand in for SLURM's."""

import os
import subprocess
import sys

import pytest

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.params import ROOT
from pipeline_steps.study import __main__ as study_main
from pipeline_steps.study import progress
from pipeline_steps.study.plan import Job, Plan
from tests.pipeline_steps.studies import COPY, make, write_plan

# Commands of a cluster without accounting. sbatch runs the job at once and knows its state when it has ended.
SLURM = {
    "sbatch": """
        echo "$*" >> $SLURM/sbatch.calls
        number=$(wc -l < $SLURM/sbatch.calls)
        for word; do case "$word" in --wrap=*) command=${word#--wrap=};; esac; done
        env SLURM_JOB_ID=$number sh -c "$command" > $SLURM/$number.log 2>&1 && state=COMPLETED || state=FAILED
        echo "$number|$state" >> $SLURM/queue
        echo $number""",
    "srun": """
        echo "$*" >> $SLURM/srun.calls
        while [ "${1#-}" != "$1" ]; do shift; done
        exec "$@" """,
    "squeue": """cat $SLURM/queue""",
    "scancel": """exit 0""",
    "sinfo": """echo main""",
    "scontrol": """echo "MinJobAge = 300 sec" """,
    "sacct": """echo "Slurm accounting storage is disabled" >&2; exit 1""",
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The folder of the stand-ins, with a log of their calls."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in SLURM.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("SLURM", str(folder))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def on_cluster(tmp_path, monkeypatch):
    """A plan in tmp_path: one job makes data, a job of three threads trains on them."""
    monkeypatch.setenv("SNAKEMAKE_PROFILE", "slurm")
    data = Job("sources", "k", "python -c \"open('out', 'w').write('x')\"", {"a": 1}, {}, {}, ("out",))
    training = Job("stage1", "k", COPY, {"a": 1}, {"out": ("sources", "k")}, {}, ("result",), num_threads=3)
    made = Plan("mine", "c0ffee", jobs={("sources", "k"): data, ("stage1", "k"): training}, memory_gb=48.0)
    write_plan(made, tmp_path)
    return made


@pytest.mark.slow
def test_a_study_runs_as_slurm_jobs_that_ask_for_what_they_need(tmp_path, monkeypatch, slurm):
    made = on_cluster(tmp_path, monkeypatch)
    command = study_main.snakemake_command(tmp_path, "mine", cores=2, gpus=4)
    command += ["--slurm-init-seconds-before-status-checks", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert set(progress.states(made, tmp_path).values()) == {"done"}
    assert (tmp_path / "jobs/stage1/k/result").read_text() == "x"
    data, training = (call.partition(" --wrap=")[0] for call in (slurm / "sbatch.calls").read_text().splitlines())
    assert "--mem 48000 --ntasks=1 --cpus-per-task=1" in data
    assert "--gpus" not in data
    assert "--mem 48000 --cpus-per-task=3" in training
    assert training.endswith(" --gpus=1")
    assert " -t 1440 " in data
    assert " -t 1440 " in training


@pytest.mark.parametrize("gpus", [0, 4])
def test_a_dry_run_with_the_profile_shows_what_jobs_ask_for(tmp_path, monkeypatch, gpus):
    """The time limit is the profile's if it sets one for the stage."""
    on_cluster(tmp_path, monkeypatch)
    profile = tmp_path / "profile"
    profile.mkdir()
    text = (ROOT / "workflow/profiles/slurm/config.yaml").read_text()
    (profile / "config.yaml").write_text(f"{text}set-resources:\n  study_stage1:\n    runtime: 2880\n")
    monkeypatch.setenv("SNAKEMAKE_PROFILE", str(profile))
    command = [*study_main.snakemake_command(tmp_path, "mine", 2, gpus), "--dry-run", "--quiet", "progress"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    data, training = done.stdout.partition("rule study:")[0].split("rule study_sources:")[1].split("rule study_stage1:")
    assert "runtime=1440" in data
    assert "runtime=2880" in training
    assert "gpu=1" not in data
    assert ("gpu=1" in training) == (gpus > 0)
    assert data.count("mem_mb=48000") == training.count("mem_mb=48000") == 1


@pytest.mark.parametrize(
    ("override", "profile", "gpus", "message"),
    [
        ("training.common.device=cuda", "slurm", 0, r"training.common.device is cuda, but no job asks .*Add --gpus N"),
        ("backbones.embedded.device=cuda", "slurm", 0, r"backbones.embedded.device is cuda, but no job .*--gpus N"),
        ("training.common.device=cuda", "slurm", 2, None),
        ("training.common.device=cuda", "default", 0, None),
        ("training.common.device=auto", "slurm", 0, None),
    ],
)
def test_a_study_on_gpus_is_refused_where_no_job_would_get_one(
    tmp_path, monkeypatch, capsys, override, profile, gpus, message
):
    monkeypatch.setenv("SNAKEMAKE_PROFILE", profile)
    monkeypatch.setenv("RUN_SCRATCH", str(tmp_path))
    study = make(arms={"none": {"overrides": [override] if "auto" not in override else []}}, seeds=[1])
    monkeypatch.setattr(study_main, "read_study", lambda name: study)
    monkeypatch.setattr(study_main, "uncommitted", str)
    monkeypatch.setattr(sys, "argv", ["study", "mine", "-n", "--gpus", str(gpus)])
    if message:
        with pytest.raises(UserError, match=f"(?s)none-x1-seed1.1.1: {message}"):
            study_main.main()
        return
    assert study_main.main() == 0
    assert ("device auto is the CPU" in capsys.readouterr().out) == (profile == "slurm" and not gpus)
