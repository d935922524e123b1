"""The procedural world: coloured handwritten digits that jump between patches, rendered in memory.

Shapes: T frames, O objects, N patches (4 x 4 of 14 px on a 56 px frame), H = W = size in px.

The frame is a 56 x 56 grid of `units` (1 unit is 1 px of a 56 px frame, 2 px of a 112 px frame), divided into four
lanes (quadrants) of 2 x 2 patches. An object has one colour and stays in one lane. In every frame it shows one
handwritten digit (scikit-learn's `load_digits`), 12 units high, inside ONE patch. Everything is aligned to whole units,
so a 112 px frame averaged over 2 x 2 px equals the 56 px frame (up to clipping and rounding).

    digits = Digits()
    scene = sample_scene(np.random.default_rng(0), "card", "train", digits)
    frames = render(scene, digits, size=112)       # uint8 [T, 112, 112, 3]
    items = scene_items(scene, np.random.default_rng(1), num_ask_items=2)

Cost: about 0.3 ms to sample and 2 ms to render a clip of six 112 px frames on one core.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from pipeline_steps.world.grid import GRID, PATCH, SCALES, UNITS

GLYPH = 12  # units along a side of a digit
NO_DIGIT, NO_COLOUR, NO_PLACE = 10, 6, 4

SPLITS = ("train", "validation", "test")
KINDS = ("card", "follow", "ask_colour", "ask_place", "caption", "gist", "image")
HOPPING_KINDS = ("card", "follow", "ask_colour", "ask_place")  # digits change in every frame
PLACES = ("top left", "top right", "bottom left", "bottom right")
COLOURS = {
    "red": (255, 64, 56),
    "green": (64, 224, 72),
    "blue": (72, 128, 255),
    "yellow": (248, 228, 56),
    "magenta": (244, 72, 232),
    "cyan": (64, 228, 240),
}
BACKGROUNDS = {"grey": (62, 62, 62), "brown": (88, 54, 26), "purple": (60, 32, 92), "teal": (12, 72, 70)}
COLOUR_NAMES, BACKGROUND_NAMES = tuple(COLOURS), tuple(BACKGROUNDS)


class Digits:
    """The 1,797 images of `load_digits` and their fixed split: 1,397 train, 200 validation, 200 test.

    values: int [1797], digit in each image. pools[split][value]: indices of the images of that digit in the split.
    """

    def __init__(self):
        from sklearn.datasets import load_digits  # slow to import

        data = load_digits()
        self.images = data.images.astype(np.float32) / 16  # [1797, 8, 8] in 0..1
        self.values = data.target.astype(np.int64)
        order = np.random.default_rng(1797).permutation(len(self.values))
        self.splits = {"train": order[:1397], "validation": order[1397:1597], "test": order[1597:]}
        self.pools = {
            split: [np.sort(indices[self.values[indices] == value]) for value in range(10)]
            for split, indices in self.splits.items()
        }
        self._glyphs = {}

    def glyphs(self, scale: int) -> np.ndarray:
        """Opacity (0..1) of all digits at `scale` px per unit (1, 2, 4): float32 [1797, 12 * scale, 12 * scale, 1]."""
        if scale not in SCALES:
            raise ValueError(f"scale is {scale} px per unit, expected one of {SCALES}")
        if scale not in self._glyphs:
            if scale == 4:
                side, cubic = 4 * GLYPH, Image.Resampling.BICUBIC
                large = np.stack([Image.fromarray(image).resize((side, side), cubic) for image in self.images])
                glyphs = np.clip(1.3 * large - 0.1, 0, 1)[..., None]  # crisper strokes
            else:
                fine = self.glyphs(4)
                side, step = GLYPH * scale, 4 // scale
                glyphs = fine.reshape(len(fine), side, step, side, step, 1).mean((2, 4))
            self._glyphs[scale] = glyphs.astype(np.float32)
        return self._glyphs[scale]


@dataclass(frozen=True)
class SceneObject:
    """A coloured digit of a scene, in every frame."""

    colour: str
    place: str
    digits: tuple[int, ...]  # value shown in each frame
    digit_images: tuple[int, ...]  # index into load_digits, per frame
    corners: tuple[tuple[int, int], ...]  # (x, y) of the digit's top left corner in units, per frame

    @property
    def patches(self) -> list[int]:
        """Index in reading order of the one patch (of 16) that holds the digit, per frame."""
        return [GRID * (y // PATCH) + x // PATCH for x, y in self.corners]

    @property
    def boxes(self) -> list[list[float]]:
        """[x0, y0, x1, y1] in 0..1, per frame."""
        return [[round(v / UNITS, 4) for v in (x, y, x + GLYPH, y + GLYPH)] for x, y in self.corners]

    def to_dict(self) -> dict:
        return {
            "colour": self.colour,
            "place": self.place,
            "digits": list(self.digits),
            "boxes": self.boxes,
        }


@dataclass(frozen=True)
class Scene:
    """Everything that `render` draws."""

    kind: str  # one of KINDS, the task of its first question
    split: str
    background: str
    objects: tuple[SceneObject, ...]  # in reading order of their places
    target: int  # index into objects: the one named by the cue or the question
    bars: np.ndarray  # int [bars, 6]: vertical?, position, start, length, width, units of drift per frame
    slope: tuple[float, float]  # shading of the background along x and y
    noise_seed: int

    @property
    def num_frames(self) -> int:
        return len(self.objects[0].digits)


def _hops(rng, num_objects: int, num_frames: int, base: int, change: bool = True) -> np.ndarray:
    """Random walk on 0..base-1 that moves at every step (change=False: never moves): int [O, T]."""
    first = rng.integers(0, base, (num_objects, 1))
    steps = rng.integers(1, base, (num_objects, num_frames - 1)) * change
    return np.cumsum(np.concatenate([first, steps], 1), 1) % base


def _steps(rng, num_objects: int, num_frames: int) -> np.ndarray:
    """As `_hops` for the four patches of a lane, but from each patch to the next one around the lane, clockwise or not:
    int [O, T]. Draws as many random numbers."""
    around = np.array([0, 1, 3, 2])  # patches in order, and the place of each patch in that order
    first = rng.integers(0, 4, (num_objects, 1))
    direction = np.where(rng.integers(1, 4, (num_objects, num_frames - 1))[:, :1] == 1, 1, -1)
    return around[(around[first] + direction * np.arange(num_frames)) % 4] if num_frames > 1 else first


def sample_scene(
    rng: np.random.Generator,
    kind: str,
    split: str,
    digits: Digits,
    num_frames: int = 6,
    motion: str | None = None,
    colour: int | None = None,
    place: int | None = None,
    background: int | None = None,
    num_objects: int | None = None,
) -> Scene:
    """Sample a scene. motion: smooth (digits go around their lane, patch by patch, in one direction) or abrupt (they
    hop to any other patch of it; None too). `colour` and `place` (of the target) and `background` are sampled if None.

    `num_objects` defaults to four; for kind `gist` it is sampled from 1 to 4. Raises ValueError for an unknown kind or
    split.
    """
    if kind not in KINDS or split not in SPLITS:
        raise ValueError(f"kind is {kind!r} and split {split!r}, expected one of {KINDS} and one of {SPLITS}")
    num_objects = num_objects or (int(rng.integers(1, 5)) if kind == "gist" else 4)

    lanes, colours = rng.permutation(4), rng.permutation(6)  # index 0 is the target
    for names, wanted in ((lanes, place), (colours, colour)):
        if wanted is not None:
            at = int(np.flatnonzero(names == wanted)[0])
            names[[0, at]] = names[[at, 0]]
    lanes, colours = lanes[:num_objects], colours[:num_objects]
    order = np.argsort(lanes)
    target = int(np.flatnonzero(order == 0)[0])
    lanes, colours = lanes[order], colours[order]

    is_smooth = motion == "smooth"
    patches = _steps(rng, num_objects, num_frames) if is_smooth else _hops(rng, num_objects, num_frames, 4)  # [O, T]
    values = _hops(rng, num_objects, num_frames, 10, change=kind in HOPPING_KINDS)
    picks = rng.random((num_objects, num_frames))
    jitter = rng.integers(0, PATCH - GLYPH + 1, (2, num_objects, num_frames))
    jitter = jitter[..., :1] if is_smooth else jitter
    x = PATCH * (2 * (lanes[:, None] % 2) + patches % 2) + jitter[0]
    y = PATCH * (2 * (lanes[:, None] // 2) + patches // 2) + jitter[1]
    pools = digits.pools[split]
    images = [
        [int(pools[value][int(u * len(pools[value]))]) for value, u in zip(values[o], picks[o], strict=True)]
        for o in range(num_objects)
    ]
    objects = tuple(
        SceneObject(
            colour=COLOUR_NAMES[colours[o]],
            place=PLACES[lanes[o]],
            digits=tuple(values[o].tolist()),
            digit_images=tuple(images[o]),
            corners=tuple(zip(x[o].tolist(), y[o].tolist(), strict=True)),
        )
        for o in range(num_objects)
    )
    count = int(rng.integers(3, 6))
    low, high = np.array([0, 0, 0, 14, 1, -3]), np.array([2, UNITS, UNITS, 44, 3, 4])
    return Scene(
        kind=kind,
        split=split,
        background=BACKGROUND_NAMES[int(rng.integers(0, len(BACKGROUNDS))) if background is None else background],
        objects=objects,
        target=target,
        bars=rng.integers(low, high, (count, 6)),
        slope=tuple(rng.uniform(-0.25, 0.25, 2).tolist()),
        noise_seed=int(rng.integers(0, 2**63)),
    )


@cache
def _ramp(size: int) -> np.ndarray:
    return np.linspace(-1, 1, size, dtype=np.float32)


def render(scene: Scene, digits: Digits, size: int = 112, noise: float = 0.06) -> np.ndarray:
    """Render a scene as uint8 [T, size, size, 3].

    size: 56, 112 or 224 px. noise: standard deviation of the pixel noise, for intensities in 0..1. Raises ValueError
    for another size.
    """
    if size % UNITS:
        raise ValueError(f"the frame size is {size} px, expected a multiple of {UNITS}")
    s = size // UNITS  # px per unit
    glyphs, tint = digits.glyphs(s), np.array(BACKGROUNDS[scene.background], np.float32)
    shade = 1 + scene.slope[0] * _ramp(size)[None, :] + scene.slope[1] * _ramp(size)[:, None]
    frames = np.tile((shade[..., None] * tint).astype(np.float32), (scene.num_frames, 1, 1, 1))  # [T, H, W, 3]
    for vertical, position, start, length, width, drift in scene.bars.tolist():
        for t, frame in enumerate(frames):
            canvas = frame.swapaxes(0, 1) if vertical else frame
            at = (position + t * drift) % UNITS
            canvas[s * at : s * (at + width), s * start : s * (start + length)] = 1.7 * tint + 12
    _draw_cue(frames[0], scene, s)
    for item in scene.objects:
        colour = np.array(COLOURS[item.colour], np.float32)
        for t, ((x, y), image) in enumerate(zip(item.corners, item.digit_images, strict=True)):
            patch = frames[t, s * y : s * (y + GLYPH), s * x : s * (x + GLYPH)]
            patch += glyphs[image] * (colour - patch)
    if noise:
        rng = np.random.Generator(np.random.SFC64(scene.noise_seed))
        grain = 255 * noise * rng.standard_normal((scene.num_frames, UNITS, UNITS), dtype=np.float32)
        grain = np.repeat(grain, 3 * s, 2)  # one value per unit, the same in R, G and B: [T, 56, 3 * size]
        rows = frames.reshape(scene.num_frames, UNITS, s, 3 * size)
        for i in range(s):
            rows[:, :, i] += grain
    return np.clip(np.rint(frames, out=frames), 0, 255, out=frames).astype(np.uint8)


def _draw_cue(frame: np.ndarray, scene: Scene, s: int) -> None:
    """Draw the cue, 2 units wide: card, a border in the target's colour; follow, a white box around its lane."""
    target, width = scene.objects[scene.target], 2 * s
    if scene.kind == "card":
        region, colour = frame, COLOURS[target.colour]
    elif scene.kind == "follow":
        row, column = divmod(PLACES.index(target.place), 2)
        half = len(frame) // 2
        region, colour = frame[half * row : half * (row + 1), half * column : half * (column + 1)], (250, 250, 250)
    else:
        return
    region[:width], region[-width:], region[:, :width], region[:, -width:] = (colour,) * 4


