"""Where the numbers come from: files by their hashes, and commit and machine, which are facts of this place and moment
and go into report.html only."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from pipeline_steps.common.hashing import sha256_file


def git(root, *arguments):
    """The answer of git, or None where there is no git or no repository."""
    try:
        found = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip()


def commit(root):
    """(short hash or None, list of changed tracked files other than results)."""
    changed = git(root, "status", "--porcelain", "--untracked-files=no") or ""
    files = [line[2:].strip() for line in changed.split("\n") if line]
    return git(root, "rev-parse", "--short=12", "HEAD"), [
        name for name in files if not name.startswith(("reports/", "dvc.lock"))
    ]


def machine():
    """One line about the machine that wrote the report."""
    names = [line.partition(":")[2].strip() for line in read_lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [int(line.split()[1]) for line in read_lines("/proc/meminfo") if line.startswith("MemTotal")]
    cores = len(os.sched_getaffinity(0))
    parts = [names[0] if names else platform.processor() or platform.machine(), f"{cores} cores"]
    if memory:
        parts.append(f"{memory[0] / 2**20:.0f} GiB of memory")
    return ", ".join([*parts, platform.system(), f"Python {platform.python_version()}"])


def read_lines(path):
    return Path(path).read_text(encoding="utf-8").split("\n") if Path(path).exists() else []


def facts(root):
    """[(name, value)] of this place and moment."""
    head, changed = commit(root)
    state = "not a git repository" if head is None else head
    if changed:
        files = "1 changed file" if len(changed) == 1 else f"{len(changed)} changed files"
        state += f" with {files}: {', '.join(changed[:5])}{' ...' if len(changed) > 5 else ''}"
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    rows = [("commit", state), ("written", written), ("machine", machine())]
    lock = Path(root) / "dvc.lock"
    return [*rows, ("dvc.lock", sha256_file(lock))] if lock.exists() else rows


def origin(root, inputs):
    """[(name, value)] of the results: the same wherever and whenever the report is written."""
    found = inputs.current.result.provenance
    rows = [
        ("ablation, seed", f"{inputs.current.ablation}, {inputs.current.seed}"),
        ("torch, transformers", f"{found.get('torch')}, {found.get('transformers')}"),
        ("evaluated checkpoint", found.get("checkpoint_sha256")),
        ("shards manifest", found.get("shards_sha256")),
        ("tokens manifest", found.get("tokens_sha256")),
        ("parameters of the evaluation", found.get("parameters_sha256")),
    ]
    return [(name, str(value)) for name, value in rows]


def wall_times(inputs):
    """[(stage, time and throughput)] of the trainings that ran on this machine."""
    rows = []
    for stage, entry in inputs.timings.items():
        seconds = entry["seconds"]
        time = f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
        rows.append((stage, f"{time}, {entry['samples_per_second']:.0f} samples per second, {entry['device']}"))
    return rows
