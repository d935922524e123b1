"""The report on synthetic results with known answers: self-containedness, missing and damaged inputs, kept runs."""

import json
import re
import subprocess
import sys

import pandas as pd
import pytest
import yaml

from pipeline_steps.common import params
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.hashing import sha256_file
from pipeline_steps.report import __main__ as report
from pipeline_steps.report import attention_figures, keep, verdicts
from pipeline_steps.report.inputs import CURVE_COLUMNS, read_inputs
from tests.pipeline_steps.reported import (
    SETTINGS,
    TASKS,
    Text,
    build,
    given,
    item_table,
    keep_run,
    make_run,
    result_of,
    write_heatmaps,
    write_root,
)


def test_page_is_self_contained_and_starts_with_the_verdict(built):
    root, page = built
    text = Text(page)
    assert text.words[0] == "Foveated <model>"
    assert text.words[1].startswith("The world is synthetic")
    assert text.words[2].startswith("The backbones' warm-up, on clips of moving digits, already teaches")
    assert text.words[3].startswith("No study in reports/study compares one planned token")
    assert text.words[5:7] == ["Exact match", "70.0%"]
    assert text.words[8] == "Token accuracy"
    assert text.words[11:13] == ["Verdict", "undecided"]
    assert "Do planned queries help?" in text.words[:15]
    assert all(address.startswith(("data:", "#")) for address in text.addresses)
    assert not re.findall(r"""(?:url\(|import\s|fetch\(|src=|href=)["']?https?:""", page)
    assert "Which &lt;b&gt;?" in page  # text from the data is escaped
    assert (root / "reports/tables/accuracy.md").read_text().count("\n| ") >= len(TASKS)


def test_the_compute_section_has_the_crossovers_folded(built):
    root, page = built
    section = page.split('<section id="compute">')[1].split("</section>")[0]
    before, folded = section.split("<details>")
    assert "<table" not in before
    table = folded.split('<table id="crossovers-rows"')[1].split("</table>")[0]
    header, *rows = table.split("<tr>")[1:]
    assert re.findall(r"<button[^>]*>(.*?)</button>", header)[:3] == ["language model", "FLOPs of", "64 text tokens"]
    numbers = [re.findall(r">([^<>\n]+)</t[hd]>", row) for row in rows]
    assert [row[:3] for row in numbers if row[0] == "135M"] == [["135M", "inference", "4"], ["135M", "training", "1"]]
    written = (root / "reports/report.md").read_text().split("\n## Compute\n")[1].split("\n## ")[0]
    assert "| 135M | inference | 4 |" in written.split("<details>")[1]
    assert (root / "reports/tables/crossovers.md").exists()


def test_the_page_has_the_contact_sheet_and_the_attention_over_the_frames(built):
    root, page = built
    assert "5 clips. Selection rule: by &lt;loss&gt;. Overlay: attention in the autoregressive mode" in page
    assert "Entropy and largest weight of the attention over the frames" in page
    assert "](heatmaps/contact_sheet.png): 5 clips. Selection rule" in (root / "reports/report.md").read_text()


def test_an_index_of_another_version_is_a_user_error():
    with pytest.raises(UserError, match="no over_frames, contact_sheet"):
        attention_figures.over_frames({"clips": [], "rule": "the first"})
    nothing = {"clips": [], "rule": "", "over_frames": {}, "contact_sheet": None}
    assert attention_figures.over_frames(nothing) is None
    assert attention_figures.contact_sheet("reports/heatmaps", nothing) is None


def test_missing_runs_are_undecided_and_name_their_command_below_the_results(built):
    page = built[1]
    assert page.index("dvc exp run") > page.index('id="table-data"')
    assert "dvc exp run --name A6-seed1 -S ablation=A6 -S seed=1" in page
    assert "dvc exp run --name B1-seed1" in page
    table = (built[0] / "reports/tables/verdict.md").read_text()
    assert table.startswith("# Verdict\n\n**Do planned queries help?** Undecided. reports/runs has no kept single run")


@pytest.mark.parametrize(("peaks", "legend"), [(None, "Ring: the patch"), ({"fine": 0.9}, "White box: the target")])
def test_the_legend_mentions_a_target_box_only_if_there_is_one(tmp_path, monkeypatch, peaks, legend):
    write_root(tmp_path, heatmaps=False)
    write_heatmaps(tmp_path / "reports/heatmaps", peaks)
    assert f"the first. {legend}" in build(tmp_path, monkeypatch)


def test_missing_optional_inputs_are_listed(tmp_path, monkeypatch):
    write_root(tmp_path, curves=False, heatmaps=False)
    page = build(tmp_path, monkeypatch)
    assert "No learning curves" in page
    assert "No heatmaps" in page
    assert "stage2.csv" in page
    assert "outputs/metrics/streaming.json (what the training stages read" in page


