"""`benchmarks.natural`: its plan, and a run at a size of seconds with stand-ins for the pretrained backbones."""

import json
import re
import shutil
import sys
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import pandas as pd
import pytest

from benchmarks import natural, natural_chats, natural_cost, natural_plan, natural_results
from pipeline_steps.common.errors import UserError, run_main
from pipeline_steps.common.files import exclusive
from pipeline_steps.common.study_results import StudySummary
from pipeline_steps.study.plan import Job, Plan, folder_of
from pipeline_steps.world.objects import GAZE_KINDS, KINDS, NEW_KINDS
from tests import drawings

SMALL = [f"sources.procedural.objects.{name}=1" for name in ("num_validation_clips", "num_test_clips", "num_new_clips")]
SMALL += ["sources.procedural.objects.num_train_clips=36", "sources.procedural.objects.held_out_share=0.2"]
SMALL += ["sources.chat.num_train=20", "sources.chat.num_validation=4", "sources.chat.num_test=4"]
SMALL += [f"training.stage{number}.num_samples=16" for number in (1, 2, 3)]
SMALL += ["model.query_dim=64", "tokens.max_tokens=256", "training.common.validate_every=1"]
SMALL += ["evaluation.max_answers_per_task=1", "evaluation.bootstrap_samples=20", "heatmaps.num_sheet_clips=2"]


@pytest.fixture
def arguments(tmp_path):
    """Arguments of a plan whose inputs are ten drawings and two files."""
    drawings.write(tmp_path / "cutouts")
    for name in ("vision_encoder", "language_model"):
        (tmp_path / "pretrained" / name).mkdir(parents=True)
        (tmp_path / "pretrained" / name / "config.json").write_text("{}")
    folders = {name: tmp_path / name for name in ("cutouts", "pretrained", "output")}
    options = {"preset": "gpu", "device": "cuda", "set": [], "backgrounds": None, "chats": None}
    return SimpleNamespace(arms=["none", "A6", "B1"], seeds=[1, 2], **options, **folders)


