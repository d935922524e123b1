"""A contact sheet of the world of objects: one clip of every task with its question and answer.

    python -m pipeline_steps.world.contact_sheet --cutouts FOLDER [--backgrounds FOLDER] [--output sheet.jpg] [--seed N]

Shows six frames of each clip, the stills in one row, and of the tasks in NEW_SHOWN also a clip with held-out names and
a held-out background (`*_new`); a green box marks the place that the question is about. Takes seconds.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline_steps.common.errors import UserError, run_main
from pipeline_steps.common.files import check_outputs
from pipeline_steps.common.names import NEW
from pipeline_steps.world import object_scene
from pipeline_steps.world import objects as world
from pipeline_steps.world.cutouts import Backgrounds, Cutouts, read_folder

SIZE, SHOWN, NUM_FRAMES = 224, 6, 12  # px of a rendered frame; frames shown of a clip's frames
TILE, GAP, TEXT, FONT = 132, 3, 24, 15  # px on the sheet
HELD_OUT_SHARE = 0.2
TARGET, NEW_COLOUR = (60, 230, 90), (176, 64, 0)
STILL = "still"
NEW_SHOWN = ("become", "meet")
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


def sheet(cutouts: Cutouts, backgrounds: Backgrounds, seed: int) -> Image.Image:
    """A row of frames for every task, its text above: every kind, NEW_SHOWN with held-out names, and a row of stills,
    half of them with held-out names."""
    rows = [(kind, False) for kind in world.KINDS if kind != STILL] + [(kind, True) for kind in NEW_SHOWN]
    strips = [_clip(cutouts, backgrounds, (seed, number), *row) for number, row in enumerate(rows)]
    strips.append(_stills(cutouts, backgrounds, (seed, len(rows))))
    height = sum(strip.height for strip in strips) + GAP * (len(strips) - 1)
    page, y = Image.new("RGB", (strips[0].width, height), "white"), 0
    for strip in strips:
        page.paste(strip, (0, y))
        y += strip.height + GAP
    return page


def _sample(cutouts: Cutouts, backgrounds: Backgrounds, key: tuple[int, ...], kind: str, is_new: bool):
    """(frames, boxes of the target or None, item) of a training clip, or of a test clip with held-out names."""
    split = "test" if is_new else "train"
    scene = world.sample_scene(np.random.default_rng(key), kind, split, cutouts, backgrounds, NUM_FRAMES, is_new)
    frames, boxes = object_scene.render(scene, cutouts, backgrounds, SIZE)
    item = world.scene_items(scene, cutouts)[0]
    return frames, None if item["target"] is None else boxes[item["target"]], item


def _strip(labels: list[tuple[str, str]]) -> Image.Image:
    """Room for SHOWN tiles under labels: a task, in a colour of its own where names are held out, and its text. Each
    starts a line, and goes on in the next one where the strip ends."""
    font, width = ImageFont.load_default(FONT), SHOWN * (TILE + GAP) - GAP
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength
    placed, line = [], -1  # [(x, line, text, colour)]
    for task, text in labels:
        x, line = 2 + measure(f"{task}   ", font), line + 1
        placed.append((2, line, task, NEW_COLOUR if task.endswith(NEW) else "black"))
        start = x
        for word in text.split(" "):
            if x + measure(word, font) > width:
                x, line = start, line + 1
            placed.append((x, line, word, "black"))
            x += measure(f"{word} ", font)
    strip = Image.new("RGB", (width, (line + 1) * TEXT + TILE), "white")
    draw = ImageDraw.Draw(strip)
    for x, line, text, colour in placed:
        draw.text((x, line * TEXT + 3), text, colour, font, stroke_width=0.4 if x == 2 else 0)
    return strip


def _clip(cutouts: Cutouts, backgrounds: Backgrounds, key: tuple[int, ...], kind: str, is_new: bool) -> Image.Image:
    """SHOWN frames of a clip under its question and answer."""
    frames, boxes, item = _sample(cutouts, backgrounds, key, kind, is_new)
    strip = _strip([(item["task"], f"{item['user'] or 'Describe the video.'}  {item['assistant']}")])
    for column, t in enumerate(np.linspace(0, NUM_FRAMES - 1, SHOWN).round().astype(int)):
        frame = Image.fromarray(frames[t])
        if boxes is not None and boxes[t].any():
            ImageDraw.Draw(frame).rectangle((SIZE * boxes[t]).tolist(), outline=TARGET, width=2)
        _paste(strip, frame, column)
    return strip


def _stills(cutouts: Cutouts, backgrounds: Backgrounds, key: tuple[int, ...]) -> Image.Image:
    """SHOWN stills under two labels: half of them with trained names, on the left, and half with held-out ones."""
    pictures, labels = [], []
    for half, side in enumerate(("left", "right")):
        samples = [
            _sample(cutouts, backgrounds, (*key, half, number), STILL, side == "right") for number in range(SHOWN // 2)
        ]
        pictures += [Image.fromarray(frames[0]) for frames, _, _ in samples]
        items = [item for _, _, item in samples]
        answers = ";  ".join(item["assistant"] for item in items)
        labels.append((items[0]["task"], f"({side}) {items[0]['user']}  {answers}"))
    strip = _strip(labels)
    for column, picture in enumerate(pictures):
        _paste(strip, picture, column)
    return strip


def _paste(strip: Image.Image, frame: Image.Image, column: int) -> None:
    tile = frame.resize((TILE, TILE), Image.Resampling.LANCZOS)
    strip.paste(tile, (column * (TILE + GAP), strip.height - TILE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cutouts", type=Path, required=True)
    parser.add_argument("--backgrounds", type=Path, default=None)
    parser.add_argument("--output", type=Path, default=Path("world_objects.jpg"))
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.output.suffix.lower() not in ENDINGS:
        raise UserError(f"--output {arguments.output}: expected a file name that ends in {', '.join(ENDINGS)}.")
    if arguments.seed < 0:
        raise UserError(f"--seed is {arguments.seed}, expected a whole number of at least 0.")
    read_folder(arguments.cutouts, "--cutouts")
    if arguments.backgrounds is not None:
        read_folder(arguments.backgrounds, "--backgrounds")
    cutouts = Cutouts(arguments.cutouts, HELD_OUT_SHARE, arguments.seed)
    cutouts.check()
    backgrounds = Backgrounds(arguments.backgrounds, HELD_OUT_SHARE, arguments.seed)
    check_outputs(files=[arguments.output])  # last, as it makes the folder
    sheet(cutouts, backgrounds, arguments.seed).save(arguments.output, quality=60)
    print(f"{arguments.output}: {arguments.output.stat().st_size // 1000} kB")


if __name__ == "__main__":
    run_main(main)
