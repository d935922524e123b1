"""The results that a study collects from its runs."""

import io
import json

import pandas as pd
import pytest
import yaml

from pipeline_steps.common import metrics, params
from pipeline_steps.common.diagnostic_results import NextFrameResult, NextFrameScore
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.hashing import fingerprint
from pipeline_steps.common.params import ROOT
from pipeline_steps.report import training_flops
from pipeline_steps.streaming.__main__ import PARAMS as STREAMING_PARAMS
from pipeline_steps.streaming.__main__ import count_stage
from pipeline_steps.streaming.dataset import TokenizedShards
from pipeline_steps.study import collect, plan
from pipeline_steps.study.plan import Plan, Run
from tests.pipeline_steps import packed
from tests.pipeline_steps.counted import flops_config, flops_result
from tests.pipeline_steps.studies import curve, killed, runs_table


def test_convergence_is_the_fall_over_the_last_quarter(tmp_path):
    change, converged = collect.convergence(curve(tmp_path / "a.csv", {250: 1.0, 500: 0.9, 750: 0.8, 1000: 0.6}))
    assert change == pytest.approx(0.25)
    assert not converged
    change, converged = collect.convergence(curve(tmp_path / "b.csv", {500: 0.6, 750: 0.6, 1000: 0.597}))
    assert converged
    assert collect.convergence(curve(tmp_path / "c.csv", {500: 0.5, 1000: 0.7}))[1]  # has passed its minimum
    assert collect.convergence(curve(tmp_path / "d.csv", {500: 0.5})) == (None, None)
    assert collect.convergence(curve(tmp_path / "e.csv", {800: 0.5, 1000: 0.5})) == (None, None)  # too late to tell


@pytest.fixture
def run_with_results(tmp_path):
    """(run, folder of studies, training FLOPs) with the files of a finished run, every number of which is another."""
    data, parameters = tmp_path / "data", params.load(ROOT / "params.yaml")
    packed.write(data, packed.clips(60, text_every=4), 30)
    for number, stage in enumerate(params.TRAINING_STAGES, start=1):
        parameters["training"][stage] |= {
            "mixture": [{"source": "*", "task": "*", "weight": 1.0}],
            "text_share": 0.25,
            "text_source": "*",
            "num_samples": 40 * number,
        }
    seeds = {"training": 5, "backbones": 6, "data": 7}
    stages = ("shards", "tokens", *params.TRAINING_STAGES, "evaluation", "flops")
    run = Run("none-x1-seed5.6.7", "none", "x1", seeds, parameters, {stage: f"key_of_{stage}" for stage in stages})
    folders = {stage: tmp_path / plan.folder_of(stage, key) for stage, key in run.jobs.items()}
    for number, folder in enumerate(folders.values()):
        (folder / "outputs/metrics").mkdir(parents=True)
        record = {"commit": f"{number}" * 40, "seconds": 10.0**number, "attempts": 9 - number}
        (folder / "done.json").write_text(json.dumps(record))
    for stage in ("shards", "tokens"):
        (folders[stage] / "data").mkdir()
        (folders[stage] / "data" / stage).symlink_to(data / stage)
    dataset = TokenizedShards(data / "shards", data / "tokens", "train", with_frames=False)
    (folders["stage3"] / "params.yaml").write_text(yaml.safe_dump(parameters))
    read = params.read(folders["stage3"] / "params.yaml", *STREAMING_PARAMS)
    contents, counts = {}, {stage: count_stage(dataset, read, stage, None) for stage in params.TRAINING_STAGES}
    for number, stage in enumerate(params.TRAINING_STAGES):
        mixture = {}
        for tasks in counts[stage].sources.values():
            for task, found in tasks.items():
                mixture.setdefault(task, {"num_samples": 0})["num_samples"] += found.num_samples
        groups = [{"group": group, "trainable": int(number < 2)} for group in ("vision", "language")]
        contents[stage] = {"mixture": mixture, "parameters": [{"group": "connector", "trainable": 9}, *groups]}
        (folders[stage] / f"outputs/metrics/{stage}.json").write_text(json.dumps(contents[stage]))
    config, training = flops_config(), params.read(folders["stage3"] / "params.yaml", "training").training
    config.save_pretrained(folders["stage3"] / "outputs/stage3")
    config.vision_config.image_size = packed.SIZE
    counted = metrics.StreamingResult(stages=counts)
    budget = training_flops.budget_of(contents, counted, flops_result(), config, training)
    curve(folders["stage3"] / "outputs/metrics/stage3.csv", {500: 0.6, 750: 0.6, 1000: 0.597})
    curve(folders["stage2"] / "outputs/metrics/stage2.csv", {500: 0.6, 750: 0.6, 1000: 0.3})
    metrics.write_json(folders["flops"] / "outputs/metrics/flops.json", flops_result())
    metrics.write_json(folders["evaluation"] / "outputs/metrics/evaluation.json", evaluated())
    return run, tmp_path, budget.flops


