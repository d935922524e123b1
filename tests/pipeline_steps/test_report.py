"""The report on synthetic results with known answers: verdicts, self-containedness, missing inputs."""

import json
import re
import subprocess
import sys
from functools import partial
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from pipeline_steps.common import metrics, params
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.hashing import sha256_file
from pipeline_steps.common.modes import SCORED_MODES
from pipeline_steps.common.params import ROOT, TRAINING_STAGES
from pipeline_steps.common.study_results import Series, StudySummary
from pipeline_steps.report import __main__ as report
from pipeline_steps.report import attention_figures, decisions, keep, studies, study_tables, verdicts
from pipeline_steps.report.budgets import Budget
from pipeline_steps.report.inputs import CURVE_COLUMNS, DIAGNOSTICS, Run, read_inputs
from pipeline_steps.report.tables import text_of
from pipeline_steps.study.design import read_study
from tests.pipeline_steps.counted import flops_config, flops_result, report_section

TASKS = ("card", "follow", "ask_colour", "ask_place", "caption", "image", "gist")
LOSS = {"coarse": 1.4, "fine": 0.30, "autoregressive": 0.31, "blind": 2.4, "random_query": 1.6}
ACCURACY = {"coarse": 0.42, "fine": 0.915, "autoregressive": 0.91, "blind": 0.12, "random_query": 0.38}
PARAMETERS = [{"group": group, "trainable": 9} for group in ("connector", "vision", "language")]
SETTINGS = report_section("Foveated <model>", TASKS)


def given(ablation="none", seed=1):
    """The parameters that `read_inputs` needs."""
    return SimpleNamespace(
        ablation=ablation, seed=seed, training=params.read(ROOT / "params.yaml", "training").training
    )


def item_table(scale=1.0, seed=0, num_items=40):
    """Items whose loss is LOSS times `scale` on average."""
    rng, rows = np.random.default_rng(seed), []
    for task in TASKS:
        for mode in SCORED_MODES:
            for item in range(num_items):
                loss = LOSS[mode] * scale * 5 * rng.uniform(0.8, 1.2)
                correct = int(rng.binomial(5, ACCURACY[mode]))
                rows.append((f"{task}-{item:03}", 0, task, mode, 5, loss, correct))
    return pd.DataFrame(rows, columns=["key", "item", "task", "mode", "num_tokens", "loss_sum", "num_correct"])


def result_of(table, data="d1"):
    tasks = {}
    for (task, mode), rows in table.groupby(["task", "mode"]):
        loss, accuracy = rows.loss_sum.sum() / rows.num_tokens.sum(), rows.num_correct.sum() / rows.num_tokens.sum()
        tasks.setdefault(task, {})[mode] = metrics.Score(
            loss=loss,
            accuracy=accuracy,
            num_items=len(rows),
            num_tokens=int(rows.num_tokens.sum()),
            loss_interval=(loss * 0.9, loss * 1.1),
            accuracy_interval=(max(accuracy - 0.04, 0), min(accuracy + 0.04, 1)),
        )
    mean = {
        mode: metrics.MeanScore(
            loss=float(np.mean([entry[mode].loss for entry in tasks.values()])),
            accuracy=float(np.mean([entry[mode].accuracy for entry in tasks.values()])),
        )
        for mode in SCORED_MODES
    }
    peaks = {"coarse": 0.2, "fine": 0.93, "autoregressive": 0.92}
    gaze = {
        mode: metrics.Gaze(
            peak_on_target=peak,
            peak_on_target_interval=(peak - 0.03, peak + 0.03),
            peak_on_any_object=0.97,
            mass_on_target=peak * 0.8,
            chance=0.0625,
            chance_among_objects=0.25,
            num_frames=600,
            per_layer=[0.1, 0.5, peak],
            per_frame=[0.2, peak, peak, peak, peak, peak],
        )
        for mode, peak in peaks.items()
    }
    return metrics.EvaluationResult(
        tasks=tasks,
        mean=mean,
        gap={task: metrics.Gap(loss_ratio=1.03, interval=(0.99, 1.07)) for task in tasks},
        text=tasks["card"]["fine"],
        chance=dict.fromkeys((*TASKS, "text"), 0.11),
        gaze=dict.fromkeys(TASKS[:4], gaze),
        generation={task: metrics.Generation(exact_match=0.7, num_items=20) for task in TASKS},
        mean_exact_match=0.7,
        provenance={"shards_sha256": data, "tokens_sha256": data, "split": "test", "torch": "2", "transformers": "5"},
    )


def make_run(name, ablation, seed, scale=1.0, items=True, data="d1"):
    table = item_table(scale, seed)
    return Run(name, ablation, seed, result_of(table, data), table if items else None, Budget(1000, 1e9))


class Found:
    """What `verdicts` needs of `Inputs`."""

    def __init__(self, current, runs):
        self.current, self.runs = current, runs


