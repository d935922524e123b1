"""Media of hub samples: find files below media_dir, and store embedded pictures in container files.

A container is a plain file of concatenated pictures; samples refer to their pictures by offset and size. A million
small pictures thus take a handful of files.
"""

import hashlib
import os
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.files import writable
from pipeline_steps.common.hashing import media_sha256

MAX_CONTAINER_BYTES = 10**9  # a new container is started before one exceeds this size
CACHE_SIZE = 16384  # recent media, so that several rows about one picture or video store or hash it only once


class MediaFolder:
    """Resolves file names below `folder`. `places`: its subfolders to search, in this order ("*": all)."""

    def __init__(self, folder: str, places: tuple[str, ...], where: str):
        root = Path(os.path.abspath(Path(folder).expanduser()))
        if not root.is_dir():
            problem = "is a file, not a folder" if root.exists() else "does not exist"
            raise UserError(f"{where}: media_dir {root} {problem}. Set it to the folder with the extracted media.")
        self._places = [place for pattern in places for place in self._expand(root, pattern)]
        self.describe = lru_cache(CACHE_SIZE)(_describe)

    @staticmethod
    def _expand(root: Path, pattern: str) -> list[Path]:
        if pattern != "*":
            return [root / pattern]
        return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))

    def find(self, names: tuple[str, ...], folders: bool) -> Path | None:
        """Return the first existing path of `names` in the places. `folders`: folders of frames count as well."""
        paths = (place / name for name in names for place in self._places)
        return next((path for path in paths if path.is_file() or (folders and path.is_dir())), None)


def _describe(path: Path) -> tuple[str, int]:
    """Return (sha256, size in bytes) of a file or of a folder of pictures."""
    files = [entry for entry in path.iterdir() if entry.is_file()] if path.is_dir() else [path]
    return media_sha256(path), sum(file.stat().st_size for file in files)


class Container:
    """Stores embedded pictures in `folder`/00000.bin, 00001.bin ...; paths are relative to `relative_to`."""

    def __init__(self, folder: Path, relative_to: Path):
        self._folder, self._relative_to = folder, relative_to
        self._file, self._number, self._end = None, 0, 0
        self._known: OrderedDict[tuple, tuple] = OrderedDict()

    def add(self, pictures: tuple[bytes, ...]) -> tuple[str, tuple[tuple[int, int], ...], str]:
        """Store the pictures of one sample. Returns (path, parts as (offset, size), hashing.media_sha256)."""
        digest = hashlib.sha256()
        for picture in pictures:
            digest.update(picture)
        identity = (digest.digest(), *map(len, pictures))
        if identity in self._known:
            self._known.move_to_end(identity)
        else:
            self._known[identity] = self._write(pictures)
            if len(self._known) > CACHE_SIZE:
                self._known.popitem(last=False)
        return *self._known[identity], digest.hexdigest()

    def _write(self, pictures):
        with writable(self._folder):
            if self._file is None or (self._end and self._end + sum(map(len, pictures)) > MAX_CONTAINER_BYTES):
                self._open_next()
            parts = []
            for picture in pictures:
                self._file.write(picture)
                parts.append((self._end, len(picture)))
                self._end += len(picture)
        return str(Path(self._file.name).relative_to(self._relative_to)), tuple(parts)

    def _open_next(self):
        self.close()
        self._folder.mkdir(parents=True, exist_ok=True)
        while (path := self._folder / f"{self._number:05d}.bin").exists():  # written by another entry with this source
            self._number += 1
        self._file, self._end = open(path, "xb"), 0  # noqa: SIM115 - closed by close()

    def close(self):
        if self._file is not None:
            with writable(self._folder):
                self._file.close()
            self._file = None
