"""What a running study shows: costs, states, time left."""

import copy
import io
import json
import math
import re
import shutil
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from rich.console import Console

from pipeline_steps.common import params
from pipeline_steps.study import __main__ as study_main
from pipeline_steps.study import job, plan, progress, results
from tests.pipeline_steps.studies import ALL, TRAINING, make, names_of, runs_table, write_record


def test_costs_are_measured_and_scale_with_the_samples(tmp_path, clean_tree):
    made = plan.make_plan("mine", make())
    long, short = (job for job in list(made.jobs.values()) if job.stage == "stage2" and job.key in [
        run.jobs["stage2"] for run in made.runs[:2]
    ])  # fmt: skip
    guess = progress.measure_costs(made, tmp_path)
    assert guess.seconds(short) == progress.FIRST_GUESS_PER_SAMPLE * TRAINING["stage2"]["num_samples"]
    folder = tmp_path / long.folder
    folder.mkdir(parents=True)
    (folder / "done.json").write_text(json.dumps({"seconds": 304.0}))
    costs = progress.measure_costs(made, tmp_path)
    assert costs.seconds(short) == pytest.approx(304.0)
    other = plan.Job(**vars(short) | {"parameters": copy.deepcopy(short.parameters), "key": "other"})
    other.parameters["model"]["num_passes"] = 2  # slower, it turns out
    assert costs.seconds(other) == pytest.approx(304.0)
    both = plan.Plan("mine", "commit", jobs={("stage2", job.key): job for job in (long, other)})
    (tmp_path / other.folder).mkdir(parents=True)
    (tmp_path / other.folder / "done.json").write_text(json.dumps({"seconds": 608.0}))
    assert progress.measure_costs(both, tmp_path).seconds(short) == pytest.approx(304.0)
    assert progress.measure_costs(both, tmp_path).seconds(other) == pytest.approx(608.0)
    found = progress.states(made, tmp_path)
    assert found["stage2", long.key] == "done"
    everything = sum(costs.seconds(job) for job in made.jobs.values())
    assert progress.total_seconds(made, found, costs) == (pytest.approx(everything - 304.0), 0)


def test_the_expected_time_of_an_arm_follows_from_kept_runs(tmp_path, clean_tree, monkeypatch, study_files):
    """Of two study_files count the runs that were not resumed and have a run without overrides beside them."""
    arms = {"none": {}, "fast": {"rate_factor": 4}, "small": {"overrides": ["ablation=A6"]}}
    arms |= {"many": {"overrides": ["ablation=B1"]}, "other": {"overrides": ["ablation=A2"]}}
    columns = ["arm", "seed", "training_samples", "training_seconds", "attempts"]
    tables = {
        "one": [
            ("none", 1, 100, 10, 1),
            ("fast", 1, 200, 20, 1),
            ("small", 1, 100, 5, 1),
            ("small", 2, 100, 90, 1),
            ("many", 1, 200, 40, 1),
            ("gone", 1, 100, 9, 1),
        ],
        "two": [("none", 3, 1000, 10, 1), ("small", 3, 1000, 7, 1), ("many", 3, 1000, 1, 2)],
    }
    monkeypatch.setattr(progress, "STUDIES", study_files)
    for name, rows in tables.items():
        (study_files / f"{name}.yaml").write_text(yaml.safe_dump(ALL | {"arms": arms}, sort_keys=False))
        (study_files / "kept" / name).mkdir(parents=True)
        own = pd.DataFrame(rows, columns=columns)
        own[[*results.SEEDS]] = own[["seed"] * 3].to_numpy()
        own["run"] = [f"r{number}" for number in own.index]
        whole = runs_table(seeds=1).iloc[[0] * len(own)].reset_index(drop=True).assign(**own.drop(columns="seed"))
        whole.to_csv(study_files / "kept" / name / "runs.csv", index=False)
    shutil.copytree(study_files / "kept/one", study_files / "kept/natural")  # of no study
    relative = progress.relative_costs(study_files / "kept")
    assert relative == {(): 1, ("ablation=A6",): pytest.approx(0.6), ("ablation=B1",): pytest.approx(2)}
    monkeypatch.setattr(progress, "relative_costs", lambda: relative)
    made = plan.make_plan("mine", make(arms=arms, seeds=[1]))
    costs = progress.measure_costs(made, tmp_path)
    stage2 = {run.arm: made.jobs["stage2", run.jobs["stage2"]] for run in made.runs}
    guess = progress.FIRST_GUESS_PER_SAMPLE * TRAINING["stage2"]["num_samples"]
    expected = {"none": 1, "fast": 1, "small": 0.6, "many": 2, "other": 1}
    assert {arm: costs.seconds(job) / guess for arm, job in stage2.items()} == pytest.approx(expected)
    folder = tmp_path / stage2["many"].folder  # measured here: what it says of the others
    folder.mkdir(parents=True)
    (folder / "done.json").write_text(json.dumps({"seconds": 300.0}))
    costs = progress.measure_costs(made, tmp_path)
    expected = {"none": 150, "fast": 150, "small": 90, "many": 300, "other": 150}
    assert {arm: costs.seconds(job) for arm, job in stage2.items()} == pytest.approx(expected)


