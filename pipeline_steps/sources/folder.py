"""Source `folder`: videos and images described by a Hugging Face VideoFolder / ImageFolder metadata file.

The folder holds media (subfolders allowed) and ONE metadata.jsonl or metadata.csv with a row per question or caption:
    file_name              path of the media file inside the folder; several rows may name the same file
    caption                and / or
    question, answer       a row with both gives two items
    family, cue, target    optional, of the row's question (of its caption if it has no question)
    split, video_id, source, objects, num_source_frames   optional, of the file; given in one of its rows is enough
Other columns are left alone. The files are not copied; their size and sha256 are recorded.
"""

import csv
import hashlib
import io
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pydantic import ValidationError
from tqdm import tqdm

from pipeline_steps.params import UserError
from pipeline_steps.records import RawSample, sha256_file, slug

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm"}
VIDEO_SUFFIXES = {
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".mpg", ".mpeg", ".flv", ".wmv", ".ogv", ".gif"
}  # fmt: skip
FILE_COLUMNS = ("split", "video_id", "source", "objects", "num_source_frames")
EXPECTED = "a metadata.jsonl or metadata.csv with the columns file_name and caption, or file_name, question and answer"


@dataclass(frozen=True)
class FolderContent:
    samples: list[RawSample]
    unreferenced: list[str]  # files that no row names


def read(folder: str | Path | None, name: str, relative_to: Path | None = None) -> FolderContent:
    """All files that the metadata of `folder` names, sorted by key; `name` is the source unless a row says otherwise.

    Paths are absolute, or relative to `relative_to`. UserError for anything that does not fit, with the line number.
    """
    folder = _existing_folder(folder)
    metadata, present = _find_metadata(folder)
    lines = _read_jsonl(metadata) if metadata.suffix == ".jsonl" else _read_csv(metadata)
    if not lines:
        raise UserError(f"{metadata}: has no rows. Write one row per caption or question.")
    _check_columns(metadata, lines)

    files: dict[str, list[tuple[int, dict]]] = {}
    for line, row in lines:
        files.setdefault(_file_name(folder, metadata, line, row), []).append((line, row))
    keys = _keys({file_name: _file_values(metadata, rows).get("source") or name for file_name, rows in files.items()})

    samples = []
    for file_name, rows in tqdm(files.items(), desc=f"reading {name}", unit="file", mininterval=1):
        path = folder / file_name
        values = {"source": name, "video_id": file_name, **_file_values(metadata, rows)}
        try:
            sample = RawSample(
                key=keys[file_name],
                path=str(path.relative_to(relative_to)) if relative_to else str(path),
                kind="image" if path.suffix.lower() in IMAGE_SUFFIXES else "video",
                sha256=sha256_file(path),
                size=path.stat().st_size,
                items=[item for line, row in rows for item in _items(metadata, line, row)],
                **values,
            )
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "row"
            problem = f"{place}: {first['msg']}, found {str(first['input'])[:100]!r}"
            raise UserError(f"{metadata} line {rows[0][0]} ({file_name}): {problem}.") from None
        except OSError as error:
            raise UserError(f"{metadata} line {rows[0][0]}: {path} cannot be read ({error.strerror}).") from None
        samples.append(sample)
    samples.sort(key=lambda sample: sample.key)
    unreferenced = sorted(present - set(files))
    return FolderContent(samples, [name.encode("utf-8", "backslashreplace").decode() for name in unreferenced])


def _existing_folder(folder: str | Path | None) -> Path:
    how = "Give one with `dvc exp run -S data=folder -S sources.folder.path=/path/to/folder`."
    if not folder:
        raise UserError(f"sources.folder.path is not set, but sources.collect lists folder. {how}")
    folder = Path(os.path.abspath(Path(folder).expanduser()))
    if not folder.is_dir():
        problem = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UserError(f"sources.folder.path: {folder} {problem}. {how}")
    return folder


