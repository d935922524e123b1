"""Jobs of a study under Snakemake: failures, kills, GPUs, threads, changed code."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
from rich.console import Console

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.params import ROOT
from pipeline_steps.study import __main__ as study_main
from pipeline_steps.study import job, plan, progress, summary
from tests.pipeline_steps.studies import COPY, FAIL, SLOW, run_snakemake, small_plan, wait_for, write_plan


def test_the_printed_command_runs_the_jobs_from_any_folder_and_shell(tmp_path, monkeypatch, capsys):
    """With quotes, spaces and what Rich would read as markup or as an emoji in its words."""
    studies, elsewhere = tmp_path / "my [bold]'s :ant: studies", tmp_path / "elsewhere"
    studies.mkdir()
    elsewhere.mkdir()
    names = "('CUDA_VISIBLE_DEVICES', 'SNAKEMAKE_PROFILE')"
    made = small_plan(f"python -c \"import os; open('result', 'w').write(str([*map(os.environ.get, {names})]))\"")
    write_plan(made, studies)
    monkeypatch.delenv("SNAKEMAKE_PROFILE", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    monkeypatch.setattr(study_main, "show_until_end", lambda process, *_: process.wait(120))
    console, arguments = Console(soft_wrap=True, width=60), SimpleNamespace(gpus=2)
    assert study_main.run_jobs(made, made, studies, None, arguments, 1, console) == 0
    printed = capsys.readouterr().out.splitlines()[-1]
    shutil.rmtree(studies / "jobs")
    variables = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    variables["SNAKEMAKE_PROFILE"] = "slurm"
    subprocess.run(["sh", "-c", printed], cwd=elsewhere, env=variables, check=True, timeout=120, capture_output=True)
    assert set(progress.states(made, studies).values()) == {"done"}
    assert (studies / "jobs/second/k0/result").read_text() == "['3, 5', None]"  # no stage of this plan takes a GPU


def test_a_failed_job_does_not_stop_the_others_and_is_reported(tmp_path):
    made = small_plan(FAIL, COPY, COPY)
    done = run_snakemake(made, tmp_path)
    assert done.returncode != 0
    found = progress.states(made, tmp_path)
    assert [found["second", f"k{number}"] for number in range(3)] == ["failed", "done", "done"]
    (text,) = progress.failures(made, tmp_path)
    assert "second of run0 failed (exit code 1)" in text
    assert "reading" in text
    assert "no digits found" in text
    assert (tmp_path / "jobs/second/k1/result").read_text() == "x"
    assert not (tmp_path / "jobs/second/k0/done.json").exists()


def test_only_what_is_missing_runs_again(tmp_path):
    run_snakemake(small_plan(FAIL, COPY), tmp_path)
    made = small_plan(COPY, COPY)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("jobs/*/*/done.json")}
    assert len(times) == 2
    assert run_snakemake(made, tmp_path).returncode == 0
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())
    assert set(progress.states(made, tmp_path).values()) == {"done"}
    assert not progress.failures(made, tmp_path)
    record = json.loads((tmp_path / "jobs/second/k0/done.json").read_text())
    assert record.keys() == {"commit", "seconds", "attempts"}
    assert record["commit"] == "c0ffee"
    assert record["attempts"] == 2


def test_a_job_that_another_study_finishes_meanwhile_is_kept(tmp_path):
    """The second job's record appears when the study has begun: Snakemake must not delete it."""
    meanwhile = "p = pathlib.Path('../../second/k0'); p.mkdir(parents=True); (p / 'done.json').write_text('{}')"
    made = small_plan(FAIL)
    first = made.jobs["first", "k"]
    made.jobs["first", "k"] = replace(first, command=f"python -c \"import pathlib; open('out', 'w'); {meanwhile}\"")
    done = run_snakemake(made, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "jobs/second/k0/done.json").read_text() == "{}"


def test_an_output_that_was_not_written_fails_the_job(tmp_path):
    run_snakemake(small_plan('python -c "pass"'), tmp_path)
    assert json.loads((tmp_path / "jobs/second/k0/failed.json").read_text())["reason"] == "not written: result"


def test_a_killed_study_leaves_nothing_running_and_continues(tmp_path):
    write_plan(small_plan(SLOW), tmp_path)
    process = subprocess.Popen(study_main.snakemake_command(tmp_path, "mine", 1, 0), stderr=subprocess.DEVNULL)
    folder = tmp_path / "jobs/second/k0"
    wait_for(lambda: (folder / "begun").exists())
    assert progress.state_of(folder) == "running"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: progress.state_of(folder) == "waiting")
    assert not progress.failures(small_plan(SLOW), tmp_path)
    assert run_snakemake(small_plan(COPY), tmp_path).returncode == 0