def test_the_cost_of_a_pretrained_network_is_unknown_until_it_has_run(tmp_path, clean_tree):
    scales_of = {name: {"overrides": [f"scale={name}"]} for name in ("smollm2_135m", "smollm2_360m")}
    made = plan.make_plan("mine", make(arms=scales_of, seeds=[1]))
    small, large = (made.jobs["stage2", run.jobs["stage2"]] for run in made.runs)
    costs = progress.measure_costs(made, tmp_path)
    assert math.isnan(costs.seconds(small))
    assert costs.seconds(made.jobs["sources", made.runs[0].jobs["sources"]]) > 0
    seconds, num_unknown = progress.total_seconds(made, progress.states(made, tmp_path), costs)
    assert seconds > 0
    assert num_unknown == 2 * (len(params.TRAINING_STAGES) + 1)  # and the evaluation
    (tmp_path / small.folder).mkdir(parents=True)
    (tmp_path / small.folder / "done.json").write_text(json.dumps({"seconds": 1000.0}))
    costs = progress.measure_costs(made, tmp_path)
    assert costs.seconds(small) == 1000.0
    assert math.isnan(costs.seconds(large))


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_running_study_shows_its_jobs_by_stage_and_state_and_the_time_left(
    tmp_path, monkeypatch, clean_tree, is_terminal
):
    """Of four runs one is done, one has failed in stage 2, one is in stage 1, one waits. 10 ms per training sample."""
    monkeypatch.setattr(progress, "relative_costs", dict)
    made = plan.make_plan("mine", make())
    first, second, third, _ = ({stage: made.jobs[name] for stage, name in names_of(run).items()} for run in made.runs)
    before = [second[stage] for stage in ("backbones", "sources", "shards", "tokens", "stage1")]
    for entry in (*first.values(), *before):
        kind, amount = progress.work_of(entry)
        write_record(tmp_path / entry.folder / "done.json", seconds=0.01 * amount if kind == "training" else 36.0)
    write_record(tmp_path / second["stage2"].folder / "failed.json", reason="exit code 1", last_lines=[])
    write_record(tmp_path / third["stage1"].folder / "params.yaml")
    polled, collected = iter([None, None, 0]), []
    monkeypatch.setattr(study_main, "INTERVAL", 0)
    monkeypatch.setattr(study_main, "collect", lambda *given: collected.append(given))
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=100, color_system=None, soft_wrap=True)
    with job.locked(tmp_path / third["stage1"].folder / "lock"):
        process = SimpleNamespace(poll=lambda: next(polled))
        study_main.show_until_end(process, made, made, tmp_path, "results", 2, console)
    assert collected == [(made, tmp_path, "results")]  # again only when another run ends
    samples = {stage: TRAINING[stage]["num_samples"] for stage in params.TRAINING_STAGES}
    left = 0.01 * (2 * samples["stage1"] + 2 * samples["stage2"] + 3 * samples["stage3"]) + 6 * 36  # not what failed
    left = f"about {progress.format_time(left / 2)} left"
    text = console.file.getvalue()
    if not is_terminal:
        (line,) = text.splitlines()  # as nothing has changed
        assert line.partition(" ")[2] == f"1/4 runs; jobs: 14 done, 1 running, 12 waiting, 1 failed; {left}"
        return
    last = text[text.rindex("study mine:") :]
    assert last.startswith("study mine: 1 of 4 runs done")
    assert left in last
    assert [[cell.strip() for cell in line.split("│")[1:-1]] for line in last.splitlines() if "│" in line] == [
        ["backbones", "2", "", "", ""],
        ["sources", "2", "", "", ""],
        ["shards", "2", "", "", ""],
        ["tokens", "2", "", "", ""],
        ["stage1", "2", "1", "1", ""],
        ["stage2", "1", "", "2", "1"],
        ["stage3", "1", "", "3", ""],
        ["evaluation", "1", "", "3", ""],
        ["flops", "1", "", "3", ""],
    ]
    assert re.search(r"stage +┃ +done +┃ +running +┃ +waiting +┃ +failed", last)


@pytest.mark.parametrize(
    ("seconds", "text"), [(45, "45 s"), (720, "12 min"), (12000, "3 h 20 min"), (float("nan"), "unknown")]
)
def test_times_are_readable(seconds, text):
    assert progress.format_time(seconds) == text
