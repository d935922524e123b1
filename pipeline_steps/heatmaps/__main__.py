"""Pictures of where the model looks: contact sheets (PNG), animations (GIF) and an index of them.

    python -m pipeline_steps.heatmaps

Reads params.yaml, outputs/stage3, data/shards and data/tokens; writes reports/heatmaps/: {key}-{item}.png (contact
sheet), .gif (animation) and -frames.webp (every frame with every mode's map over it), overview.png and index.json.
Which clips: the first `num_clips` by key of every family whose items name a target (of every family, where no item
does), so that nobody picks. Cost at the embedded scale: about 15 seconds on two cores.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("MKL_DYNAMIC", "FALSE")  # the same number of threads, so the same sums

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from pipeline_steps import drawing, gaze, params
from pipeline_steps.answers import answer_batch, expected_answer, question
from pipeline_steps.checkpoint import load_checkpoint
from pipeline_steps.metrics import GAZE_MODES
from pipeline_steps.params import UserError
from pipeline_steps.records import replaced_folder, write_json
from pipeline_steps.streaming import targets
from pipeline_steps.streaming.collate import Collator
from pipeline_steps.streaming.dataset import TokenizedShards

PARAMS = ("heatmaps", "streaming.image_replication")
OVERVIEW_SIDE = 120  # px


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
    numbers = choose_clips(dataset, settings.num_clips) if model.config.architecture == "foveated" else []
    with replaced_folder(arguments.outputs) as folder:
        entries = []
        for number in tqdm(numbers, desc="heatmaps", unit="clip", dynamic_ncols=True):
            clip, entry = look(model, processor.tokenizer, collate, dataset, number, settings.max_answer_tokens)
            entries.append(entry | draw(clip, folder, f"{entry['key']}-{entry['item']}", settings))
            if len(entries) == 1:
                drawing.overview(clip, OVERVIEW_SIDE).save(folder / "overview.png")
        first = "the first clip" if settings.num_clips == 1 else f"the first {settings.num_clips} clips"
        rule = f"{first} by key of every family that names a target (else of every family)"
        write_json(folder / "index.json", {"clips": entries, "rule": rule, "split": settings.split})
    print(
        f"{len(entries)} clips drawn in {arguments.outputs}" if entries else "a model without queries: nothing to draw"
    )


def read_arguments():
    parser = argparse.ArgumentParser(description="Draw where the model looks.")
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--checkpoint", type=Path, default=Path("outputs/stage3"))
    parser.add_argument("--shards", type=Path, default=Path("data/shards"))
    parser.add_argument("--tokens", type=Path, default=Path("data/tokens"))
    parser.add_argument("--outputs", type=Path, default=Path("reports/heatmaps"))
    return parser.parse_args()


def choose_clips(dataset, num_clips):
    """Row numbers: the first `num_clips` by (key, item) of every family with a known target, or of every family
    where there is none."""
    families, with_target = {}, set()
    for number, row in enumerate(dataset.rows):
        if row["kind"] != "text":
            families.setdefault(row["family"], []).append((row["key"], row["item"], number))
    if not families:
        raise UserError(
            f"{dataset.tokens_dir}: split '{dataset.split}' has no samples with frames, so there is nothing to draw"
        )
    chosen = {family: [number for *_, number in sorted(rows)[:num_clips]] for family, rows in sorted(families.items())}
    for family, numbers in chosen.items():
        row = dataset.rows[numbers[0]]
        sample = dataset.sample(numbers[0])
        if sample.objects and sample.items[row["item"]].target is not None:
            with_target.add(family)
    return [
        number for family, numbers in chosen.items() if family in with_target or not with_target for number in numbers
    ]


@torch.inference_mode()
def look(model, tokenizer, collate, dataset, number, max_tokens):
    """(`Clip`, index entry) of one row: attention in every mode, and the greedy answer."""
    item = dataset[number]
    batch = collate([item])
    num_frames = int(batch["num_frames"][0])
    wanted = ("input_ids", "attention_mask", "pixel_values", "num_frames", "target_patches")
    inputs = {name: batch[name] for name in wanted if name in batch}
    maps = {}
    for mode in ("coarse",) if model.config.coarse_only else GAZE_MODES:
        weights = model(**inputs, mode=mode, output_attentions=True).attention_weights
        maps[mode] = gaze.attention_maps(weights.numpy())
    grid = round(maps["coarse"].shape[-1] ** 0.5)
    truth = targets.truth(dataset.sample(number), item["item"], num_frames, grid, dataset.fit)
    frames = item["frames"] if len(item["frames"]) == num_frames else item["frames"].repeat(num_frames, axis=0)
    clip = drawing.Clip(
        frames=frames,
        maps={mode: values[-1] for mode, values in maps.items()},
        boxes=None if truth is None else truth.boxes,
        title=f"{item['family']}  ·  {item['key']}",
        question=question(tokenizer, item),
        answer=expected_answer(tokenizer, item),
        prediction=answer_batch(model, tokenizer, collate, [item], max_tokens)[0],
    )
    entry = {name: item[name] for name in ("key", "item", "family")} | {
        "question": clip.question,
        "answer": clip.answer,
        "prediction": clip.prediction,
        "num_frames": num_frames,
        "peak_on_target": None if truth is None else {mode: on_target(values, truth) for mode, values in maps.items()},
    }
    return clip, entry


def on_target(maps, truth):
    """Share of the frames after the first one whose strongest patch is the target's; None when it is never
    visible."""
    seen = gaze.summary(maps, truth)
    return round(seen["peak_on_target"] / seen["gaze_frames"], 6) if seen["gaze_frames"] else None


def draw(clip, folder, name, settings):
    """Writes the sheet, the frames and the animation of one clip; returns their part of the index entry."""
    sheet, geometry = drawing.contact_sheet(clip, settings.tile_pixels)
    sheet.save(folder / f"{name}.png")
    frames, strip_geometry = drawing.strip(clip, settings.tile_pixels)
    frames.save(folder / f"{name}-frames.webp", quality=80)
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
    params.run(main)
