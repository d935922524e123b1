"""Batches in order, prepared ahead in the background."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor


def prefetch(make: Callable, jobs: Iterable, ahead: int) -> Iterator:
    """make(job) for every job, in order, with up to `ahead` results prepared by a background thread.

    An error of `make` is raised where its result is due. `ahead` = 0 makes each result when it is asked for.
    """
    if ahead == 0:
        yield from map(make, jobs)
        return
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting: deque = deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(make, job))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