def _item(scene: Scene, task: str, target: int) -> dict:
    """One question with its answer. Answers omit the first frame's digits, because that frame may show the cue."""
    asked = scene.objects[target]
    named = asked.colour if task in ("card", "ask_colour") else asked.place
    if task in HOPPING_KINDS:
        user = {
            "card": "Which digits does the card's colour show?",
            "follow": "Which digits show where the box was?",
            "ask_colour": f"Which digits does {asked.colour} show?",
            "ask_place": f"Which digits show at the {asked.place}?",
        }[task]
        answer = f"{named}: {''.join(map(str, asked.digits[1:]))}"
        return {"user": user, "assistant": answer, "task": task, "cue": f"{named}:", "target": target}
    if task == "gist":
        user = "What is the background and how many digits are there?"
        answer = f"{scene.background}, {len(scene.objects)}"
    else:
        user = "What is in the picture?" if task == "image" else None
        answer = ", ".join(f"{item.colour} {item.digits[0]}" for item in scene.objects)
    return {"user": user, "assistant": answer, "task": task, "cue": "", "target": None}


def scene_items(scene: Scene, rng: np.random.Generator | None = None, num_ask_items: int = 0) -> list[dict]:
    """The scene's items: {"user", "assistant", "task", "cue", "target"}. The first asks the question of its kind.

    It is followed by up to `num_ask_items` other ask_colour and ask_place questions about any object, sampled with
    `rng` (only for kinds whose digits change), and by the caption of a training `gist` clip. `user` is None for
    captions: the tokens stage inserts the default prompt.
    """
    items = [_item(scene, scene.kind, scene.target)]
    if scene.kind in HOPPING_KINDS and num_ask_items:
        pairs = [(task, o) for task in ("ask_colour", "ask_place") for o in range(len(scene.objects))]
        others = [pair for pair in pairs if pair != (scene.kind, scene.target)]
        items += [_item(scene, *others[i]) for i in rng.permutation(len(others))[:num_ask_items]]
    if scene.kind == "gist" and scene.split == "train":
        items.append(_item(scene, "caption", scene.target))
    return items


