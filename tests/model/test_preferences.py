"""Direct preference optimisation: one look for two answers, the reference, and two processes."""

import copy
import math

import pytest
import torch
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from model.losses import dpo_loss
from tests.model.tiny import MODES, make_model, preference_batch, rows_of


def test_preferences_are_scored_after_one_look():
    model, batch, walks = make_model(), preference_batch(), []
    model.vision_encoder.encoder.layer[0].register_forward_hook(lambda *_: walks.append(1))
    reference = model.preference_log_probs(**batch)
    assert len(walks) == 1  # chosen and rejected share the look
    output = model(**batch, reference_log_probs=reference)
    assert output.loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert output.reward_margin.abs().max() < 1e-5
    for column, prefix in enumerate(("", "rejected_")):
        text = {name: batch[prefix + name] for name in ("input_ids", "attention_mask", "labels")}
        alone = model(**text, pixel_values=batch["pixel_values"], num_frames=batch["num_frames"])
        torch.testing.assert_close(output.log_probs[:, column], -alone.token_loss.sum(1), atol=1e-4, rtol=0)


def test_training_on_preferences_prefers_the_chosen_answers():
    model, batch = make_model(dpo_beta=0.5).train(), preference_batch()
    frozen = copy.deepcopy(model)
    reference = frozen.preference_log_probs(**batch)
    assert frozen.training
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(5):
        output = model(**batch, reference_log_probs=reference)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert output.loss < 0.6
    assert (output.reward_margin > 0).all()
    assert torch.equal(frozen.preference_log_probs(**batch), reference)  # the frozen copy has not moved
    chosen, rejected = torch.tensor([-1.0]), torch.tensor([-3.0])
    loss, margin = dpo_loss(chosen, rejected, torch.tensor([-2.0]), torch.tensor([-2.0]), 0.1)
    assert (loss.item(), margin.item()) == pytest.approx((math.log(1 + math.exp(-0.2)), 0.2))


def test_preferences_with_another_question_are_refused():
    batch = preference_batch()
    batch["rejected_input_ids"][0, 1] = (batch["rejected_input_ids"][0, 1] + 1) % 60 + 3
    with pytest.raises(ValueError, match="sample 0: up to the last frame the chosen sequence has 7 tokens"):
        make_model()(**batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference_log_probs": torch.zeros(1, 2)}, r"reference_log_probs has shape \[1, 2\], expected \[4, 2\]"),
        ({"reference_log_probs": torch.zeros(4)}, r"reference_log_probs has shape \[4\], expected \[4, 2\]"),
        ({"rejected_labels": None}, "labels and rejected_labels are both needed"),
        ({"rejected_input_ids": torch.full((2, 9), 5)}, "4 chosen answers but 2 rejected ones"),
        ({"rejected_input_ids": torch.full((4, 200), 5)}, "rejected_input_ids has 200 tokens .* at most 128"),
    ],
)
def test_preference_arguments_that_do_not_fit_are_named(change, message):
    batch = preference_batch() | change
    if "rejected_input_ids" in change:
        batch["rejected_attention_mask"] = None
    with pytest.raises(ValueError, match=message):
        make_model()(**batch)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_log_probabilities_do_not_depend_on_the_batch(mode):
    model, batch = make_model(), preference_batch()
    together = model(**batch, mode=mode).log_probs
    for rows in ([0], [1], [2, 3], [3, 1, 0]):
        alone = model(**rows_of(batch, rows, 0, 3), mode=mode).log_probs
        torch.testing.assert_close(alone, together[rows], atol=1e-5, rtol=0)


def gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_frozen_copy_and_a_reference_computed_before_agree():
    """Before: sample by sample, as a stage that stores it would; a copy: whole batches, while the model trains."""
    model, batch = make_model().train(), preference_batch()
    frozen = copy.deepcopy(model).requires_grad_(False)
    before = torch.cat([model.preference_log_probs(**rows_of(batch, [row])) for row in range(4)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    along = frozen.preference_log_probs(**batch)
    torch.testing.assert_close(along, before, atol=1e-5, rtol=0)
    assert (model.preference_log_probs(**batch) - before).abs().max() > 1e-3  # the model itself has moved
    ours, theirs = (gradients(model, batch | {"reference_log_probs": values}) for values in (along, before))
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-5, rtol=0)
    assert all(p.grad is None for p in frozen.parameters())


def test_the_reference_is_that_of_evaluation_whatever_is_sampled_in_training():
    model, batch = make_model(hard_attention="gumbel"), preference_batch()
    expected = model.preference_log_probs(**batch)
    model.train()
    assert torch.equal(model.preference_log_probs(**batch), expected)
    assert model.training
    assert not torch.equal(model(**batch).log_probs, expected)  # sampled looks


SPLITS = {"frames everywhere": ([0, 1], [2, 3]), "text only on one": ([1, 1], [0, 3])}  # samples of each process


def train_in_one_of_two_processes(rank: int, folder: str) -> None:
    """Writes the gradients that DistributedDataParallel left in this process, and how often it looked."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        results = {}
        for name, rows in SPLITS.items():
            model, passes = make_model(tie_first_query=False).train(), []
            model.vision_encoder.encoder.layer[0].register_forward_hook(lambda *_, passes=passes: passes.append(1))
            wrapped = DistributedDataParallel(model, find_unused_parameters=name == "text only on one")
            wrapped(**rows_of(torch.load(f"{folder}/batch.pt"), rows[rank])).loss.backward()
            results[name] = {key: p.grad for key, p in model.named_parameters()}, len(passes)
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_get_the_gradients_of_one_on_the_joined_batch(tmp_path):
    batch = preference_batch()
    model = make_model(tie_first_query=False).train()
    shift = torch.tensor([[0.5, -0.5], [0.0, 1.0], [-1.0, 0.3], [0.2, 0.1]])  # another reference than the model itself
    batch["reference_log_probs"] = model.preference_log_probs(**batch) + shift
    torch.save(batch, tmp_path / "batch.pt")
    multiprocessing.spawn(train_in_one_of_two_processes, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, (left, right) in SPLITS.items():
        expected = gradients(model, rows_of(batch, left + right))
        assert sum(gradient.abs().max() > 0 for gradient in expected.values()) == len(list(model.parameters()))
        for process in (first, second):
            found = process[name][0]
            assert found.keys() == expected.keys()
            for key, gradient in expected.items():
                torch.testing.assert_close(found[key], gradient, atol=1e-6, rtol=1e-4)
        assert first[name][1] == (0 if name == "text only on one" else 1)  # once for both answers
        assert second[name][1] == 1
        alone = gradients(model, rows_of(batch, right))  # what a process without the other would have
        assert max((alone[key] - expected[key]).abs().max() for key in alone) > 1e-4