def write_root(root, *, curves=True, heatmaps=True):
    """The folders of a finished run, with invented numbers."""
    table = item_table()
    metrics.write_json(root / "outputs/metrics/evaluation.json", result_of(table))
    (root / "outputs/evaluation").mkdir(parents=True)
    table.to_parquet(root / "outputs/evaluation/items.parquet")
    answer = {
        "key": "a",
        "item": 0,
        "task": "card",
        "question": "Which?",
        "expected": "red: 1",
        "generated": "red: 2",
    }
    (root / "outputs/evaluation/answers.jsonl").write_text(json.dumps(answer) + "\n")
    metrics.write_json(root / "outputs/metrics/flops.json", flops_result())
    flops_config().save_pretrained(root / "outputs/stage3")
    write_manifests(root)
    if curves:
        for stage in ("stage1", "stage2", "stage3"):
            curve_table().to_csv(root / f"outputs/metrics/{stage}.csv", index=False)
            mixture = {"card": {"num_samples": 100, "share": 0.86, "epochs": 1.0}}
            mixture["text"] = {"num_samples": 14, "share": 0.14, "epochs": 1.0}
            (root / f"outputs/metrics/{stage}.json").write_text(
                json.dumps({"mixture": mixture, "num_steps": 59, "parameters": PARAMETERS})
            )
        metrics.write_json(root / "outputs/metrics/streaming.json", streaming_result(TRAINING_STAGES))
    if heatmaps:
        write_heatmaps(root / "reports/heatmaps")
    (root / "params.yaml").write_text("seed: 1\n")


def curve_table(sources=("procedural",), columns=CURVE_COLUMNS):
    """The table of a training stage: all tasks from every source, diagnostics and one warning."""
    rows = [{"event": "train", "step": s, "samples": 32 * s, "loss": 3 / s**0.5} for s in range(1, 60)]
    for step in (20, 40, 59):
        for source in sources:
            shared = {"event": "validation", "step": step, "source": source, "mode": "fine", "loss": 1}
            rows += [{**shared, "task": task, "accuracy": step / 80} for task in TASKS]
        rows.append({"event": "diagnostics", "step": step, **dict.fromkeys(DIAGNOSTICS, 20 / step)})
    rows.append({"event": "warning", "step": 59, "message": "uniform attention: <nothing> is chosen"})
    return pd.DataFrame(rows, columns=columns)


def served(num_items, num_samples, share, num_truncated=0):
    return metrics.SampleCounts(
        num_items=num_items,
        num_samples=num_samples,
        share=share,
        epochs=num_samples / num_items,
        num_frames=6 * num_samples,
        text_tokens=30 * num_samples,
        visual_tokens=6 * num_samples,
        num_truncated=num_truncated,
    )


def streaming_result(stages=("stage1",)):
    stage = metrics.StageCounts(
        num_steps=10,
        sources={
            "chat": {"text": served(50, 14, 0.14)},
            "procedural": {"card": served(40, 86, 0.86, 3), "gist": served(7, 0, 0.0)},
        },
        total=served(97, 100, 1.0, 3),
        unmatched={"procedural/gist": 7},
    )
    return metrics.StreamingResult(stages=dict.fromkeys(stages, stage))


def write_manifests(root):
    shard = {"name": "000000.tar", "num_samples": 9, "num_frames": 54, "seconds": 90.0, "bytes": 1, "sha256": "a"}
    split = {"shards": [shard], "num_samples": 9, "num_frames": 54, "seconds": 90.0, "bytes": 2_000_000}
    bad = {"key": "x", "source": "folder", "path": "x.mp4", "reason": "truncated"}
    shards = {
        "splits": {"test": split},
        "seen": 10,
        "packed": 9,
        "quarantined": [bad],
        "sources": {"folder": 9},
        "frames": {"image_size": 56, "resize_mode": "crop", "fps": 2.0, "max_frames": 16, "jpeg_quality": 95},
    }
    token = {"name": "000000.arrow", "num_items": 9, "num_tokens": 99, "shard_sha256": "a", "sha256": "b"}
    tokens = {
        "splits": {"test": {"shards": [token], "num_items": 9, "num_tokens": 99}},
        "seen": 9,
        "kept": 9,
        "dropped": [],
        "truncated": [],
        "sources": {"folder": {"seen": 9, "kept": 9, "truncated": 0, "dropped": 0, "tokens": 99}},
        "tasks": {"card": 9},
        "tokenizer_sha256": "c",
        "vocabulary_size": 512,
        "max_tokens": 256,
        "system": "",
    }
    for name, content in (("shards", shards), ("tokens", tokens)):
        (root / "data" / name).mkdir(parents=True)
        (root / "data" / name / "manifest.json").write_text(json.dumps(content))


def write_heatmaps(folder, peaks=None):
    """One clip of three frames; the tile of frame t has the grey level 60 t + 40."""
    folder.mkdir(parents=True)
    Image.new("RGB", (64, 64), "#345").save(folder / "c.png")
    Image.new("RGB", (64, 64), "#345").save(folder / "c.gif")
    side, step, kinds = 32, 38, ["frame", "coarse", "fine", "autoregressive"]
    strip = Image.new("RGB", (len(kinds) * step, 3 * step))
    for t in range(3):
        strip.paste((60 * t + 40,) * 3, (0, t * step, strip.width, t * step + side))
    strip.save(folder / "c-frames.webp", lossless=True)
    clip = {
        "key": "c",
        "item": 0,
        "task": "card",
        "question": "Which <b>?",
        "answer": "red: 1",
        "prediction": "red: 1",
        "peak_on_target": peaks,
        "num_frames": 3,
        "sheet": "c.png",
        "animation": "c.gif",
        "geometry": {"left": 0, "top": 0, "side": 10, "step": 12, "rows": ["frame"], "frames": [0, 1, 2]},
        "frames": "c-frames.webp",
        "frames_geometry": {"side": side, "step": step, "kinds": kinds},
        "frame_milliseconds": 700,
    }
    Image.new("RGB", (96, 64), "#345").save(folder / "contact_sheet.png")
    sheet = {"picture": "contact_sheet.png", "rule": "by <loss>", "mode": "autoregressive", "clips": [{}] * 5}
    curve = {"entropy": [0.9, 0.4, 0.2], "peak": [0.1, 0.6, 0.8], "num_clips": [1, 1, 1]}
    index = {"clips": [clip], "rule": "the first", "split": "test", "contact_sheet": sheet}
    index["over_frames"] = dict.fromkeys(("coarse", "fine", "autoregressive"), curve)
    (folder / "index.json").write_text(json.dumps(index))