def _find_metadata(folder: Path) -> tuple[Path, set[str]]:
    """The metadata file and the names of all other files in the folder (hidden ones left out)."""
    files = set()
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = Path(parent).relative_to(folder)
        files |= {(relative / name).as_posix() for name in names if not name.startswith(".")}
    if not files:
        raise UserError(f"{folder}: the folder is empty. Expected videos or images and {EXPECTED}.")
    found = [name for name in METADATA_NAMES if name in files]
    if len(found) == 2:
        raise UserError(f"{folder}: holds both metadata.jsonl and metadata.csv. Keep one of them.")
    if not found:
        some = ", ".join(sorted(files)[:5])
        deeper = sorted(file for file in files if PurePosixPath(file).name in METADATA_NAMES)
        hint = f" There is {deeper[0]}: name that folder, or move the file up." if deeper else ""
        raise UserError(f"{folder}: no metadata among its {len(files)} files ({some}). Expected {EXPECTED}.{hint}")
    return folder / found[0], files - set(found)


def _read_text(metadata: Path) -> str:
    try:
        return metadata.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = metadata.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{metadata} line {line}: not UTF-8 (byte {error.start}). Save the file as UTF-8.") from None
    except OSError as error:
        raise UserError(f"{metadata}: cannot be read ({error.strerror}).") from None


def _read_jsonl(metadata: Path) -> list[tuple[int, dict]]:
    """[(line number, row)]; a null is a column that is not given."""
    rows = []
    for line, text in enumerate(_read_text(metadata).split("\n"), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
            json.dumps(row, ensure_ascii=False).encode()  # refuses half of a character, such as "\\ud800"
        except json.JSONDecodeError as error:
            raise UserError(
                f"{metadata} line {line}: not valid JSON ({error.msg}, column {error.colno}). One object per line."
            ) from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
            raise UserError(f"{metadata} line {line}: cannot be read ({str(error).split(';')[0]}).") from None
        if not isinstance(row, dict):
            raise UserError(f'{metadata} line {line}: expected an object {{"file_name": ...}}, found {text[:50]}')
        rows.append((line, {name: value for name, value in row.items() if value is not None}))
    return rows


def _read_csv(metadata: Path) -> list[tuple[int, dict]]:
    """[(line number, row)]; an empty cell is a column that is not given."""
    reader = csv.DictReader(io.StringIO(_read_text(metadata), newline=""), strict=True)
    rows = []
    try:
        repeated = [name for name, count in Counter(reader.fieldnames or ()).items() if count > 1]
        if repeated:
            raise UserError(f"{metadata} line 1: the column {repeated[0]!r} is there twice. Rename or remove one.")
        for row in reader:
            if None in row or None in row.values():
                count = sum(value is not None for value in row.values()) - (None in row) + len(row.get(None, ()))
                expected = f"{count} cells, the header has {len(reader.fieldnames)}"
                raise UserError(f"{metadata} line {reader.line_num}: {expected}. Quote texts that contain commas.")
            row = {name: value for name, value in row.items() if value != ""}
            for name in ("target", "num_source_frames"):
                if re.fullmatch("[0-9]{1,9}", row.get(name, "")):
                    row[name] = int(row[name])
            rows.append((reader.line_num, row))
    except csv.Error as error:
        raise UserError(f"{metadata} line {reader.line_num}: not valid CSV ({error}).") from None
    if rows:
        rows[0] = (rows[0][0], {**dict.fromkeys(reader.fieldnames), **rows[0][1]})  # keeps the header's names
    return rows


def _check_columns(metadata: Path, lines: list[tuple[int, dict]]) -> None:
    columns = {name for _, row in lines for name in row}
    if "file_name" not in columns or not ("caption" in columns or {"question", "answer"} <= columns):
        found = ", ".join(sorted(columns)) or "none"
        hint = " The cells of a csv are separated by commas, its names stand without spaces, in lower case."
        hint = hint if metadata.suffix == ".csv" else ""
        raise UserError(
            f"{metadata}: the columns are {found}. Expected file_name and caption, or question and answer.{hint}"
        )


def _file_name(folder: Path, metadata: Path, line: int, row: dict) -> str:
    """The row's file_name, normalised, of an existing file inside the folder."""
    where, name = f"{metadata} line {line}", row.get("file_name")
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{where}: file_name is {name!r}. Every row names a file.")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{where}: file_name {name!r} leads out of {folder}. Name files inside the folder.")
    if path.suffix.lower() not in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
        known = " ".join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))
        raise UserError(f"{where}: {name!r} is neither a video nor an image by its ending. Known: {known}")
    if any(len(part.encode("utf-8")) > 255 for part in path.parts):
        raise UserError(f"{where}: file_name {name[:50]!r}... is longer than a file's name can be (255 bytes).")
    if not (folder / path).is_file():
        problem = "is a folder" if (folder / path).is_dir() else "does not exist"
        raise UserError(f"{where}: file_name {name!r} {problem} in {folder}. Add the file or remove the row.")
    return str(path)


