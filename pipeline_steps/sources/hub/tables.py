"""Read the rows of a data set from the Hub at a pinned revision, or from a local copy of its files.

Both use `datasets.load_dataset(..., streaming=True)` without decoding images. JSON files are loaded as text and parsed
here, so that ids and answers such as "007" stay strings and an invalid line affects one row only.
"""

import glob
import json
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from pyarrow import ArrowException
from pyarrow.dataset import ParquetFragmentScanOptions

from pipeline_steps.common.errors import UserError
from pipeline_steps.sources.hub.adapter import Adapter, Table, UnusableRow

ROW_GROUPS = ParquetFragmentScanOptions(pre_buffer=False)  # True keeps everything read from a file in memory
LOADERS = {  # file suffix -> (builder, options) of load_dataset
    ".parquet": ("parquet", {"batch_size": 100, "fragment_scan_options": ROW_GROUPS}),  # 16 batches are prefetched
    ".csv": ("csv", {"keep_default_na": False}),  # "NA" is text
    ".jsonl": ("text", {}),
    ".json": ("text", {"sample_by": "document"}),
}


def chosen_tables(entry, adapter: Adapter) -> list[Table]:
    """Return the tables of the entry's subsets. Raises UserError for an unknown subset."""
    unknown = sorted(set(entry.subsets or ()) - set(adapter.subsets))
    if unknown:
        known = ", ".join(adapter.subsets)
        raise UserError(f"{where(entry)}: {entry.dataset} has no subset '{unknown[0]}'. Its subsets: {known}.")
    return [table for table in adapter.tables if entry.subsets is None or table.subset in entry.subsets]


def where(entry) -> str:
    """Name the entry in messages."""
    return f"sources.hub (dataset: {entry.dataset})"


def check_entry(entry, adapter: Adapter) -> None:
    """Check path, revision, media_dir and local files, before reading rows. Raises UserError."""
    if adapter.media_subfolders and entry.media_dir is None:
        raise UserError(f"{where(entry)}: media_dir is not set. Set it to the folder with {adapter.download}.")
    if not adapter.media_subfolders and entry.media_dir is not None:
        raise UserError(f"{where(entry)}: media_dir is {entry.media_dir}, but {adapter.download}. Set it to null.")
    if _local(entry) is None:
        _revision(entry, adapter)
        return
    if entry.revision is not None:
        raise UserError(
            f"{where(entry)}: revision is set, but path is local. Set revision to null, or path to null for the Hub."
        )
    for table in chosen_tables(entry, adapter):
        _local_files(entry, adapter, table)


def read_rows(entry, adapter: Adapter, table: Table) -> Iterator[dict | UnusableRow]:
    """Yield all rows of a table. A line that is not a JSON object yields an UnusableRow with the reason.

    Raises UserError if files are unreadable or lack the adapter's columns.
    """
    if _local(entry) is None:
        repo, revision = entry.path or adapter.repo, _revision(entry, adapter)
        suffix, files = PurePosixPath(table.files).suffix, [f"hf://datasets/{repo}@{revision}/{table.files}"]
        place = f"{repo} ({table.files}) at revision {revision}"
    else:
        paths = _local_files(entry, adapter, table)
        suffix, files = paths[0].suffix, [glob.escape(str(path)) for path in paths]
        place = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    rows = _guarded(lambda: _load(suffix, files), place, entry)
    if suffix in (".json", ".jsonl"):
        rows = _parsed(rows, place, suffix)
    checked = False
    for row in rows:
        if not checked and isinstance(row, dict):
            _check_columns(row, entry, adapter, place)
            checked = True
        yield row


def _load(suffix, files) -> Iterator[dict]:
    from datasets import load_dataset  # takes half a second to import, rarely needed

    builder, options = LOADERS[suffix]
    rows = load_dataset(builder, data_files=files, split="train", streaming=True, **options)
    return iter(rows if rows.features is None else rows.decode(False))  # without features, nothing is decoded