def build(root, monkeypatch):
    """Runs the stage on `root` with SETTINGS and returns the page."""
    values = {
        "seed": 1,
        "backbones": {"kind": "embedded", "embedded": {"seed": 5, "vision_queries": "selecting"}},
        "evaluation": {"seed": 2},
    }
    values |= {"sources": {"collect": ["procedural", "chat"], "procedural": {"world": "digits"}}}
    parameters = SimpleNamespace(**vars(given()), report=SETTINGS, as_dict=lambda: values)
    monkeypatch.setattr(report.params, "read", lambda path, *keys: parameters)
    monkeypatch.setattr("sys.argv", ["report", "--root", str(root), "--params", str(root / "params.yaml")])
    report.main()
    return (root / "reports/report.html").read_text()


class Text(HTMLParser):
    """Text of the body in order, and every address that the page refers to."""

    def __init__(self, page):
        super().__init__()
        self.words, self.addresses, self.skip = [], [], 0
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.skip += tag in ("style", "script", "title")
        self.addresses += [
            value for name, value in attributes if name in ("src", "srcset", "href", "poster", "data") and value
        ]

    def handle_endtag(self, tag):
        self.skip -= tag in ("style", "script", "title")

    def handle_data(self, data):
        if not self.skip and data.strip():
            self.words.append(data.strip())


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


def keep_run(root, ablation="none", seed=1):
    """The file of the run under `root`, kept as `ablation` and `seed`."""
    kept = keep.kept_run(
        read_inputs(root, given(ablation, seed)), {"seed": seed, "backbones": {"embedded": {"seed": 5}}}
    )
    path = root / f"reports/runs/{ablation}-seed{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(keep.as_text(kept))
    return path


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


SEEDS = (1, 2)


def study_summary(name="mine", arms=("none", "B1"), seeds=SEEDS, **changes):
    """A `StudySummary` of these arms at one budget; the default gains 40 points on the gaze and loses 10 on reading."""
    shared = {"budget": "x1", "seeds": [[seed] * 3 for seed in seeds], "training_samples": 6e4}
    shared |= {"training_flops": 1.5e13, "training_seconds": 300.0, "num_converged": 2, "num_measured": 2}
    comparison = {"baseline": "none", "p_value": 0.5, "p_adjusted": 1.0, "smallest_margin": 0.6, "matched": "samples"}
    pairs = [(0.4 + seed / 100, -0.1) for seed in seeds]
    return StudySummary.model_validate(
        {
            "name": name,
            "question": "Which <one>?",
            "baseline": "none",
            "num_runs": len(arms) * len(seeds),
            "num_planned": 6,
            "margin": 0.03,
            "plateau": 0.75,
            "group_tasks": {"all": list(TASKS), "gaze": ["card", "follow"], "reading": ["gist"]},
            "arms": [
                shared
                | {
                    "arm": arm,
                    "groups": {"all": [score(arm, seed) for seed in seeds]},
                    "exact_match": [score(arm, seed) - 0.3 for seed in seeds],
                    "num_above_plateau": len(seeds) if arm == "none" else 0,
                }
                for arm in arms
            ],
            "comparisons": [
                comparison
                | {
                    "arm": arm,
                    "group": group,
                    "differences": [pair[number] for pair in pairs],
                    "interval": (0.3, 0.5) if number == 0 else (-0.1, -0.1),
                    "bounded_interval": (-0.2, 0.9),
                    "verdict": "undecided",
                    "num_not_converged": 2,
                }
                for arm in arms
                if arm != "none"
                for number, group in enumerate(("gaze", "reading"))
            ],
        }
        | changes
    )


def score(arm, seed):
    return {"none": 0.9, "A6": 0.5, "B1": 0.6}.get(arm, 0.7) + seed / 100


def write_study(root, summary):
    """summary.json, runs.csv and items.parquet of a study. Losses per token: .2 of the default, .4 of every other
    arm on the gaze, .16 on reading."""
    folder = root / "reports/study" / summary.name
    metrics.write_json(folder / "summary.json", summary)
    runs, items = [], []
    for arm in summary.arms:
        for seeds in arm.seeds:
            name, value = f"{arm.arm}-{seeds[0]}", score(arm.arm, seeds[0])
            row = {"run": name, "arm": arm.arm, "budget": arm.budget, **dict.fromkeys(studies.SEEDS, seeds[0])}
            row |= {"training_samples": arm.training_samples, "training_seconds": 300.0, "attempts": 1}
            row |= {"converged": False, "commit": "c0ffee", "parameters": "0"}
            row |= {"training_flops": 3e13 if arm.arm == "B1" else 1.5e13, "mean_token_accuracy": value}
            row |= {"mean_loss": 0.2 if arm.arm == "none" else 0.4, "exact_match_accuracy": value - 0.3}
            row |= {f"accuracy_{task}": value for task in TASKS} | {"exact_match_card": value - 0.3}
            runs.append(row)
            for task in TASKS:
                loss = 0.2 if arm.arm == "none" else 0.16 if task == "gist" else 0.4
                items.append({"run": name, "task": task, "num_tokens": 5, "loss_sum": 5 * loss})
    pd.DataFrame(runs).to_csv(folder / "runs.csv", index=False)
    pd.DataFrame(items).to_parquet(folder / "items.parquet")
    return studies.read_study(folder)


