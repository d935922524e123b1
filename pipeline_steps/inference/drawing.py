"""Contact sheets and animations of attention maps, drawn with Pillow.

Maps are attention over the patches (gaze.py). All modes of a clip share one colour scale: black is 0, the brightest
yellow is `Clip.scale`. A difference of two maps uses the colours MORE and LESS on the same scale: both are strongest
where the maps differ by `Clip.scale`.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

BACKGROUND, INK, FAINT, RIGHT, WRONG = "#15181d", "#f2f4f7", "#9aa4b2", "#6ee7a0", "#ff8f8f"
MARGIN, GAP = 16, 6  # px
LEGEND_HEIGHT = 68  # px, below a sheet
MAX_STRIP_HEIGHT = 16_000  # px; WebP's limit is 16 383
MAX_COLUMNS = 8  # of a sheet; longer clips show evenly spaced frames (animations show all)
MORE, LESS = (255, 159, 28), (76, 168, 255)  # orange and blue: distinguishable for colour-blind readers
COLOURS = (matplotlib.colormaps["magma"](np.arange(256))[:, :3] * 255).astype(np.uint8)
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@dataclass
class Clip:
    """The content of the pictures of one clip."""

    frames: np.ndarray  # uint8 [T, height, width, 3]
    maps: dict[str, np.ndarray]  # mode -> [T, N], attention over the patches of the last layer
    boxes: np.ndarray | None  # [T, 4], the target's box, 0..1; None: unknown
    title: str
    question: str
    answer: str | None  # None: unknown
    prediction: str

    @property
    def correct(self):
        return self.prediction == self.answer

    @property
    def verdict(self):
        """Colour of the model's answer."""
        return INK if self.answer is None else RIGHT if self.correct else WRONG

    @property
    def prediction_text(self):
        return self.prediction or "(nothing)"

    def thinned(self, num_frames):
        """(the clip reduced to at most `num_frames` evenly spaced frames, the indices of those frames)."""
        kept = np.unique(np.linspace(0, len(self.frames) - 1, min(num_frames, len(self.frames))).round().astype(int))
        boxes = None if self.boxes is None else self.boxes[kept]
        maps = {mode: values[kept] for mode, values in self.maps.items()}
        return replace(self, frames=self.frames[kept], maps=maps, boxes=boxes), kept.tolist()

    @property
    def scale(self):
        """The attention weight of the brightest colour: the largest weight, but at least four times the uniform
        weight."""
        peak = max(float(values.max()) for values in self.maps.values())
        return max(peak, min(1.0, 4 / next(iter(self.maps.values())).shape[1]))

    @property
    def difference(self):
        """[T, N]: the autoregressive attention minus that of the static query; None if either is
        missing."""
        if not {"autoregressive", "coarse"} <= self.maps.keys():
            return None
        return self.maps["autoregressive"] - self.maps["coarse"]


def font(size, bold=False):
    return ImageFont.truetype(FONTS / ("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"), size)


def frame_picture(frame, side):
    return Image.fromarray(frame).resize((side, side), Image.Resampling.BICUBIC)


def heat_picture(values, scale, side):
    """One map [N] as a coloured picture, interpolated between patches."""
    return Image.fromarray(COLOURS[(255 * heat(values, scale, side)).astype(np.uint8)])


def overlay_picture(frame, values, scale, side):
    """The map over the frame in grey, which stays visible where attention is low."""
    strength = heat(values, scale, side)
    return blended(frame, strength, COLOURS[(255 * strength).astype(np.uint8)], side)


def difference_picture(frame, values, scale, side):
    """A difference of two maps over the frame: MORE above 0, LESS below 0."""
    more, less = heat(np.maximum(values, 0), scale, side), heat(np.maximum(-values, 0), scale, side)
    colours = np.where((more >= less)[..., None], np.array(MORE), np.array(LESS))
    return blended(frame, np.maximum(more, less), colours, side)


def blended(frame, strength, colours, side):
    """The frame in grey, blended with colours [side, side, 3]; opacity grows with strength 0..1 [side, side]."""
    grey = np.asarray(frame_picture(frame, side).convert("L"), np.float32)[..., None]
    opacity = density(strength[..., None])
    mixed = (1 - opacity) * grey + opacity * colours
    return Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8))


