"""Direct preference optimisation: one encoding for two answers, the reference, and two processes."""

import math

import pytest
import torch

from pipeline_steps.training.objectives.preference import dpo_loss
from tests.model.tiny import MODES, as_batch, make_model, preference_batch, rows_of
from tests.objectives import frozen, step, training_model

FRAMES = ("pixel_values", "num_frames")
TEXT = ("input_ids", "attention_mask", "labels")


def answers(batch: dict) -> tuple[dict, dict]:
    """The chosen and the rejected answers."""
    return tuple({name: batch[prefix + name] for name in TEXT} for prefix in ("", "rejected_"))


def log_probs(model, batch: dict, mode: str = "fine") -> torch.Tensor:
    chosen, rejected = answers(batch)
    text = {name: chosen[name] for name in TEXT[:2]}
    passes = model.encode_frames(**text, **{name: batch[name] for name in FRAMES}, mode=mode)
    return model.preference_log_probs(chosen, rejected, passes[-1].visual_tokens if passes else None)


@torch.no_grad()
def test_preferences_are_scored_after_one_encoding():
    model, batch, encoded = make_model(), preference_batch(), []
    model.vision_encoder.encoder.layer[0].register_forward_hook(lambda *_: encoded.append(1))
    found = log_probs(model, batch)
    assert len(encoded) == 1  # chosen and rejected share it
    for column, text in enumerate(answers(batch)):
        alone = model(**text, pixel_values=batch["pixel_values"], num_frames=batch["num_frames"])
        torch.testing.assert_close(found[:, column], -alone.token_loss.sum(1), atol=1e-4, rtol=0)


def test_training_on_preferences_prefers_the_chosen_answers():
    model, batch = make_model(), as_batch(preference_batch())
    reference, training = frozen(model), training_model(model, "preference", preference={"beta": 0.5})
    before = {name: value.clone() for name, value in reference.state_dict().items()}
    optimizer, rows = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(5):
        rows.append(step(training, batch, reference=reference)[0])
        optimizer.step()
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[-1]["loss"] < 0.6
    assert rows[-1]["reward_margin"] > 0
    assert all(torch.equal(value, before[name]) for name, value in reference.state_dict().items())  # has not moved
    chosen, rejected = torch.tensor([-1.0]), torch.tensor([-3.0])
    loss, margin = dpo_loss(chosen, rejected, torch.tensor([-2.0]), torch.tensor([-2.0]), 0.1)
    assert (loss.item(), margin.item()) == pytest.approx((math.log(1 + math.exp(-0.2)), 0.2))


def test_preferences_with_another_question_are_refused():
    batch = preference_batch()
    batch["rejected_input_ids"][0, 1] = (batch["rejected_input_ids"][0, 1] + 1) % 60 + 3
    with pytest.raises(ValueError, match=r"sample 0: the chosen and .* differ before the end of the frames \(7 and"):
        log_probs(make_model(), batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected_labels": None}, "labels are missing. Both answers need labels"),
        ({"rejected_input_ids": torch.full((2, 9), 5)}, "4 chosen answers but 2 rejected ones"),
        ({"rejected_input_ids": torch.full((4, 200), 5)}, "the rejected answers have 200 tokens, .* context is 128"),
        (
            {"rejected_input_ids": torch.full((4, 9), 5)},
            r"rejected answers have input_ids \[4, 9\], .* \[4, 23\]",
        ),
    ],
)
def test_preference_arguments_that_do_not_fit_are_named(change, message):
    batch = preference_batch() | change
    if "rejected_input_ids" in change:
        batch["rejected_attention_mask"] = None
    with pytest.raises(ValueError, match=message):
        log_probs(make_model(), batch)


def test_preferences_need_the_visual_tokens_of_their_frames_and_known_ids():
    model, (chosen, rejected) = make_model(), answers(preference_batch())
    with pytest.raises(ValueError, match="0 visual tokens for 6 visual placeholders"):
        model.preference_log_probs(chosen, rejected)
    rejected["labels"][1, 3] = 70
    with pytest.raises(ValueError, match="sample 1 has the label 70 at place 3, but the vocabulary has 64 tokens"):
        model.preference_log_probs(chosen, rejected, torch.zeros(6, 1, 48))


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_log_probabilities_do_not_depend_on_the_batch(mode):
    model, batch = make_model(), preference_batch()
    together = log_probs(model, batch, mode)
    for rows in ([0], [1], [2, 3], [3, 1, 0]):
        alone = log_probs(model, rows_of(batch, rows, 0, 3), mode)
        torch.testing.assert_close(alone, together[rows], atol=1e-5, rtol=0)


def test_the_reference_stays_where_the_stage_began():
    model, batch = make_model(), preference_batch()
    reference, training = frozen(model), training_model(model, "preference")
    with torch.no_grad():
        before = log_probs(reference, batch)
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        assert torch.equal(log_probs(reference, batch), before)
        assert (log_probs(model, batch) - before).abs().max() > 1e-3  # the model itself has moved
        expected = dpo_loss(*log_probs(model, batch).unbind(1), *before.unbind(1), 0.1)
    values, _ = step(training, as_batch(batch), reference=reference)
    assert values["loss"] == pytest.approx(expected[0].item(), abs=1e-5)
    assert values["reward_margin"] == pytest.approx(expected[1].mean().item(), abs=1e-5)
    assert all(p.grad is None for p in reference.parameters())


def test_the_reference_is_that_of_evaluation_whatever_is_sampled_in_training():
    model, batch = make_model(hard_attention="gumbel"), as_batch(preference_batch())
    reference, training = frozen(model), training_model(model, "preference")
    margins = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        margins.append(step(training, batch, reference=reference)[0]["reward_margin"])
    assert not reference.training
    assert margins[0] != margins[1]  # sampled attention in training
    model.eval()
    assert step(training.eval(), batch, reference=reference)[0]["reward_margin"] == pytest.approx(0, abs=1e-6)