def test_the_study_with_all_arms_leads_the_page_with_verdicts_and_every_run(tmp_path, monkeypatch, capsys):
    write_root(tmp_path)
    write_study(tmp_path, study_summary(arms=("none", "A6", "B1")))
    write_study(tmp_path, study_summary("early", ("none", "F1")))
    page = build(tmp_path, monkeypatch)
    title = "One planned token (default) against sixteen tokens (B1): tasks that need a gaze"
    statement = "+41.5 [+30.0, +50.0] points of token accuracy (95% t-interval), 2 pairs of runs, p = 1.000 (sign "
    statement += "flips, Holm for 4 questions), equal training samples, 2.00 × the training FLOPs for sixteen tokens "
    statement += "(B1)."
    assert page.index("<dt>Exact match</dt><dd>61.5%</dd>") < page.index("<dt>Token accuracy</dt><dd>91.5%</dd>")
    assert "<dd>2 of 2</dd><p>left the plateau: token accuracy of at least 75%; 95% interval" in page
    assert 0 < page.index("<dd>2 of 2</dd>") < page.index(title) < page.index(statement) < page.index('class="lead"')
    assert '<span class="open">2 of 4 runs not converged</span>' in page
    assert "Which &lt;one&gt;?" in page
    assert "6 of 6 runs" in page
    assert '<button type="button"></button>' not in page  # every column has a name
    assert page.index('alt="Differences between the baseline') < page.index(
        "<details><summary>Study early: Which &lt;one&gt;?<"
    )
    assert page.count('alt="Accuracy of every run of the study') == 2
    assert page.count('alt="Differences between the baseline and the other arms') == 2
    text = (tmp_path / "reports/report.md").read_text()
    assert statement.replace("[", "\\[").replace("]", "\\]") in text
    assert "study_mine_forest" in text
    table = (tmp_path / "reports/tables/verdict.md").read_text()
    assert f"**{title}:** UNDECIDED (2 of 4 runs not converged). {statement[:5]}" in table
    assert table.index(title) < table.index("## Single runs kept in") < table.index("has no kept single run to compare")
    printed = capsys.readouterr().out
    assert f"{title}: UNDECIDED (2 of 4 runs not converged). {statement}" in printed
    assert "Do planned queries help?" not in printed
    row = "| sixteen tokens (B1) | 2 | 31.5 [31–32] | 61.5 [61–62] | 0 of 2 [0–84] | 2 of 2 | 60,000 | 15.0 | 5.0 |"
    assert row in text
    assert "| sixteen tokens (B1): token accuracy | 61.5 [61–62] |" in text
    assert "| one static token (A6): exact match | 21.5 [21–22] | – | – | – | – | – | – |" in text


def test_a_verdict_says_in_how_many_pairs_the_arms_are_alike(tmp_path):
    study = write_study(tmp_path, study_summary(seeds=range(8)))
    entry = study.summary.comparisons[0].model_copy(update={"verdict": "better"})
    assert "of the pairs" not in study_tables.statement(study, entry, 4)
    alike = entry.model_copy(update={"differences": [*entry.differences[2:], 0.029, -0.03]})
    assert study_tables.statement(study, alike, 4).endswith(" In 2 of the pairs the difference is within 3 points.")


def test_an_equality_says_what_it_rests_on(tmp_path):
    study = write_study(tmp_path, study_summary(seeds=range(8)))
    entry = study.summary.comparisons[0].model_copy(update={"verdict": "equal"})
    unseen = "An outcome that fewer than 37% of all runs have may have escaped these 8."
    assert study_tables.statement(study, entry, 4).endswith(f"Equal: the 90% interval lies within 3 points. {unseen}")
    entry = entry.model_copy(update={"p_adjusted": 0.047})
    text = f"within 3 points, although the difference is significant. {unseen}"
    assert study_tables.statement(study, entry, 4).endswith(text)


def test_a_comparison_with_runs_on_both_sides_of_the_plateau_shows_the_interval_for_any_distribution(tmp_path):
    study = write_study(tmp_path, study_summary(seeds=range(8)))
    entry = study.summary.comparisons[0]
    assert "any distribution" not in study_tables.statement(study, entry, 4)
    is_high = (study.runs["arm"] == "B1") & (study.runs["training_seed"] < 3)
    study.runs.loc[is_high, ["accuracy_card", "accuracy_follow"]] = 0.75  # .08 above the highest of the others
    assert "any distribution" not in study_tables.statement(study, entry, 4)
    study.runs.loc[is_high, ["accuracy_card", "accuracy_follow"]] = 0.9
    assert study_tables.statement(study, entry, 4).endswith(
        "Only some runs reach 75% in these tasks (sixteen tokens (B1): 3 of 8), so this interval may be too narrow; "
        "the one for any distribution is [−20.0, +90.0]."
    )


