"""Write index.jsonl, quarantined.jsonl and summary.json while the sources are read.

Rows are written to disk immediately; only keys and row offsets stay in memory, so that millions of samples fit:

    python -m benchmarks.source_index         # 1 million text samples: 171 bytes of memory each, 25 s on one core
"""

import bisect
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipeline_steps.common.errors import UserError, listing, printable
from pipeline_steps.common.files import to_json, writable, write_json
from pipeline_steps.common.names import check_name
from pipeline_steps.common.schemas import Quarantined, RawSample

MAX_NAMES = 10_000  # of sources and tasks
MAX_LISTED = 10  # quarantined samples and unreferenced files listed in summary.json and in the terminal


@contextmanager
def open_index(folder: Path) -> Iterator["IndexWriter"]:
    """Open an IndexWriter in the existing `folder`. Raises UserError if the folder is not writable."""
    with ExitStack() as files:
        with writable(folder):
            rows = files.enter_context(tempfile.TemporaryFile(dir=folder))  # deleted when the process ends
            quarantined = files.enter_context(open(folder / "quarantined.jsonl", "wb"))
        yield IndexWriter(folder, rows, quarantined)


class IndexWriter:
    """Collects the samples of one source after another; `finish` writes the three files into `folder`."""

    def __init__(self, folder: Path, rows, quarantined):
        self.folder, self._rows, self._quarantined = folder, rows, quarantined
        self._places: dict[str, int] = {}  # key -> offset of its row in _rows
        self._starts, self._entries = [], []  # offset of each source's first row in _rows, and its name
        self._end = 0
        self._names: set[tuple[str, str]] = set()  # ("source" or "task", name) that were checked
        self._sources: dict[str, dict[str, Counter]] = {}
        self._listed: dict[str, list[Quarantined]] = {}
        self._unreferenced: dict[str, tuple[Counter, list[str]]] = {}  # numbers by reason, and the first names
        self._ignored: dict[str, dict[str, list[str]]] = {}  # columns that are not read, by source and metadata file

    def add_source(
        self, entry: str, samples: Iterable[RawSample], quarantined: list[Quarantined], limit: float
    ) -> None:
        """Add all `samples` of the source `entry`, whose generator fills `quarantined`.

        Raises UserError for a repeated key, for a source without samples, and if more than the share `limit` of the
        samples is quarantined.
        """
        self._starts.append(self._end)
        self._entries.append(entry)
        before = len(self._places)
        for sample in samples:
            self._add(entry, sample)
        taken = len(self._places) - before
        for row in quarantined:
            self._count(row.source, "quarantined", "count")
            listed = self._listed.setdefault(row.source, [])
            if len(listed) < MAX_LISTED:
                listed.append(row)
            self._write(self._quarantined, row)
        _check(entry, taken, quarantined, limit)

    def add_unreferenced(self, source: str, names: list[str], reasons: Counter) -> None:
        """Record files of `source` that belong to no sample: names of them, and the number of all by reason."""
        before, listed = self._unreferenced.get(source, (Counter(), []))
        self._unreferenced[source] = before + reasons, (listed + names)[:MAX_LISTED]

    def add_ignored_columns(self, source: str, columns: dict[str, list[str]]) -> None:
        """Record the columns of `source` that are not read, by metadata file."""
        if columns:
            self._ignored[source] = columns

    def finish(self) -> dict:
        """Write index.jsonl, sorted by key, and summary.json. Returns the content of summary.json."""
        summary = self._summary()
        with writable(self.folder), open(self.folder / "index.jsonl", "wb") as index:
            for key in sorted(self._places):
                self._rows.seek(self._places[key])
                index.write(self._rows.readline())
            self._quarantined.flush()
        write_json(self.folder / "summary.json", summary)
        return summary

    def _add(self, entry: str, sample: RawSample) -> None:
        if sample.key in self._places:
            first = self._entries[bisect.bisect_right(self._starts, self._places[sample.key]) - 1]
            both = f"twice by the source '{entry}'" if first == entry else f"by the sources '{first}' and '{entry}'"
            raise UserError(f"the key {sample.key} is used {both}. Keys must be unique: rename a source or a sample.")
        self._check_names(sample)
        self._places[sample.key] = self._end
        self._end += self._write(self._rows, sample)
        self._count(sample.source, "samples", sample.split or "undecided")
        self._count(sample.source, "kinds", sample.kind)
        self._count(sample.source, "bytes", "count", sample.size)
        for item in sample.items:
            self._count(sample.source, "items", item.task)

    def _check_names(self, sample: RawSample) -> None:
        for kind, name in [("source", sample.source), *(("task", item.task) for item in sample.items)]:
            if (kind, name) not in self._names:
                check_name(kind, name, f"sample '{sample.key}'")
                self._names.add((kind, name))
        if len(self._names) > MAX_NAMES:
            raise UserError(
                f"sample '{sample.key}': more than {MAX_NAMES:,} different names of sources and tasks. "
                "A task is a kind of question: give questions of one kind the same task."
            )

    def _write(self, file, row) -> int:
        with writable(self.folder):
            return file.write(to_json(row).encode() + b"\n")

    def _count(self, source: str, what: str, name: str, number: int = 1) -> None:
        counts = self._sources.setdefault(source, {})
        counts.setdefault(what, Counter())[name] += number

    def _summary(self) -> dict:
        sources = {}
        for source in sorted(self._sources.keys() | self._unreferenced.keys() | self._ignored.keys()):
            counts = self._sources.get(source, {})
            taken = counts.get("samples", Counter()).total()
            bad = counts.get("quarantined", Counter()).total()
            reasons, names = self._unreferenced.get(source, (Counter(), []))
            first = [row.model_dump(mode="json", exclude={"source"}) for row in self._listed.get(source, ())]
            sources[source] = {
                "seen": taken + bad,
                "taken": taken,
                "quarantined": {"count": bad, "first": first},
                **{name: dict(sorted(counts.get(name, Counter()).items())) for name in ("samples", "kinds", "items")},
                "bytes": counts.get("bytes", Counter()).total(),
                "unreferenced": {"count": reasons.total(), "first": names, "reasons": dict(sorted(reasons.items()))},
            }
            if source in self._ignored:
                sources[source]["ignored_columns"] = self._ignored[source]
        num_items = sum(sum(source["items"].values()) for source in sources.values())
        return {"num_samples": len(self._places), "num_items": num_items, "sources": sources}


