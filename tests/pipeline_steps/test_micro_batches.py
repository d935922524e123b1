"""micro_batch_size auto: what fits, what is reserved, what is said."""

from types import SimpleNamespace

import pytest
import torch
from torch import distributed

from pipeline_steps.common.errors import UserError
from pipeline_steps.streaming.loader import plan_stage
from pipeline_steps.training import checks, train_loop
from pipeline_steps.training.distributed import SINGLE_PROCESS, DistributedContext
from pipeline_steps.training.ema import EMA
from pipeline_steps.training.optimizers import Optimizer
from pipeline_steps.training.parameters import trainable_parameters
from pipeline_steps.training.schema import MixtureEntry
from tests.model.tiny import as_batch, make_batch, make_model
from tests.objectives import training_model
from tests.pipeline_steps import packed
from tests.pipeline_steps.training_runs import settings

POINTS = SimpleNamespace(patch_size=packed.SIZE // 4)


@pytest.mark.parametrize(("fits", "found"), [(32, 32), (31, 16), (5, 4), (1, 1)])
def test_the_micro_batch_is_halved_until_it_fits(fits, found):
    tried = []

    def try_size(size):
        tried.append(size)
        if size > fits:
            raise torch.OutOfMemoryError("out of memory")

    assert checks.find_micro_batch_size(32, try_size) == found
    assert tried == [size for size in (32, 16, 8, 4, 2, 1) if size >= found]


@pytest.fixture
def auto_stage(tmp_path, monkeypatch):
    """A function of how many samples fit and of changes: (run on CUDA with `auto`, list of what is tried on it).

    The plan has the task gist only, in steps of four samples, and its largest item is damaged.
    """
    clips = [packed.Clip(f"world-{n}", num_frames=1 + n % 3, tasks=("gist",)) for n in range(8)]
    clips += [packed.Clip("world-large", num_frames=5, tasks=("gist",))]
    clips += [packed.Clip("world-other", num_frames=8, num_tokens=20, tasks=("card",))]
    dataset = packed.open_split(packed.write(tmp_path, clips, 20))
    with open(tmp_path / "shards/train" / dataset.shards[0].name, "r+b") as tar:
        tar.seek(dataset.rows[8]["frame_offsets"][0])
        tar.write(b"damaged")
    mixture = (MixtureEntry(source="*", task="gist", weight=1.0),)
    section = packed.stage(mixture=mixture, text_share=0.0, num_samples=9)
    sizes = {"batch_size": 4, "tokens_per_frame": 1}
    plan = plan_stage(dataset, section, packed.streaming(), stage="stage2", seed=1, **sizes)

    def make(fits, group=SINGLE_PROCESS):
        def try_micro_batch(run, batch, accumulates):
            tried.append((batch.keys, accumulates))
            if len(batch.keys) > fits:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        tried = []
        monkeypatch.setattr(train_loop, "try_micro_batch", try_micro_batch)
        return SimpleNamespace(
            stage="stage2", common=SimpleNamespace(micro_batch_size="auto"), device="cuda", stage_plan=plan,
            train=dataset, distributed=group, streaming=packed.streaming(),
            model=SimpleNamespace(config=SimpleNamespace(vision_config=POINTS)),
            loader=SimpleNamespace(collate=packed.collator()),
        ), tried  # fmt: skip

    return make


@pytest.mark.parametrize(("fits", "found"), [(4, 4), (3, 2), (1, 1)])
def test_auto_tries_the_largest_readable_items_of_the_stage_and_says_what_fits(auto_stage, fits, found, capsys):
    """Smaller micro-batches than the step's share accumulate gradients."""
    run, tried = auto_stage(fits)
    assert train_loop.choose_micro_batch_size(run) == found
    largest = ["world-2", "world-5", "world-1", "world-4"]
    assert tried == [(largest[:size], size < 4) for size in (4, 2, 1) if size >= found]
    said = capsys.readouterr()
    assert f"stage2: micro-batches of {found} samples fit into the memory of cuda" in said.out + said.err


@pytest.mark.parametrize(("own", "other", "found"), [(2, 1, 1), (1, 2, 1), (2, 2, 2)])
def test_with_several_ranks_auto_takes_what_fits_on_all_of_them(auto_stage, own, other, found, monkeypatch, capsys):
    """Each has half of a step, and one says it."""

    def all_reduce(value, operation=distributed.ReduceOp.SUM):
        assert operation == distributed.ReduceOp.MIN
        value.fill_(min(int(value), other))

    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    for rank in (0, 1):
        run, tried = auto_stage(own, DistributedContext(rank, world_size=2))
        assert train_loop.choose_micro_batch_size(run) == found
        assert [len(keys) for keys, _ in tried] == [size for size in (2, 1) if size >= own]
    said = capsys.readouterr()
    assert (said.out + said.err).count(f"micro-batches of {found} samples fit") == 1


def test_auto_with_a_sample_that_does_not_fit_says_what_to_change(auto_stage):
    run, tried = auto_stage(0)
    advice = "activation_checkpointing: true or .*precision: bf16, or lower shards.max_frames or tokens.max_tokens"
    with pytest.raises(UserError, match=f"a single sample does not fit into GPU memory .*{advice}"):
        train_loop.choose_micro_batch_size(run)
    assert tried[-1][0] == ["world-2"]


def auto_run(optimizer="adamw", **options):
    """A run as `try_micro_batch` sees it."""
    model = make_model().train()
    groups, _ = trainable_parameters(model, settings(freeze_vision=True), 0.01, optimizer)
    defaults = {"ema_decay": None, "precision": "fp32", "optimizer": optimizer}
    common = SimpleNamespace(**(defaults | options.pop("common", {})))
    run = {"distributed": DistributedContext(), "is_sharded": False, "device": "cpu"} | options
    return SimpleNamespace(
        model=model, training_model=training_model(model), reference=None, common=common, **run
    ), groups


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("decay", [None, 0.9])
def test_reserved_memory_equals_optimizer_state_and_ema(decay, name):
    run, groups = auto_run(name, common={"ema_decay": decay})
    reserved = sum(tensor.nbytes for tensor in train_loop.reserve_state(run))
    optimizer = Optimizer(groups, (0.9, 0.98))
    run.model(**make_batch()).loss.backward()
    optimizer.step()
    held = [value for part in optimizer.parts for state in part.state.values() for value in state.values()]
    held = [value for value in held if value.ndim or value.numel() > 1]  # without counters of steps
    if decay is not None:
        held += EMA(run.model, decay).values.values()
    assert reserved == sum(value.nbytes for value in held)
    parts, _ = auto_run(
        name, common={"ema_decay": decay}, is_sharded=True, distributed=DistributedContext(world_size=2)
    )
    assert sum(tensor.nbytes for tensor in train_loop.reserve_state(parts)) == pytest.approx(reserved / 2, rel=1e-3)


@pytest.mark.parametrize(
    ("accumulates", "options", "there"),
    [
        (True, {}, True),
        (False, {}, False),  # a whole step in one piece: gradients come while activations go
        (False, {"distributed": DistributedContext(world_size=2)}, True),  # buckets
        (False, {"distributed": DistributedContext(world_size=2), "is_sharded": True}, False),
    ],
)
def test_a_micro_batch_is_tried_with_gradient_memory_allocated(accumulates, options, there, monkeypatch):
    run, _ = auto_run(**options)
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    seen = []
    run.model.register_forward_pre_hook(lambda *_: seen.append({p.grad is not None for p in trained}))
    monkeypatch.setattr(train_loop, "reserve_state", lambda run: seen.append("state") or [])
    train_loop.try_micro_batch(run, as_batch(make_batch()), accumulates)
    assert seen == ["state", {there}]
    assert all(parameter.grad is None for parameter in run.model.parameters())