def test_studies_of_other_tasks_do_not_lead_the_page(tmp_path, monkeypatch):
    write_root(tmp_path)
    folder = tmp_path / "reports/study/mine"
    write_study(tmp_path, study_summary(arms=("none", "A6", "B1")))
    runs = pd.read_csv(folder / "runs.csv")
    runs.rename(columns={"accuracy_card": "accuracy_puzzle"}).to_csv(folder / "runs.csv", index=False)
    page = build(tmp_path, monkeypatch)
    assert "<dd>70.0%</dd>" in page  # of this run
    assert "<h2>Studies on other data</h2>" in page
    assert "<h2>Decisions on other data</h2>" in page
    assert page.index("Do planned queries help?") < page.index("Study mine")
    assert "## Studies on other data" in (tmp_path / "reports/report.md").read_text()


@pytest.mark.parametrize(
    ("kind", "warm_up", "collect", "world", "expected"),
    [
        ("embedded", "selecting", ["procedural", "chat"], "digits", ["moving digits. Nothing", "backbones' warm-up"]),
        ("embedded", "none", ["procedural", "chat"], "digits", ["moving digits. Nothing"]),
        ("local", "selecting", ["procedural"], "objects", ["clips of moving photographs of objects. Nothing"]),
        ("embedded", "selecting", ["folder", "chat"], "digits", ["backbones' warm-up, on clips of moving digits"]),
        ("embedded", "reading", ["chat"], "digits", []),
        ("hub", "selecting", ["hub", "procedural"], "digits", []),
    ],
)
def test_the_banner_says_what_the_data_and_the_backbones_are(kind, warm_up, collect, world, expected):
    sources = {"collect": collect, "procedural": {"world": world}}
    backbones = {"kind": kind, "embedded": {"vision_queries": warm_up}}
    lines = report.texts.banner({"backbones": backbones, "sources": sources})
    assert len(lines) == len(expected)
    assert all(part in line for part, line in zip(expected, lines, strict=True))