@pytest.mark.parametrize(
    "name", ["outputs/metrics/evaluation.json", "outputs/metrics/flops.json", "data/shards/manifest.json"]
)
def test_missing_required_input_is_a_user_error(tmp_path, name):
    write_root(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=name):
        read_inputs(tmp_path, given())


def test_unknown_key_in_a_result_file_is_a_user_error(tmp_path):
    write_root(tmp_path)
    path = tmp_path / "outputs/metrics/evaluation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "extra": 1}))
    with pytest.raises(UserError, match="extra"):
        read_inputs(tmp_path, given())


HEADER = ",".join(CURVE_COLUMNS) + "\n"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "outputs/evaluation/answers.jsonl",
            '\n{"task": "card", "quest',
            "jsonl, line 2: not valid JSON .* evaluation",
        ),
        (
            "outputs/evaluation/answers.jsonl",
            '{"question": "Which?", "expected": "", "generated": ""}',
            "line 1: no task",
        ),
        ("outputs/evaluation/answers.jsonl", "[]", "line 1: no task, question, expected, generated"),
        ("outputs/evaluation/items.parquet", "PAR1", "items.parquet: .*dvc repro evaluation"),
        ("outputs/metrics/stage2.csv", "", "stage2.csv: No columns to parse from file. Run `dvc repro stage2`"),
        ("outputs/metrics/stage2.csv", HEADER, "stage2.csv: 0 rows, none of a training step"),
        ("outputs/metrics/stage2.csv", f"{HEADER}train,1,32,,,,much", "not only numbers in column loss"),
        ("outputs/metrics/stage2.json", "[]", "stage2.json: a JSON list, expected an object"),
        ("outputs/stage3/config.json", '{"model_type": ', "config.json: no configuration .*dvc repro stage3"),
        ("outputs/stage3/config.json", "[]", "config.json: no configuration .*dvc repro stage3"),
        ("outputs/stage3/config.json", '{"vision_config": 3}', "config.json: no configuration .*dvc repro stage3"),
    ],
)
def test_a_damaged_input_is_a_user_error(tmp_path, name, content, words):
    write_root(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words):
        read_inputs(tmp_path, given())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda table: table.drop(columns="loss_sum"), "items.parquet: .*loss_sum.* Run `dvc repro evaluation`"),
        (lambda table: table.iloc[:0], "items.parquet: no rows. Run `dvc repro evaluation`"),
    ],
)
def test_items_without_a_column_or_rows_are_a_user_error(tmp_path, change, words):
    write_root(tmp_path)
    change(item_table()).to_parquet(tmp_path / "outputs/evaluation/items.parquet")
    with pytest.raises(UserError, match=words):
        read_inputs(tmp_path, given())


def test_a_damaged_heatmap_is_a_user_error(tmp_path):
    write_heatmaps(tmp_path / "heatmaps")
    folder, index = tmp_path / "heatmaps", json.loads((tmp_path / "heatmaps/index.json").read_text())
    (folder / "c-frames.webp").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"c-frames\.webp is no picture"):
        report.inlined(folder, index)
    for key in ("sheet", "task", "frames"):
        entry = {name: value for name, value in index["clips"][0].items() if name != key}
        with pytest.raises(UserError, match=f"index.json: entry without {key}, written by another version"):
            report.inlined(folder, {"clips": [entry]})


def test_kept_runs_are_read_by_name(tmp_path):
    write_root(tmp_path)
    for seed in (1, 2):
        keep_run(tmp_path, "A6", seed)
    runs = read_inputs(tmp_path, given()).runs
    assert [(run.ablation, run.seed, len(run.items)) for run in runs] == [("A6", 1, 280), ("A6", 2, 280)]
    path = tmp_path / "reports/runs/A6-seed2.json"
    path.rename(path.with_name("A6-seed3.json"))
    with pytest.raises(UserError, match=r"A6-seed3.json: holds ablation A6, seed 2"):
        read_inputs(tmp_path, given())
    path.with_name("A6-seed3.json").rename(path.with_name("A6.json"))
    with pytest.raises(UserError, match=r"runs/A6.json: name the file <ablation>-seed<number>"):
        read_inputs(tmp_path, given())


def test_a_kept_run_gives_the_same_comparison_as_its_full_results(tmp_path):
    write_root(tmp_path)
    full = read_inputs(tmp_path, given("A6")).current
    path = keep_run(tmp_path, "A6", 1)
    assert path.read_text().count("\n") < 30
    kept = read_inputs(tmp_path, given()).runs[0]
    assert (kept.ablation, kept.seed, kept.budget) == ("A6", 1, full.budget)
    assert kept.result.provenance["seeds"] == {"training": 1, "backbones.embedded": 5}
    base = make_run("none-seed1", "none", 1, scale=0.5)
    expected, found = (verdicts.compare([base], [run], SETTINGS) for run in (full, kept))
    assert found.ratio == pytest.approx(expected.ratio, abs=1e-6)
    assert found.interval == pytest.approx(expected.interval, abs=1e-5)
    assert found.accuracy_difference.interval == pytest.approx(expected.accuracy_difference.interval, abs=1e-6)


