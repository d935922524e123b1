"""The stages one after another, on real files, at a size of seconds."""

import itertools
import json
import shutil

import pandas as pd
import pytest
from PIL import Image
from safetensors.torch import load_file

from pipeline_steps.common.metrics import EvaluationResult
from pipeline_steps.common.modes import SCORED_MODES
from pipeline_steps.world.digits import KINDS
from tests import pipeline

pytestmark = pytest.mark.slow


def copy_of(finished_run, tmp_path, *folders):
    for name in folders:
        shutil.copytree(finished_run / name, tmp_path / name)
    shutil.copy(finished_run / "params.yaml", tmp_path / "params.yaml")
    return tmp_path


def test_evaluation_has_every_task_in_every_mode(finished_run):
    text = (finished_run / "outputs/metrics/evaluation.json").read_text()
    EvaluationResult.model_validate_json(text)
    result = json.loads(text)
    assert set(result["tasks"]) == set(KINDS)
    for scores in result["tasks"].values():
        assert set(scores) >= set(SCORED_MODES)  # and controls, of at most as many items
        assert all(scores[mode]["num_items"] == 3 for mode in SCORED_MODES)
    assert result["text"]["num_items"] == 4


def test_every_stage_changed_the_weights_and_served_its_text_share(finished_run):
    weights = [load_file(finished_run / f"outputs/stage{n}/model.safetensors") for n in (1, 2, 3)]
    for before, after in itertools.pairwise(weights):
        assert before.keys() == after.keys()
        assert any(not before[name].equal(after[name]) for name in before)
    summary = json.loads((finished_run / "outputs/metrics/stage2.json").read_text())
    assert summary["mixture"]["text"]["num_samples"] == pytest.approx(0.14 * 60, abs=1)
    assert sum(row["num_samples"] for row in summary["mixture"].values()) == 60
    assert summary["num_steps"] == 8  # 60 samples in batches of 8: the budget is exact, the last batch is short


def test_report_is_one_self_contained_page(finished_run, tmp_path):
    folder = copy_of(finished_run, tmp_path, "data", "outputs", "reports")
    done = pipeline.run(folder, "report")
    assert done.returncode == 0, done.stderr
    page = (folder / "reports/report.html").read_text()
    assert 'src="http' not in page
    assert 'href="http' not in page


def test_the_commands_of_dvc_give_the_same_bytes(finished_run, tmp_path):
    """`finished_run` calls the same code in processes that have imported it already (tests/pipeline.py)."""
    pipeline.write_params(tmp_path)
    pipeline.run_all(tmp_path, *pipeline.STAGES[:-2], run=pipeline.run_command)
    for name in ("data", "outputs", "outputs/metrics"):
        files = [path.relative_to(finished_run) for path in (finished_run / name).rglob("*") if path.is_file()]
        assert files
        for file in files:
            if not {"timings", "live"} & set(file.parts) and file.name != "flops.json":
                assert (tmp_path / file).read_bytes() == (finished_run / file).read_bytes(), file


def test_the_networks_options_run_through_all_stages(finished_run, tmp_path):
    """The oracle, with several aggregated looks, a learned temperature, frame times and every further loss."""
    folder = copy_of(finished_run, tmp_path, "data")
    options = {"query_source": "oracle", "num_visual_tokens_per_frame": 2, "token_aggregation": "weighted"}
    options |= {"learnable_temperature": True, "frame_time_embedding": "sinusoidal", "num_passes": 2}
    overrides = [f"model.{name}={value}" for name, value in options.items()]
    weights = [f"objective.{name}.weight=0.1" for name in ("coarse", "entropy", "contrastive")]
    overrides += [f"training.stage{n}.{weight}" for n in (1, 2, 3) for weight in weights]
    overrides += [f"training.stage{n}.num_samples=16" for n in (1, 2, 3)]
    pipeline.write_params(folder, *overrides)
    pipeline.run_all(folder, "stage1", "stage2", "stage3", "evaluation", "flops", "heatmaps")
    rows = pd.read_csv(folder / "outputs/metrics/stage2.csv").query("event == 'train'")
    assert rows[["loss_coarse", "loss_entropy", "loss_contrastive"]].notna().all().all()
    assert set(rows["num_plans"]) <= {2, 3}
    result = json.loads((folder / "outputs/metrics/evaluation.json").read_text())
    for task in ("card", "follow", "ask_colour", "ask_place"):  # the oracle's queries see the target alone
        assert result["gaze"][task]["autoregressive"]["peak_on_target"] == 1.0
        assert result["gaze"][task]["autoregressive"]["mass_on_target"] == pytest.approx(1.0)