def density(strength):
    """Opacity of a colour over a frame, limited so that digits stay readable."""
    return 0.62 * strength**0.7


def heat(values, scale, side):
    """Strength 0..1 of every pixel: [side, side]."""
    grid = round(len(values) ** 0.5)
    small = Image.fromarray((np.asarray(values).reshape(grid, grid) / scale).astype(np.float32))
    return np.clip(np.asarray(small.resize((side, side), Image.Resampling.BICUBIC)), 0, 1)


def mark_box(picture, box):
    """Draws the target's box in white with a dark edge, visible on any background. No-op without a box."""
    if box is None or box[2] <= box[0] or box[3] <= box[1]:
        return picture
    draw, width = ImageDraw.Draw(picture), max(2, picture.width // 90)
    x0, y0, x1, y1 = (round(float(value) * (picture.width - 1)) for value in box)
    draw.rectangle((x0 - width - 1, y0 - width - 1, x1 + width + 1, y1 + width + 1), outline="#000000", width=width + 2)
    draw.rectangle((x0 - width, y0 - width, x1 + width, y1 + width), outline="#ffffff", width=width)
    return picture


def mark_peak(picture, values):
    """Draws a ring on the patch with the most attention, if there is any."""
    if not values.any():
        return picture
    grid = round(len(values) ** 0.5)
    row, column = divmod(int(np.argmax(values)), grid)
    x, y, radius = (column + 0.5) * picture.width / grid, (row + 0.5) * picture.height / grid, picture.width / 28
    draw = ImageDraw.Draw(picture)
    draw.ellipse((x - radius - 1, y - radius - 1, x + radius + 1, y + radius + 1), outline="#000000", width=4)
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline="#5eead4", width=2)
    return picture


def tile_rows(clip, side):
    """[(label, T pictures)]: the rows of a contact sheet."""
    boxes = [None] * len(clip.frames) if clip.boxes is None else clip.boxes
    rows = [
        ("frame", [mark_box(frame_picture(frame, side), box) for frame, box in zip(clip.frames, boxes, strict=True)])
    ]
    for mode, maps in clip.maps.items():
        tiles = [heat_picture(values, clip.scale, side) for values in maps]
        rows.append(
            (
                mode,
                [mark_peak(mark_box(tile, box), values) for tile, box, values in zip(tiles, boxes, maps, strict=True)],
            )
        )
    mode, maps = list(clip.maps.items())[-1]
    tiles = [overlay_picture(frame, values, clip.scale, side) for frame, values in zip(clip.frames, maps, strict=True)]
    rows.append((f"{mode},\nover the frame", [mark_box(tile, box) for tile, box in zip(tiles, boxes, strict=True)]))
    if (difference := difference_tiles(clip, side)) is not None:
        rows.append(("autoregressive\nminus coarse", difference))
    return rows


def difference_tiles(clip, side):
    """T pictures of `Clip.difference` over the frames, or None if it is None."""
    if (values := clip.difference) is None:
        return None
    boxes = [None] * len(clip.frames) if clip.boxes is None else clip.boxes
    return [
        mark_box(difference_picture(frame, value, clip.scale, side), box)
        for frame, value, box in zip(clip.frames, values, boxes, strict=True)
    ]


