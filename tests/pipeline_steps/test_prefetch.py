"""Background work: results in order, errors in their place, memory within its bound, no thread left behind."""

import threading
import time

import pytest

from pipeline_steps.streaming.prefetch import map_ordered


def settings(num_workers, limit=10**9, size=1):
    return {"num_workers": num_workers, "limit": limit, "size_of": lambda job: size}


@pytest.mark.parametrize("num_workers", [0, 1, 2, 4, 50])
def test_results_and_errors_keep_the_order_of_jobs(num_workers):
    def square(number):
        time.sleep(0.001 * (number % 3))
        return number * number

    assert list(map_ordered(square, range(20), **settings(num_workers))) == [n * n for n in range(20)]
    assert list(map_ordered(square, [], **settings(num_workers))) == []
    served = map_ordered(lambda n: 12 // (3 - n), range(10), **settings(num_workers))
    assert [next(served) for _ in range(3)] == [4, 6, 12]
    with pytest.raises(ZeroDivisionError):
        next(served)


class Counting:
    """Jobs are sizes; knows the most bytes that were in flight: submitted and not handed out."""

    def __init__(self):
        self.lock, self.held, self.most, self.made = threading.Lock(), 0, 0, 0

    def make(self, size):
        with self.lock:
            self.held += size
            self.made += 1
            self.most = max(self.most, self.held)
        return size

    def used(self, size):
        with self.lock:
            self.held -= size


@pytest.mark.parametrize("limit", [1, 40, 100, 1_000])
def test_prefetched_memory_stays_within_the_limit(limit):
    sizes, counting = [5, 30, 10, 40, 100, 1, 1, 1, 25] * 20, Counting()
    served = map_ordered(counting.make, sizes, num_workers=4, limit=limit, size_of=lambda size: size)
    for size in served:
        time.sleep(0.001)  # the workers make what they may meanwhile
        counting.used(size)
    assert counting.made == len(sizes)
    assert counting.held == 0
    assert counting.most <= max(limit, 100) + 100  # what is in use counts beside it: at most one
    if limit == 1_000:
        assert counting.most > 500  # it does work ahead


def test_result_larger_than_the_limit_is_made_alone():
    counting = Counting()
    served = map_ordered(counting.make, [50] * 6, num_workers=4, limit=10, size_of=lambda size: size)
    for size in served:
        time.sleep(0.02)
        assert counting.held <= 2 * size  # the one in use and the next
        counting.used(size)


@pytest.mark.parametrize("fetch", [None, lambda job: job])
def test_closing_early_leaves_no_threads(fetch):
    before = threading.active_count()
    served = map_ordered(lambda n: time.sleep(0.002) or n, range(10_000), fetch=fetch, **settings(3))
    assert [next(served) for _ in range(3)] == [0, 1, 2]
    assert threading.active_count() > before
    served.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("num_workers", [0, 1, 4])
def test_fetch_runs_in_order_in_one_thread(num_workers):
    fetched, threads = [], set()

    def fetch(job):
        fetched.append(job)
        threads.add(threading.get_ident())
        if job == 30:
            raise OSError("gone")
        return job * 2

    served = map_ordered(lambda value: value + 1, range(40), fetch=fetch, **settings(num_workers))
    assert [next(served) for _ in range(30)] == [2 * n + 1 for n in range(30)]
    with pytest.raises(OSError, match="gone"):
        next(served)
    assert fetched[:31] == list(range(31))
    assert len(threads) == 1
