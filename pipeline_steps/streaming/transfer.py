"""Reads the output of a command with limits on memory and time, and counts what was transferred."""

import os
import select
import signal
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field

STALL_SECONDS = 60.0  # waiting time after which the speed is judged
MIN_SPEED = 1_000  # bytes per second of waiting, below which a transfer fails
CHUNK = 2**18  # bytes


class TransferError(OSError):
    """A transfer that failed, was too slow or too large."""


@dataclass
class Transfers:
    """Counts of all transfers of a data set. Threads may share it."""

    attempts: int = 0
    failures: int = 0
    retries: int = 0
    num_bytes: int = 0
    seconds: float = 0.0  # spent waiting for data
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, **numbers: float) -> None:
        with self._lock:
            for name, number in numbers.items():
                setattr(self, name, getattr(self, name) + number)

    def summary(self) -> dict[str, float]:
        """Return the counts, the share of attempts that succeeded, and megabytes per second of waiting."""
        return {
            "attempts": self.attempts,
            "failures": self.failures,
            "retries": self.retries,
            "success_rate": round(1 - self.failures / self.attempts, 4) if self.attempts else 1.0,
            "megabytes": round(self.num_bytes / 1e6, 3),
            "megabytes_per_second": round(self.num_bytes / 1e6 / max(self.seconds, 1e-9), 3),
        }


class Command:
    """A file object with the output of a shell command, and a context manager that ends the command.

    Only the time that `read` waits counts for the speed, so a reader that pauses loses no connection. `read` raises
    TransferError if the transfer is slower than MIN_SPEED over STALL_SECONDS, or longer than `limit` bytes, or if the
    command fails.
    """

    def __init__(self, command: str, transfers: Transfers, limit: int | None = None):
        self.transfers, self.limit = transfers, limit
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (a pipe could fill up, and the command would wait)
        self._process = subprocess.Popen(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
            bufsize=0,
        )
        self._total = 0
        self._waited, self._received = 0.0, 0  # since the speed was last judged

    def read(self, size: int = -1) -> bytes:
        """Return `size` bytes (-1: all), fewer only at the end of the output."""
        parts, left = [], size
        while left != 0:
            piece = self._piece(CHUNK if left < 0 else min(left, CHUNK))
            if piece is None:  # nothing has come yet
                continue
            if not piece:
                break
            parts.append(piece)
            left -= len(piece) if left > 0 else 0
        return b"".join(parts)

    def _piece(self, size: int) -> bytes | None:
        output, started = self._process.stdout, time.monotonic()
        ready, _, _ = select.select([output], [], [], max(STALL_SECONDS - self._waited, 0.001))
        piece = os.read(output.fileno(), size) if ready else b""
        seconds = time.monotonic() - started
        self.transfers.add(seconds=seconds, num_bytes=len(piece))
        self._waited, self._received = self._waited + seconds, self._received + len(piece)
        self._total += len(piece)
        if self.limit is not None and self._total > self.limit:
            raise TransferError(f"longer than {self.limit:,} bytes")
        if self._waited >= STALL_SECONDS:
            if self._received < MIN_SPEED * self._waited:
                speed = self._received / self._waited
                raise TransferError(
                    f"too slow: {speed:,.0f} bytes/s over {self._waited:.0f} s, at least {MIN_SPEED:,} are needed"
                )
            self._waited, self._received = 0.0, 0
        if ready and not piece:
            self._check_exit()
        return piece if ready else None

    def _check_exit(self) -> None:
        code = self._process.wait()
        if code:
            self._errors.seek(0)
            text = self._errors.read(2_000).decode(errors="replace").strip()
            raise TransferError(text or f"exit code {code}")

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the command and all processes that it has started."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.stdout.close()
        self._process.wait()
        self._errors.close()