def evaluated():
    """An `EvaluationResult` of two tasks."""
    interval = {"loss_interval": (0, 9), "accuracy_interval": (0, 1), "num_items": 1, "num_tokens": 1}
    modes = ("coarse", "fine", "autoregressive", "blind")
    return metrics.EvaluationResult(
        tasks={
            task: {mode: metrics.Score(loss=9, accuracy=base + 0.1 * n, **interval) for n, mode in enumerate(modes)}
            for task, base in (("gist", 0.5), ("card", 0.25))
        },
        mean={mode: metrics.MeanScore(loss=n + 0.5, accuracy=0.01 * n + 0.7) for n, mode in enumerate(modes)},
        generation={
            task: metrics.Generation(exact_match=share, num_items=4)
            for task, share in (("text", 0.125), ("gist", 0.75), ("card", 0.625))
        },
        mean_exact_match=0.6875,
        gap={},
        text=None,
        chance={},
        gaze={},
        provenance={},
    )


def test_the_row_of_a_run_has_every_column_with_its_value(run_with_results):
    run, studies, flops = run_with_results
    row = collect.row_of(run, studies)
    expected = {
        "run": "none-x1-seed5.6.7",
        "arm": "none",
        "budget": "x1",
        "training_seed": 5,
        "backbones_seed": 6,
        "data_seed": 7,
        "training_samples": 40 + 80 + 120,
        "training_flops": flops,
        "training_seconds": 1e2 + 1e3 + 1e4,
        "attempts": 7,
        "mean_token_accuracy": 0.72,
        "exact_match_accuracy": 0.6875,
        "mean_loss": 2.5,
        "accuracy_card": pytest.approx(0.45),
        "accuracy_gist": pytest.approx(0.7),
        "exact_match_card": 0.625,
        "exact_match_gist": 0.75,
        "exact_match_text": 0.125,
        "blind_accuracy": 0.73,
        "blind_card": pytest.approx(0.55),
        "blind_gist": pytest.approx(0.8),
        "validation_loss_change": pytest.approx(0.005),
        "converged": True,
        "commit": "4" * 12,
        "parameters": fingerprint({name: value for name, value in run.parameters.items() if name != "runtime"}),
    }
    assert list(row) == list(expected)
    assert row == expected


def test_a_small_gain_of_small_losses_survives_the_files(run_with_results):
    """Losses of 1e-5 had two digits, in which a gain of .2 % was 0."""
    run, studies, _ = run_with_results
    loss = {"coarse": 1.400271e-5, "fine_1": 1.397469e-5}
    group = NextFrameScore(loss=loss, per_frame={}, num_clips=1, num_pairs=1)
    found = NextFrameResult(settings={}, groups={"image": group}, passes={})
    path = studies / plan.folder_of("evaluation", run.jobs["evaluation"]) / "outputs/metrics/evaluation.json"
    metrics.write_json(path, evaluated().model_copy(update={"next_frame": found}))
    row = collect.row_of(run, studies)
    kept = pd.read_csv(io.StringIO(collect.as_csv(pd.DataFrame([row])))).iloc[0]
    gain = 1 - kept["next_frame_image_fine_1"] / kept["next_frame_image_coarse"]
    assert gain == pytest.approx(1 - loss["fine_1"] / loss["coarse"], rel=1e-3)


def test_earlier_results_stay_and_foreign_ones_are_refused(tmp_path, monkeypatch):
    """Of two planned runs one was collected elsewhere; the other is finished here."""
    runs = [Run(f"r{n}", "none", "x1", {"training": n}, {"seed": n}, {"evaluation": f"k{n}"}) for n in (1, 2)]
    made = Plan("mine", "c0ffee", runs=runs)
    items = pd.DataFrame({"run": ["r2"], "task": ["card"]})
    old = runs_table(seeds=1).iloc[0].to_dict()
    old |= {"run": "r2", "training_flops": 7.0, "parameters": collect.parameters_hash({"seed": 2})}
    pd.DataFrame([old]).to_csv(tmp_path / "runs.csv", index=False)
    items.to_parquet(tmp_path / "items.parquet")
    assert collect.check_earlier(made, tmp_path) == ({"r2": 7.0}, [])
    monkeypatch.setattr(collect, "finished", lambda run, studies: run.name == "r1")
    new = old | {"run": "r1", "training_flops": 5.0, "training_seed": 1}
    monkeypatch.setattr(collect, "row_of", lambda run, studies: new)
    monkeypatch.setattr(collect, "items_of", lambda run, studies: items.assign(run=run.name))
    table = collect.collect(made, tmp_path, tmp_path)
    assert list(zip(table["run"], table["training_flops"], strict=True)) == [("r1", 5.0), ("r2", 7.0)]
    assert sorted(pd.read_parquet(tmp_path / "items.parquet")["run"]) == ["r1", "r2"]
    with monkeypatch.context() as patched:
        patched.setattr(collect, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            collect.collect(made, tmp_path, tmp_path / "other")
    assert collect.check_earlier(made, tmp_path / "other") == ({}, [])
    pd.DataFrame([old | {"parameters": "other"}]).to_csv(tmp_path / "runs.csv", index=False)
    assert collect.check_earlier(made, tmp_path) == ({}, ["r2"])
    pd.DataFrame([old | {"run": "r3"}]).to_csv(tmp_path / "runs.csv", index=False)
    with pytest.raises(UserError, match=r"has 1 run.s. that are not in the study \(r3\)"):
        collect.check_earlier(made, tmp_path)