def _file_values(metadata: Path, rows: list[tuple[int, dict]]) -> dict:
    """The columns that describe the file, from whichever of its rows give them; they must agree."""
    values, given_in = {}, {}
    for line, row in rows:
        for name in FILE_COLUMNS:
            if row.get(name) is None:
                continue
            if name == "source" and (not isinstance(row[name], str) or not slug(row[name])):
                raise UserError(
                    f"{metadata} line {line} ({row['file_name']}): source is {row[name]!r}. It begins the keys of its "
                    "samples: give it a name with letters or digits, or leave it out."
                )
            if name in values and values[name] != row[name]:
                both = f"{values[name]!r} in line {given_in[name]} and {row[name]!r} in line {line}"
                raise UserError(f"{metadata}: {row['file_name']} has {name} {both[:300]}. A file has one {name}.")
            values[name], given_in[name] = row[name], line
    return values


def _items(metadata: Path, line: int, row: dict) -> list[dict]:
    """One item per caption and per question with answer in this row."""
    texts = {name: row[name] for name in ("caption", "question", "answer") if row.get(name) is not None}
    where = f"{metadata} line {line} ({row['file_name']})"
    for name, text in texts.items():
        if not isinstance(text, str):
            raise UserError(f"{where}: {name} is {text!r}, expected text.")
        if not any(character.isprintable() and not character.isspace() for character in text):
            raise UserError(f"{where}: {name} is blank. Write it, or remove the row.")
    if ("question" in texts) != ("answer" in texts) or not texts:
        found = f"a {next(iter(texts))} only" if texts else "no text (an empty cell or null is none)"
        raise UserError(f"{where}: found {found}. Every row needs a caption, or a question and its answer.")
    if row.get("family") == "text":
        raise UserError(f"{where}: the family 'text' is kept for samples without media. Give this one another name.")
    if row.get("family") == "*":
        raise UserError(f"{where}: the family '*' stands for all families in mixtures. Give this one another name.")
    if isinstance(row.get("family"), str) and not row["family"].strip():
        raise UserError(f"{where}: family is blank. Name it, or leave it out.")
    extra = {name: row[name] for name in ("family", "cue", "target") if row.get(name) is not None}
    items = []
    if "caption" in texts:
        item = {"user": None, "assistant": texts["caption"], "family": "caption"}
        items.append(item if "question" in texts else item | extra)
    if "question" in texts:
        items.append({"user": texts["question"], "assistant": texts["answer"], "family": "question", **extra})
    return items


def _keys(sources: dict[str, str]) -> dict[str, str]:
    """{file_name: unique key}; names that differ only in what a key cannot hold get a piece of their hash."""
    plain = {
        file_name: f"{slug(source)}-{slug(str(PurePosixPath(file_name).with_suffix('')))}"
        for file_name, source in sources.items()
    }
    counts = Counter(key.lower() for key in plain.values())
    keys = {}
    for file_name, key in plain.items():
        unique = counts[key.lower()] == 1 and not key.endswith("-")
        keys[file_name] = key if unique else f"{key}-{hashlib.sha256(file_name.encode()).hexdigest()[:8]}"
    return keys
