"""An ordered parallel map with a limit on the memory of prefetched results."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

END = object()


def map_ordered(
    make: Callable,
    jobs: Iterable,
    *,
    num_workers: int,
    size_of: Callable[[object], int],
    limit: int,
    fetch: Callable | None = None,
) -> Iterator:
    """Yield make(job) for every job, in order, computed ahead by `num_workers` threads.

    Pending results take at most `limit` bytes according to `size_of(job)`, but one is always allowed. fetch: runs in
    its own thread, in the order of the jobs; `make` receives its result instead of the job. An error is raised in place
    of its result. With 0 workers, results are computed on demand. Closing the iterator stops the threads.
    """
    if num_workers == 0:
        for job in jobs:
            yield make(job if fetch is None else fetch(job))
        return
    with ExitStack() as stack:
        fetcher = None if fetch is None else stack.enter_context(ThreadPoolExecutor(1, "fetch"))
        pool = stack.enter_context(ThreadPoolExecutor(num_workers, "decode"))
        for one in (pool, fetcher):
            if one is not None:
                stack.callback(one.shutdown, wait=False, cancel_futures=True)

        def submit(job: object) -> Future:
            if fetcher is None:
                return pool.submit(make, job)
            fetched = fetcher.submit(fetch, job)
            return pool.submit(lambda: make(fetched.result()))

        yield from _in_order(submit, iter(jobs), size_of, limit)


def _in_order(submit: Callable, jobs: Iterator, size_of: Callable, limit: int) -> Iterator:
    """Yield the results of all jobs; jobs are submitted ahead as long as they fit into `limit` bytes."""
    waiting: deque = deque()  # (future, bytes)
    held, job = 0, next(jobs, END)
    while True:
        for due in (True, False):  # submit, take the first result, and submit again before yielding it
            while job is not END and (not waiting or held + size_of(job) <= limit):
                waiting.append((submit(job), size_of(job)))
                held, job = held + waiting[-1][1], next(jobs, END)
            if due and not waiting:
                return
            if due:
                future, size = waiting.popleft()
                result, held = future.result(), held - size
        yield result
