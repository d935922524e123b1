"""What a data set has to say about itself, and the functions that read fields of its rows.

An adapter turns one row into a `Draft`: items and the media they are about. A row that it cannot use raises `Unusable`
with a reason of a few words; the reader quarantines it. Media are never opened here.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath

YOUTUBE_CLIP = re.compile(r"(?:celebv_|ytb_|v_)?([A-Za-z0-9_-]{11})(?:(?:_\d+){0,2}(?:to\d+)?|-Scene-\d+)")
ORIGINS = {  # folders of collections that several data sets take videos from, and one name for each
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


class Unusable(Exception):
    """A row of which no sample can be made. The message is the reason for the quarantine list."""


@dataclass(frozen=True)
class Table:
    """Files with equal rows: a part of a data set, or the whole of it."""

    subset: str  # what `subsets` of an entry chooses by
    files: str  # glob of the published files, within the repository
    source: str  # the name of its samples' source
    task: str = ""  # of its items, where the file decides it


@dataclass(frozen=True)
class Draft:
    """One row as a sample, its media not looked up yet. Without video and images it is a text-only sample."""

    name: str  # readable part of the key; the reader adds a hash of all that the row says
    items: tuple[dict, ...]  # fields of schemas.Item
    video_id: str | None = None  # the ORIGINAL video or picture; None: the pictures' own hash, or the key of a text
    videos: tuple[str, ...] = ()  # names below media_dir of ONE video file, or folder of its frames: the first found
    images: tuple[bytes, ...] = ()  # all pictures of a still, embedded in the row
    picture_fps: float | None = None  # of a video that is a folder of frames
    segment: tuple[float, float] | None = None  # seconds
    url: str | None = None  # where the video is published, if the row says it


@dataclass(frozen=True)
class Adapter:
    """What the reader has to know about one data set. Its name is that of its module in `adapters/`."""

    repo: str  # id on the Hub
    revision: str | None  # commit that the schema was taken from; None: the user names one
    licence: str
    download: str  # what the user downloads besides the rows, for messages
    columns: tuple[str, ...]  # that every row needs
    tables: tuple[Table, ...]
    sample: Callable[[dict, Table], Draft | None]  # None: the row belongs to another table with the same files
    places: tuple[str, ...] = ()  # folders below media_dir to look in, "*": its subfolders. (): media are in the rows
    held_out: bool = False  # an evaluation set: everything goes to the split `test`
    addresses: bool = False  # its rows say where the videos are published

    @property
    def subsets(self) -> list[str]:
        return list(dict.fromkeys(table.subset for table in self.tables))


# ---------------------------------------------------------------- fields of a row


def text(row: dict, name: str) -> str:
    """A text that is not blank, without space around it."""
    value = row.get(name)
    if not isinstance(value, str):
        raise Unusable(f"{name}: expected text, found {_short(value)}")
    if not any(character.isprintable() and not character.isspace() for character in value):
        raise Unusable(f"{name}: empty")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a character, such as "\ud800", which no file can hold
        raise Unusable(f"{name}: not valid Unicode") from None
    return value.strip()


def optional_text(row: dict, name: str) -> str | None:
    """The text, or None where it is null or blank."""
    value = row.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return text(row, name)


def identifier(row: dict, name: str) -> str:
    """An id, which is text or a whole number."""
    value = row.get(name)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else text(row, name)


def number(row: dict, name: str) -> float:
    value = row.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise Unusable(f"{name}: expected a number, found {_short(value)}")
    return float(value)


def texts(row: dict, name: str) -> list[str]:
    """A list of texts that are not blank."""
    values = row.get(name)
    if not isinstance(values, list) or not values:
        raise Unusable(f"{name}: expected a list of texts, found {_short(values)}")
    return [text({f"{name}[{i}]": value}, f"{name}[{i}]") for i, value in enumerate(values)]


def entries(row: dict, name: str) -> list[dict]:
    """A list of objects, at least one."""
    values = row.get(name)
    if not isinstance(values, list) or not values or not all(isinstance(value, dict) for value in values):
        raise Unusable(f"{name}: expected a list of objects, found {_short(values)}")
    return values


def image_bytes(value: dict | None, name: str) -> bytes:
    """The file's bytes of an image that was not decoded: {"bytes": ..., "path": ...}."""
    content = value.get("bytes") if isinstance(value, dict) else None
    if not isinstance(content, bytes) or not content:
        raise Unusable(f"{name}: no image bytes")
    return content


def _short(value) -> str:
    return "null" if value is None else f"{type(value).__name__} {value!r}"[:60]


# ---------------------------------------------------------------- items


def chat(turns: list[tuple[str, str]], task: str) -> dict:
    """One item of all [(role, text)]: roles user and assistant in turn, answered last, a system line perhaps first."""
    roles = [role for role, _ in turns]
    body = roles[1:] if roles[:1] == ["system"] else roles
    if not body or body != ["user", "assistant"] * (len(body) // 2):
        raise Unusable(f"messages: the roles are {', '.join(roles)[:80]}, not user and assistant in turn")
    if len(turns) == 2:
        return {"user": turns[0][1], "assistant": turns[1][1], "task": task}
    messages = [{"role": role, "content": content} for role, content in turns]
    return {"messages": messages, "task": task}


def multiple_choice(question: str, options: list[str], answer: str, task: str) -> dict:
    """An item whose answer is one of `options`, word for word."""
    if options.count(answer) != 1:
        raise Unusable(f"answer: {answer[:40]!r} is {options.count(answer)} of the {len(options)} options")
    return lettered_choice(question, options, options.index(answer), task)


def lettered_choice(question: str, options: list[str], correct: int, task: str) -> dict:
    """An item whose answer is options[correct]."""
    if len(options) < 2 or not 0 <= correct < len(options):
        raise Unusable(f"answer: option {correct} of {len(options)}")
    return {"user": question, "options": options, "correct_option": correct, "task": task}


def task_name(dataset: str, task: str) -> str:
    """`<dataset>_<task>` in small letters, digits and underscores."""
    return f"{dataset}_{re.sub('[^a-z0-9]+', '_', task.lower()).strip('_')}"


# ---------------------------------------------------------------- names of media


def file_name(name: str) -> str:
    """A relative path below media_dir as it is; Unusable if it leads out of the folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or any(len(p.encode()) > 255 for p in path.parts):
        raise Unusable(f"path: {name[:60]!r} is no name inside media_dir")
    return str(path)


def original_video(path: str) -> str:
    """The video that a clip was cut from, by the naming of the known collections.

    A YouTube id where the name holds one (`v_ID`, `ytb_ID`, `ID_3`, `ID_12_0to143`, `ID_000010_000020`,
    `ID-Scene-033`), so that equal videos of different data sets meet; `<collection>-<name>` for known collections;
    else the name of the file.
    """
    path = PurePosixPath(path)
    stem = path.parent.name if re.fullmatch(r"split_\d+", path.stem) else path.stem
    origin = next((ORIGINS[part.lower()] for part in path.parts[:-1] if part.lower() in ORIGINS), None)
    if origin:
        return f"{origin}-{stem}"
    match = YOUTUBE_CLIP.fullmatch(stem)
    return match[1] if match else stem
