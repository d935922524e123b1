"""Work in the background whose results come in order, with a bound on the memory that finished results hold."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

END = object()


def ordered(
    make: Callable,
    jobs: Iterable,
    *,
    num_workers: int,
    size_of: Callable[[object], int],
    limit: int,
    fetch: Callable | None = None,
) -> Iterator:
    """make(job) for every job, in order, made by `num_workers` threads ahead of the one who asks.

    Results that are made or being made and not handed out yet have `limit` bytes at most, by `size_of(job)`; one is
    always allowed. `fetch`: what must happen in the order of the jobs, in one thread of its own; `make` gets its
    result in place of the job. An error is raised where its result is due. No workers: each result is made when it is
    asked for. Closing the iterator ends the threads.
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
    """The results of all jobs, of which as many are submitted ahead as fit into `limit` bytes."""
    waiting: deque = deque()  # (future, bytes)
    held, job = 0, next(jobs, END)
    while True:
        for due in (True, False):  # fill up, take the first result, and fill up before it is used
            while job is not END and (not waiting or held + size_of(job) <= limit):
                waiting.append((submit(job), size_of(job)))
                held, job = held + waiting[-1][1], next(jobs, END)
            if due and not waiting:
                return
            if due:
                future, size = waiting.popleft()
                result, held = future.result(), held - size
        yield result