def test_the_kept_heatmap_of_a_study_is_in_its_section(tmp_path, monkeypatch):
    write_root(tmp_path)
    for name, arms in (("leading", ("none", "A6", "B1")), ("natural", ("none", "A6")), ("plain", ("none", "F1"))):
        write_study(tmp_path, study_summary(name, arms))
    for name in ("leading", "natural"):
        Image.new("RGB", (96, 64), "#345").save(tmp_path / "reports/study" / name / "heatmap.png")
    page = build(tmp_path, monkeypatch)
    places = {name: page.index(f'alt="Frames of a clip of study {name} with') for name in ("leading", "natural")}
    assert page.index('id="studies"') < places["leading"] < page.index("<summary>Study natural: ")
    section = page[page.index("<summary>Study natural: ") : page.index("<summary>Study plain: ")]
    assert 'src="data:image/webp;base64,' in section
    assert "A held-out clip of a run of study natural" in section
    assert "clip of study plain" not in page
    text = (tmp_path / "reports/report.md").read_text()
    assert text.count("](study/natural/heatmap.png)") == text.count("](study/leading/heatmap.png)") == 1
    (tmp_path / "reports/study/natural/heatmap.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"study/natural/heatmap\.png is no picture"):
        build(tmp_path, monkeypatch)


def test_a_study_with_more_arms_leads_with_the_headline_arms_and_folds_the_others(tmp_path, monkeypatch):
    write_root(tmp_path)
    write_study(tmp_path, study_summary(arms=("none", "A6", "A6_16", "B1")))
    page = build(tmp_path, monkeypatch)
    folded = page.index("<details><summary>All arms of study mine</summary>")
    assert page.index(">one static token (A6)</th>") < folded < page.index(">A6_16</th>")
    assert page.index("<h2>Verdict</h2>") < page.index("Study mine: Which &lt;one&gt;?") < folded
    assert "against A6_16" not in page
    assert (tmp_path / "reports/figures/study_mine_first_forest.svg").exists()
    assert (tmp_path / "reports/figures/study_mine_forest.svg").exists()


def test_the_headline_study_has_all_arms_most_replicates_and_the_latest_seeds(tmp_path):
    arms = ("none", "A6", "B1")

    def made(name, arms, seeds, **changes):
        return write_study(tmp_path, study_summary(name, arms, seeds, **changes))

    some, tuned = made("some", ("none", "B1"), (9, 10, 11)), made("tuned", arms, (1, 2, 3), split="validation")
    assert studies.headline_of([some, tuned]) is None
    first, later = made("zeta", arms, (1, 2)), made("alpha", arms, (3, 4))
    assert studies.headline_of([some, tuned, first, later]) is later
    more = made("more", arms, (1, 2, 5))
    assert studies.headline_of([first, more, later]) is more


def test_the_key_figures_are_of_the_study_with_most_and_latest_runs_of_the_default(tmp_path):
    def made(name, arms, seeds, **changes):
        return write_study(tmp_path, study_summary(name, arms, seeds, **changes))

    compared, alone = made("zeta", ("none", "A6", "B1"), (1, 2, 3)), made("alone", ("none",), (4, 5, 6))
    others = [made("few", ("none",), (9,)), made("tuned", ("none",), (6, 7, 8, 9), split="validation")]
    others.append(made("without", ("A6",), (6, 7, 8, 9)))
    found = partial(studies.default_of, num_samples=60_000)
    assert found(others[1:]) is None
    assert found([compared, alone, *others]) is alone
    assert found([compared, *others]) is compared
    summary = study_summary("short", ("none",), range(10, 20))
    arms = [arm.model_copy(update={"training_samples": 18_000.0}) for arm in summary.arms]
    short = write_study(tmp_path, summary.model_copy(update={"arms": arms}))
    assert found([compared, short]) is compared  # its runs are as long as the pipeline's
    assert studies.default_of([compared, short], num_samples=100) is short  # no study's are


def test_the_loss_is_compared_by_group_in_the_tiers_of_the_research(tmp_path):
    study = write_study(tmp_path, study_summary())
    cells = {row[2]: row[-2:] for row in study_tables.effects(study).rows}
    assert cells["gaze"] == [("+50%", pytest.approx(50)), "above 15% (2 of 2 pairs above 5%)"]
    assert cells["reading"] == [("−25%", pytest.approx(-25)), "worse (0 of 2 pairs above 5%)"]
    tiers = [study_tables.tier([gain]).partition(" (")[0] for gain in (0.04, 0.051, 0.15, 0.151)]
    assert tiers == ["up to 5%", "5 to 15%", "5 to 15%", "above 15%"]


def test_an_arm_of_equal_flops_is_paired_with_the_runs_that_have_as_many(tmp_path):
    study = write_study(tmp_path, study_summary())
    runs = study.runs.assign(budget=["x1", "x1", "same", "same"], training_flops=[1e13, 2e13, 1.01e13, 2.0e13])
    study = studies.Study(
        study.summary, pd.concat([runs, runs.iloc[:2].assign(budget="x2", training_flops=9e13, run="z")]), None
    )
    entry = study.summary.comparisons[0].model_copy(update={"arm": "B1, same", "matched": "FLOPs"})
    own, base = studies.paired_runs(study, entry)
    assert list(zip(own["run"], base["run"], strict=True)) == [("B1-1", "none-1"), ("B1-2", "none-2")]


def test_decisions_follow_from_the_verdicts_and_the_rest_names_its_study(tmp_path):
    cheaper, other = decisions.CHEAPER, decisions.OTHER
    for rule, found, expected in (
        (cheaper, ("equal", "equal"), "take the alternative"),
        (other, ("equal", "equal"), "keep the default"),
        (other, ("worse", "equal"), "take the alternative"),
        (other, ("better", "worse"), "depends on the tasks"),
        (cheaper, ("better", "undecided"), "keep the default"),
        (cheaper, ("equal", "undecided"), "undecided"),
        (other, ("worse", "exploratory"), "undecided"),
        (other, ("unmatched budgets", "equal"), "undecided"),
    ):
        assert decisions.outcome(rule, found) == expected
    few, many = (
        write_study(tmp_path, study_summary(*given)) for given in (("few",), ("many", ("none", "B1"), (3, 4, 5)))
    )
    rows = {row[0]: [text_of(cell) for cell in row[1:]] for row in decisions.table([many, few]).rows}
    assert rows["more tokens: sixteen pooled (B1)"] == [
        *(
            "+44.0 [+30.0, +50.0]",
            "−10.0 [−10.0, −10.0]",
            "+50% [above 15%]",
            "−25% [worse]",
            "depends on the tasks; default: gaze better, reading worse (many, 3 pairs, exploratory, 2 of 6 runs not "
            "converged)",
            "if default worse",
        ),
    ]
    assert rows["more tokens: sixteen pooled (B1), equal FLOPs, own rates"][-2] == "not run (study equal_flops_rates)"
    paired = [entry.model_copy(update={"matched": "FLOPs"}) for entry in many.summary.comparisons]
    flops = studies.Study(many.summary.model_copy(update={"comparisons": paired}), many.runs, many.task_losses)
    of_flops = {row[0]: [text_of(cell) for cell in row[1:]] for row in decisions.table([flops, few]).rows}
    row_of_flops = of_flops["more tokens: sixteen pooled (B1), equal FLOPs, own rates"]
    assert row_of_flops[:-1] == rows["more tokens: sixteen pooled (B1)"][:-1]
    assert "2 pairs" in of_flops["more tokens: sixteen pooled (B1)"][-2]  # of the study at equal samples
    assert rows["freeze: both backbones (F1)"][-2:] == ["not run (study phase1a)", "unless default better"]
    assert len(rows) == len(decisions.CHOICES)
    not_run = [cells[-2].startswith("not run (study ") for cells in rows.values()]
    assert not_run == sorted(not_run)  # last
    assert False in not_run
    assert decisions.missing([many, few]) >= {"equal_flops_rates", "phase1a"}
    assert "confirm_longest" not in decisions.missing([write_study(tmp_path, study_summary(arms=("none", "A6", "B1")))])
    known = {path.stem for path in (params.ROOT / "conf/study").glob("*.yaml")}
    for choice in decisions.CHOICES:
        assert choice.study in known
        assert {choice.arm, choice.baseline} <= set(read_study(choice.study).arms), choice


def test_a_decision_of_a_scaling_grid_is_that_of_its_largest_budget(tmp_path):
    summary = study_summary()
    shared = {"arm": "B1", "groups": {"all": [0.6, 0.6]}, "exact_match": [0.3, 0.3], "num_above_plateau": 0}
    arms = [
        summary.arms[1].model_copy(update=shared | {"budget": name, "training_samples": samples})
        for name, samples in (("x2", 12e4), ("x1", 6e4))
    ]
    pairs = [entry.model_copy(update={"arm": f"B1, {arm.budget}"}) for arm in arms for entry in summary.comparisons]
    grid = summary.model_copy(update={"arms": arms, "comparisons": pairs, "series": [Series(name="one", arms=["B1"])]})
    choice = next(choice for choice in decisions.CHOICES if choice.arm == "B1")
    assert decisions.labels(choice, SimpleNamespace(summary=grid)) == ["B1, x2"]
    plain = grid.model_copy(update={"series": []})
    assert decisions.labels(choice, SimpleNamespace(summary=plain)) == ["B1, x2", "B1, x1"]


@pytest.mark.parametrize(
    ("num_pairs", "tested", "matched", "expected"),
    [
        (6, "undecided", "samples", "undecided"),  # corrected for many questions
        (6, "exploratory", "samples", "better"),
        (5, "undecided", "samples", "better"),
        (2, "undecided", "samples", "too few runs"),
        (5, "unmatched budgets", None, "unmatched budgets"),
    ],
)
def test_intervals_decide_where_the_test_says_nothing(num_pairs, tested, matched, expected):
    entry = SimpleNamespace(differences=[0.1] * num_pairs, interval=(0.09, 0.11), verdict=tested, matched=matched)
    assert decisions.verdict(entry, margin=0.03) == expected


@pytest.mark.parametrize(
    ("num_pairs", "verdict", "split", "words"),
    [
        (3, "better", "test", "3 pairs, exploratory"),
        (3, "better", "validation", "3 pairs, validation split"),
        (6, "better", "test", "6 pairs, tested"),
        (6, "exploratory", "test", "6 pairs, exploratory"),
    ],
)
def test_a_decision_tells_its_split_and_explores_without_a_test(num_pairs, verdict, split, words):
    summary = study_summary(seeds=range(num_pairs), split=split)
    own = {entry.group: entry.model_copy(update={"verdict": verdict}) for entry in summary.comparisons}
    study = SimpleNamespace(name="mine", summary=summary)
    facts = decisions.attribution(study, own)
    open_runs = f"2 of {2 * num_pairs} runs not converged"
    assert decisions.attributed("undecided", facts) == f"undecided (mine, {words}, {open_runs})"
    assert decisions.shared([facts, facts | {"study": "other"}]) == {
        name: fact for name, fact in facts.items() if name != "study"
    }


def test_a_study_of_another_version_names_the_command(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/summary.json").write_text('{"name": "mine"}')
    with pytest.raises(UserError, match=r"python -m pipeline_steps.study.summary mine"):
        studies.read_studies(tmp_path)


@pytest.mark.parametrize("num_pairs", [2, 3])
def test_cards_name_the_power_of_as_many_pairs_as_may_be_called_equal(tmp_path, num_pairs):
    study = write_study(tmp_path, study_summary(arms=("none", "A6", "B1"), seeds=range(num_pairs)))
    text = "With this spread, arms that are the same are called equal (within 3 points) in "
    assert [text in card["statement"] for card in study_tables.cards(study)] == [num_pairs > 2] * 4


def test_cards_and_comparisons_name_the_runs_that_were_not_measured(tmp_path):
    summary = study_summary(arms=("none", "A6", "B1"), seeds=(1, 2, 3, 4))
    entries = [entry.model_copy(update={"num_unmeasured": 4}) for entry in summary.comparisons]
    study = write_study(tmp_path, summary.model_copy(update={"comparisons": entries, "num_runs": 12}))
    assert {card["open"] for card in study_tables.cards(study)} == {"2 of 4 measured not converged, 4 not measured"}
    table = study_tables.effects(study)
    assert {row[table.columns.index("not converged")] for row in table.rows} == {("2 of 4, 4 not measured", 2)}


def test_without_a_measurement_nothing_is_counted_as_converged(tmp_path):
    summary = study_summary()
    unmeasured = summary.arms[1].model_copy(update={"num_converged": 0, "num_measured": 0})
    nothing = {"num_unmeasured": 2 * len(SEEDS), "num_not_converged": 0}
    entries = [entry.model_copy(update=nothing) for entry in summary.comparisons]
    changed = {"arms": [summary.arms[0], unmeasured], "comparisons": entries}
    study = write_study(tmp_path, summary.model_copy(update=changed))
    table, effects = study_tables.arms(study, study.summary.arms), study_tables.effects(study)
    assert [text_of(row[table.columns.index("converged")]) for row in table.rows] == ["2 of 2", "–"]
    assert "or rose; –: not measured." in table.note
    assert {text_of(row[effects.columns.index("not converged")]) for row in effects.rows} == {"not measured"}
    assert "not measured" not in study_tables.arms(study, study.summary.arms[:1]).note


@pytest.mark.parametrize(("num_pairs", "is_told"), [(5, True), (6, False)])
def test_comparisons_say_that_a_test_of_few_pairs_decides_nothing(tmp_path, num_pairs, is_told):
    summary = study_summary(seeds=range(num_pairs), num_planned=2 * num_pairs)
    note = study_tables.effects(write_study(tmp_path, summary)).note
    assert ("With fewer than 6 pairs the test cannot say better or worse" in note) == is_told


@pytest.mark.parametrize("content", ["", "run,arm\nnone-1,none\n"])
def test_a_study_with_damaged_runs_names_the_file(tmp_path, content):
    study = write_study(tmp_path, study_summary())
    folder = tmp_path / "reports/study" / study.name
    (folder / "runs.csv").write_text(content)
    with pytest.raises(UserError, match=r"mine/runs.csv: (No columns|no column budget).*Restore it"):
        studies.read_study(folder)


def test_too_few_pairs_have_a_card_of_their_own(tmp_path):
    summary = study_summary(arms=("none", "A6", "B1"))
    entries = [entry.model_copy(update={"verdict": "too few runs"}) for entry in summary.comparisons]
    study = write_study(tmp_path, summary.model_copy(update={"comparisons": entries}))
    assert {card["status"] for card in study_tables.cards(study)} == {"too few runs"}


def test_a_summary_of_other_runs_is_refused(tmp_path):
    study = write_study(tmp_path, study_summary())
    folder = tmp_path / "reports/study" / study.name
    study.runs.iloc[:-1].to_csv(folder / "runs.csv", index=False)
    with pytest.raises(UserError, match=rf"runs.csv has \d+ runs, but .* pipeline_steps.study.summary {study.name}"):
        studies.read_study(folder)


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


def three_seeds(arm, scale, **options):
    base = [make_run(f"none-seed{seed}", "none", seed) for seed in (1, 2, 3)]
    return Found(base[0], base[1:] + [make_run(f"{arm}-seed{seed}", arm, seed, scale, **options) for seed in (1, 2, 3)])


def test_clear_difference_on_three_seeds_is_validated():
    verdict = verdicts.verdicts(three_seeds("A6", 3.0), SETTINGS)[0]
    assert verdict.status == verdicts.VALIDATED
    assert verdict.comparison.ratio == pytest.approx(3.0, rel=0.02)
    assert verdict.comparison.interval[0] < 3.0 < verdict.comparison.interval[1]


def test_equal_losses_do_not_validate_help_but_validate_equality():
    assert verdicts.verdicts(three_seeds("A6", 1.0), SETTINGS)[0].status == verdicts.NOT_VALIDATED
    assert verdicts.verdicts(three_seeds("B1", 1.0), SETTINGS)[1].status == verdicts.VALIDATED


def test_better_sixteen_tokens_do_not_validate_equality():
    assert verdicts.verdicts(three_seeds("B1", 0.6), SETTINGS)[1].status == verdicts.NOT_VALIDATED


def test_an_interval_that_includes_the_threshold_is_undecided():
    verdict = verdicts.verdicts(three_seeds("A6", 1.05), SETTINGS)[0]
    assert verdict.status == verdicts.UNDECIDED
    assert "threshold" in verdict.reasons[0]


def test_one_seed_or_missing_items_is_undecided():
    one = Found(make_run("none", "none", 1), [make_run("A6", "A6", 1, 3.0)])
    verdict = verdicts.verdicts(one, SETTINGS)[0]
    assert verdict.status == verdicts.UNDECIDED
    assert verdict.reasons == ["1 of 3 seeds"]
    assert any("A6-seed2" in command for command in verdict.commands)
    blind = verdicts.verdicts(three_seeds("A6", 3.0, items=False), SETTINGS)[0]
    assert blind.status == verdicts.UNDECIDED
    assert blind.comparison.interval is None


def test_runs_on_different_data_are_not_compared():
    verdict = verdicts.verdicts(three_seeds("A6", 3.0, data="d2"), SETTINGS)[0]
    assert verdict.status == verdicts.UNDECIDED
    assert verdict.comparison is None
    assert "shards_sha256 differs" in verdict.reasons[0]


def test_runs_on_different_items_are_not_compared():
    found = three_seeds("A6", 3.0)
    found.runs[-1].items["key"] = "other-" + found.runs[-1].items["key"]
    verdict = verdicts.verdicts(found, SETTINGS)[0]
    assert verdict.status == verdicts.UNDECIDED
    assert verdict.comparison is None
    assert "different items" in verdict.reasons[0]


def test_an_outdated_kept_run_is_not_compared():
    found = three_seeds("A6", 3.0)
    found.runs.append(make_run("none-seed1", "none", 1))
    assert verdicts.verdicts(found, SETTINGS)[0].status == verdicts.VALIDATED
    found.runs[-1].result.provenance["checkpoint_sha256"] = "another"
    verdict = verdicts.verdicts(found, SETTINGS)[0]
    assert verdict.status == verdicts.UNDECIDED
    assert "reports/runs/none-seed1 is not the run of this page" in verdict.reasons[0]


def test_targets_are_judged_on_the_embedded_world_only():
    result = result_of(item_table())
    table = report.tables.targets(result, SETTINGS.targets)
    assert {row[1] for row in table.rows} == {"met"}
    required, reached = next(row[2:] for row in table.rows if row[0].startswith("blind"))
    assert required == "≤ 10 points"
    assert re.fullmatch(r"[+-]\d+\.\d points \(\w+, the highest\)", reached)
    bad = result.model_copy(deep=True)
    bad.tasks["card"]["autoregressive"].loss = 9.0
    judged = {row[0]: row[1] for row in report.tables.targets(bad, SETTINGS.targets).rows}
    assert judged["loss of card"] == "missed"
    del bad.tasks["gist"]
    assert report.tables.targets(bad, SETTINGS.targets).rows == []


def test_a_single_item_has_no_interval_and_decides_nothing():
    several, one = (result_of(item_table(num_items=count)) for count in (40, 1))
    for build_table in (report.tables.accuracies, report.tables.losses):
        assert " [" in build_table(several).markdown()
        assert " [" not in build_table(one).markdown()
    assert "apart in 7 of 7" in " ".join(report.texts.controls(several, SETTINGS.targets))
    assert "apart in 0 of 7" in " ".join(report.texts.controls(one, SETTINGS.targets))
