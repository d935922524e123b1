"""Heatmaps of the model's attention: contact sheets (PNG), animations (GIF) and an index of them.

    python -m pipeline_steps.heatmaps

Reads params.yaml, outputs/stage3, outputs/evaluation/items.parquet, data/shards and data/tokens; writes
reports/heatmaps/: {key}-{item}.png (contact sheet), .gif (animation) and -frames.webp (every frame with the overlay of
every mode, and the difference), contact_sheet.png (many clips), overview.png (one clip, small) and index.json. The
clips are `num_clips` random ones of every task whose items have a target (of every task if no item has one);
overview.png shows the one where planned queries gain most (`gain`), contact_sheet.png the best, the worst and random
clips (sheet.py). Cost at the embedded scale: about 20 seconds on two cores.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("MKL_DYNAMIC", "FALSE")  # a fixed number of threads keeps floating-point sums reproducible

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from model import FoveationOptions
from pipeline_steps.common import params
from pipeline_steps.common.checkpoint import load_checkpoint
from pipeline_steps.common.errors import UserError, run_main
from pipeline_steps.common.files import replaced_folder, write_json
from pipeline_steps.common.modes import GAZE_MODES
from pipeline_steps.heatmaps import over_frames, sheet
from pipeline_steps.inference import drawing, gaze
from pipeline_steps.inference.answers import answer_batch, expected_answer, question
from pipeline_steps.monitoring.progress import progress_bar
from pipeline_steps.streaming import targets
from pipeline_steps.streaming.collate import Collator
from pipeline_steps.streaming.dataset import TokenizedShards

PARAMS = ("heatmaps", "streaming.image_replication")
OVERVIEW_SIDE = 120  # px
SHEET_BATCH = 16  # clips of the sheet in one forward pass


def main():
    arguments = read_arguments()
    parameters = params.read(arguments.params, *PARAMS)
    settings = parameters.heatmaps
    torch.set_num_threads(settings.num_threads)
    transformers_logging.disable_progress_bar()
    model, processor = load_checkpoint(arguments.checkpoint)
    replication = parameters.streaming.image_replication
    dataset = TokenizedShards.for_model(model.config, arguments.shards, arguments.tokens, settings.split, replication)
    collate = Collator.for_model(model.config, loss="answer_only", image_replication=replication)
    foveated = model.config.architecture == "foveated"
    numbers = choose_clips(dataset, settings.num_clips, settings.seed) if foveated else []
    with replaced_folder(arguments.outputs) as folder:
        entries, clips = [], []
        for number in progress_bar("heatmaps", numbers, unit="clip"):
            clip, entry = attention_clip(
                model, processor.tokenizer, collate, dataset, number, settings.max_answer_tokens
            )
            entries.append(entry | draw(clip, folder, f"{entry['key']}-{entry['item']}", settings))
            clips.append(clip)
        if entries:
            clip, _ = max(zip(clips, entries, strict=True), key=lambda pair: gain(pair[1]))  # the first of equal ones
            drawing.overview(clip, OVERVIEW_SIDE).save(folder / "overview.png")
        drawn = "1 clip" if settings.num_clips == 1 else f"{settings.num_clips} clips"
        index = {
            "clips": entries,
            "rule": f"{drawn} of every task with a target (of every task if none has one), drawn at random (seed "
            f"{settings.seed})",
            "split": settings.split,
            "over_frames": over_frames.mean_curves([clip.maps for clip in clips]),
            "contact_sheet": draw_sheet(model, collate, dataset, settings, arguments.items, folder)
            if foveated and settings.num_sheet_clips
            else None,
        }
        write_json(folder / "index.json", index)
    print(
        f"{len(entries)} clips drawn in {arguments.outputs}" if entries else "0 clips drawn: the model has no queries"
    )


def read_arguments():
    parser = argparse.ArgumentParser(description="Draw attention heatmaps.")
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--checkpoint", type=Path, default=Path("outputs/stage3"))
    parser.add_argument("--shards", type=Path, default=Path("data/shards"))
    parser.add_argument("--tokens", type=Path, default=Path("data/tokens"))
    parser.add_argument("--items", type=Path, default=Path("outputs/evaluation/items.parquet"))
    parser.add_argument("--outputs", type=Path, default=Path("reports/heatmaps"))
    return parser.parse_args()


def choose_clips(dataset, num_clips, seed):
    """Row numbers: `num_clips` random ones, in the order of (key, item), of every task with a known target, or of every
    task if none has one."""
    tasks, with_target = {}, set()
    for number, row in enumerate(dataset.rows):
        if row["kind"] != "text":
            tasks.setdefault(row["task"], []).append((row["key"], row["item"], number))
    if not tasks:
        raise UserError(
            f"{dataset.tokens_dir}: split '{dataset.split}' has 0 samples with frames, nothing to draw. Change "
            "heatmaps.split."
        )
    draw, chosen = np.random.default_rng(seed), {}
    for task, rows in sorted(tasks.items()):
        numbers = [number for *_, number in sorted(rows)]
        places = draw.choice(len(rows), min(num_clips, len(rows)), replace=False)
        chosen[task] = [numbers[place] for place in sorted(places)]
    for task, numbers in chosen.items():
        row = dataset.rows[numbers[0]]
        sample = dataset.sample(numbers[0])
        if sample.objects and sample.items[row["item"]].target is not None:
            with_target.add(task)
    return [number for task, numbers in chosen.items() if task in with_target or not with_target for number in numbers]


@torch.inference_mode()
def attention_clip(model, tokenizer, collate, dataset, number, max_tokens):
    """(`Clip`, index entry) of one row, with attention in every mode and the greedy answer."""
    item = dataset[number]
    batch = collate([item])
    num_frames = int(batch.num_frames[0])
    modes = ("coarse",) if model.config.coarse_only else GAZE_MODES
    maps = {mode: attention(model, batch, mode) for mode in modes}
    truth = truth_of(dataset, number, item, maps["coarse"])
    clip = drawing.Clip(
        frames=shown_frames(item, num_frames),
        maps={mode: values[-1] for mode, values in maps.items()},
        boxes=None if truth is None else truth.boxes,
        title=f"{item['task']}  ·  {item['key']}",
        question=question(tokenizer, item),
        answer=expected_answer(tokenizer, item),
        prediction=answer_batch(model, tokenizer, collate, [item], max_tokens)[0],
    )
    entry = {name: item[name] for name in ("key", "item", "task")} | {
        "question": clip.question,
        "answer": clip.answer,
        "prediction": clip.prediction,
        "num_frames": num_frames,
        "peak_on_target": None if truth is None else {mode: on_target(values, truth) for mode, values in maps.items()},
    }
    return clip, entry


def attention(model, batch, mode):
    """Attention maps [L, frames of the batch one item after another, N] of a forward pass in one mode."""
    options = FoveationOptions(target_patches=batch.target_patches, output_attentions=True)
    passes = model.encode_frames(**batch.inputs(), mode=mode, options=options)
    return gaze.attention_maps(passes[-1].attention_weights.numpy())


def truth_of(dataset, number, item, maps):
    """The `GroundTruth` of a row on the patch grid of its maps [L, T, N], or None."""
    grid = round(maps.shape[-1] ** 0.5)
    return targets.ground_truth(dataset.sample(number), item["item"], maps.shape[1], grid, dataset.resize_mode)


def shown_frames(item, num_frames):
    """The frames that the model receives: an image is repeated `num_frames` times."""
    return item["frames"] if len(item["frames"]) == num_frames else item["frames"].repeat(num_frames, axis=0)


@torch.inference_mode()
def draw_sheet(model, collate, dataset, settings, items_path, folder):
    """Writes contact_sheet.png and returns its entry in index.json. UserError for scored items that are not in the
    dataset."""
    chosen = sheet.choose(sheet.read_losses(items_path), settings.num_sheet_clips, settings.seed)
    entries = [{"part": part, **row} for part, rows in chosen.items() for row in rows.to_dict("records")]
    numbers = sheet_rows(dataset, entries, items_path)
    mode = "coarse" if model.config.coarse_only else sheet.MODE
    tiles = []
    for start in progress_bar("contact sheet", range(0, len(numbers), SHEET_BATCH), unit="batch"):
        items = [dataset[number] for number in numbers[start : start + SHEET_BATCH]]
        batch = collate(items)
        counts = batch.num_frames.tolist()
        parts = np.split(attention(model, batch, mode), np.cumsum(counts)[:-1], axis=1)
        for place, (item, maps) in enumerate(zip(items, parts, strict=True), start):
            entry, truth = entries[place], truth_of(dataset, numbers[place], item, maps)
            clip = drawing.Clip(
                frames=shown_frames(item, maps.shape[1]),
                maps={mode: maps[-1]},
                boxes=None if truth is None else truth.boxes,
                title=item["task"],
                question="",
                answer=None,
                prediction="",
            )
            name = f"{entry['key']} / {entry['item']}"
            tiles.append(sheet.Tile(clip, entry["part"], entry["task"], name, entry["loss"], entry["correct"]))
    sheet.picture(tiles).save(folder / "contact_sheet.png")
    rounded = [entry | {"loss": round(entry["loss"], 6)} for entry in entries]
    return {"picture": "contact_sheet.png", "rule": sheet.rule(chosen, settings.seed), "mode": mode, "clips": rounded}


def sheet_rows(dataset, entries, items_path):
    """Row numbers of the chosen items. UserError for an item that is not in the dataset."""
    rows = {(row["key"], row["item"]): number for number, row in enumerate(dataset.rows)}
    absent = [(entry["key"], entry["item"]) for entry in entries if (entry["key"], entry["item"]) not in rows]
    if absent:
        key, item = absent[0]
        raise UserError(
            f"{items_path} scores item {item} of '{key}', which is not in split '{dataset.split}' of "
            f"{dataset.tokens_dir} ({len(absent)} of {len(entries)} chosen items are not): set heatmaps.split to "
            "evaluation.split, or run `dvc repro evaluation`"
        )
    return [rows[entry["key"], entry["item"]] for entry in entries]


def on_target(maps, truth):
    """Share of the frames with a visible target, except the first, whose strongest patch is on the target; None without
    such frames."""
    sums = gaze.summary(maps, truth)
    return round(sums["peak_on_target"] / sums["gaze_frames"], 6) if sums["gaze_frames"] else None


def gain(entry):
    """Share of the frames (`on_target`) with planned queries minus that with the static one; 0 where it is unknown."""
    shares = [share for share in (entry["peak_on_target"] or {}).values() if share is not None]
    return shares[-1] - shares[0] if shares else 0.0


def draw(clip, folder, name, settings):
    """Writes the sheet, the frames and the animation of one clip; returns their fields of the index entry."""
    sheet, geometry = drawing.contact_sheet(clip, settings.tile_pixels)
    sheet.save(folder / f"{name}.png")
    frames, strip_geometry = drawing.strip(clip, settings.tile_pixels)
    frames.save(folder / f"{name}-frames.webp", quality=65)
    pictures = drawing.animation(clip, settings.tile_pixels)
    drawing.save_animation(pictures, folder / f"{name}.gif", settings.frame_milliseconds)
    return {
        "sheet": f"{name}.png",
        "animation": f"{name}.gif",
        "geometry": geometry,
        "frames": f"{name}-frames.webp",
        "frames_geometry": strip_geometry,
        "frame_milliseconds": settings.frame_milliseconds,
    }


if __name__ == "__main__":
    run_main(main)
