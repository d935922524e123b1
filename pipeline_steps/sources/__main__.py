"""Collect raw samples: render the procedural world, write text-only questions, list the user's own files and archives.

    python -m pipeline_steps.sources [--params params.yaml] [--output data/raw] [--num-processes N]

Writes OUTPUT/index.jsonl (one schemas.RawSample per line, sorted by key), OUTPUT/quarantined.jsonl (unusable samples
with the reason), OUTPUT/summary.json (counts) and, for the procedural world, OUTPUT/procedural/ (media and
metadata.jsonl). OUTPUT is replaced only when the new folder is complete; a failed run leaves the old one unchanged.
Formats: docs/data.md. Cost at the tiny scale: 25 s on two cores, 150 MB of disk.
"""

import argparse
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pipeline_steps.common import params
from pipeline_steps.common.errors import UserError, run_main
from pipeline_steps.common.files import replaced_folder
from pipeline_steps.common.schemas import RawSample
from pipeline_steps.sources import chat, folder, object_clips, procedural, tars
from pipeline_steps.sources.actions import reader as actions
from pipeline_steps.sources.hub import reader as hub
from pipeline_steps.sources.index import IndexWriter, open_index, print_summary

PARAMS = ("sources",)
WORLDS = {"digits": "procedural", "objects": "objects"}  # {procedural.world: name of its source}


def collect(section, output: Path, num_processes: int = 1) -> dict:
    """Collect all sources of `section` (schema.Section) into `output`. Returns the content of summary.json.

    Every source is a generator of RawSample that appends unusable samples to a list of Quarantined. The user's own data
    are read first, so that errors in them surface before the procedural world is rendered. Raises UserError for
    unusable data or parameters.
    """
    repeated = [name for name, count in Counter(section.collect).items() if count > 1]
    if repeated:
        raise UserError(f"sources.collect lists {repeated[0]} twice: {section.collect}. List every source once.")
    hub_entries = hub.entries(section)  # checks all entries before any work
    with replaced_folder(output) as partial, open_index(partial) as index:
        if "chat" in section.collect:
            index.add_source("chat", chat.collect(section.chat), [], 0.0)
        if "folder" in section.collect:
            index.add_source(section.folder.name, _read_folder(section.folder, partial, index), [], 0.0)
        if "tars" in section.collect:
            _take_tars(section.tars, partial, index, num_processes)
        if "actions" in section.collect:
            _take_actions(section.actions, index)
        for entry in hub_entries:
            quarantined = []
            index.add_source(
                entry.dataset, hub.read(entry, partial, quarantined), quarantined, 1.0
            )  # hub.read checks its own limit
        if "procedural" in section.collect:
            name = WORLDS[section.procedural.world]
            index.add_source(name, _render(section.procedural, name, partial, num_processes), [], 0.0)
        return index.finish()


def _read_folder(section, partial: Path, index: IndexWriter) -> Iterator[RawSample]:
    content = folder.read(section.path, section.name, output=partial)
    index.add_unreferenced(section.name, content.unreferenced, Counter({"named in no row": len(content.unreferenced)}))
    index.add_ignored_columns(section.name, content.ignored_columns)
    yield from content.samples


def _take_tars(entries, partial: Path, index: IndexWriter, num_processes: int) -> None:
    if not entries:
        raise UserError("sources.collect lists tars, but sources.tars is empty. conf/data/tars.yaml shows an entry.")
    for entry in entries:
        quarantined = []
        samples = tars.read(entry, partial, quarantined, index.add_unreferenced, num_processes)
        index.add_source(entry.name, samples, quarantined, entry.max_quarantined)


def _take_actions(entries, index: IndexWriter) -> None:
    if not entries:
        raise UserError(
            "sources.collect lists actions, but sources.actions is empty. conf/data/actions.yaml shows entries."
        )
    for entry in entries:
        quarantined = []
        samples = actions.read(entry, quarantined, index.add_unreferenced)
        index.add_source(entry.name, samples, quarantined, entry.max_quarantined)


def _render(section, name: str, partial: Path, num_processes: int) -> Iterator[RawSample]:
    (partial / "procedural").mkdir()
    writer = {"digits": procedural, "objects": object_clips}[section.world]
    writer.write(partial / "procedural", section, num_processes)
    yield from folder.read(partial / "procedural", name, relative_to=Path(os.path.abspath(partial))).samples


def main():
    parser = argparse.ArgumentParser(description="Collect raw samples into data/raw.")
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--output", type=Path, default=Path("data/raw"))
    parser.add_argument(
        "--num-processes",
        type=int,
        default=min(len(os.sched_getaffinity(0)), 16),
        help="default: all cores, at most 16",
    )
    arguments = parser.parse_args()
    if arguments.num_processes < 1:
        parser.error(f"--num-processes is {arguments.num_processes}, expected at least 1")
    section = params.read(arguments.params, *PARAMS).sources
    summary = collect(section, arguments.output, arguments.num_processes)
    print_summary(arguments.output, summary)


if __name__ == "__main__":
    run_main(main)