@dataclass(frozen=True)
class FrameBatch:
    """Independent single frames with labels, to warm up a vision encoder. B frames, N = 16 patches."""

    frames: np.ndarray  # uint8 [B, size, size, 3]
    patch_digit: np.ndarray  # int64 [B, N], 10 = no digit in this patch
    patch_colour: np.ndarray  # int64 [B, N], index into COLOUR_NAMES, 6 = none
    colour_digit: np.ndarray  # int64 [B, 6] digit that each colour shows, 10 = colour absent
    place_digit: np.ndarray  # int64 [B, 4] digit that each place shows, 10 = place empty
    border_colour: np.ndarray  # int64 [B] colour of the card's border, 6 = no border
    box_place: np.ndarray  # int64 [B] place of the white box, 4 = no box
    background: np.ndarray  # int64 [B] index into BACKGROUND_NAMES


def render_batch(
    rng: np.random.Generator,
    digits: Digits,
    batch_size: int,
    split: str = "train",
    noise: float = 0.06,
    size: int = UNITS,
) -> FrameBatch:
    """Render `batch_size` single frames. A quarter has a card's border, a quarter a box; each has 1 to 4 objects.

    size: 56, 112 or 224 px.
    """
    frames, background = np.empty((batch_size, size, size, 3), np.uint8), np.empty(batch_size, np.int64)
    patch_digit = np.full((batch_size, GRID * GRID), NO_DIGIT)
    patch_colour = np.full((batch_size, GRID * GRID), NO_COLOUR)
    colour_digit, place_digit = np.full((batch_size, 6), NO_DIGIT), np.full((batch_size, 4), NO_DIGIT)
    border_colour, box_place = np.full(batch_size, NO_COLOUR), np.full(batch_size, NO_PLACE)
    for b in range(batch_size):
        kind = ("card", "follow", "ask_colour", "gist")[rng.integers(0, 4)]
        scene = sample_scene(rng, kind, split, digits, num_frames=1)
        frames[b] = render(scene, digits, size, noise)[0]
        background[b] = BACKGROUND_NAMES.index(scene.background)
        for item in scene.objects:
            colour, place = COLOUR_NAMES.index(item.colour), PLACES.index(item.place)
            patch_digit[b, item.patches[0]] = colour_digit[b, colour] = place_digit[b, place] = item.digits[0]
            patch_colour[b, item.patches[0]] = colour
        target = scene.objects[scene.target]
        if kind == "card":
            border_colour[b] = COLOUR_NAMES.index(target.colour)
        elif kind == "follow":
            box_place[b] = PLACES.index(target.place)
    return FrameBatch(
        frames, patch_digit, patch_colour, colour_digit, place_digit, border_colour, box_place, background
    )
