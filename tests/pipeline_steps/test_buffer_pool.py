"""Memory that is used again: only when nothing refers to it any more."""

import gc
import threading

import numpy as np
import pytest
import torch

from pipeline_steps.streaming.buffer_pool import BufferPool, _rounded


def address(array):
    return array.__array_interface__["data"][0]


def test_memory_is_reused_after_the_array_is_deleted():
    pool = BufferPool(10**6)
    one = pool.empty((100, 7), np.float32)
    assert (one.shape, one.dtype, one.flags.writeable, one.flags.c_contiguous) == ((100, 7), np.float32, True, True)
    first = address(one)
    other = pool.empty((100, 7), np.float32)
    assert address(other) != first
    del one
    assert address(pool.empty((10, 70), np.int32)) == first


@pytest.mark.parametrize(
    "view",
    [
        lambda array: array[3:],
        lambda array: array.T[1:, ::2],
        lambda array: array.reshape(-1)[5:].view(np.uint8)[7:],
        torch.from_numpy,
        lambda array: torch.from_numpy(array)[2:].numpy()[1:],
        lambda array: memoryview(array),
    ],
)
def test_memory_is_not_reused_while_a_view_or_tensor_exists(view):
    pool = BufferPool(10**6)
    array = pool.empty((10, 8), np.float32)
    array[:] = np.arange(80).reshape(10, 8)
    first, kept = address(array), view(array)
    before = np.asarray(kept).copy()
    del array
    gc.collect()
    for _ in range(3):
        other = pool.empty((10, 8), np.float32)
        assert address(other) != first
        other[:] = -1
    assert np.array_equal(np.asarray(kept), before)
    del kept, other
    gc.collect()
    assert first in {address(array) for array in [pool.empty((10, 8), np.float32) for _ in range(4)]}


def test_idle_memory_is_limited():
    pool = BufferPool(1_000)
    for size in (300, 400, 500, 600, 2_000):
        arrays = [pool.empty((size,), np.uint8) for _ in range(3)]
        del arrays
        assert sum(len(buffer) for idle in pool._idle.values() for buffer in idle) == pool._bytes <= 1_000


def test_empty_arrays_are_supported():
    assert BufferPool(10).empty((0, 3, 1, 1), np.float32).shape == (0, 3, 1, 1)


def test_sizes_are_rounded_up_by_at_most_an_eighth():
    for size in [*range(1, 500), 10**6 + 7, 77 * 2**20 + 1]:
        assert size <= _rounded(size) <= size * 1.125 + 1
    assert len({_rounded(size) for size in range(2**20, 2**21)}) <= 9


def test_threads_never_share_memory():
    pool, wrong = BufferPool(10**5), []

    def work(mark):
        rng = np.random.default_rng(mark)
        for _ in range(500):
            array = pool.empty((int(rng.integers(1, 60)), 5), np.int64)
            array[:] = mark
            if not (array == mark).all():
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