def test_jobs_take_a_gpu_each_and_wait_for_one(tmp_path):
    names = ["2", "MIG-GPU-8/1/0"]
    with job.free_device(tmp_path, names) as first, job.free_device(tmp_path, names) as second:
        assert [first, second] == names
        code = (
            "from pathlib import Path\nfrom pipeline_steps.study.job import free_device\n"
            f"with free_device(Path({str(tmp_path)!r}), {names}) as name: print(name)"
        )
        third = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        time.sleep(1.5)
        assert third.poll() is None
    assert third.communicate(timeout=30)[0].strip() in names
    assert {path.name for path in tmp_path.iterdir()} == {"gpu2.lock", "gpuMIG-GPU-8-1-0.lock"}


@pytest.mark.parametrize(
    ("given", "count", "expected"),
    [(None, 2, ["0", "1"]), ("2,3", 1, ["2"]), ("3, 2", 2, ["3", "2"]), ("GPU-8f,MIG-1", 2, ["GPU-8f", "MIG-1"])],
)
def test_jobs_use_the_gpus_that_the_user_selected(monkeypatch, given, count, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert job.visible_devices(count) == expected


@pytest.mark.parametrize(("given", "found"), [("2,3", 2), ("", 0), ("-1", 0), ("0,-1,1", 1)])
def test_more_gpus_than_the_user_selected_are_refused_before_anything_runs(monkeypatch, given, found):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    monkeypatch.delenv("SNAKEMAKE_PROFILE", raising=False)
    monkeypatch.setattr(sys, "argv", ["study", "smoke", "--gpus", "3"])
    monkeypatch.setattr(study_main, "make_plan", lambda *_: pytest.fail("planned"))
    with pytest.raises(UserError, match=rf"--gpus 3, but CUDA_VISIBLE_DEVICES={given} has {found} device"):
        study_main.main()


def test_a_job_asks_for_its_threads_and_the_memory_of_the_study(tmp_path):
    made = replace(small_plan(COPY), memory_gb=48.0)
    made.jobs["second", "k0"] = replace(made.jobs["second", "k0"], num_threads=3)
    write_plan(made, tmp_path)
    command = [*study_main.snakemake_command(tmp_path, "mine", 4, 0), "--dry-run", "--quiet", "progress"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    first, second = done.stdout.split("rule study_first:")[1].split("rule study_second:")
    assert "threads:" not in first
    assert "threads: 3" in second.partition("rule study:")[0]
    assert first.count("mem_mb=48000") == second.partition("rule study:")[0].count("mem_mb=48000") == 1


def test_code_that_changed_since_the_plan_is_refused(git_repository):
    code = {"code.py": plan.git("hash-object", "code.py").strip()}
    plan.check_code(code)
    (git_repository / "code.py").write_text("2")
    with pytest.raises(UserError, match=r"1 file.s. changed since the study was planned \(code.py\)"):
        plan.check_code(code)
    (git_repository / "code.py").unlink()
    with pytest.raises(UserError, match=r"changed since the study was planned \(code.py\)"):
        plan.check_code(code)


def test_missing_inputs_name_the_job_that_makes_them(tmp_path):
    made = small_plan(COPY).as_dict()["jobs"][1]
    folder = tmp_path / "jobs/second/k0"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match=r"jobs/first/k/out: missing; it is an output of first \(k\)"):
        job.prepare(made, folder, tmp_path)


@pytest.mark.slow
def test_a_study_end_to_end(tmp_path, monkeypatch, clean_tree):
    """Two arms of seconds through the real stages; then nothing is left to do."""
    monkeypatch.setenv("RUN_SCRATCH", str(tmp_path))
    monkeypatch.setattr(study_main, "RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(
        study_main, "write_summary", lambda name, study: summary.write_summary(name, study, tmp_path / "results")
    )
    monkeypatch.setattr(sys, "argv", ["study", "smoke", "--cores", "2", "--seeds", "1"])
    assert study_main.main() == 0
    table = pd.read_csv(tmp_path / "results/smoke/runs.csv")
    assert list(table["arm"]) == ["none", "A6"]
    assert (table["training_samples"] == 100).all()
    assert table["training_flops"].iloc[0] > table["training_flops"].iloc[1]  # planning costs
    items = pd.read_parquet(tmp_path / "results/smoke/items.parquet")
    for run, rows in items.groupby("run"):
        tasks = rows.groupby("task")[["num_correct", "num_tokens"]].sum()
        found = table.set_index("run").loc[run, [f"accuracy_{task}" for task in tasks.index]]
        assert list(found) == pytest.approx(list(tasks["num_correct"] / tasks["num_tokens"]), abs=1e-5)
    started = time.monotonic()
    assert study_main.main() == 0
    assert time.monotonic() - started < 60
