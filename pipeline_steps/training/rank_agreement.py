"""Checks before the first step that all ranks of a run do the same work.

Ranks that differ in parameters, data or code would train a mixture of two runs silently, or wait for each other forever
because one of them has more steps. Every rank describes its work as {key: value}; all ranks compare all descriptions.
"""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from pipeline_steps.common.errors import UserError, listing
from pipeline_steps.common.hashing import sha256_file
from pipeline_steps.training.checkpoint_io import LIBRARIES, ROOT, code_files
from pipeline_steps.training.distributed import DistributedContext

COLLECTIVE = ("checkpoint_every", "log_every", "heatmaps_every", "num_heatmap_clips")  # of `runtime`: when ranks meet
MAX_LISTED = 10  # differences in a message
ABSENT = "absent"
Result = TypeVar("Result")


def together(group: DistributedContext, prepare: Callable[[], tuple[Result, dict[str, object]]]) -> Result:
    """Runs `prepare` on every rank and returns this rank's result.

    prepare: returns (result, description of the work), and must not communicate with other ranks. UserError on every
    rank if it fails on one of them or if the descriptions differ, so no rank waits for one that has stopped.
    """
    if group.world_size == 1:
        return prepare()[0]
    try:
        result, own = prepare()
    except Exception as problem:
        group.gather(({}, f"{problem}"))  # the other ranks stop, too
        raise
    entries = group.gather((own, None))
    failed = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(entries) if text is not None]
    if failed:
        raise UserError(f"rank {group.rank} stops because another rank failed. {' '.join(failed)}")
    compare([description for description, _ in entries])
    return result


def compare(descriptions: list[dict[str, object]]) -> None:
    """UserError that names every rank and key whose value differs from rank 0's, with both values."""
    first, lines = descriptions[0], []
    for rank, other in enumerate(descriptions[1:], start=1):
        for key in sorted(first.keys() | other.keys()):
            one, two = first.get(key, ABSENT), other.get(key, ABSENT)
            if one != two:
                lines.append(f"{key}: rank 0 has {one!r}, rank {rank} has {two!r}")
    if lines:
        raise UserError(
            f"the ranks of this run differ in {len(lines)} value(s):\n{listing(lines[:MAX_LISTED], len(lines))}\n"
            "Start all processes with the same params.yaml, data and code (one commit, one shared disk or equal "
            "copies)."
        )


def describe(parameters, inputs: list[Path]) -> dict[str, object]:
    """{key: value} of parameters, input files (those that the run starts from), code and library versions."""
    values = flat(parameters.as_dict())
    values |= {f"runtime.{name}": getattr(parameters.runtime, name) for name in COLLECTIVE}
    values |= {f"file {path}": short_hash(path) for path in inputs}
    values |= {f"code {path.relative_to(ROOT)}": short_hash(path) for path in code_files()}
    return values | {f"version of {name}": version(name) for name in LIBRARIES}


def describe_data(run) -> dict[str, object]:
    """{key: value} of the data and of the order in which the TrainContext reads them."""
    return {
        "training data": run.train.fingerprint,
        "validation data": run.validation.fingerprint,
        "order of the samples": run.stage_plan.plan.fingerprint,
        "number of steps": run.stage_plan.plan.num_steps,
    }


def flat(values: dict, prefix: str = "") -> dict[str, object]:
    """{dotted key: value} of nested dicts."""
    found = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def short_hash(path: Path) -> str:
    return sha256_file(path)[:12]
