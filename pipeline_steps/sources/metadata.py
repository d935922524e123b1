"""Read the rows of a folder's metadata.jsonl, .json, .csv, .tsv or .parquet, with line numbers for messages."""

import csv
import difflib
import io
import json
import re
from collections import Counter
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline_steps.common.errors import UserError
from pipeline_steps.sources.texts import decoded, unique_fields
from pipeline_steps.sources.walk import walk

METADATA_NAMES = ("metadata.jsonl", "metadata.json", "metadata.csv", "metadata.tsv", "metadata.parquet")
NAME_COLUMNS = ("file_name", "file_names", "images_file_names")
MEDIA_COLUMNS = ("image", "video", "images", "videos")  # of LLaVA's rows; read if no column of NAME_COLUMNS is set
EXPECTED = (
    f"one of {', '.join(METADATA_NAMES)} with the columns file_name (or file_names) and caption, or question and "
    "answer, or messages"
)
JSON_COLUMNS = ("file_names", "images_file_names", "images", "videos", "messages", "conversations", "options")  # JSON
# text in the cells of a csv
COLUMNS = {*NAME_COLUMNS, *MEDIA_COLUMNS, *JSON_COLUMNS, "caption", "question", "answer", "rejected", "task", "cue"}
COLUMNS |= {"target", "split", "video_id", "source", "objects", "num_source_frames"}  # all that are read
SEPARATOR_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs"}
SPLIT_FOLDERS = {  # names of the folders of a Hugging Face VideoFolder's splits
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "val", "valid", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def find(folder: Path) -> tuple[list[Path], set[str]]:
    """Return the metadata files and the names of all other files, except hidden ones. Raises UserError.

    There is one metadata file at the top of the folder, or one in each of several folders of SPLIT_FOLDERS.
    """
    files = set()
    for parent, folders, names in walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = Path(parent).relative_to(folder)
        files |= {(relative / name).as_posix() for name in names if not name.startswith(".")}
    if not files:
        raise UserError(f"{folder}: the folder is empty. Expected videos or images and {EXPECTED}.")
    places = sorted({name.split("/")[0] for name in files if "/" in name and split_of(name)})
    by_place = {}
    for place in ("", *(f"{place}/" for place in places)):
        found = [place + name for name in METADATA_NAMES if place + name in files]
        if len(found) > 1:
            raise UserError(f"{folder}: holds both {found[0]} and {found[1]}. Keep one of them.")
        by_place |= dict.fromkeys(found, place)
    if not by_place:
        some = ", ".join(sorted(files)[:5])
        deeper = sorted(file for file in files if PurePosixPath(file).name in METADATA_NAMES)
        hint = f" Found {deeper[0]}: use that folder, or move the file up." if deeper else ""
        raise UserError(f"{folder}: no metadata among its {len(files)} files ({some}). Expected {EXPECTED}.{hint}")
    if len(by_place) > 1 and "" in by_place.values():
        top, below = list(by_place)[:2]
        raise UserError(
            f"{folder}: holds both {top} and {below}. Describe all files in {top}, or each folder's files in its own."
        )
    return [folder / name for name in by_place], files - set(by_place)


def split_of(name: str) -> str | None:
    """The split of a file by the first folder of its name, as in a Hugging Face VideoFolder; None: not given."""
    first, slash, _ = name.partition("/")
    return SPLIT_FOLDERS.get(first.casefold()) if slash else None


def read(metadata: Path) -> tuple[list[tuple[int, dict]], list[str]]:
    """Return [(line number, row)], at least one, and the sorted columns that are not read.

    Rows lack the columns that they do not set. Raises UserError.
    """
    reader = {
        ".jsonl": read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".parquet": _read_parquet,
    }
    lines = reader[metadata.suffix](metadata)
    if not lines:
        raise UserError(f"{metadata}: no rows. Write one row per caption or question.")
    _check_columns(metadata, lines)
    ignored = sorted({name for _, row in lines for name in row} - COLUMNS)
    _check_ignored(metadata, ignored)
    return [(line, _standard_row(metadata, line, row)) for line, row in lines], ignored


def _standard_row(metadata: Path, line: int, row: dict) -> dict:
    """The row with `conversations` and MEDIA_COLUMNS, as in LLaVA's rows, under this pipeline's names."""
    if row.get("conversations") is not None:
        if row.get("messages") is not None:
            raise UserError(f"{metadata} line {line}: found both messages and conversations. Keep one of them.")
        row = {**row, "messages": row["conversations"]}
    given = [name for name in MEDIA_COLUMNS if row.get(name) is not None]
    if not given or any(row.get(name) is not None for name in NAME_COLUMNS):
        return row
    if len(given) > 1:
        raise UserError(f"{metadata} line {line}: found both {given[0]} and {given[1]}. Keep one of them.")
    media = row[given[0]]
    media = media[0] if isinstance(media, list) and len(media) == 1 else media
    return {**row, "file_names" if isinstance(media, list) else "file_name": media}


def _read_text(metadata: Path) -> str:
    try:
        content = metadata.read_bytes()
        return decoded(content)
    except UnicodeDecodeError as error:
        if error.encoding != "utf-8":
            raise UserError(
                f"{metadata}: not {error.encoding.upper()} (byte {error.start}). Save it as UTF-8."
            ) from None
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{metadata} line {line}: not UTF-8 (byte {error.start}). Save the file as UTF-8.") from None
    except OSError as error:
        raise UserError(f"{metadata}: cannot be read ({error.strerror}).") from None


def read_jsonl(metadata: Path) -> list[tuple[int, dict]]:
    """Return [(line number, row)]; nulls are dropped."""
    rows = []
    for line, text in enumerate(_read_text(metadata).split("\n"), 1):
        if text.strip():
            row = _parse_json(f"{metadata} line {line}", text, "Write an object per line.")
            rows.append((line, _json_row(f"{metadata} line {line}", row)))
    return rows


def _read_json(metadata: Path) -> list[tuple[int, dict]]:
    """Return [(number in the list, row)]; nulls are dropped."""
    rows = _parse_json(f"{metadata}", _read_text(metadata), "Write a list of objects.")
    if not isinstance(rows, list):
        raise UserError(
            f"{metadata}: expected a list of objects, found {str(rows)[:50]}. A .jsonl has an object per line."
        )
    return [(number, _json_row(f"{metadata} line {number}", row)) for number, row in enumerate(rows, 1)]


def _parse_json(where: str, text: str, hint: str):
    try:
        parsed = json.loads(text, object_pairs_hook=unique_fields)
        json.dumps(parsed, ensure_ascii=False).encode()  # rejects lone surrogates such as "\\ud800"
        return parsed
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg}, column {error.colno}). {hint}") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of nested brackets
        raise UserError(f"{where}: cannot be read ({str(error).split(';')[0]}).") from None


