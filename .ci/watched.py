"""Run a command, show what it prints, and stop it when its time is over or when it has been silent for too long.

WATCHED_SECONDS holds both numbers. No test may take longer than 15 minutes, and each of the two test processes names
the test it starts: a longer silence means that both stand still. Stacks and the threads that were awake are printed
then. The memory of the largest process is the last line. Exit codes: the command's, 124 after its time, 125 after the
silence.
"""

import contextlib
import math
import os
import resource
import selectors
import signal
import subprocess
import sys
import time

TOTAL, SILENCE = (float(seconds) for seconds in os.environ.get("WATCHED_SECONDS", "2400 960").split())
TABLE = ["ps", "-eLo", "pid,tid,stat,cls,ni,etimes,time,wchan:24,args", "--sort=-time", "--cols", "160"]


def main(command: list[str]) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        code = follow(process, TOTAL, SILENCE)
        if code:
            table = threads()
            send(process, signal.SIGABRT)  # pytest prints the stack of every thread
            follow(process, 30, math.inf)
            why = f"still running after {TOTAL:.0f} s" if code == 124 else f"nothing was printed for {SILENCE:.0f} s"
            print(f"\nstopped: {why}. {table}", flush=True)
        else:
            code = process.wait()
    finally:
        send(process, signal.SIGKILL)  # what is left of it
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)  # its memory counts then
    print(f"largest process: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024:.0f} MiB", flush=True)
    return code if code >= 0 else 128 - code


def follow(process: subprocess.Popen, total: float, silence: float) -> int | None:
    """Shows the output until the command ends (None) or must be stopped (124 or 125, as above).

    Seconds in which this process did not run, because the machine was paused, are not counted.
    """
    selector = selectors.DefaultSelector()
    selector.register(process.stdout, selectors.EVENT_READ)
    running = quiet = 0.0
    before = time.monotonic()
    while True:
        ended = process.poll() is not None  # a process it has left may hold the pipe: only what is there is read
        printed = selector.select(0 if ended else 1)
        now = time.monotonic()
        passed, before = min(now - before, 5), now
        running += passed
        quiet = 0.0 if printed else quiet + passed
        if printed:
            text = os.read(process.stdout.fileno(), 1 << 16)
            if not text:
                return None
            sys.stdout.buffer.write(text)
            sys.stdout.buffer.flush()
        elif ended:
            return None
        if running > total:
            return 124
        if quiet > silence:
            return 125


def threads() -> str:
    """Load, number of threads, and those of them that run, may run or wait for a device."""
    try:
        header, *rows = subprocess.run(TABLE, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"What was awake is not known, for want of ps: {error}"
    awake = [row for row in rows if row.split()[2][0] in "RD"]
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return "\n".join([f"Load {load}; {len(awake)} of {len(rows)} threads were awake:", header, *awake[:40]])


def send(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
