"""metadata.jsonl, metadata.csv or metadata.parquet of a folder: its rows, with the line numbers for messages."""

import csv
import io
import json
import os
import re
from collections import Counter
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline_steps.common.errors import UserError

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
NAME_COLUMNS = ("file_name", "file_names", "images_file_names")
EXPECTED = (
    "a metadata.jsonl, .csv or .parquet with the columns file_name (or file_names) and caption, or question and "
    "answer, or messages"
)
JSON_COLUMNS = ("file_names", "images_file_names", "messages", "options")  # a cell of a csv holds them as JSON


def find(folder: Path) -> tuple[Path, set[str]]:
    """The metadata file and the names of all other files in the folder (hidden ones left out)."""
    files = set()
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = Path(parent).relative_to(folder)
        files |= {(relative / name).as_posix() for name in names if not name.startswith(".")}
    if not files:
        raise UserError(f"{folder}: the folder is empty. Expected videos or images and {EXPECTED}.")
    found = [name for name in METADATA_NAMES if name in files]
    if len(found) > 1:
        raise UserError(f"{folder}: holds both {found[0]} and {found[1]}. Keep one of them.")
    if not found:
        some = ", ".join(sorted(files)[:5])
        deeper = sorted(file for file in files if PurePosixPath(file).name in METADATA_NAMES)
        hint = f" There is {deeper[0]}: name that folder, or move the file up." if deeper else ""
        raise UserError(f"{folder}: no metadata among its {len(files)} files ({some}). Expected {EXPECTED}.{hint}")
    return folder / found[0], files - set(found)


def read(metadata: Path) -> list[tuple[int, dict]]:
    """[(line number, row)], at least one; a column that is not given is not in the row. UserError."""
    reader = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}[metadata.suffix]
    lines = reader(metadata)
    if not lines:
        raise UserError(f"{metadata}: has no rows. Write one row per caption or question.")
    _check_columns(metadata, lines)
    return lines


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
            rows.append((reader.line_num, _json_cells(metadata, reader.line_num, row)))
    except csv.Error as error:
        raise UserError(f"{metadata} line {reader.line_num}: not valid CSV ({error}).") from None
    if rows:
        rows[0] = (rows[0][0], {**dict.fromkeys(reader.fieldnames), **rows[0][1]})  # keeps the header's names
    return rows


def _json_cells(metadata: Path, line: int, row: dict) -> dict:
    """The row with its lists, which are JSON text in a csv."""
    for name in JSON_COLUMNS:
        if name in row:
            try:
                row[name] = json.loads(row[name])
            except (ValueError, RecursionError):
                cell = row[name][:50]
                raise UserError(f"{metadata} line {line}: {name} is {cell!r}, expected a list as JSON text.") from None
    return row


def _read_parquet(metadata: Path) -> list[tuple[int, dict]]:
    """[(number of the row, row)]; a null is a column that is not given."""
    try:
        rows = pq.read_table(metadata).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{metadata}: not a parquet file that can be read ({str(error)[:100]}).") from None
    return [(n, {k: v for k, v in row.items() if v is not None}) for n, row in enumerate(rows, 1)]


def _check_columns(metadata: Path, lines: list[tuple[int, dict]]) -> None:
    """The columns of all rows together can make up items."""
    columns = {name for _, row in lines for name in row}
    has_text = {"caption", "messages"} & columns or {"question", "answer"} <= columns
    if not (columns & set(NAME_COLUMNS) and has_text):
        found = ", ".join(sorted(columns)) or "none"
        hint = " The cells of a csv are separated by commas, its names stand without spaces, in lower case."
        hint = hint if metadata.suffix == ".csv" else ""
        raise UserError(
            f"{metadata}: the columns are {found}. Expected file_name and caption, or question and answer, or "
            f"messages.{hint}"
        )
