"""Read the rows of a folder's metadata.jsonl, .csv or .parquet, with line numbers for messages."""

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
JSON_COLUMNS = ("file_names", "images_file_names", "messages", "options")  # JSON text in the cells of a csv


def find(folder: Path) -> tuple[Path, set[str]]:
    """Return the metadata file and the names of all other files, except hidden ones. Raises UserError."""
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
        hint = f" Found {deeper[0]}: use that folder, or move the file up." if deeper else ""
        raise UserError(f"{folder}: no metadata among its {len(files)} files ({some}). Expected {EXPECTED}.{hint}")
    return folder / found[0], files - set(found)


def read(metadata: Path) -> list[tuple[int, dict]]:
    """Return [(line number, row)], at least one; rows lack the columns that they do not set. Raises UserError."""
    reader = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}[metadata.suffix]
    lines = reader(metadata)
    if not lines:
        raise UserError(f"{metadata}: no rows. Write one row per caption or question.")
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
    """Return [(line number, row)]; nulls are dropped."""
    rows = []
    for line, text in enumerate(_read_text(metadata).split("\n"), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
            json.dumps(row, ensure_ascii=False).encode()  # rejects lone surrogates such as "\\ud800"
        except json.JSONDecodeError as error:
            raise UserError(
                f"{metadata} line {line}: not valid JSON ({error.msg}, column {error.colno}). Write an object per line."
            ) from None
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of nested brackets
            raise UserError(f"{metadata} line {line}: cannot be read ({str(error).split(';')[0]}).") from None
        if not isinstance(row, dict):
            raise UserError(f'{metadata} line {line}: expected an object {{"file_name": ...}}, found {text[:50]}')
        rows.append((line, {name: value for name, value in row.items() if value is not None}))
    return rows


def _read_csv(metadata: Path) -> list[tuple[int, dict]]:
    """Return [(line number, row)]; empty cells are dropped."""
    reader = csv.DictReader(io.StringIO(_read_text(metadata), newline=""), strict=True)
    rows = []
    try:
        repeated = [name for name, count in Counter(reader.fieldnames or ()).items() if count > 1]
        if repeated:
            raise UserError(f"{metadata} line 1: the column {repeated[0]!r} occurs twice. Rename or remove one.")
        for row in reader:
            if None in row or None in row.values():
                count = sum(value is not None for value in row.values()) - (None in row) + len(row.get(None, ()))
                found = f"{count} cells, but the header has {len(reader.fieldnames)}"
                raise UserError(f"{metadata} line {reader.line_num}: {found}. Quote texts that contain commas.")
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


def _json_cells(metadata: Path, line: int, row: dict) -> dict:
    """Parse the JSON text in the row's list columns."""
    for name in JSON_COLUMNS:
        if name in row:
            try:
                row[name] = json.loads(row[name])
            except (ValueError, RecursionError):
                cell = row[name][:50]
                raise UserError(f"{metadata} line {line}: {name} is {cell!r}, expected a list as JSON text.") from None
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
    has_text = {"caption", "messages"} & columns or {"question", "answer"} <= columns
    if not (columns & set(NAME_COLUMNS) and has_text):
        found = ", ".join(sorted(columns)) or "none"
        hint = " In a csv, separate cells with commas and write column names in lower case without spaces."
        hint = hint if metadata.suffix == ".csv" else ""
        raise UserError(
            f"{metadata}: the columns are {found}. Expected file_name and caption, or question and answer, or "
            f"messages.{hint}"
        )