def preference_folder(folder):
    """Stills of one grey each, asked how bright they are, with a right and a wrong answer."""
    folder.mkdir()
    rows = []
    for number in range(12):
        bright = number % 2
        Image.new("RGB", (56, 56), (60 + 120 * bright + number,) * 3).save(folder / f"{number}.png")
        answers = {"answer": ["dark", "light"][bright], "rejected": ["light", "dark"][bright]}
        split = "train" if number < 8 else "validation" if number < 10 else "test"
        rows.append({"file_name": f"{number}.png", "question": "Is it dark or light?", "split": split, **answers})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_preferences_of_a_folder_are_trained_on(finished_run, tmp_path):
    options = ["sources.collect=[folder]", f"sources.folder.path={preference_folder(tmp_path / 'pictures')}"]
    options += ["training.stage3.loss=preference", "training.stage3.text_share=0.0", "shards.max_hash_distance=null"]
    options += [
        "training.stage3.mixture=[{source: folder, task: '*', weight: 1.0}]",
        "training.stage3.num_samples=64",
    ]
    options += ["training.common.optimizer=adamw"]  # moves further than Muon in the eight steps of this test
    pipeline.write_params(tmp_path, *options, "training.common.record_every=1")
    (tmp_path / "data").mkdir()
    shutil.copytree(finished_run / "data/backbones", tmp_path / "data/backbones")
    shutil.copytree(finished_run / "outputs/stage2", tmp_path / "outputs/stage2")
    pipeline.run_all(tmp_path, "sources", "shards", "tokens", "stage3")
    rows = pd.read_csv(tmp_path / "outputs/metrics/stage3.csv").query("event == 'train'")
    assert rows["loss"].iloc[0] == pytest.approx(0.693147, abs=1e-4)  # the reference is the model itself
    assert rows["loss"].iloc[-1] < 0.5
    assert rows["reward_margin"].iloc[0] == pytest.approx(0, abs=1e-4)
    assert rows["reward_margin"].iloc[-1] > 0.5


def test_a_stage_of_preferences_without_any_is_refused(finished_run, tmp_path):
    folder = copy_of(finished_run, tmp_path, "data")
    shutil.copytree(finished_run / "outputs/stage1", folder / "outputs/stage1")
    pipeline.write_params(folder, "training.stage2.loss=preference", "training.stage2.text_share=0.0")
    done = pipeline.run(folder, "stage2")
    assert done.returncode == 1
    assert "have no rejected answer" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("training.stage2.mixture=[{source: '*', task: cards, weight: 1.0}]",), "no items of cards"),
        (("ablation=A6",), "coarse_only is False, but params.yaml has True"),
        (
            ("ablation=A6", "training.stage2.objective.coarse.weight=0.5"),
            "training.stage2.objective.coarse.weight is 0.5, but model.coarse_only is true",
        ),
        (("training.stage2.objective.initial_modules=previous",), "outputs/stage1/objective.safetensors: missing"),
    ],
)
def test_wrong_training_parameters_are_refused(finished_run, tmp_path, overrides, message):
    folder = copy_of(finished_run, tmp_path, "data")
    shutil.copytree(finished_run / "outputs/stage1", folder / "outputs/stage1")
    pipeline.write_params(folder, *overrides)
    done = pipeline.run(folder, "stage2")
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "outputs/stage2").exists()


def test_a_missing_stage_is_named(finished_run, tmp_path):
    folder = copy_of(finished_run, tmp_path, "data")
    done = pipeline.run(folder, "stage3")
    assert done.returncode == 1
    assert "outputs/stage2/model.safetensors: missing" in done.stderr
