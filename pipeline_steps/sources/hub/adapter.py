"""The interface of a data set adapter, and helpers that read and validate the fields of a row.

An adapter converts one row into a `Draft`: items and references to their media. For an unusable row it raises
`UnusableRow` with a short reason, and the reader quarantines the row. Adapters never open media.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath

YOUTUBE_CLIP = re.compile(r"(?:celebv_|ytb_|v_)?([A-Za-z0-9_-]{11})(?:(?:_\d+){0,2}(?:to\d+)?|-Scene-\d+)")
ORIGINS = {  # folder -> name of the collection, for collections whose videos occur in several data sets
    "charades": "charades",
    "charades_v1_480": "charades",
    "sta_video": "charades",
    "perception": "perception_test",
    "perception_test": "perception_test",
    "nextqa": "nextqa",
    "nextvideo": "nextqa",
    "clevrer": "clevrer",
    "ssv2_video": "ssv2",
    "ego4d": "ego4d",
}


class UnusableRow(Exception):
    """A row that cannot become a sample. The message is the reason for the quarantine list."""


@dataclass(frozen=True)
class Table:
    """Files with the same columns: a data set or one of its subsets."""

    subset: str  # name for `subsets` of an entry
    files: str  # glob of the published files, within the repository
    source: str  # source of its samples
    task: str = ""  # task of its items, if the file determines it


@dataclass(frozen=True)
class Draft:
    """One row as a sample whose media are not resolved yet. Without videos and images it is a text-only sample."""

    name: str  # readable part of the key; the reader appends a hash of the row's contents
    items: tuple[dict, ...]  # fields of schemas.Item
    video_id: str | None = None  # the ORIGINAL video or picture; None: hash of the images, else the sample's key
    videos: tuple[str, ...] = ()  # candidate paths below media_dir of ONE video (file or folder of frames)
    images: tuple[bytes, ...] = ()  # all images of the sample, embedded in the row
    picture_fps: float | None = None  # if the video is a folder of frames
    segment: tuple[float, float] | None = None  # start and end, seconds
    url: str | None = None  # download URL of the video, if the row has one


@dataclass(frozen=True)
class Adapter:
    """Everything the reader needs to know about one data set. Its module in `adapters/` gives it its name."""

    repo: str  # id on the Hub
    revision: str | None  # pinned commit, whose columns the adapter reads; None: the user sets one
    licence: str
    download: str  # media that the user downloads, for messages
    columns: tuple[str, ...]  # required in every row
    tables: tuple[Table, ...]
    sample: Callable[[dict, Table], Draft | None]  # returns None if the row belongs to another table of the same files
    media_subfolders: tuple[str, ...] = ()  # subfolders of media_dir to search, "*": all. (): embedded media
    held_out: bool = False  # evaluation set: all samples go to split `test`
    has_urls: bool = False  # its rows contain download URLs

    @property
    def subsets(self) -> list[str]:
        return list(dict.fromkeys(table.subset for table in self.tables))


# ---------------------------------------------------------------- fields of a row


def text(row: dict, name: str) -> str:
    """Return a text, stripped. Raises UnusableRow if it is blank."""
    value = row.get(name)
    if not isinstance(value, str):
        raise UnusableRow(f"{name}: expected text, found {_short(value)}")
    if not any(character.isprintable() and not character.isspace() for character in value):
        raise UnusableRow(f"{name}: empty")
    try:
        value.encode()
    except UnicodeEncodeError:  # lone surrogates such as "\ud800"
        raise UnusableRow(f"{name}: not valid Unicode") from None
    return value.strip()


def optional_text(row: dict, name: str) -> str | None:
    """Return the text, or None if it is null or blank."""
    value = row.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return text(row, name)


def identifier(row: dict, name: str) -> str:
    """Return an id (text or integer) as text."""
    value = row.get(name)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else text(row, name)


def number(row: dict, name: str) -> float:
    """Return a finite number."""
    value = row.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise UnusableRow(f"{name}: expected a number, found {_short(value)}")
    return float(value)


def texts(row: dict, name: str) -> list[str]:
    """Return a non-empty list of texts, none of them blank."""
    values = row.get(name)
    if not isinstance(values, list) or not values:
        raise UnusableRow(f"{name}: expected a list of texts, found {_short(values)}")
    return [text({f"{name}[{i}]": value}, f"{name}[{i}]") for i, value in enumerate(values)]


def entries(row: dict, name: str) -> list[dict]:
    """Return a non-empty list of objects."""
    values = row.get(name)
    if not isinstance(values, list) or not values or not all(isinstance(value, dict) for value in values):
        raise UnusableRow(f"{name}: expected a list of objects, found {_short(values)}")
    return values


def image_bytes(value: dict | None, name: str) -> bytes:
    """Return the encoded bytes of an undecoded image, {"bytes": ..., "path": ...}."""
    content = value.get("bytes") if isinstance(value, dict) else None
    if not isinstance(content, bytes) or not content:
        raise UnusableRow(f"{name}: no image bytes")
    return content


def _short(value) -> str:
    return "null" if value is None else f"{type(value).__name__} {value!r}"[:60]


# ---------------------------------------------------------------- items


def chat(turns: list[tuple[str, str]], task: str) -> dict:
    """Return one item of [(role, text)]: an optional system message, then user and assistant alternating."""
    roles = [role for role, _ in turns]
    body = roles[1:] if roles[:1] == ["system"] else roles
    if not body or body != ["user", "assistant"] * (len(body) // 2):
        raise UnusableRow(f"messages: the roles are {', '.join(roles)[:80]}, expected user and assistant alternating")
    if len(turns) == 2:
        return {"user": turns[0][1], "assistant": turns[1][1], "task": task}
    messages = [{"role": role, "content": content} for role, content in turns]
    return {"messages": messages, "task": task}


def multiple_choice(question: str, options: list[str], answer: str, task: str) -> dict:
    """Return a multiple-choice item. `answer` must equal exactly one of `options`."""
    if options.count(answer) != 1:
        raise UnusableRow(
            f"answer: {answer[:40]!r} occurs {options.count(answer)} times among the {len(options)} options"
        )
    return lettered_choice(question, options, options.index(answer), task)


def lettered_choice(question: str, options: list[str], correct: int, task: str) -> dict:
    """Return a multiple-choice item whose answer is options[correct]."""
    if len(options) < 2 or not 0 <= correct < len(options):
        raise UnusableRow(f"answer: option number {correct} (from 0) of {len(options)} options")
    return {"user": question, "options": options, "correct_option": correct, "task": task}


def task_name(dataset: str, task: str) -> str:
    """Return `<dataset>_<task>` in lower-case letters, digits and underscores."""
    return f"{dataset}_{re.sub('[^a-z0-9]+', '_', task.lower()).strip('_')}"


# ---------------------------------------------------------------- names of media


def file_name(name: str) -> str:
    """Return a relative path below media_dir. Raises UnusableRow if it points outside."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or any(len(p.encode()) > 255 for p in path.parts):
        raise UnusableRow(f"path: {name[:60]!r} is not a valid path inside media_dir")
    return str(path)


def original_video(path: str) -> str:
    """Return the id of the video that a clip was cut from, derived from the clip's path.

    The id is the YouTube id if the name contains one (`v_ID`, `ytb_ID`, `ID_3`, `ID_12_0to143`, `ID_000010_000020`,
    `ID-Scene-033`), `<collection>-<name>` for known collections, else the file name without its suffix. The same video
    thus gets the same id in every data set.
    """
    path = PurePosixPath(path)
    stem = path.parent.name if re.fullmatch(r"split_\d+", path.stem) else path.stem
    origin = next((ORIGINS[part.lower()] for part in path.parts[:-1] if part.lower() in ORIGINS), None)
    if origin:
        return f"{origin}-{stem}"
    match = YOUTUBE_CLIP.fullmatch(stem)
    return match[1] if match else stem
