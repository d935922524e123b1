"""Pictures for the world of objects: cut-outs with transparency, and backgrounds, each with a name.

Both are read from a folder in ImageFolder format: picture files and a metadata.jsonl with a row
`{"file_name": "frog.png", "name": "frog"}` per picture. Several pictures may share a name; files with equal bytes must.
Backgrounds can also be textures made here: a pattern in a colour, such as "green stripes". Cut-outs are divided into
splits by name, photographs by content, textures by pattern and colour.
"""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline_steps.common.errors import UserError

SPLITS = ("train", "validation", "test")
COLOURS = {
    "red": (150, 70, 62),
    "orange": (186, 124, 66),
    "yellow": (190, 172, 88),
    "green": (84, 124, 70),
    "blue": (74, 102, 156),
    "purple": (112, 84, 140),
    "brown": (104, 80, 60),
    "grey": (126, 126, 126),
}
PATTERNS = ("stripes", "checks", "dots", "waves", "clouds", "bricks")
MIN_TRAIN_NAMES = 6  # of different last words: four objects in a frame, which change into others
MARGIN = 1.25  # a background is this many times as wide as the frame, so that it can drift behind the objects
OPAQUE = 128  # alpha from which on a pixel counts as the object's
MAX_LISTED = 10  # opaque cut-outs shown in the terminal


@dataclass(frozen=True)
class Picture:
    """One picture of a folder."""

    path: Path
    file_name: str  # in the folder, as in metadata.jsonl
    name: str
    line: int  # of metadata.jsonl
    sha256: str


def read_folder(folder: str | Path | None, key: str) -> list[Picture]:
    """The pictures that metadata.jsonl of `folder` names, in its order. key: the parameter, for messages.

    UserError for a missing folder, metadata or file, for a row without a usable name and for equal files of two names,
    with file and row.
    """
    hint = " `python -m pipeline_steps.world.tuxpaint --output FOLDER` makes one." if key.endswith("cutouts") else ""
    if not folder:
        raise UserError(
            f"{key} is null, expected a folder of pictures with a metadata.jsonl (file_name and name).{hint}"
        )
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"{key}: {folder}: no such folder. Expected pictures with a metadata.jsonl (file_name and name).{hint}"
        )
    metadata = folder / "metadata.jsonl"
    try:
        lines = metadata.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(
            f"{key}: {metadata} cannot be read ({reason}). Write one row "
            f'{{"file_name": ..., "name": ...}} per picture.{hint}'
        ) from None
    rows = {number: line for number, line in enumerate(lines, 1) if line.strip()}
    pictures = [_picture(folder, f"{metadata} line {number}", number, line) for number, line in rows.items()]
    repeated = {picture.path: picture.line for picture in pictures}
    for picture in pictures:
        if repeated[picture.path] != picture.line:
            both = f"in line {picture.line} and in line {repeated[picture.path]}"
            raise UserError(f"{metadata}: {picture.path.name} is {both}. A picture has one row.")
    first = {}
    for picture in pictures:
        other = first.setdefault(picture.sha256, picture)
        if other.name != picture.name:
            both = (f"{each.path.name} (line {each.line}, {each.name})" for each in (other, picture))
            raise UserError(f"{metadata}: {' and '.join(both)} are equal files. Remove one, or give both one name.")
    if not pictures:
        raise UserError(f"{metadata}: has no rows. Write one per picture.")
    return pictures


def _picture(folder: Path, where: str, number: int, line: str) -> Picture:
    try:
        row = json.loads(line)
        file_name, name = row["file_name"], row["name"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f'{where}: expected {{"file_name": "frog.png", "name": "frog"}}, found {line[:80]} ({error}).'
        ) from None
    if not isinstance(name, str) or not name.strip() or "," in name or name != " ".join(name.split()):
        raise UserError(f"{where}: name is {name!r}, expected words without commas or further spaces.")
    if (
        not isinstance(file_name, str)
        or not file_name
        or ".." in Path(file_name).parts
        or Path(file_name).is_absolute()
    ):
        raise UserError(f"{where}: file_name is {file_name!r}, expected a path inside {folder}.")
    path = folder / file_name
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{where}: {path} cannot be read ({reason}). Add the file or remove the row.") from None
    return Picture(path, file_name, name, number, digest)


def different(pictures: list[Picture]) -> list[Picture]:
    """The first picture of each content."""
    first = {}
    for picture in pictures:
        first.setdefault(picture.sha256, picture)
    return list(first.values())


