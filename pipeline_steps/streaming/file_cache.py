"""Pieces of many large files, read by position, with a bounded number of them open."""

import os
import threading
from collections import OrderedDict

GAP = 2048  # bytes between two pieces that are read at once: more than a tar puts between two members


class OpenFiles:
    """Reads by `os.pread`, so that any number of threads share one open file. At most `limit` files stay open."""

    def __init__(self, limit: int = 128):
        self.limit = limit
        self._files: OrderedDict[str, _File] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: str, places: list[tuple[int, int]]) -> list[bytes]:
        """The pieces (offset, size) of a file. Neighbours, in this order, are read at once. OSError when the file
        cannot be read or ends before."""
        pieces: list[bytes] = []
        while len(pieces) < len(places):
            group = _neighbours(places[len(pieces) :])
            first, end = group[0][0], group[-1][0] + group[-1][1]
            file = self._open(path)  # held while it is read: see _File
            content = os.pread(file.descriptor, end - first, first)
            if len(content) < end - first:
                raise OSError(f"{path} ends {end - first - len(content)} bytes too early")
            pieces += [content[offset - first : offset - first + size] for offset, size in group]
        return pieces

    def _open(self, path: str) -> "_File":
        with self._lock:
            file = self._files.pop(path, None) or _File(path)
            self._files[path] = file  # the last one is the one used last
            if len(self._files) > self.limit:
                self._files.popitem(last=False)
        return file


def _neighbours(places: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The first places, up to one that does not follow within GAP bytes."""
    count = 1
    while count < len(places) and 0 <= places[count][0] - sum(places[count - 1]) <= GAP:
        count += 1
    return places[:count]


class _File:
    """Closed when nobody reads it any more: a thread that is reading keeps a file open that the others have dropped."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)
