"""Read pieces of many large files by offset, with a limited number of open files."""

import os
import threading
from collections import OrderedDict

GAP = 2048  # largest gap in bytes between pieces read together; tar members are closer


class FileCache:
    """An LRU cache of open files. Reads use `os.pread`, so threads can share files. At most `limit` files stay open."""

    def __init__(self, limit: int = 128):
        self.limit = limit
        self._files: OrderedDict[str, _File] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: str, places: list[tuple[int, int]]) -> list[bytes]:
        """Read the pieces (offset, size) of a file. Adjacent pieces are read with one call.

        Raises OSError if the file cannot be read or is too short.
        """
        pieces: list[bytes] = []
        while len(pieces) < len(places):
            group = _neighbours(places[len(pieces) :])
            first, end = group[0][0], group[-1][0] + group[-1][1]
            file = self._open(path)  # this reference keeps it open during the read
            content = os.pread(file.descriptor, end - first, first)
            if len(content) < end - first:
                raise OSError(f"{path} ends {end - first - len(content)} bytes too early")
            pieces += [content[offset - first : offset - first + size] for offset, size in group]
        return pieces

    def _open(self, path: str) -> "_File":
        with self._lock:
            file = self._files.pop(path, None) or _File(path)
            self._files[path] = file  # most recently used last
            if len(self._files) > self.limit:
                self._files.popitem(last=False)
        return file


def _neighbours(places: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the leading places whose gaps are at most GAP bytes."""
    count = 1
    while count < len(places) and 0 <= places[count][0] - sum(places[count - 1]) <= GAP:
        count += 1
    return places[:count]


class _File:
    """An open file, closed when the last reference is gone; a reading thread keeps an evicted file open."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)
