"""Pieces of many large files, read by position, with a bounded number of them open."""

import os
import threading
from collections import OrderedDict
from pathlib import Path


class OpenFiles:
    """Reads by `os.pread`, so that any number of threads share one open file. At most `limit` files stay open."""

    def __init__(self, limit: int = 128):
        self.limit = limit
        self._files: OrderedDict[Path, _File] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on. OSError when the file cannot be read or ends before."""
        file = self._open(path)  # held while it is read: see _File
        content = os.pread(file.descriptor, size, offset)
        if len(content) < size:
            raise OSError(f"{path} ends {size - len(content)} bytes too early")
        return content

    def _open(self, path: Path) -> "_File":
        with self._lock:
            file = self._files.pop(path, None) or _File(path)
            self._files[path] = file  # the last one is the one used last
            if len(self._files) > self.limit:
                self._files.popitem(last=False)
        return file


class _File:
    """Closed when nobody reads it any more: a thread that is reading keeps a file open that the others have dropped."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)