def write_chats(path, count, **columns):
    turns = [[{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": f"{n}"}] for n in range(count)]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"messages": chat, **columns}) + "\n" for chat in turns))


def keys(plan, stage):
    return [run.jobs[stage] for run in plan.runs]


def test_arms_share_data_and_seeds_share_backbones(arguments):
    plan = natural_plan.make_plan(arguments)
    assert [run.name for run in plan.runs] == [f"{arm}-x1-seed{n}.1.{n}" for n in (1, 2) for arm in arguments.arms]
    counts = {stage: len(set(keys(plan, stage))) for stage in plan.runs[0].jobs}
    shared = {"sources": 2, "shards": 2, "tokens": 2, "backbones": 1}
    assert counts == shared | dict.fromkeys(("stage1", "stage2", "stage3", "evaluation", "flops", "heatmaps"), 6)
    for run in plan.runs:
        assert (run.parameters["training"]["common"]["device"], run.parameters["seed"]) == ("cuda", run.seeds["data"])
        assert run.parameters["sources"]["procedural"]["world"] == "objects"
        assert run.parameters["evaluation"]["max_captions_per_task"] == 0  # needs packages that a bare machine lacks


def test_other_pictures_are_other_work_and_another_place_is_not(arguments, tmp_path):
    before = natural_plan.make_plan(arguments)
    arguments.cutouts = (tmp_path / "cutouts").rename(tmp_path / "moved")
    assert natural_plan.make_plan(arguments).jobs.keys() == before.jobs.keys()
    metadata = tmp_path / "moved/metadata.jsonl"
    metadata.write_text(metadata.read_text() + "\n")
    other = natural_plan.make_plan(arguments)
    assert keys(other, "backbones") == keys(before, "backbones")
    assert not set(keys(other, "stage1")) & set(keys(before, "stage1"))


def test_other_chats_are_other_work(arguments, tmp_path):
    arguments.chats = tmp_path / "chats.jsonl"
    for text in ("{}\n", "[]\n"):
        arguments.chats.write_text(text)
        plan = natural_plan.make_plan(arguments)
        paths = {run.parameters["sources"]["chat"]["path"] for run in plan.runs}
        assert len(paths) == 1
        (job,) = {(job.stage, job.key) for job in plan.jobs.values() if job.stage == "backbones"}
        place = arguments.output / folder_of(*job)
        place.mkdir(parents=True, exist_ok=True)
        assert (place / paths.pop()).read_text() == text


def test_results_are_not_kept_where_packages_are_missing(monkeypatch, tmp_path):
    """Said before the run."""
    monkeypatch.setattr(natural_results, "find_spec", lambda name: None if name == "scipy" else name)
    with pytest.raises(UserError, match=r"--keep objects: .* need scipy, not installed .*pip install scipy`, or leave"):
        natural_results.check_kept_name("objects", tmp_path)


def test_a_machine_without_hydra_reads_the_plan_of_another(arguments, monkeypatch):
    made = natural_plan.make_plan(arguments)
    monkeypatch.setattr(natural_plan, "find_spec", lambda name: None)
    read = natural_plan.make_plan(arguments)
    assert (read.runs, read.jobs) == (made.runs, made.jobs)
    arguments.seeds = [3]
    with pytest.raises(UserError, match=r"a plan of other work \(seeds \[1, 2\], here \[3\]\)"):
        natural_plan.make_plan(arguments)
    (arguments.output / "plan.json").unlink()
    with pytest.raises(UserError, match=r"plan\.json: missing, and Hydra"):
        natural_plan.make_plan(arguments)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--arms", "A66"), r"--arms A66: there is no conf/ablation/A66\.yaml"),
        (("--rate", "0"), "--rate is 0, expected a number above 0"),
        (("--minutes", "-1"), "--minutes is -1, expected a number above 0"),
        (("--jobs", "-1"), "--jobs is -1, expected"),
        (("--seeds", "1", "-2"), "--seeds: -2, expected whole numbers from 0 to 9223372036854775807"),
        (("--seeds", str(2**63)), "--seeds: 9223372036854775808, expected whole numbers from 0 to 9223372036854775807"),
        (("--keep", "a/b"), "--keep a/b: expected a name"),
        (("--keep", ".."), r"--keep \.\.: expected a name"),
        (("--keep", "confirm"), "--keep confirm: .*confirm is for the results of another study"),
        (("--jobs", "0"), "--jobs is 0, expected"),
        (("--minutes", "0.75"), "--minutes is 0.75, expected more than 0.75"),
        (("--arms", "none", "none"), "--arms none none: expected each once"),
        (("--seeds", "1", "1"), "--seeds 1 1: expected each once"),
        (("--chats", "missing.jsonl"), r"--chats missing\.jsonl: no such file, expected a \.jsonl"),
        (("--chats", "."), r"--chats \.: is a folder, expected a \.jsonl"),
        (("--chats", "one.jsonl"), r"--chats one\.jsonl: 1 different chat\(s\), expected at least one each for train"),
        (("--chats", "held_out.jsonl"), r"--chats held_out\.jsonl: no chat has the split train"),
        (("--chats", "columns.jsonl"), r"columns\.jsonl line 1: unknown column question"),
        (("--cutouts", "missing"), "--cutouts: missing: no such folder"),
        (("--backgrounds", "missing"), "--backgrounds: missing: no such folder"),
        (("--backgrounds", "pretrained"), r"--backgrounds: pretrained/metadata\.jsonl cannot be read \(No such file"),
        (("--backgrounds", "one"), r"--backgrounds one: 1 different picture\(s\), expected at least 3"),
        (
            ("--set", "sources.chat.nmu_train=3"),
            r"chat\.nmu_train: unknown key .*did you mean 'num_train'.*\n  Check --set sour",
        ),
        (("--set", "training.stage1.num_samples=few"), r"stage1\.num_samples: .*\"few\"(.*\n)*  Check --set training"),
        (("--set", "training=3"), r"training: should be .*, found 3(.*\n)*  Check --set training=3"),
        (("--set", "seed=5"), "--set seed=5: --seeds sets this"),
        (("--set", "ablation=A6"), "--set ablation=A6: --arms sets this"),
        (("--output", "one.jsonl"), r"one\.jsonl/plan\.json: cannot be written \(Not a directory\)"),
        (("--pretrained", "missing"), "missing: no language_model there"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_made(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained/vision_encoder").mkdir(parents=True)
    (tmp_path / "pretrained/language_model").mkdir()
    (tmp_path / "pretrained/language_model/config.json").write_text("{}")
    drawings.write(tmp_path / "cutouts")
    drawings.write(tmp_path / "one")
    rows = (tmp_path / "one/metadata.jsonl").read_text().splitlines()
    (tmp_path / "one/metadata.jsonl").write_text(rows[0])
    write_chats(tmp_path / "one.jsonl", 1)
    write_chats(tmp_path / "held_out.jsonl", 9, split="test")
    (tmp_path / "columns.jsonl").write_text('{"question": "Which?"}\n')
    monkeypatch.setattr(natural_chats.own_chats, "write_chats", lambda *_, **__: pytest.fail("chats were written"))
    defaults = ("--preset", "cpu", "--pretrained", "pretrained", "--output", "output", "--cutouts", "cutouts")
    monkeypatch.setattr(sys, "argv", ["natural", *defaults, *words])
    with pytest.raises(SystemExit, match="1"):
        run_main(natural.main)
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "output").exists()


def test_pictures_of_any_kind_are_part_of_the_work(tmp_path):
    (tmp_path / "owl.tif").write_bytes(b"one")
    before = natural_plan.folder_hash(tmp_path)
    (tmp_path / "owl.tif").write_bytes(b"two")
    assert natural_plan.folder_hash(tmp_path) != before


def test_results_are_kept_over_those_of_an_earlier_run_only(tmp_path):
    designs, studies = tmp_path / "conf", tmp_path / "studies"
    natural_results.check_kept_name("mine", studies, designs)
    (studies / "mine").mkdir(parents=True)
    natural_results.check_kept_name("mine", studies, designs)
    (studies / "mine" / "runs.csv").touch()
    with pytest.raises(UserError, match=r"mine is for the results of another study"):
        natural_results.check_kept_name("mine", studies, designs)
    (studies / "mine" / natural_results.SCORES).touch()
    natural_results.check_kept_name("mine", studies, designs)
    with pytest.raises(UserError, match=r"scores\.json/mine: cannot be written \(Not a directory\)"):
        natural_results.check_kept_name("mine", studies / "mine" / natural_results.SCORES, designs)


def test_a_dry_run_makes_no_chats_and_says_how_they_are_made(arguments, tmp_path, monkeypatch, capsys):
    asked, described = [], []
    monkeypatch.setattr(natural_chats, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(natural_chats.own_chats, "write_chats", lambda _, path, device: asked.append((path, device)))
    monkeypatch.setattr(natural_cost, "describe", lambda *given: described.append(given) or "the estimate")
    words = ["natural", "--dry-run", "--arms", "none"]
    for name in ("cutouts", "pretrained", "output"):
        words += [f"--{name}", str(getattr(arguments, name))]
    monkeypatch.setattr(sys, "argv", words)
    assert natural.main() == 0
    assert len(described) == 1
    path = natural_chats.own_chats_path(arguments.pretrained)
    message = capsys.readouterr().out
    assert "not made yet" in message
    assert f"python -m pipeline_steps.backbones.own_chats --language {arguments.pretrained}/language_model" in message
    assert (
        f"{len(natural_chats.own_chats.questions(None))} answers, about 6 minutes on a CPU, kept in {path}." in message
    )
    assert asked == []
    assert natural_chats.make_chats(arguments.pretrained, "cuda") == path
    assert asked == [(path, "cuda")]
    with monkeypatch.context() as patched:
        patched.setattr(natural_chats.own_chats, "TOPICS", ("chess",))
        assert natural_chats.own_chats_path(arguments.pretrained) != path
    write_chats(path, 9)
    assert natural.main() == 0
    assert "not made yet" not in capsys.readouterr().out


def test_a_stage_that_minutes_stopped_twice_is_an_error(tmp_path):
    job = Job("sources", "key", "python -c 'import time; time.sleep(60)'", {"ablation": "none"}, {}, {}, ())
    trained = replace(job, stage="stage1")
    plan = Plan("natural", "c0ffee", jobs={(own.stage, own.key): own for own in (job, trained)})
    for _ in range(2):
        natural.check_minutes(plan, tmp_path, 1.0)
        assert not natural.run_jobs(plan, tmp_path, 2, "cpu", time.monotonic() + 1.0)
    folder = re.escape(str(tmp_path / "jobs/sources/key"))
    with pytest.raises(UserError, match=rf"--minutes stopped sources 2 times, after up to [12] s \({folder}\): it .*"):
        natural.check_minutes(plan, tmp_path, 1.0)
    natural.check_minutes(plan, tmp_path, 10.0)


def test_a_stage_that_ends_when_it_is_stopped_is_done(tmp_path):
    code = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(0)); print('ready', flush=True)"
    job = Job("stage1", "key", f'python -c "{code}; time.sleep(60)"', {"ablation": "none"}, {}, {}, ())
    plan = Plan("natural", "c0ffee", jobs={(job.stage, job.key): job})
    natural.run_jobs(plan, tmp_path, 1, "cpu", time.monotonic() + 5.0)
    assert "ready" in (tmp_path / job.folder / "log.txt").read_text()
    assert natural.is_done(job, tmp_path)


def test_two_runs_do_not_write_into_one_folder(arguments, monkeypatch):
    arguments.chats = arguments.output.with_name("chats.jsonl")
    write_chats(arguments.chats, 9)
    words = ["natural", "--preset", "cpu", "--arms", "none", "--chats", str(arguments.chats)]
    for name in ("cutouts", "pretrained", "output"):
        words += [f"--{name}", str(getattr(arguments, name))]
    monkeypatch.setattr(sys, "argv", words)
    arguments.output.mkdir(exist_ok=True)
    with (
        exclusive(arguments.output / "lock", ""),
        pytest.raises(UserError, match=r"--output .*: another process of this benchmark is at work there"),
    ):
        natural.main()


def test_a_curve_is_means_of_its_parts(tmp_path):
    rows = [f"train,{step},{8 * step},,{step}.0," for step in range(1, 21)]
    rows += ["validation,20,,fine,2.0,0.5", "validation,20,,fine,4.0,0.7", "validation,20,,coarse,9.0,0.1"]
    (tmp_path / "stage.csv").write_text("\n".join(["event,step,samples,mode,loss,accuracy", *rows]) + "\n")
    found = natural_results.curve(tmp_path / "stage.csv")
    assert found["train"] == [[16 * n, 2 * n - 0.5] for n in range(1, 11)]
    assert found["validation"] == [[20, 3.0, 0.6]]


@pytest.fixture
def run(finished_run, tmp_path, monkeypatch):
    """Runs the command with the embedded backbones in place of the pretrained ones; returns its exit code."""
    drawings.write(tmp_path / "cutouts")
    write_chats(tmp_path / "chats.jsonl", 24)
    words = ["natural", "--preset", "cpu", "--arms", "none", "--pretrained", finished_run / "data/backbones"]
    words += ["--cutouts", tmp_path / "cutouts", "--output", tmp_path / "output"]
    words += ["--chats", tmp_path / "chats.jsonl"]

    def call(*more, overrides=()):
        monkeypatch.setattr(sys, "argv", [str(word) for word in [*words, *more, "--set", *SMALL, *overrides]])
        with pytest.raises(SystemExit) as caught:
            run_main(natural.main)
        return caught.value.code or 0

    return call


def test_wheels_are_what_a_bare_machine_lacks():
    locked = natural_cost.locked_versions()
    wheels = natural_cost.wheels_of(natural_cost.NEEDED, natural_cost.GIVEN, locked)
    assert {"pydantic", "pydantic-core", "pyarrow", "av", "imagehash", "pywavelets", "pandas"} <= set(wheels)
    assert not {"torch", "transformers", "numpy", "tokenizers", "dvc", "hydra-core"} & set(wheels)
    assert all(entry["version"] == locked[name] and entry["bytes"] > 1000 for name, entry in wheels.items())


def test_the_rate_of_the_estimate_is_stated(monkeypatch):
    assert natural_cost.assumed_rate("cpu")[0] == natural_cost.CPU_FLOPS
    monkeypatch.setattr(natural_cost.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(natural_cost.torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    rate, reason = natural_cost.assumed_rate("cuda")
    assert rate == pytest.approx(0.06 * 312e12)
    assert reason == "6% of the peak of an NVIDIA A100-SXM4-80GB; --rate sets another"


@pytest.mark.slow
def test_a_run_is_stopped_continued_and_collected(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(natural, "GRACE", 20.0)
    assert run("--dry-run", "--rate", "1e9") == 0
    estimate = capsys.readouterr().out
    assert not (tmp_path / "output/jobs").exists()
    stages = [line.split() for line in estimate.splitlines() if line.startswith("stage")]
    assert [(row[0], row[2:5]) for row in stages] == [(f"stage{n}", ["to", "do", "16"]) for n in (1, 2, 3)]
    assert "minutes at 1 GFLOP/s (--rate)" in estimate
    assert "cutouts, as --cutouts" in estimate
    assert run("--minutes", 30 / 60) == natural.STOPPED  # ten seconds of work
    assert "stopped: run the same command to continue" in capsys.readouterr().out
    done = set((tmp_path / "output/jobs").rglob("done.json"))
    assert run() == 0
    assert done < set((tmp_path / "output/jobs").rglob("done.json"))
    results = tmp_path / "output/results"
    (row,) = pd.read_csv(results / "runs.csv").to_dict("records")
    assert (row["run"], row["arm"], row["training_samples"]) == ("none-x1-seed1.1.1", "none", 48)
    assert 1e15 * sum(float(cells[5]) for cells in stages) == pytest.approx(row["training_flops"], rel=0.1)
    (summary,) = json.loads((results / "scores.json").read_text())
    assert set(summary["tasks"]) == {*KINDS, *(f"{kind}_new" for kind in NEW_KINDS)}
    assert set(GAZE_KINDS) <= set(summary["gaze"])
    assert all(0 < gaze["chance"] < 1 for gaze in summary["gaze"].values())
    assert all(len(summary["curves"][stage]["train"]) == 2 for stage in ("stage1", "stage2", "stage3"))
    assert "|become|" in (results / "scores.md").read_text()
    assert (results / row["run"] / "overview.png").exists()
    capsys.readouterr()
    assert run() == 0
    assert "0 of 10 jobs to do" in capsys.readouterr().out


def row(run, tasks, accuracy):
    """What `natural_results.keep` reads of a row of runs.csv."""
    seeds = {f"{kind}_seed": value for kind, value in run.seeds.items()}
    budget = {"training_samples": 10, "training_flops": 1e9, "training_seconds": 5.0, "attempts": 1, "converged": True}
    budget |= {"commit": "c0ffee", "validation_loss_change": 0.0, "blind_accuracy": 0.1, "parameters": "0"}
    scores = {"mean_token_accuracy": accuracy, "exact_match_accuracy": accuracy, "mean_loss": 1.0}
    named = {f"accuracy_{task}": accuracy for task in tasks} | {f"exact_match_{task}": accuracy for task in tasks}
    return {"run": run.name, "arm": run.arm, "budget": run.budget, **seeds, **budget, **scores, **named}


def test_kept_results_are_compared_like_a_study(arguments, tmp_path, monkeypatch):
    plan = natural_plan.make_plan(arguments)
    results = arguments.output / "results"
    (results / plan.runs[0].name).mkdir(parents=True)
    (results / plan.runs[0].name / "overview.png").write_bytes(b"picture")
    tasks = [*KINDS, *(f"{kind}_new" for kind in NEW_KINDS)]
    accuracy = {"none": 0.8, "A6": 0.6, "B1": 0.7}
    table = pd.DataFrame([row(run, tasks, accuracy[run.arm]) for run in plan.runs])
    table.to_csv(results / "runs.csv", index=False)
    items = [{"run": run.name, "task": task, "num_tokens": 2, "loss_sum": 1.0} for run in plan.runs for task in tasks]
    pd.DataFrame(items).to_parquet(results / "items.parquet")
    for name in ("scores.json", "scores.md"):
        (results / name).write_text("")
    arguments.keep = "objects"
    command = natural.command_of(arguments)
    keep = partial(natural_results.keep, plan, arguments.output, "objects", command)
    with monkeypatch.context() as patched:
        copies = [shutil.copyfile, Mock(side_effect=KeyboardInterrupt)]
        patched.setattr(natural_results.shutil, "copyfile", lambda *paths: copies.pop(0)(*paths))
        with pytest.raises(KeyboardInterrupt):
            keep(tmp_path / "studies")
    natural_results.check_kept_name("objects", tmp_path / "studies", tmp_path)  # the same command works again
    folder = keep(tmp_path / "studies")
    made_by = "python -m benchmarks.natural --preset gpu --arms none A6 B1 --seeds 1 2 --cutouts CUTOUTS --keep objects"
    text = (folder / "README.md").read_text()
    assert f"`{made_by}`" in text
    assert "make study" not in text
    assert (folder / "heatmap.png").read_bytes() == b"picture"
    summary = StudySummary.model_validate_json((folder / "summary.json").read_text())
    assert {(entry.arm, entry.group) for entry in summary.comparisons} == {
        (arm, group) for arm in ("A6", "B1") for group in ("gaze", "reading", "gaze, new names")
    }
    assert all(len(entry.differences) == 2 for entry in summary.comparisons)
    assert summary.comparisons[0].differences[0] == pytest.approx(0.2 if summary.comparisons[0].arm == "A6" else 0.1)


@pytest.mark.slow
def test_a_failed_stage_is_named_with_its_log(run, tmp_path, capsys):
    assert run(overrides=["sources.procedural.objects.held_out_share=0.0"]) == 1
    message = capsys.readouterr().err
    assert "sources failed, exit code 1" in message
    assert "held_out_share 0.0 leaves 0 names out of training" in message
    assert str(tmp_path / "output/jobs/sources") in message