def open_picture(picture: Picture, mode: str) -> Image.Image:
    """The decoded picture. UserError if it is damaged."""
    try:
        return Image.open(picture.path).convert(mode)
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{picture.path} (row {picture.line} of its metadata.jsonl) is no picture ({error}).") from None


def head_noun(name: str) -> str:
    """The last word: "green apple" and "red apple" share it, and never meet in one clip."""
    return name.split()[-1].lower()


def divide(names: list[str], held_out_share: float, seed: int) -> dict[str, list[str]]:
    """Names by split, disjoint: round(held_out_share * names) for validation, as many for test, the rest to train on.

    Names with the same head noun ("red apple", "apple") stay together.
    """
    nouns = sorted({head_noun(name) for name in names})
    order = [nouns[index] for index in np.random.default_rng((seed, len(nouns))).permutation(len(nouns))]
    count = round(held_out_share * len(nouns))
    parts = {"validation": order[:count], "test": order[count : 2 * count], "train": order[2 * count :]}
    return {split: sorted(name for name in set(names) if head_noun(name) in parts[split]) for split in SPLITS}


class Cutouts:
    """All cut-outs and their division.

    pictures: in the order of metadata.jsonl. names[split]: sorted. of[name]: indices of its pictures.
    """

    def __init__(self, folder: str | Path | None, held_out_share: float, seed: int):
        self.key = "sources.procedural.objects.cutouts"
        self.pictures = read_folder(folder, self.key)
        self.names = divide([picture.name for picture in self.pictures], held_out_share, seed)
        self.of: dict[str, list[int]] = {}
        for index, picture in enumerate(self.pictures):
            self.of.setdefault(picture.name, []).append(index)
        nouns = len({head_noun(name) for name in self.names["train"]})
        if nouns < MIN_TRAIN_NAMES:
            raise UserError(
                f"{self.key}: {folder} leaves {nouns} different names to train on, at least {MIN_TRAIN_NAMES} are "
                f"needed (names that end in the same word count once; held_out_share is {held_out_share}). Add "
                "pictures, or lower sources.procedural.objects.held_out_share."
            )
        self._opened: dict[int, Image.Image] = {}
        self._opaque: list[Picture] = []  # of those opened
        self._colours: dict[int, np.ndarray] = {}

    def image(self, index: int) -> Image.Image:
        """RGBA, cropped to what is visible, at most 256 px on a side. UserError: damaged, or nothing is visible."""
        if index not in self._opened:
            image = open_picture(self.pictures[index], "RGBA")
            if image.getchannel("A").getextrema()[0] >= OPAQUE:
                self._opaque.append(self.pictures[index])
            box = image.getchannel("A").point(lambda alpha: 255 * (alpha >= OPAQUE)).getbbox()
            if box is None:
                picture = self.pictures[index]
                raise UserError(f"{picture.path} (row {picture.line} of its metadata.jsonl) has no visible pixel.")
            image = image.crop(box)
            image.thumbnail((256, 256), Image.Resampling.LANCZOS)
            self._opened[index] = image
        return self._opened[index]

    def colour(self, index: int) -> np.ndarray:
        """Mean RGB of the visible pixels, 0..255: float [3]."""
        if index not in self._colours:
            pixels = np.asarray(self.image(index), np.float32).reshape(-1, 4)
            self._colours[index] = pixels[pixels[:, 3] >= OPAQUE, :3].mean(0)
        return self._colours[index]

    def check(self) -> None:
        """Open every picture once, and print which are opaque. UserError for the first one that is unusable."""
        for index in range(len(self.pictures)):
            self.image(index)
        if self._opaque:
            names = [picture.path.name for picture in self._opaque[:MAX_LISTED]]
            names += [f"{len(self._opaque) - MAX_LISTED} more"] if len(self._opaque) > MAX_LISTED else []
            print(
                f"note: {len(self._opaque)} of {len(self.pictures)} cut-outs are not transparent anywhere, so clips "
                f"show them as rectangles: {', '.join(names)}. Make their backgrounds transparent.",
                file=sys.stderr,
            )


@dataclass(frozen=True)
class Background:
    """A photograph, or a texture: `picture` is an index into Backgrounds.pictures, or `pattern` is one of PATTERNS."""

    name: str
    picture: int | None = None
    pattern: str | None = None
    colour: str | None = None


