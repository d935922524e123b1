"""List the files of a folder, linked folders included."""

import os
from collections.abc import Iterator
from pathlib import Path

from pipeline_steps.common.errors import UserError


def walk(root: str | Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """os.walk in sorted order that follows links, but enters no folder twice.

    Raises UserError for a folder that cannot be read, so that its files are not missed.
    """
    visited = set()
    for parent, folders, names in os.walk(root, followlinks=True, onerror=_refuse):
        real = os.path.realpath(parent)
        if real in visited:  # another link, or a link back
            folders[:] = []
            continue
        visited.add(real)
        folders.sort()
        yield parent, folders, sorted(names)


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read ({error.strerror}). Change its permissions, or move it away.")
