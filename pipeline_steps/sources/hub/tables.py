"""Rows of a data set: from the Hub at a pinned revision, or from a local copy of its files.

Both go through `datasets.load_dataset(..., streaming=True)`, with pictures left as the bytes that they are. JSON is
taken as text and parsed here, so that ids and answers such as "007" stay what they are and one bad line is one row.
"""

import glob
import json
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from pyarrow import ArrowException
from pyarrow.dataset import ParquetFragmentScanOptions

from pipeline_steps.common.errors import UserError
from pipeline_steps.sources.hub.adapter import Adapter, Table, Unusable

ROW_GROUPS = ParquetFragmentScanOptions(pre_buffer=False)  # else all that was read of a file stays in memory with it
LOADERS = {  # by the ending of the files: builder and options of load_dataset
    ".parquet": ("parquet", {"batch_size": 100, "fragment_scan_options": ROW_GROUPS}),  # 16 batches are read ahead
    ".csv": ("csv", {"keep_default_na": False}),  # "NA" is a text
    ".jsonl": ("text", {}),
    ".json": ("text", {"sample_by": "document"}),
}


def chosen_tables(entry, adapter: Adapter) -> list[Table]:
    """The tables of the entry's subsets. UserError for a subset that the data set does not have."""
    unknown = sorted(set(entry.subsets or ()) - set(adapter.subsets))
    if unknown:
        known = ", ".join(adapter.subsets)
        raise UserError(f"{where(entry)}: {entry.dataset} has no subset '{unknown[0]}'. Its subsets: {known}.")
    return [table for table in adapter.tables if entry.subsets is None or table.subset in entry.subsets]


def where(entry) -> str:
    return f"sources.hub (dataset: {entry.dataset})"


def check_entry(entry, adapter: Adapter) -> None:
    """UserError for what can be seen before any row is read: path, revision, media_dir and local files."""
    if adapter.places and entry.media_dir is None:
        raise UserError(f"{where(entry)}: media_dir is not set. It is the folder with {adapter.download}.")
    if not adapter.places and entry.media_dir is not None:
        raise UserError(f"{where(entry)}: takes no media_dir: {adapter.download}. Set it to null.")
    if _local(entry) is None:
        _revision(entry, adapter)
        return
    if entry.revision is not None:
        raise UserError(
            f"{where(entry)}: a local path has no revision. Set it to null, or path to null to read the Hub."
        )
    for table in chosen_tables(entry, adapter):
        _local_files(entry, adapter, table)


def read_rows(entry, adapter: Adapter, table: Table) -> Iterator[dict | Unusable]:
    """All rows of a table, a line that is no JSON object as the reason why.

    UserError if files cannot be read, or rows do not have the adapter's columns.
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
    from datasets import load_dataset  # half a second to import, and most runs of the stage do not need it

    builder, options = LOADERS[suffix]
    rows = load_dataset(builder, data_files=files, split="train", streaming=True, **options)
    return iter(rows if rows.features is None else rows.decode(False))  # without features nothing is decoded


def _parsed(rows, place, suffix) -> Iterator[dict | Unusable]:
    """The objects in rows of text: of a line each, or of a list that is a whole file."""
    for number, row in enumerate(rows, 1):
        if not row["text"].strip():
            continue
        try:
            content = json.loads(row["text"])
        except (ValueError, RecursionError) as error:
            if suffix == ".json":
                hint = "Repair it, or name it .jsonl if it has one object per line."
                raise UserError(f"{place}: file {number} is no JSON ({str(error)[:100]}). {hint}") from None
            yield Unusable(f"no JSON: {str(error)[:100]}")
            continue
        if suffix == ".json" and not isinstance(content, list):
            raise UserError(f"{place}: file {number} is no list of objects. Is this a file of annotations?")
        for value in content if suffix == ".json" else [content]:
            yield value if isinstance(value, dict) else Unusable("no JSON object")


def _guarded(load, place, entry) -> Iterator[dict]:
    """The rows of load(); what `datasets` and the libraries below it raise for bad files becomes a UserError."""
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
                    "Without a connection, copy the data set's files to a local folder and name it with `path` "
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
            f"{', '.join(adapter.columns)}. Is this a file of {adapter.repo}?"
        )


def _local(entry) -> Path | None:
    """The existing local file or folder, or None for a data set on the Hub."""
    if entry.path is None:
        return None
    path = Path(entry.path).expanduser()
    if path.exists():
        return path.absolute()
    if entry.path.count("/") == 1 and entry.path[0] not in "/.~":
        return None
    raise UserError(f"{where(entry)}: path {entry.path} does not exist. Give a file, a folder or a data set's id.")


def _revision(entry, adapter: Adapter) -> str:
    if entry.revision is not None:
        return entry.revision
    repo = entry.path or adapter.repo
    if repo != adapter.repo or adapter.revision is None:
        raise UserError(
            f"{where(entry)}: no revision of {repo} is pinned. Give the commit that you want (40 characters, from the "
            "data set's page, 'Files and versions', 'History') as `revision`, or a local copy as `path`."
        )
    return adapter.revision


def _local_files(entry, adapter: Adapter, table: Table) -> list[Path]:
    """The table's files in the local copy, sorted. UserError if there are none, or of several formats."""
    path = _local(entry)
    one_table = len({table.files for table in adapter.tables}) == 1
    pattern = table.files.removeprefix("**/")
    if path.is_file():
        fits = one_table or fnmatch(path.name, Path(pattern).name)
        files = [path] if fits and path.suffix in LOADERS else []
    else:
        files = sorted(path.glob(f"**/{pattern}"))
        if not files and one_table:  # a copy under other names, such as csv made parquet
            files = sorted(file for file in path.glob("**/*") if file.suffix in LOADERS)
    formats = {file.suffix for file in files}
    if len(formats) > 1:
        raise UserError(
            f"{where(entry)}: {path} holds files of several formats ({', '.join(sorted(formats))}). Name one."
        )
    if not files:
        found = sorted({t.subset for t in adapter.tables if path.is_dir() and any(path.glob(f"**/{t.files}"))})
        hint = f"It has the subsets: {', '.join(found)}; list those in `subsets`." if found else ""
        raise UserError(
            f"{where(entry)}: no file {table.files} in {path}, for subset '{table.subset}'. {hint}".rstrip()
        )
    return files
