"""Ranks of one run refuse to train if their parameters, data, code or devices differ."""

import shutil
import time
from threading import Thread

import pytest
from torch import distributed

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.params import ROOT
from pipeline_steps.training import rank_agreement
from pipeline_steps.training.distributed import DistributedContext, compare_start
from tests import pipeline


def test_differences_name_the_rank_the_key_and_both_values():
    equal = {"training.common.batch_size": 8, "file a": "12"}
    rank_agreement.compare([equal, dict(equal), dict(equal)])
    with pytest.raises(UserError) as error:
        rank_agreement.compare([equal, dict(equal), {"training.common.batch_size": 4, "code b.py": "34"}])
    message = str(error.value)
    assert "differ in 3 value(s)" in message
    assert "training.common.batch_size: rank 0 has 8, rank 2 has 4" in message
    assert "code b.py: rank 0 has 'absent', rank 2 has '34'" in message
    assert "rank 1" not in message


def test_code_and_data_are_part_of_the_description():
    class Parameters:
        runtime = pipeline.params.read(ROOT / "params.yaml").runtime

        @staticmethod
        def as_dict():
            return {"training": {"common": {"batch_size": 8}}}

    found = rank_agreement.describe(Parameters, [ROOT / "params.yaml"])
    assert found["training.common.batch_size"] == 8
    assert f"file {ROOT / 'params.yaml'}" in found
    assert "code model/queries.py" in found
    assert found["runtime.checkpoint_every"] == Parameters.runtime.checkpoint_every
    assert "version of torch" in found


class Ranks(DistributedContext):
    """Two ranks whose other one contributes a fixed value."""

    def gather(self, value):
        return [value, self.other]


def test_an_error_of_another_rank_stops_this_one():
    group = Ranks(0, 2)
    object.__setattr__(group, "other", ({}, "data/tokens/manifest.json: missing"))
    with pytest.raises(UserError, match=r"another rank failed. rank 1: data/tokens/manifest\.json"):
        rank_agreement.together(group, lambda: (1, {}))


def test_a_rank_tells_the_others_before_it_raises():
    group, told = Ranks(0, 2), []
    object.__setattr__(group, "other", ({}, None))
    object.__setattr__(group, "gather", lambda value: told.append(value) or [value, ({}, None)])

    def fail():
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        rank_agreement.together(group, fail)
    assert told == [({}, "'lost'")]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"device": "cuda"}, "rank 0: cpu, rank 1: cuda"),
        ({"error": "params.yaml: cannot be read"}, "rank 1: params.yaml: cannot be read"),
    ],
)
def test_ranks_on_different_devices_or_failed_ones_stop_all(second, message):
    store, errors = distributed.HashStore(), []

    def join(rank, own):
        try:
            compare_start(store, rank, 2, own)
        except UserError as error:
            errors.append(str(error))

    threads = [Thread(target=join, args=pair) for pair in enumerate(({"device": "cpu"}, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(errors) == 2
    assert all(message in error for error in errors)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "damage", "message"),
    [
        (("training.stage1.learning_rate.connector=0.5",), None, "training.stage1.learning_rate.connector: rank 0 has"),
        (("+training.stage1.nonsense=1",), None, "nonsense: unknown key"),
        (("training.common.batch_size=4",), None, "training.common.batch_size: rank 0 has 8, rank 1 has 4"),
        ((), "data/tokens/manifest.json", "file data/tokens/manifest.json: rank 0 has"),
        ((), "missing", "data/tokens/manifest.json: missing"),
    ],
    ids=["rate", "unknown key", "batch size", "data", "missing data"],
)
def test_ranks_that_differ_stop_before_the_first_step(finished_run, tmp_path, overrides, damage, message):
    one, other = tmp_path / "one", tmp_path / "other"
    for place, changes in ((one, ()), (other, overrides)):
        place.mkdir()
        pipeline.write_params(place, "training.stage1.num_samples=40", *changes)
        shutil.copytree(finished_run / "data", place / "data")
    manifest = other / "data/tokens/manifest.json"
    if damage == "missing":
        manifest.unlink()
    elif damage:
        manifest.write_text(manifest.read_text() + " ")
    started = time.monotonic()
    processes = pipeline.start_training(one, "stage1", 2, {1: other})
    for process in processes:
        process.join(90)
    assert [process.exitcode for process in processes] == [1, 1]
    assert time.monotonic() - started < 90
    for log in (one / "log-0.txt", other / "log-1.txt"):
        assert message in log.read_text(), log.read_text()
    assert not list(one.glob(".scratch/stage1/*/step-*"))