def _json_row(where: str, row) -> dict:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object, found {str(row)[:50]}")
    return {name: value for name, value in row.items() if value is not None}


def _read_csv(metadata: Path) -> list[tuple[int, dict]]:
    """Return [(line number, row)]; empty cells are dropped."""
    text = _read_text(metadata)
    separator = _separator(text)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows = []
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        repeated = [name for name, count in Counter(reader.fieldnames).items() if count > 1]
        if repeated:
            raise UserError(f"{metadata} line 1: the column {repeated[0]!r} occurs twice. Rename or remove one.")
        for row in reader:
            if None in row or None in row.values():
                count = sum(value is not None for value in row.values()) - (None in row) + len(row.get(None, ()))
                found = f"{count} cells, but the header has {len(reader.fieldnames)}"
                raise UserError(
                    f"{metadata} line {reader.line_num}: {found}. "
                    f"Quote texts that contain {SEPARATOR_NAMES[separator]}."
                )
            row = {name: value for name, value in row.items() if value != ""}
            for name in ("target", "num_source_frames"):
                if re.fullmatch("[0-9]{1,9}", row.get(name, "")):
                    row[name] = int(row[name])
            rows.append((reader.line_num, _json_cells(metadata, reader.line_num, row)))
    except csv.Error as error:
        raise UserError(f"{metadata} line {reader.line_num}: not valid CSV ({error}).") from None
    if rows:
        rows[0] = (rows[0][0], {**dict.fromkeys(reader.fieldnames), **rows[0][1]})  # for _check_columns
    return rows


def _separator(text: str) -> str:
    """The separator with which the first line has a column of files: a comma, a semicolon or a tab."""
    head = text.split("\n", 1)[0].rstrip("\r")
    for separator in SEPARATOR_NAMES:
        if {name.strip('" ') for name in head.split(separator)} & {*NAME_COLUMNS, *MEDIA_COLUMNS}:
            return separator
    return ","


def _json_cells(metadata: Path, line: int, row: dict) -> dict:
    """Parse the JSON text in the row's list columns."""
    for name in JSON_COLUMNS:
        if name in row:
            try:
                row[name] = json.loads(row[name], object_pairs_hook=unique_fields)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{metadata} line {line}: {name} is {row[name][:50]!r}, expected a list as JSON text "
                    f"({str(error).split(';')[0]})."
                ) from None
    return row


def _read_parquet(metadata: Path) -> list[tuple[int, dict]]:
    """Return [(row number, row)]; nulls are dropped."""
    try:
        rows = pq.read_table(metadata).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{metadata}: not a parquet file, or damaged ({str(error)[:100]}).") from None
    return [(n, {k: v for k, v in row.items() if v is not None}) for n, row in enumerate(rows, 1)]


def _check_columns(metadata: Path, lines: list[tuple[int, dict]]) -> None:
    """Check that the columns of all rows suffice to make items. Raises UserError."""
    columns = {name for _, row in lines for name in row}
    has_text = {"caption", "messages", "conversations"} & columns or {"question", "answer"} <= columns
    if not (columns & {*NAME_COLUMNS, *MEDIA_COLUMNS} and has_text):
        found = ", ".join(sorted(columns)) or "none"
        hint = (
            " In a csv, separate cells with commas, semicolons or tabs, and write column names in lower case without "
            "spaces."
        )
        hint = hint if metadata.suffix in (".csv", ".tsv") else ""
        raise UserError(
            f"{metadata}: the columns are {found}. Expected file_name and caption, or question and answer, or "
            f"messages.{hint}"
        )


def _check_ignored(metadata: Path, names: list[str]) -> None:
    """Raise UserError for a column whose name is probably meant to be one of COLUMNS, such as `optoins`.

    A name that continues one of COLUMNS, such as `question_id` or `video_path`, is a column of its own.
    """
    for name in names:
        plain = name.strip().lower()
        close = difflib.get_close_matches(plain, sorted(COLUMNS), 1, 0.8)
        if close and not any(plain.startswith(f"{column}_") for column in COLUMNS):
            raise UserError(
                f"{metadata}: the column {name!r} is not read: probably a typo, did you mean {close[0]!r}? Rename or "
                "remove it."
            )