def _check(entry: str, taken: int, quarantined: list[Quarantined], limit: float) -> None:
    bad, seen = len(quarantined), taken + len(quarantined)
    listed = listing([f"{row.key} ({row.path}): {row.reason}" for row in quarantined[:MAX_LISTED]], bad)
    if bad > limit * seen:
        raise UserError(
            f"{bad} of {seen} samples of the source '{entry}' are unusable ({bad / seen:.1%}), more than its "
            f"max_quarantined allows ({limit:.1%}):\n{listed}\nRepair or remove them, or raise max_quarantined."
        )
    if not taken:
        shown = f":\n{listed}\nRepair or replace them." if bad else "."
        raise UserError(f"the source '{entry}' has no usable sample ({bad} quarantined){shown}")


def print_summary(output: Path, summary: dict) -> None:
    """Print one line per source, its quarantined samples and its unreferenced files."""
    for name, source in summary["sources"].items():
        print(f"{name}: samples {source['samples']}, items {source['items']}, {source['bytes'] / 1e6:.1f} MB")
        left, bad = source["unreferenced"], source["quarantined"]
        if left["count"]:
            why = ", ".join(f"{count} {reason}" for reason, count in left["reasons"].items())
            files = ", ".join(left["first"])
            print(printable(f"{name}: {left['count']} files belong to no sample ({why}): {files}"))
        for metadata, columns in source.get("ignored_columns", {}).items():
            print(printable(f"{name}: {metadata}: columns that are not read: {', '.join(columns)}"))
        if bad["count"]:
            print(
                f"{name}: {bad['count']} of {source['seen']} quarantined (full list: {output / 'quarantined.jsonl'}):"
            )
            for row in bad["first"]:
                print(printable(f"  {row['key']} ({row['path']}): {row['reason']}"))
    print(f"{output}: {summary['num_samples']} samples, {summary['num_items']} items")
