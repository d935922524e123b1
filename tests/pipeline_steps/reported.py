"""Synthetic results with known answers, and the report that is built from them."""

import json
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pandas as pd
from PIL import Image

from pipeline_steps.common import metrics, params
from pipeline_steps.common.modes import SCORED_MODES
from pipeline_steps.common.params import ROOT, TRAINING_STAGES
from pipeline_steps.common.study_results import StudySummary
from pipeline_steps.report import __main__ as report
from pipeline_steps.report import keep, studies
from pipeline_steps.report.budgets import Budget
from pipeline_steps.report.inputs import CURVE_COLUMNS, DIAGNOSTICS, Run, read_inputs
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


def keep_run(root, ablation="none", seed=1):
    """The file of the run under `root`, kept as `ablation` and `seed`."""
    kept = keep.kept_run(
        read_inputs(root, given(ablation, seed)), {"seed": seed, "backbones": {"embedded": {"seed": 5}}}
    )
    path = root / f"reports/runs/{ablation}-seed{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(keep.as_text(kept))
    return path


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