def test_keeping_rejects_missing_or_inconsistent_results(tmp_path):
    write_root(tmp_path, curves=False)
    with pytest.raises(UserError, match=r"stage1.json, outputs/metrics/stage2.json, outputs/metrics/stage3.json"):
        keep_run(tmp_path)
    write_root(tmp_path / "b")
    table = item_table()
    table[table["key"] != "card-003"].to_parquet(tmp_path / "b/outputs/evaluation/items.parquet")
    with pytest.raises(UserError, match=r"39 items with 195 tokens of task card.* 40 with 200"):
        keep_run(tmp_path / "b")
    write_root(tmp_path / "c")
    kept = keep.kept_run(read_inputs(tmp_path / "c", given()), {"seed": 1})
    with pytest.raises(UserError, match=r"shards/manifest.json has hash .*, but the evaluation used d1"):
        keep.check_origin(kept, tmp_path / "c")
    keep.refuse_changed(["heatmaps", "report"])
    with pytest.raises(UserError, match=r"2 stage\(s\) changed \(evaluation, stage3\)"):
        keep.refuse_changed(["evaluation", "report", "stage3"])


COPY = """
import shutil, yaml
for name in ("outputs", "data"):
    shutil.copytree("made/" + name, name, dirs_exist_ok=True)
"""


@pytest.mark.slow
def test_experiments_are_kept_without_touching_the_workspace(tmp_path, monkeypatch):
    """Two experiments of a small project, kept from DVC's cache; a second one of the same ablation and seed is not."""
    write_root(tmp_path / "made")
    hashes = {name: sha256_file(tmp_path / f"made/data/{name}/manifest.json") for name in ("shards", "tokens")}
    path = tmp_path / "made/outputs/metrics/evaluation.json"
    content = json.loads(path.read_text())
    content["provenance"] |= {f"{name}_sha256": value for name, value in hashes.items()}
    path.write_text(json.dumps(content))
    (tmp_path / "make_run.py").write_text(COPY)
    (tmp_path / "params.yaml").write_text(params.compose())
    stage = {"cmd": f"{sys.executable} make_run.py", "params": ["seed"], "outs": ["outputs", "data"]}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"run": stage}}))
    identity = {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    for name, value in identity.items():
        monkeypatch.setenv(name, value)

    def run(command):
        done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    dvc = f"{sys.executable} -m dvc"
    run(f"git init -q && {dvc} init -q && git add -A && git commit -qm start")
    with pytest.raises(UserError, match="this commit has no experiments"):
        keep.keep_experiments(tmp_path, [])
    for name, seed in (("two", 2), ("three", 3)):
        run(f"{dvc} exp run -q --temp --name {name} --set-param seed={seed}")
    with pytest.raises(UserError, match=r"no experiment four of this commit \(there are: three, two\)"):
        keep.keep_experiments(tmp_path, ["four"])
    found = keep.keep_experiments(tmp_path, [])
    assert sorted(path.name for path in found) == ["none-seed2.json", "none-seed3.json"]
    assert not (tmp_path / "outputs").exists()
    runs = read_inputs(tmp_path / "made", given("A6")).runs
    assert runs == []
    assert json.loads(found[0].read_text())["provenance"]["seeds"]["training"] in (2, 3)
    run(f"{dvc} exp run -q --temp --name again --set-param seed=2 --set-param report.title=x")
    with pytest.raises(UserError, match="experiments again and two both are ablation none with seed 2"):
        keep.keep_experiments(tmp_path, [])


def test_summary_and_plots_contain_the_results(built):
    root = built[0]
    found = json.loads((root / "reports/metrics/summary.json").read_text())
    result = result_of(item_table())
    assert found["mean_token_accuracy"] == pytest.approx(result.mean["autoregressive"].accuracy, abs=1e-6)
    assert found["accuracy_card"] == pytest.approx(result.tasks["card"]["autoregressive"].accuracy, abs=1e-6)
    assert found["training_samples"] == 3 * 114
    assert len(found) <= 18
    by_task = pd.read_csv(root / "reports/plots/accuracy_by_task.csv")
    assert sorted(by_task["task"]) == sorted(TASKS)
    curve = pd.read_csv(root / "reports/plots/validation_accuracy.csv")
    assert list(curve["samples"]) == [32 * (59 * stage + step) for stage in range(3) for step in (20, 40, 59)]
    assert list(curve["accuracy"])[:2] == [0.25, 0.5]
    assert len(pd.read_csv(root / "reports/plots/training_loss.csv")) == 3 * 59
