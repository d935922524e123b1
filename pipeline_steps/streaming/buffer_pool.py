"""Large arrays whose memory is used again: clean pages from the system cost about as much time as filling them."""

import math
import threading

import numpy as np


class Pool:
    """Gives arrays whose memory comes back when neither the array nor a view or tensor of it is left.

    At most `limit` bytes that nobody uses are kept.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._idle: dict[int, list[np.ndarray]] = {}  # by size
        self._bytes = 0  # in _idle
        self._lock = threading.RLock()  # an array may end in the same thread while another one is taken

    def empty(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """An array with any content, as of `np.empty`."""
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        if num_bytes == 0:
            return np.empty(shape, dtype)
        buffer = self._take(_rounded(num_bytes))
        return np.asarray(_Loan(self, buffer, buffer[:num_bytes].view(dtype).reshape(shape)))

    def _take(self, size: int) -> np.ndarray:
        with self._lock:
            idle = self._idle.get(size)
            if idle:
                self._bytes -= size
                return idle.pop()
        return np.empty(size, np.uint8)

    def give_back(self, buffer: np.ndarray) -> None:
        with self._lock:
            if self._bytes + len(buffer) > self.limit:  # most likely of sizes that are not asked for any more
                self._idle, self._bytes = {}, 0
            if len(buffer) <= self.limit:
                self._idle.setdefault(len(buffer), []).append(buffer)
                self._bytes += len(buffer)


class _Loan:
    """Owner of an array's memory in NumPy's eyes: it ends with the last array, view or tensor that uses it."""

    def __init__(self, pool: Pool, buffer: np.ndarray, array: np.ndarray):
        self.pool, self.buffer, self.__array_interface__ = pool, buffer, array.__array_interface__

    def __del__(self):
        self.pool.give_back(self.buffer)


def _rounded(num_bytes: int) -> int:
    """Up to an eighth more, so that few sizes occur."""
    step = 1 << max(num_bytes.bit_length() - 4, 0)
    return -(-num_bytes // step) * step
