"""Source `tars`: existing WebDataset archives, read in place.

    sources.tars: [{path: /data/openvid, name: openvid, picture_fps: 1.0, tokenizer: null, split: null, ...}]

Nothing is unpacked: a row of the index holds the path of the archive and the offsets of the media in it. Unusable
samples are quarantined with a reason; the unreadable rest of a damaged archive counts as one quarantined sample.
"""

import glob
import hashlib
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pipeline_steps.common.errors import UserError, listing
from pipeline_steps.common.files import parse, to_json
from pipeline_steps.common.processes import map_in_processes
from pipeline_steps.common.schemas import Quarantined, RawSample, slug
from pipeline_steps.monitoring.progress import progress_bar
from pipeline_steps.sources.archive import DamagedArchive, members
from pipeline_steps.sources.chatml import decoder
from pipeline_steps.sources.index import MAX_LISTED
from pipeline_steps.sources.layout import Layout, printable
from pipeline_steps.sources.procedural import FEWER
from pipeline_steps.sources.tar_sample import UnusableSample, make_sample
from pipeline_steps.sources.walk import walk


@dataclass
class Report:
    """What `scan` found in one archive besides usable samples."""

    quarantined: list[Quarantined] = field(default_factory=list)
    unreferenced: list[str] = field(default_factory=list)  # the first names of members that belong to no sample
    reasons: Counter = field(default_factory=Counter)  # number of these members by reason
    damage: str | None = None  # from which byte and why the archive is unreadable


def read(
    entry,
    folder: Path,
    quarantined: list[Quarantined],
    add_unreferenced: Callable[[str, list[str], Counter], None],
    num_processes: int,
) -> Iterator[RawSample]:
    """Yield the samples of all archives of `entry` (schema.Tars), archive by archive.

    folder: for temporary files. quarantined: receives the unusable samples. add_unreferenced: called for every archive
    with the source, the first names and the number by reason of members that belong to no sample. Raises UserError for
    a wrong path or tokenizer.
    """
    tars = find_tars(entry)
    if entry.tokenizer is not None:
        decoder(entry.tokenizer)  # fail early on a wrong tokenizer
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        jobs = [(tar, name, Path(scratch) / f"{number}.jsonl") for number, (tar, name) in enumerate(tars)]
        work = partial(_work, entry)
        scanned = map_in_processes(work, jobs, num_processes, FEWER)
        progress = progress_bar(entry.name, scanned, total=len(jobs), unit="tar")
        damaged = []
        for (tar, _, rows), report in zip(jobs, progress, strict=True):
            damaged += [f"{tar}: {report.damage}"] if report.damage else []
            quarantined += report.quarantined
            add_unreferenced(entry.name, report.unreferenced, report.reasons)
            with open(rows, encoding="utf-8") as lines:
                for line in lines:
                    yield parse(RawSample, line, rows)
            rows.unlink()
    _print_damage(entry.name, damaged, len(tars))


def _print_damage(name: str, damaged: list[str], num_tars: int) -> None:
    if not damaged:
        return
    print(
        f"{name}: {len(damaged)} of {num_tars} archives are damaged. The unreadable rest of each counts as one "
        "quarantined sample, as the number of samples in it is unknown:\n"
        + listing(damaged[:MAX_LISTED], len(damaged)),
        file=sys.stderr,
    )


SUFFIX = re.compile(r"\.tar$", re.IGNORECASE)
COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4)|tgz|tbz2|txz)$", re.IGNORECASE)


