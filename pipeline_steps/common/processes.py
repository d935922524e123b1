"""Work in other processes of this machine. They end with the process that starts them, however it ends.

Nothing is forked: a fork copies the locks that other threads hold at that moment, and the child then waits for them
for ever.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial

from pipeline_steps.common.errors import UserError

# Asks the kernel (Linux) for SIGKILL at the parent's death, then becomes the command. Not SIGTERM: its handler in
# Snakemake takes a lock that the interrupted thread may hold, and then deadlocks.
_BOUND = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def ends_with_this_process(command: Sequence) -> list[str]:
    """The command line that runs `command` (its process id stays the same) until this process ends (Linux)."""
    return [sys.executable, "-I", "-S", "-c", _BOUND, str(os.getpid()), *map(str, command)]


def map_in_processes(
    work: Callable,
    jobs: Sequence,
    num_processes: int,
    advice: str,
    start: Callable[[], None] | None = None,
    chunksize: int = 1,
) -> Iterator:
    """Yield work(job) of every job, in order.

    With one process or one job the work is done in this process. start: called once in every process that works. If a
    job fails, or the iteration ends early, the processes are ended at once.
    `work`, `start` and the jobs have to be picklable, and importable from a module other than `__main__`. UserError,
    with `advice` on what to do, if a process is killed.
    """
    if num_processes < 1:
        raise UserError(f"the number of processes is {num_processes}, expected at least 1")
    num_processes = min(num_processes, len(jobs))
    if num_processes <= 1:
        if start is not None:
            start()
        yield from map(work, jobs)
        return
    pool = ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn"), _bind, (os.getpid(), start))
    earlier = set(multiprocessing.active_children())
    try:
        yield from pool.map(partial(_run, work), jobs, chunksize=chunksize)
    except BrokenProcessPool:
        raise UserError(
            f"one of {num_processes} processes was killed, probably for lack of memory (if it could not start, the "
            f"reason is above). {advice}"
        ) from None
    except BaseException:
        for process in set(multiprocessing.active_children()) - earlier:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_start: Callable[[], None] | None = None  # still to be called in this process


def _bind(parent: int, start: Callable[[], None] | None) -> None:
    global _start
    _start = start  # not called here: errors of a pool's initializer do not reach the parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and stops its workers
    if sys.platform == "linux":  # orphans would go on writing after the lock of the output is free
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # other workers use the remaining cores


def _run(work: Callable, job):
    global _start
    if _start is not None:
        _start()
        _start = None
    return work(job)