class Backgrounds:
    """Photographs of a folder, or textures where `folder` is null; by_split[split]: list of Background, disjoint.

    Photographs are divided one by one, equal files counting as one; textures so that every pattern and every colour is
    trained on and their held-out combinations are not.
    """

    def __init__(self, folder: str | Path | None, held_out_share: float, seed: int):
        self._colours: dict[int, np.ndarray] = {}
        if folder is None:
            self.pictures = []
            self.by_split = {split: [] for split in SPLITS}
            for p, pattern in enumerate(PATTERNS):
                for c, colour in enumerate(COLOURS):
                    split = {0: "test", 1: "validation"}.get((p + 2 * c) % 5, "train")
                    self.by_split[split].append(Background(f"{colour} {pattern}", None, pattern, colour))
            return
        key = "sources.procedural.objects.backgrounds"
        self.pictures = different(read_folder(folder, key))
        order = np.random.default_rng((seed, len(self.pictures))).permutation(len(self.pictures))
        count = max(1, round(held_out_share * len(order)))
        if len(order) < 3:
            raise UserError(
                f"{key}: {folder} holds {len(order)} different pictures, expected at least 3: one for each split."
            )
        parts = {"validation": order[:count], "test": order[count : 2 * count], "train": order[2 * count :]}
        self.by_split = {
            split: [Background(self.pictures[index].name, int(index)) for index in sorted(parts[split])]
            for split in SPLITS
        }

    def colour(self, background: Background) -> np.ndarray:
        """Mean RGB, 0..255: float [3]."""
        if background.picture is None:
            return 0.86 * np.array(COLOURS[background.colour], np.float32)
        if background.picture not in self._colours:
            image = open_picture(self.pictures[background.picture], "RGB")
            self._colours[background.picture] = np.asarray(image.resize((16, 16)), np.float32).mean((0, 1))
        return self._colours[background.picture]

    def draw(self, background: Background, size: int, rng: np.random.Generator) -> np.ndarray:
        """A random piece of the photograph, or a new texture: uint8 [S, S, 3] with S = MARGIN * size px."""
        side = round(MARGIN * size)
        if background.picture is not None:
            return _random_piece(open_picture(self.pictures[background.picture], "RGB"), side, rng)
        return texture(background.pattern, COLOURS[background.colour], side, rng)


def _random_piece(image: Image.Image, side: int, rng: np.random.Generator) -> np.ndarray:
    share = rng.uniform(0.7, 1)  # of the shorter side
    length = max(1, int(share * min(image.size)))
    left, top = (int(rng.integers(0, extent - length + 1)) for extent in image.size)
    piece = image.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + length, top + length))
    if rng.random() < 0.5:
        piece = piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(piece)


def texture(pattern: str, colour: tuple[int, int, int], side: int, rng: np.random.Generator) -> np.ndarray:
    """A pattern in shades of one colour, with smooth light and fine grain: uint8 [side, side, 3]."""
    scale = side / 280  # patterns keep their size in the frame
    angle = rng.uniform(0, np.pi)
    y, x = np.mgrid[:side, :side].astype(np.float32) / scale
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    period = rng.uniform(22, 38)
    offset = rng.uniform(0, period, 2)
    if pattern == "stripes":
        light = np.sin(2 * np.pi * (u + offset[0]) / period) > 0
    elif pattern == "checks":
        light = (np.floor((u + offset[0]) / period) + np.floor((v + offset[1]) / period)) % 2 > 0
    elif pattern == "dots":
        light = np.hypot((u + offset[0]) % period - period / 2, (v + offset[1]) % period - period / 2) < 0.3 * period
    elif pattern == "waves":
        light = 0.5 + 0.5 * np.sin(2 * np.pi * (u + 7 * np.sin(2 * np.pi * v / (2.2 * period)) + offset[0]) / period)
    elif pattern == "clouds":
        light = np.clip(0.5 + 0.9 * (_smooth_noise(rng, side, 9) + 0.5 * _smooth_noise(rng, side, 21)), 0, 1)
    else:  # bricks stand upright
        row = np.floor((y + offset[1]) / (0.6 * period))
        along = (x + offset[0] + 0.5 * 1.4 * period * (row % 2)) % (1.4 * period)
        light = ~((along < 2.5) | ((y + offset[1]) % (0.6 * period) < 2.5))
    shade = 0.66 + 0.4 * np.asarray(light, np.float32) + 0.2 * _smooth_noise(rng, side, 4)
    shade = shade + rng.normal(0, 0.03, (side, side)).astype(np.float32)
    return np.clip(shade[..., None] * np.array(colour, np.float32), 0, 255).astype(np.uint8)


def _smooth_noise(rng: np.random.Generator, side: int, cells: int) -> np.ndarray:
    """Smooth random values of standard deviation 1/2 or so: float32 [side, side]."""
    coarse = Image.fromarray(rng.normal(0, 0.5, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
