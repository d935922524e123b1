"""A contact sheet of the world of objects: one clip of every task with its question and answer.

    python -m pipeline_steps.world.contact_sheet --cutouts FOLDER [--backgrounds FOLDER] [--output sheet.jpg] [--seed N]

Shows six frames of each clip; a green box marks the place that the question is about. Takes seconds.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline_steps.common.errors import run_main
from pipeline_steps.common.files import check_outputs
from pipeline_steps.world import objects as world
from pipeline_steps.world.cutouts import Backgrounds, Cutouts

SIZE, SHOWN, NUM_FRAMES = 224, 6, 12  # px of a rendered frame; frames shown of a clip's frames
TILE, GAP, TEXT = 140, 3, 22  # px on the sheet
HELD_OUT_SHARE = 0.2
TARGET = (60, 230, 90)


def sheet(cutouts: Cutouts, backgrounds: Backgrounds, seed: int) -> Image.Image:
    """One row of frames per task, its text above."""
    width, height = SHOWN * (TILE + GAP) - GAP, TILE + TEXT + GAP
    kinds = [kind for kind in world.KINDS if kind != "still"]
    page = Image.new("RGB", (width, len(kinds) * height), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for row, kind in enumerate(kinds):
        rng = np.random.default_rng((seed, row))
        scene = world.sample_scene(rng, kind, "train", cutouts, backgrounds, NUM_FRAMES)
        frames, boxes = world.render(scene, cutouts, backgrounds, SIZE)
        item = world.scene_items(scene, cutouts)[0]
        text = f"{kind}:  {item['user'] or 'Describe the video.'}  {item['assistant']}"
        draw.text((2, row * height + 3), text, "black", font)
        for column, t in enumerate(np.linspace(0, NUM_FRAMES - 1, SHOWN).round().astype(int)):
            frame = Image.fromarray(frames[t])
            if item["target"] is not None and boxes[item["target"], t].any():
                ImageDraw.Draw(frame).rectangle((SIZE * boxes[item["target"], t]).tolist(), outline=TARGET, width=2)
            tile = frame.resize((TILE, TILE), Image.Resampling.LANCZOS)
            page.paste(tile, (column * (TILE + GAP), row * height + TEXT))
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cutouts", type=Path, required=True)
    parser.add_argument("--backgrounds", type=Path, default=None)
    parser.add_argument("--output", type=Path, default=Path("world_objects.jpg"))
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    check_outputs(files=[arguments.output])
    cutouts = Cutouts(arguments.cutouts, HELD_OUT_SHARE, arguments.seed)
    backgrounds = Backgrounds(arguments.backgrounds, HELD_OUT_SHARE, arguments.seed)
    sheet(cutouts, backgrounds, arguments.seed).save(arguments.output, quality=70)
    print(f"{arguments.output}: {arguments.output.stat().st_size // 1000} kB")


if __name__ == "__main__":
    run_main(main)
