"""A pool of reusable memory for large arrays: new pages from the system cost about as much time as filling them."""

import math
import threading

import numpy as np


class BufferPool:
    """Allocates arrays whose memory returns to the pool once the array and all its views and tensors are deleted.

    Keeps at most `limit` bytes of unused memory.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._idle: dict[int, list[np.ndarray]] = {}  # by size
        self._bytes = 0  # in _idle
        self._lock = threading.RLock()  # an array may be deleted in the thread that allocates another one

    def empty(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """Return an uninitialised array, like `np.empty`."""
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

    def release(self, buffer: np.ndarray) -> None:
        """Return the memory of a deleted array to the pool."""
        with self._lock:
            if self._bytes + len(buffer) > self.limit:  # most likely sizes that are no longer used
                self._idle, self._bytes = {}, 0
            if len(buffer) <= self.limit:
                self._idle.setdefault(len(buffer), []).append(buffer)
                self._bytes += len(buffer)


class _Loan:
    """The `base` of an array: deleted together with the last array, view or tensor that uses its memory."""

    def __init__(self, pool: BufferPool, buffer: np.ndarray, array: np.ndarray):
        self.pool, self.buffer, self.__array_interface__ = pool, buffer, array.__array_interface__

    def __del__(self):
        self.pool.release(self.buffer)


def _rounded(num_bytes: int) -> int:
    """Round up by at most an eighth, so that few distinct sizes occur."""
    step = 1 << max(num_bytes.bit_length() - 4, 0)
    return -(-num_bytes // step) * step
