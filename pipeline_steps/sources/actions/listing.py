"""What a layout finds in a folder, and helpers that read annotation files with line numbers for messages."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline_steps.common.errors import UserError, printable
from pipeline_steps.common.schemas import Split
from pipeline_steps.sources.folder import VIDEO_SUFFIXES
from pipeline_steps.sources.texts import decoded
from pipeline_steps.sources.walk import walk


@dataclass(frozen=True, slots=True)
class Clip:
    """One labelled video, or a segment of one."""

    name: str  # unique in the data set, part of the key
    label: str  # the action in natural words
    split: Split  # of the list that names it
    group: str  # becomes video_id: clips of one group never end up in two splits
    path: Path  # of the video; where it should be, if it is missing
    where: str  # annotation file and line, for messages
    segment: tuple[float, float] | None = None  # start and end, seconds
    problem: str | None = None  # why the file at `path` cannot be used, if the layout knows


@dataclass(frozen=True)
class Listing:
    """The labelled clips of a folder."""

    clips: list[Clip]
    labels: tuple[str, ...]  # all actions of the data set in natural words, sorted, without repetition
    present: set[Path]  # video files in the data set's own folders


# ---------------------------------------------------------------- files and folders


def find_file(root: Path, names: tuple[str, ...], where: str) -> Path:
    """Return the one file with a name of `names` in `root` or a folder directly in it. Raises UserError."""
    found = find_files(root, names)
    if len(found) > 1:
        raise UserError(f"{where}: {found[0]} and {found[1]} both exist. Keep one of them.")
    if not found:
        raise UserError(
            f"{where}: no {' or '.join(names)} in {root} or in a folder directly in it, which holds {_content(root)}. "
            "Add the file, or set path to the folder that holds the data set."
        )
    return found[0]


def find_files(root: Path, names: tuple[str, ...]) -> list[Path]:
    """Return the files with a name of `names` in `root` or a folder directly in it."""
    return [folder / name for folder in _folders(root) for name in names if (folder / name).is_file()]


def find_folder(root: Path, name: str, where: str) -> Path:
    """Return the folder `name` in `root` or in a folder directly in it. Raises UserError."""
    found = [folder / name for folder in _folders(root) if (folder / name).is_dir()]
    if not found:
        raise UserError(
            f"{where}: no folder {name} in {root} or in a folder directly in it, which holds {_content(root)}. Extract "
            "the videos into it, or set path to the folder that holds it."
        )
    return found[0]


def _folders(root: Path) -> list[Path]:
    return [root, *sorted(entry for entry in root.iterdir() if entry.is_dir())]


def _content(root: Path) -> str:
    return ", ".join(sorted(printable(entry.name) for entry in root.iterdir())[:8]) or "nothing"


def video_files(folder: Path) -> Iterator[Path]:
    """Yield all video files in `folder` and below. Raises UserError for unreadable folders and names not in UTF-8."""
    for parent, folders, names in walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            if path.suffix.lower() in VIDEO_SUFFIXES and not name.startswith("."):
                if printable(str(path)) != str(path):
                    raise UserError(f"the path {printable(str(path))} is not printable UTF-8. Rename it.")
                yield path


# ---------------------------------------------------------------- annotation files


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Return [(line number, stripped text)] of all lines that are not blank. Raises UserError, also if all are."""
    lines = _read(path).splitlines()
    return check_rows(path, [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()])


def read_csv(path: Path, required: tuple[str, ...]) -> list[tuple[str, dict[str, str]]]:
    """Return [("FILE line N", row)] of a csv with a header. Raises UserError if a column of `required` is missing or
    occurs twice, a cell of it is blank, or there is no row."""
    reader = csv.DictReader(io.StringIO(_read(path), newline=""), strict=True)
    rows = []
    try:
        check_columns(path, reader.fieldnames or (), required)
        for row in reader:
            where = f"{path} line {reader.line_num}"
            if None in row or None in row.values():
                count = sum(value is not None for value in row.values()) - (None in row) + len(row.get(None, ()))
                raise UserError(
                    f"{where}: {count} cells, but the header has {len(reader.fieldnames)}. Quote texts with commas."
                )
            blank = next((name for name in required if not row[name].strip()), None)
            if blank is not None:
                raise UserError(f"{where}: {blank} is blank. Fill it in, or remove the line.")
            rows.append((where, {name: value.strip() for name, value in row.items()}))
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: not valid CSV ({error}). Download the file again.") from None
    return check_rows(path, rows)


def csv_columns(path: Path) -> list[str]:
    """Return the header of a csv."""
    return next(csv.reader(io.StringIO(_read(path), newline="")), [])


def check_rows(path: Path, rows: list) -> list:
    """The rows of a file. UserError if there are none: a download that was cut off would leave out a whole split."""
    if not rows:
        raise UserError(f"{path}: lists nothing. Download the file again.")
    return rows


def check_columns(path: Path, found, required: tuple[str, ...]) -> None:
    """Raise UserError if columns are missing, with those that were found, or occur twice."""
    repeated = [name for name in required if list(found).count(name) > 1]
    if repeated:
        raise UserError(f"{path} line 1: the column {repeated[0]!r} occurs twice. Rename or remove one.")
    missing = [name for name in required if name not in found]
    if missing:
        raise UserError(
            f"{path} line 1: no column {', '.join(missing)}; the columns are {', '.join(found) or 'none'}. Expected "
            f"{', '.join(required)}. Check that this is the data set's own file."
        )


def read_json(path: Path):
    """Return the content of a JSON file. Raises UserError."""
    try:
        return json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno}: not valid JSON ({error.msg}). Download the file again.") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of nested brackets
        raise UserError(f"{path}: cannot be read ({str(error).split(';')[0]}). Download the file again.") from None


def _read(path: Path) -> str:
    try:
        return decoded(path.read_bytes())
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}). Save the file as UTF-8.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
