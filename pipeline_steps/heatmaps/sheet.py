"""One contact sheet of many clips: the best, the worst and random ones by answer loss.

A tile shows a row of frames with the attention overlay of the autoregressive mode, the target's box, the task, the loss
per scored token, the key, and whether the answer was right. Losses come from outputs/evaluation/items.parquet.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

from pipeline_steps.common.errors import UserError
from pipeline_steps.inference import drawing
from pipeline_steps.inference.drawing import BACKGROUND, FAINT, GAP, INK, MARGIN, RIGHT, WRONG, font

COLUMNS = ["key", "item", "task", "loss", "correct"]
PARTS = ("best", "worst", "random")
MODE = "autoregressive"
NUM_COLUMNS, NUM_FRAMES, SIDE = 4, 6, 64  # tiles in a row, frames in a tile, px
FRAME_GAP, LINE, BAND = 2, 17, 40  # px: between frames, a line of text, the heading of a part


@dataclass
class Tile:
    """A clip of the sheet."""

    clip: drawing.Clip  # with one map
    part: str  # one of PARTS
    task: str
    name: str  # key, and the item's number
    loss: float  # nats per scored token
    correct: bool


def read_losses(path):
    """The scored items with frames: COLUMNS, loss in nats per scored token of the autoregressive mode; correct: every
    scored token was the most likely one. UserError if the file is absent or lacks a column."""
    names = ["key", "item", "task", "mode", "num_tokens", "loss_sum", "num_correct", "num_frames"]
    try:
        table = pd.read_parquet(path, columns=names)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: run `dvc repro evaluation`, which writes it") from None
    except ValueError as error:  # pyarrow: no such column, or not a Parquet file
        raise UserError(f"{path}: {str(error).splitlines()[0]}. Regenerate it with `dvc repro evaluation`") from None
    table = table[(table["mode"] == MODE) & (table["num_frames"] > 0)]
    return table.assign(
        loss=table["loss_sum"] / table["num_tokens"], correct=table["num_correct"] == table["num_tokens"]
    )[COLUMNS].reset_index(drop=True)


def choose(table, num_clips, seed):
    """{part: rows of `read_losses`}: at most `num_clips` different clips, in equal parts.

    best: the lowest losses, ascending; worst: the highest losses, descending; random: sampled from the rest with
    `seed`, sorted by key. A clip with several items appears once, with its first item in that order; ties are broken
    by key and item.
    """
    ordered = table.sort_values(["loss", "key", "item"], kind="stable")
    base, more = divmod(min(num_clips, table["key"].nunique()), len(PARTS))
    best = ordered.drop_duplicates("key").head(base + (more > 0))
    rest = ordered[~ordered["key"].isin(best["key"])]
    worst = rest.iloc[::-1].drop_duplicates("key").head(base + (more > 1))
    rest = rest[~rest["key"].isin(worst["key"])].sort_values(["key", "item"]).drop_duplicates("key")
    drawn = np.random.default_rng(seed).choice(len(rest), size=base, replace=False)
    return dict(zip(PARTS, (best, worst, rest.iloc[np.sort(drawn)]), strict=True))


def rule(chosen, seed):
    """The rule of `choose` in words."""
    best, worst, drawn = (len(chosen[part]) for part in PARTS)
    return (
        f"of the evaluated items with frames, by loss per scored token in autoregressive mode, one item per "
        f"clip: the {best} lowest (best), the {worst} highest (worst), and {drawn} of the rest at random (seed {seed})"
    )


def picture(tiles):
    """The sheet: a band with the heading of each part, its tiles below, NUM_COLUMNS in a row."""
    width = NUM_FRAMES * (SIDE + FRAME_GAP) - FRAME_GAP
    height = 2 * LINE + SIDE + 3 * GAP
    groups = {part: [tile for tile in tiles if tile.part == part] for part in PARTS}
    groups = {part: group for part, group in groups.items() if group}
    rows = sum(-(-len(group) // NUM_COLUMNS) for group in groups.values())
    size = (
        2 * MARGIN + NUM_COLUMNS * (width + MARGIN) - MARGIN,
        2 * MARGIN + len(groups) * BAND + rows * height + LINE,
    )
    sheet, y = Image.new("RGB", size, BACKGROUND), MARGIN
    draw = ImageDraw.Draw(sheet)
    for part, group in groups.items():
        right = sum(tile.correct for tile in group)
        draw.text((MARGIN, y + 24), f"{part}: {right} of {len(group)} right", INK, font(18, bold=True), anchor="ls")
        y += BAND
        for number, tile in enumerate(group):
            x = MARGIN + number % NUM_COLUMNS * (width + MARGIN)
            draw_tile(sheet, tile, x, y + number // NUM_COLUMNS * height, width)
        y += -(-len(group) // NUM_COLUMNS) * height
    legend = "overlay: attention in autoregressive mode; brightest: the largest weight in the clip"
    boxes = any(tile.clip.boxes is not None for tile in tiles)
    draw.text((MARGIN, y + 12), legend + "    white box: the target" * boxes, FAINT, font(13), anchor="ls")
    return sheet


def draw_tile(sheet, tile, x, y, width):
    """Draws two lines of text and a row of at most NUM_FRAMES frames."""
    draw = ImageDraw.Draw(sheet)
    draw.text((x, y + 13), tile.task, INK, font(13, bold=True), anchor="ls")
    caption = f"{'right' if tile.correct else 'wrong'}, loss {tile.loss:.4f}"
    draw.text((x + width, y + 13), caption, RIGHT if tile.correct else WRONG, font(13), anchor="rs")
    draw.text((x, y + 13 + LINE), shortened(tile.name, font(12), width), FAINT, font(12), anchor="ls")
    clip, _ = tile.clip.thinned(NUM_FRAMES)
    boxes = [None] * len(clip.frames) if clip.boxes is None else clip.boxes
    (maps,) = clip.maps.values()
    for t, (frame, values, box) in enumerate(zip(clip.frames, maps, boxes, strict=True)):
        shown = drawing.mark_box(drawing.overlay_picture(frame, values, tile.clip.scale, SIDE), box)
        sheet.paste(shown, (x + t * (SIDE + FRAME_GAP), y + 2 * LINE + GAP))


def shortened(text, face, width):
    """The text, with an ellipsis for its beginning if it is wider than `width` px: keys differ at their ends."""
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(f"…{text}") > width:
        text = text[1:]
    return f"…{text}"
