"""Stream the raw samples of one entry of `sources.hub`; only hashes of the keys stay in memory.

Every row becomes a sample, is quarantined with a reason, or is skipped because of `max_samples`. The counts are printed
at the end.
"""

import hashlib
import heapq
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.schemas import Item, Quarantined, RawSample, slug
from pipeline_steps.monitoring.progress import progress_bar
from pipeline_steps.sources.hub.adapter import Adapter, Draft, Table, UnusableRow
from pipeline_steps.sources.hub.media import Container, MediaFolder
from pipeline_steps.sources.hub.registry import ADAPTERS
from pipeline_steps.sources.hub.tables import check_entry, chosen_tables, read_rows, where

MAX_LISTED = 5  # names of missing media, or reasons, in a message


@dataclass
class Counts:
    """Counts of the rows of one entry, with examples for messages."""

    rows: int = 0
    taken: int = 0
    missing: list[str] = field(default_factory=list)  # names of the first missing media
    reasons: list[str] = field(default_factory=list)  # reasons of the first unusable rows
    num_missing: int = 0
    num_unusable: int = 0
    num_beyond: int = 0  # skipped because of max_samples

    def reject(self, place: str, reason: str) -> None:
        self.num_unusable += 1
        if len(self.reasons) < MAX_LISTED:
            self.reasons.append(f"{place}: {reason}")

    def miss(self, name: str) -> None:
        self.num_missing += 1
        if len(self.missing) < MAX_LISTED:
            self.missing.append(name)

    def check(self, entry) -> None:
        """Print the counts. Raises UserError if too many media are missing or no sample is left."""
        print(
            f"{entry.dataset}: {self.rows} rows: {self.taken} taken, {self.num_missing} without media, "
            f"{self.num_unusable} unusable, {self.num_beyond} skipped by max_samples"
        )
        wanted = self.taken + self.num_missing
        if self.num_missing > entry.max_missing * wanted:
            share, listed = self.num_missing / wanted, ", ".join(self.missing)
            raise UserError(
                f"{where(entry)}: {self.num_missing} of {wanted} samples have no media in {entry.media_dir} "
                f"({share:.1%}), more than max_missing allows ({entry.max_missing:.1%}). The first: {listed}. "
                "Add the files and rerun the stage (`dvc repro --force sources`), or raise max_missing."
            )
        if not self.taken:
            problem = f"none of {self.rows} rows is usable. {'; '.join([*self.reasons, *self.missing])}"
            raise UserError(f"{where(entry)}: {problem}".rstrip())


def entries(section) -> list:
    """Return the entries (schema.HubEntry) to collect. Raises UserError for invalid entries, before reading rows."""
    if "hub" not in section.collect:
        return []
    if not section.hub:
        raise UserError("sources.collect lists hub, but sources.hub is empty. conf/data/research.yaml shows entries.")
    problems = []
    for entry in section.hub:
        try:
            check_entry(entry, ADAPTERS[entry.dataset])
            _media_folder(entry, ADAPTERS[entry.dataset])
        except UserError as problem:
            problems.append(str(problem))
    if problems:
        raise UserError("\n  ".join([f"{len(problems)} of {len(section.hub)} data sets cannot be read:", *problems]))
    return section.hub


def read(entry, output_dir: Path, quarantined: list[Quarantined]) -> Iterator[RawSample]:
    """Yield the samples of one entry (schema.HubEntry) in the order of its rows, and fill `quarantined`.

    Embedded pictures are stored below `output_dir`/hub. Raises UserError if rows are unreadable, if more than the share
    `max_missing` of the samples lacks media, or if there is no sample.
    """
    adapter = ADAPTERS[entry.dataset]
    check_entry(entry, adapter)
    reading = _Reading(entry, adapter, quarantined)
    for table in chosen_tables(entry, adapter):
        container = Container(output_dir / "hub" / table.source, output_dir)
        try:
            yield from reading.samples(table, container)
        finally:
            container.close()
    reading.counts.check(entry)


