"""A scene of the world of objects, and how it is drawn. objects.py samples scenes.

Shapes: T frames, H = W = size in px. Places and sizes are in 0..1 of the frame.

A clip shows up to five tracks. A track is one moving place; it shows one picture at a time and may change into another.
Later tracks are drawn over earlier ones. Ground truth is measured on the rendered frames: the box of a track in a frame
encloses its visible pixels, and is [0, 0, 0, 0] where less than a quarter of the object can be seen.

Cost: about 25 ms for a clip of twelve 224 px frames on one core.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from pipeline_steps.world.cutouts import OPAQUE, Background, Backgrounds, Cutouts

MIN_VISIBLE = 0.25  # share of an object's pixels; below it the object counts as out of sight
MAX_STRETCH = 1.25


@dataclass(frozen=True)
class Track:
    """One moving place. Per frame: the picture that it shows (index into Cutouts.pictures) and its centre."""

    pictures: tuple[int, ...]
    centres: tuple[tuple[float, float], ...]  # (x, y); outside of 0..1 the object is partly or wholly out of the frame
    size: float  # longest side of a square object; longer ones are given more (`_Sprites.length`)
    flip: bool = False
    angle: float = 0.0  # degrees
    place: str = ""  # one of PLACES if it stays there


@dataclass(frozen=True)
class Scene:
    kind: str  # one of KINDS
    split: str
    is_new: bool  # whether the names that are asked for are held out of training
    background: Background
    tracks: tuple[Track, ...]  # drawn in this order
    target: int | None  # index into tracks; None: the whole frame is asked about
    motion: str | None = None  # of every object: smooth or abrupt; None: some of both
    others: tuple[int, ...] = ()  # kind meet: the track that each track meets, -1 for none
    drift: tuple[float, float] = (0.0, 0.0)  # of the background over the clip, -1..1
    seed: int = 0  # of the background's texture

    @property
    def num_frames(self) -> int:
        return len(self.tracks[0].pictures)


def visibility(scene: Scene, cutouts: Cutouts, size: int) -> np.ndarray:
    """Share of each track's pixels that is inside the frame and not covered by others: [tracks, T]."""
    owners, counts = _owners(scene, _Sprites(cutouts, size), size)
    seen = np.stack([(owners == index).sum((1, 2)) for index in range(len(scene.tracks))])
    return seen / np.maximum(counts, 1)


class _Sprites:
    """The pictures of tracks at their sizes, made once per clip."""

    def __init__(self, cutouts: Cutouts, size: int):
        self.cutouts, self.size, self.made = cutouts, size, {}

    def get(self, own: Track, picture: int) -> Image.Image:
        key = (picture, own.size, own.flip, own.angle)
        if key not in self.made:
            image = self.cutouts.image(picture)
            scale = self.length(own.size, image) * self.size / max(image.size)
            shape = tuple(max(1, round(scale * side)) for side in image.size)
            image = image.convert("RGBa").resize(shape, Image.Resampling.BICUBIC)  # premultiplied: no dark rims
            if own.flip:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            image = image.rotate(own.angle, Image.Resampling.BICUBIC, expand=True)
            self.made[key] = image.convert("RGBA")
        return self.made[key]

    @staticmethod
    def length(size: float, image: Image.Image) -> float:
        """Longest side in 0..1 of the frame: up to MAX_STRETCH times `size` for long, thin objects."""
        return size * min(MAX_STRETCH, (max(image.size) / min(image.size)) ** 0.3)

    def corner(self, own: Track, t: int) -> tuple[Image.Image, int, int]:
        """The picture in frame t and the px of its top left corner."""
        image = self.get(own, own.pictures[t])
        x, y = own.centres[t]
        return image, round(x * self.size - image.width / 2), round(y * self.size - image.height / 2)


def _owners(scene: Scene, sprites: _Sprites, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(track whose object each pixel shows, -1 for the background: int8 [T, H, W]; all pixels of each track's object,
    inside the frame or not: [tracks, T])."""
    owners = np.full((scene.num_frames, size, size), -1, np.int8)
    counts = np.zeros((len(scene.tracks), scene.num_frames), int)
    for index, own in enumerate(scene.tracks):
        for t in range(scene.num_frames):
            image, left, top = sprites.corner(own, t)
            mask = np.asarray(image.getchannel("A")) >= OPAQUE
            counts[index, t] = mask.sum()
            x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + image.width, size), min(top + image.height, size)
            if x0 < x1 and y0 < y1:
                owners[t, y0:y1, x0:x1][mask[y0 - top : y1 - top, x0 - left : x1 - left]] = index
    return owners, counts


def render(scene: Scene, cutouts: Cutouts, backgrounds: Backgrounds, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(frames uint8 [T, size, size, 3], boxes float [tracks, T, 4]: x0, y0, x1, y1 in 0..1, zeros for out of sight)."""
    large = backgrounds.draw(scene.background, size, np.random.default_rng(scene.seed))
    sprites = _Sprites(cutouts, size)
    room = len(large) - size
    frames = []
    for t in range(scene.num_frames):
        along = t / max(1, scene.num_frames - 1) - 0.5
        x, y = (round(room * (0.5 + along * value)) for value in scene.drift)
        frame = Image.fromarray(large[y : y + size, x : x + size])
        for own in scene.tracks:
            image, left, top = sprites.corner(own, t)
            frame.paste(image, (left, top), image)
        frames.append(frame)
    owners, counts = _owners(scene, sprites, size)
    boxes = np.zeros((len(scene.tracks), scene.num_frames, 4))
    for index in range(len(scene.tracks)):
        for t in range(scene.num_frames):
            rows, columns = np.nonzero(owners[t] == index)
            if len(rows) and len(rows) >= MIN_VISIBLE * counts[index, t]:
                boxes[index, t] = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    boxes = np.round(boxes / size, 4)
    if scene.kind == "become":
        _draw_mark(frames[0], boxes[scene.target, 0])
    return np.stack([np.asarray(frame) for frame in frames]), boxes


def _draw_mark(frame: Image.Image, box: np.ndarray) -> None:
    """A white frame with a dark edge around the target."""
    side, width = frame.width, max(2, round(frame.width / 75))
    x0, y0, x1, y1 = (round(value * side) for value in box)
    outer = (
        max(0, x0 - 2 * width),
        max(0, y0 - 2 * width),
        min(side - 1, x1 + 2 * width),
        min(side - 1, y1 + 2 * width),
    )
    draw = ImageDraw.Draw(frame)
    draw.rectangle(outer, outline=(20, 20, 20), width=width + 2)
    draw.rectangle(
        tuple(v + d for v, d in zip(outer, (1, 1, -1, -1), strict=True)), outline=(255, 255, 255), width=width
    )
