"""What the trace of launches takes for a wait of the host (tests/model/launches.py)."""

import numpy as np
import pytest
import torch

from tests.model.launches import Launches

VALUES = torch.arange(6.0)
MASK = VALUES > 2
REPEATS = torch.tensor([1, 2, 0, 1, 1, 1])
PLACE = torch.tensor(2)
WAITS = {
    "item": lambda: PLACE.item(),
    "int": lambda: int(PLACE),
    "bool": lambda: bool(PLACE),
    "range": lambda: range(PLACE),
    "slice": lambda: VALUES[:PLACE],
    "tolist": lambda: VALUES.tolist(),
    "cpu": lambda: VALUES.cpu(),
    "numpy": lambda: VALUES.numpy(),
    "asarray": lambda: np.asarray(VALUES),
    "to": lambda: VALUES.to("cpu"),
    "to device=": lambda: VALUES.to(device="cpu", non_blocking=True),
    "mask": lambda: VALUES[MASK],
    "mask of an axis": lambda: VALUES.view(1, 6)[:, MASK],
    "write by mask": lambda: VALUES.clone().index_put_((MASK,), torch.ones(3)),
    "masked_select": lambda: VALUES.masked_select(MASK),
    "where": lambda: torch.where(MASK),
    "nonzero": lambda: MASK.nonzero(),
    "argwhere": lambda: torch.argwhere(MASK),
    "repeat_interleave": lambda: VALUES.repeat_interleave(REPEATS),
    "unique": lambda: VALUES.unique(),
    "unique of an axis": lambda: VALUES.view(2, 3).unique(dim=0),
    "unique_consecutive": lambda: VALUES.unique_consecutive(),
    "bincount": lambda: REPEATS.bincount(),
    "equal": lambda: torch.equal(VALUES, VALUES),
    "allclose": lambda: torch.allclose(VALUES, VALUES),
}
NO_WAITS = {
    "where of three": lambda: torch.where(MASK, VALUES, -VALUES),
    "masked_fill": lambda: VALUES.masked_fill(MASK, 0),
    "index": lambda: VALUES[REPEATS],
    "repeat_interleave of a known size": lambda: VALUES.repeat_interleave(REPEATS, output_size=6),
    "repeat_interleave by a number": lambda: VALUES.repeat_interleave(2),
    "nonzero_static": lambda: torch.nonzero_static(MASK, size=3),
    "to a dtype": lambda: VALUES.to(torch.float64),
}


@pytest.mark.parametrize("call", WAITS.values(), ids=WAITS)
def test_a_wait_is_counted(call):
    with Launches() as launches:
        call()
    assert len(launches.waits) == 1


@pytest.mark.parametrize("call", NO_WAITS.values(), ids=NO_WAITS)
def test_other_calls_are_not(call):
    with Launches() as launches:
        call()
    assert launches.waits == []
    assert launches.count >= 1


def test_nothing_is_counted_outside():
    with Launches() as launches:
        pass
    VALUES.tolist()
    PLACE.item()
    assert (launches.count, launches.waits) == (0, [])