class _Reading:
    """State shared by the tables of one entry."""

    def __init__(self, entry, adapter: Adapter, quarantined: list[Quarantined]):
        self.entry, self.adapter, self.quarantined = entry, adapter, quarantined
        self.media = _media_folder(entry, adapter)
        self.last = last_rank(entry, adapter)
        self.counts = Counts()
        self.keys: set[int] = set()

    def samples(self, table: Table, container: Container) -> Iterator[RawSample]:
        for number, key, draft, reason in drafts(self.entry, self.adapter, table):
            self.counts.rows += 1
            if draft is not None and self.last is not None and rank(key) > self.last:
                self.counts.num_beyond += 1
                continue
            if draft is not None and _key_hash(key) in self.keys:
                draft, reason = None, "duplicate of an earlier row"
            if draft is None:
                self._reject(table, key, f"{table.subset} row {number}", reason)
                continue
            self.keys.add(_key_hash(key))
            sample = self._sample(table, key, draft, container)
            if sample is not None:
                self.counts.taken += 1
                yield sample

    def _sample(self, table, key, draft, container) -> RawSample | None:
        """Return the raw sample, or None if its media are missing or the record is invalid."""
        try:
            found = _media(draft, self.media, container)
        except OSError as error:  # from reading media; failing to write a container raises UserError
            return self._miss(table, key, draft, f"cannot be read ({error.strerror})")
        if found is None:
            return self._miss(table, key, draft, "missing media")
        is_folder = found["kind"] == "video" and Path(found["path"]).is_dir()
        try:
            return RawSample(
                key=key,
                source=table.source,
                split="test" if self.adapter.held_out else None,
                video_id=draft.video_id or (f"image-{found['sha256'][:16]}" if draft.images else key),
                picture_fps=draft.picture_fps if is_folder else None,
                segment=draft.segment,
                items=draft.items,
                **found,
            )
        except ValidationError as error:
            return self._reject(table, key, (*draft.videos, key)[0], _first(error))

    def _reject(self, table, key, place, reason) -> None:
        self.counts.reject(place, reason)
        self.quarantined.append(Quarantined(key=key, source=table.source, path=place, reason=reason))

    def _miss(self, table, key, draft, reason) -> None:
        self.counts.miss(draft.videos[0])
        self.quarantined.append(Quarantined(key=key, source=table.source, path=draft.videos[0], reason=reason))


def drafts(entry, adapter: Adapter, table: Table) -> Iterator[tuple[int, str, Draft | None, str]]:
    """Yield (row number from 1, key, draft, "") per row, or (number, key, None, reason) if it is unusable."""
    rows = progress_bar(f"reading {table.source}", read_rows(entry, adapter, table), unit="row")
    for number, row in enumerate(rows, 1):
        try:
            if isinstance(row, UnusableRow):
                raise row
            draft = adapter.sample(row, table)
            if draft is not None:
                for item in draft.items:
                    Item(**item)
                yield number, _key(table, draft), draft, ""
        except UnusableRow as problem:
            yield number, f"{table.source}-{slug(table.subset)}-row-{number}", None, str(problem)
        except ValidationError as error:
            yield number, f"{table.source}-{slug(table.subset)}-row-{number}", None, _first(error)


def _media_folder(entry, adapter: Adapter) -> MediaFolder | None:
    return MediaFolder(entry.media_dir, adapter.media_subfolders, where(entry)) if adapter.media_subfolders else None


def _media(draft: Draft, media: MediaFolder | None, container: Container) -> dict | None:
    """Return the media fields of schemas.RawSample, or None if the file is missing."""
    if draft.images:
        path, parts, sha256 = container.add(draft.images)
        size = sum(length for _, length in parts)
        return {"kind": "image", "path": path, "parts": parts, "sha256": sha256, "size": size}
    if not draft.videos:
        return {"kind": "text", "path": None}
    path = media.find(draft.videos, folders=draft.picture_fps is not None)
    if path is None:
        return None
    sha256, size = media.describe(path)
    return {"kind": "video", "path": str(path), "sha256": sha256, "size": size}


def _key(table: Table, draft: Draft) -> str:
    """Hash the contents of the row, so that keys do not depend on the order of rows."""
    said = [draft.name, draft.video_id, draft.videos, draft.items, draft.picture_fps, draft.segment]
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for picture in draft.images:
        digest.update(hashlib.sha256(picture).digest())
    return "-".join(filter(None, [table.source, slug(draft.name)[:100].strip("-"), digest.hexdigest()[:16]]))


def _key_hash(key: str) -> int:
    return int(key[-16:], 16)


def rank(key: str) -> int:
    """Return a sample's position in the pseudo-random, stable order in which `max_samples` selects samples."""
    return int.from_bytes(hashlib.sha256(f"max_samples {key}".encode()).digest()[:8])


def last_rank(entry, adapter: Adapter) -> int | None:
    """Return the largest rank among the `max_samples` selected samples, in one pass over all rows; None: take all."""
    if entry.max_samples is None:
        return None
    first: list[int] = []  # negated smallest ranks: a max-heap
    known = set()
    for table in chosen_tables(entry, adapter):
        for _, key, draft, _ in drafts(entry, adapter, table):
            number = -rank(key)
            if draft is None or number in known or (len(first) == entry.max_samples and number < first[0]):
                continue
            known.add(number)
            if len(first) < entry.max_samples:
                heapq.heappush(first, number)
            else:
                known.discard(heapq.heappushpop(first, number))
    return -first[0] if len(first) == entry.max_samples else None


def _first(error: ValidationError) -> str:
    problem = error.errors()[0]
    place = ".".join(map(str, problem["loc"]))
    return f"{place}: {problem['msg']}"[:200].removeprefix(": ")