def contact_sheet(clip, side):
    """(picture, geometry): a row per kind, a column per frame, at most MAX_COLUMNS.

    Geometry {left, top, side, step in px, rows: labels, frames: indices} locates the tiles.
    """
    clip, numbers = clip.thinned(MAX_COLUMNS)
    rows = tile_rows(clip, side)
    label_width = max(120, side // 2 + 30)
    width = max(2 * MARGIN + label_width + len(clip.frames) * (side + GAP) - GAP, 640)
    header = header_lines(clip, width - 2 * MARGIN)
    top = MARGIN + sum(height for *_, height in header) + 30
    sheet = Image.new("RGB", (width, top + len(rows) * (side + GAP) - GAP + LEGEND_HEIGHT), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    write_lines(draw, header, MARGIN, MARGIN)
    left = MARGIN + label_width
    for column, t in enumerate(numbers):
        draw.text((left + column * (side + GAP) + side / 2, top - 8), f"frame {t}", FAINT, font(14), anchor="ms")
    for number, (label, tiles) in enumerate(rows):
        y = top + number * (side + GAP)
        draw.multiline_text((left - 12, y + side / 2), label, INK, font(15), anchor="rm", align="right", spacing=4)
        for t, tile in enumerate(tiles):
            sheet.paste(tile, (left + t * (side + GAP), y))
    below = sheet.height - LEGEND_HEIGHT
    draw.text((left, below + 28), legend(clip), FAINT, font(13), anchor="ls")
    scale_bar(sheet, COLOURS, "0", f"{clip.scale:.0%} of the attention", below + 15)
    if clip.difference is not None:
        text = "autoregressive minus coarse: orange: more attention, blue: less"
        draw.text((left, below + 52), text, FAINT, font(13), anchor="ls")
        scale_bar(sheet, difference_colours(), f"−{clip.scale:.0%}", f"+{clip.scale:.0%} of the attention", below + 39)
    return sheet, {
        "left": left,
        "top": top,
        "side": side,
        "step": side + GAP,
        "rows": [label.replace("\n", " ") for label, _ in rows],
        "frames": numbers,
    }


def legend(clip):
    box = "white box: the target    " if clip.boxes is not None else ""
    return f"{box}ring: the patch with the most attention"


def difference_colours():
    """Colours [256, 3] of a difference over a dark frame, from the strongest LESS to the strongest MORE."""
    strength = np.linspace(-1, 1, 256)[:, None]
    opacity = density(np.abs(strength))
    return ((1 - opacity) * 50 + opacity * np.where(strength < 0, LESS, MORE)).astype(np.uint8)


def scale_bar(sheet, colours, low, high, y):
    """Draws a colour scale [256, 3] with labels for both ends, right-aligned at height y."""
    width, height = 140, 12
    text = font(13)
    x = sheet.width - MARGIN - int(text.getlength(high)) - 6 - width
    bar = np.repeat(colours[np.linspace(0, 255, width).astype(int)][None], height, axis=0)
    sheet.paste(Image.fromarray(bar), (x, y))
    draw = ImageDraw.Draw(sheet)
    draw.text((x - 6, y + height), low, FAINT, text, anchor="rs")
    draw.text((x + width + 6, y + height), high, FAINT, text, anchor="ls")


def header_lines(clip, width):
    """[(text, font, colour, height)] of title, question, answer and prediction, wrapped to `width` px."""
    lines = [(clip.title, font(20, bold=True), INK, 32)]
    for name, text, colour in (
        ("question", clip.question, INK),
        ("answer", clip.answer, INK),
        ("model", clip.prediction_text, clip.verdict),
    ):
        lines += [(line, font(16), colour, 24) for line in wrapped(f"{name}:  {text}", font(16), width)]
    return lines


def wrapped(text, face, width):
    """Text broken into lines of at most `width` px."""
    lines = [""]
    for word in text.replace("\n", " ").split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if lines[-1] and face.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def write_lines(draw, lines, x, y):
    for text, face, colour, height in lines:
        draw.text((x, y), text, colour, face)
        y += height


def animation(clip, side):
    """Pictures of an animation: the frame and the overlay of every mode, two per row, with the question and the
    model's answer below."""
    boxes = [None] * len(clip.frames) if clip.boxes is None else clip.boxes
    line = 24  # px, of a label
    num_rows = -(-(1 + len(clip.maps)) // 2)
    width = 2 * MARGIN + 2 * side + GAP
    face = font(14)
    words = [(text, INK) for text in wrapped(clip.question, face, width - 2 * MARGIN)]
    words += [(text, clip.verdict) for text in wrapped(f"model:  {clip.prediction_text}", face, width - 2 * MARGIN)]
    bottom = MARGIN + num_rows * (side + line + GAP)
    pictures = []
    for t, (frame, box) in enumerate(zip(clip.frames, boxes, strict=True)):
        picture = Image.new("RGB", (width, bottom + len(words) * 21 + 8), BACKGROUND)
        draw = ImageDraw.Draw(picture)
        tiles = [(f"frame {t}", frame_picture(frame, side))]
        for mode, maps in clip.maps.items():
            tiles.append((mode, mark_peak(overlay_picture(frame, maps[t], clip.scale, side), maps[t])))
        for number, (label, tile) in enumerate(tiles):
            x, y = MARGIN + (number % 2) * (side + GAP), MARGIN + (number // 2) * (side + line + GAP)
            draw.text((x, y + line - 7), label, FAINT, font(16), anchor="ls")
            picture.paste(mark_box(tile, box), (x, y + line))
        for number, (text, colour) in enumerate(words):
            draw.text((MARGIN, bottom + number * 21), text, colour, face)
        pictures.append(picture)
    return pictures


def strip(clip, side):
    """(picture, geometry): a row per frame, a column per kind: the frame, the overlay of every mode, the difference.

    Geometry {side, step in px, kinds: labels} locates the tiles. Tiles are smaller than `side` if the picture would
    exceed WebP's height limit.
    """
    side = min(side, MAX_STRIP_HEIGHT // len(clip.frames) - GAP)
    boxes = [None] * len(clip.frames) if clip.boxes is None else clip.boxes
    step = side + GAP
    columns = {"frame": [mark_box(frame_picture(f, side), box) for f, box in zip(clip.frames, boxes, strict=True)]}
    for mode, maps in clip.maps.items():
        columns[mode] = [
            mark_box(mark_peak(overlay_picture(frame, values, clip.scale, side), values), box)
            for frame, values, box in zip(clip.frames, maps, boxes, strict=True)
        ]
    if (difference := difference_tiles(clip, side)) is not None:
        columns["difference"] = difference
    picture = Image.new("RGB", (len(columns) * step - GAP, len(clip.frames) * step - GAP), BACKGROUND)
    for column, tiles in enumerate(columns.values()):
        for t, tile in enumerate(tiles):
            picture.paste(tile, (column * step, t * step))
    return picture, {"side": side, "step": step, "kinds": list(columns)}


def save_animation(pictures, file, milliseconds):
    """Writes a looping GIF to a path or binary file, one palette per picture; the last picture is shown twice as
    long."""
    indexed = [
        picture.quantize(colors=255, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE) for picture in pictures
    ]
    durations = [milliseconds] * (len(indexed) - 1) + [2 * milliseconds]
    indexed[0].save(
        file, "GIF", save_all=True, append_images=indexed[1:], duration=durations, loop=0, optimize=False, disposal=1
    )


def overview(clip, side):
    """A small picture for a README: the frames, and overlays for the static and for the planned queries."""
    clip, _ = clip.thinned(6)
    boxes = [None] * len(clip.frames) if clip.boxes is None else clip.boxes
    rows = [("frames", [frame_picture(frame, side) for frame in clip.frames])]
    last = list(clip.maps)[-1]
    for label, mode in dict.fromkeys((("static query", "coarse"), ("planned\nqueries", last))):
        maps = clip.maps[mode]
        rows.append(
            (label, [overlay_picture(f, values, clip.scale, side) for f, values in zip(clip.frames, maps, strict=True)])
        )
    label_width = 116
    width = 2 * MARGIN + label_width + len(clip.frames) * (side + GAP) - GAP
    lines = wrapped(f"“{clip.question}”", font(16, bold=True), width - 2 * MARGIN)
    lines = [(line, font(16, bold=True), INK, 26) for line in lines]
    top = MARGIN + 26 * len(lines) + 6
    picture = Image.new("RGB", (width, top + len(rows) * (side + GAP) + 30), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    write_lines(draw, lines, MARGIN, MARGIN)
    left = MARGIN + label_width
    for number, (label, tiles) in enumerate(rows):
        y = top + number * (side + GAP)
        draw.multiline_text((left - 12, y + side / 2), label, INK, font(13), anchor="rm", align="right", spacing=4)
        for t, (tile, box) in enumerate(zip(tiles, boxes, strict=True)):
            picture.paste(mark_box(tile, box), (left + t * (side + GAP), y))
    line_text = f"model:  {clip.prediction_text}"
    draw.text((left, picture.height - 10), line_text, clip.verdict, font(15), anchor="ls")
    if not clip.correct:
        draw.text(
            (left + font(15).getlength(line_text) + 16, picture.height - 10),
            f"expected:  {clip.answer}",
            FAINT,
            font(15),
            anchor="ls",
        )
    return picture