def find_tars(entry) -> list[tuple[str, str]]:
    """Return the sorted (absolute path, name within the entry without .tar) of all archives. UserError if none."""
    given = os.path.abspath(Path(entry.path).expanduser())
    packed = []
    if os.path.isdir(given):
        names = [os.path.join(parent, name) for parent, _, names in walk(given) for name in names]
        base, found = given, [name for name in names if SUFFIX.search(name)]
        packed = [name for name in names if COMPRESSED.search(name)]
    elif glob.has_magic(given) and not os.path.exists(given):
        base = str(Path(*_until(Path(given).parts, glob.has_magic)))
        found = glob.glob(given, recursive=True)
    else:
        base, found = os.path.dirname(given), [given]
    if packed:
        raise UserError(
            f"sources.tars '{entry.name}': {len(packed)} compressed archive(s) in {entry.path}, such as "
            f"{printable(packed[0])}. Archives are read in place: "
            "Decompress them, or select the others with a pattern."
        )
    missing = [path for path in found if not os.path.isfile(path)]
    if missing or not found:
        exists = bool(missing) and os.path.lexists(missing[0])
        problem = f"{missing[0]} is not a file" if exists else "does not exist" if missing else "no .tar found"
        raise UserError(f"sources.tars '{entry.name}': {entry.path}: {problem}. Give a folder, a pattern or one file.")
    unreadable = [path for path in found if not _is_utf8(path)]
    if unreadable:
        raise UserError(f"sources.tars '{entry.name}': the path {printable(unreadable[0])} is not UTF-8. Rename it.")
    return [(path, SUFFIX.sub("", os.path.relpath(path, base))) for path in sorted(found)]


def _until(parts, condition):
    return [part for number, part in enumerate(parts) if not any(map(condition, parts[: number + 1]))]


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _work(entry, job: tuple[str, str, Path]) -> Report:
    """Scan one archive into a file of lines, so that no process holds all samples. Returns the Report."""
    tar, name, rows = job
    report = Report()
    with open(rows, "w", encoding="utf-8") as lines:
        for sample in scan(entry, tar, name, report):
            lines.write(to_json(sample) + "\n")
    return report


def scan(entry, tar: str, name: str, report: Report) -> Iterator[RawSample]:
    """Yield the samples of one archive and fill `report` with the rest. `name`: the archive's name in keys."""
    layout, chat_decoder = Layout(MAX_LISTED), decoder(entry.tokenizer) if entry.tokenizer is not None else None

    def quarantine(key: str, reason: str) -> None:
        report.quarantined.append(Quarantined(key=key, source=entry.name, path=tar, reason=reason))

    try:
        file = open(tar, "rb")  # noqa: SIM115 (closed below; catches errors of opening only)
    except OSError as error:
        report.damage = f"cannot be opened ({error.strerror})"
        quarantine(make_key(entry.name, name, ""), report.damage)
        return
    with file:
        damage = _list_members(file, layout)
        for group in layout.samples():
            key = make_key(entry.name, name, group.key)
            try:
                yield make_sample(group, file, tar, key, entry, chat_decoder)
            except UnusableSample as error:
                quarantine(key, str(error))
            except OSError as error:
                quarantine(key, f"cannot be read ({error.strerror})")
        size = os.fstat(file.fileno()).st_size
    if damage is not None:
        rest = f"the remaining {max(size - damage.offset, 0)} bytes are unreadable"
        report.damage = f"at byte {damage.offset}: {damage.reason}; {rest}"
        quarantine(make_key(entry.name, name, ""), report.damage)
    report.unreferenced, report.reasons = layout.unreferenced, layout.reasons


def _list_members(file, layout: Layout) -> DamagedArchive | None:
    """Fill `layout`. Returns the damage of the archive, or None."""
    try:
        for member in members(file):
            layout.add(member)
        return None
    except DamagedArchive as error:
        damage = error
    except OSError as error:
        damage = DamagedArchive(file.tell(), f"cannot be read ({error.strerror})")
    if layout.last is not None:  # it may have more members in the unreadable rest
        layout.last.complain("the archive is damaged within or right after this sample")
    return damage


def make_key(source: str, tar: str, key: str) -> str:
    """Return the stable key `{source}-{archive}-{key}`. A name that `slug` changes gets a part of its hash."""
    name = f"{tar}/{key}" if key else tar
    plain = slug(f"{tar}-{key}" if key else tar)
    exact = plain == (f"{tar}-{key}" if key else tar)
    mark = "" if exact else "-" + hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{source}-{plain}{mark}"