def _parsed(rows, place, suffix) -> Iterator[dict | UnusableRow]:
    """Parse rows of text: one object per line (.jsonl), or a list of objects per file (.json)."""
    for number, row in enumerate(rows, 1):
        if not row["text"].strip():
            continue
        try:
            content = json.loads(row["text"])
        except (ValueError, RecursionError) as error:
            if suffix == ".json":
                hint = "Repair it, or rename it to .jsonl if it has one object per line."
                raise UserError(f"{place}: file {number} is not valid JSON ({str(error)[:100]}). {hint}") from None
            yield UnusableRow(f"not valid JSON: {str(error)[:100]}")
            continue
        if suffix == ".json" and not isinstance(content, list):
            raise UserError(f"{place}: file {number} is not a list of objects. Check that it is an annotation file.")
        for value in content if suffix == ".json" else [content]:
            yield value if isinstance(value, dict) else UnusableRow("not a JSON object")


def _guarded(load, place, entry) -> Iterator[dict]:
    """Yield the rows of load(). Errors of `datasets` and its libraries for bad files become UserErrors."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    rows = None
    while True:
        try:
            rows = load() if rows is None else rows
            row = next(rows)
        except StopIteration:
            return
        except (ArrowException, DatasetsError, HTTPError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            hint = "Repair the file, or download it again."
            if _local(entry) is None:
                hint = (
                    "Without network, copy the data set's files to a local folder and set `path` to it "
                    "(docs/data.md, Data sets from the Hub)."
                )
            problem = f"{place} cannot be read ({type(error).__name__}: {reason})"
            raise UserError(f"{where(entry)}: {problem}. {hint}") from None
        yield row


def _check_columns(row, entry, adapter, place):
    missing = [name for name in adapter.columns if name not in row]
    if missing:
        raise UserError(
            f"{place}: no column {', '.join(missing)}; its columns are {', '.join(row)}. {entry.dataset} needs "
            f"{', '.join(adapter.columns)}. Check that this is a file of {adapter.repo}."
        )


def _local(entry) -> Path | None:
    """Return the existing local file or folder, or None for a data set on the Hub. Raises UserError."""
    if entry.path is None:
        return None
    path = Path(entry.path).expanduser()
    if path.exists():
        return path.absolute()
    if entry.path.count("/") == 1 and entry.path[0] not in "/.~":
        return None
    raise UserError(
        f"{where(entry)}: path {entry.path} does not exist. Set it to a file, a folder or a Hub id (owner/name)."
    )


def _revision(entry, adapter: Adapter) -> str:
    if entry.revision is not None:
        return entry.revision
    repo = entry.path or adapter.repo
    if repo != adapter.repo or adapter.revision is None:
        raise UserError(
            f"{where(entry)}: no revision of {repo} is pinned. Set `revision` to a commit (40 hex digits, from the "
            "data set's page, 'Files and versions', 'History'), or `path` to a local copy."
        )
    return adapter.revision


def _local_files(entry, adapter: Adapter, table: Table) -> list[Path]:
    """Return the table's files in the local copy, sorted. Raises UserError for no file or several formats."""
    path = _local(entry)
    one_table = len({table.files for table in adapter.tables}) == 1
    pattern = table.files.removeprefix("**/")
    if path.is_file():
        fits = one_table or fnmatch(path.name, Path(pattern).name)
        files = [path] if fits and path.suffix in LOADERS else []
    else:
        files = sorted(path.glob(f"**/{pattern}"))
        if not files and one_table:  # a copy with other names, such as csv converted to parquet
            files = sorted(file for file in path.glob("**/*") if file.suffix in LOADERS)
    formats = {file.suffix for file in files}
    if len(formats) > 1:
        raise UserError(
            f"{where(entry)}: {path} holds files of several formats ({', '.join(sorted(formats))}). "
            "Set `path` to one file."
        )
    if not files:
        found = sorted({t.subset for t in adapter.tables if path.is_dir() and any(path.glob(f"**/{t.files}"))})
        hint = f"It has the subsets {', '.join(found)}: list these in `subsets`." if found else ""
        raise UserError(
            f"{where(entry)}: no file {table.files} in {path}, for subset '{table.subset}'. {hint}".rstrip()
        )
    return files
