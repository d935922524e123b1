"""Micro-batches give the gradient of one batch, and many logits that of few."""

import pytest
import torch

from model import objective as model_objective
from pipeline_steps.training.objective import counts, micro_batches, weighted_loss
from tests.model.tiny import LAYOUTS, make_batch, make_model, preference_batch

LAMBDAS = {"lambda_coarse": 0.5, "lambda_entropy": 0.3, "lambda_contrastive": 0.2, "contrastive_margin": -1.0}
KEYS = {"keys": list("abcd")}


def gradients_in_pieces(model, batch: dict, size: int | None) -> tuple[float, dict[str, torch.Tensor]]:
    model.train().zero_grad()
    total, loss = counts(batch), 0.0
    for piece in micro_batches(batch, size):
        output = model(**{name: value for name, value in piece.items() if name != "keys"})
        part = weighted_loss(output, model.config, counts(piece), total)
        part.backward()
        loss += part.item()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one, other, rtol=0.0):
    assert one[0] == pytest.approx(other[0], rel=1e-6)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], atol=1e-6, rtol=rtol)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("layout", ["question_first", "vision_first"])
@pytest.mark.parametrize("options", [{}, LAMBDAS], ids=["text", "all losses"])
def test_micro_batches_add_up_to_one_batch(size, layout, options):
    """Four samples of 3, 0, 1 and 2 frames: tokens and frames are divided unevenly."""
    model, batch = make_model(layout=layout, tie_first_query=False, **options), make_batch(layout=layout) | KEYS
    batch["labels"][1, -6:] = -100  # and so are the labels
    rtol = 1e-4 if options else 0.0  # entropies lose digits
    assert_same(gradients_in_pieces(model, batch, size), gradients_in_pieces(model, batch, None), rtol)


def test_the_whole_batch_is_the_models_own_loss():
    model, batch = make_model(**LAMBDAS).train(), make_batch() | KEYS
    own = model(**{name: value for name, value in batch.items() if name != "keys"}).loss.item()
    assert gradients_in_pieces(model, batch, None)[0] == pytest.approx(own, rel=1e-6)


@pytest.mark.parametrize("size", [1, 3])
def test_preferences_in_micro_batches(size):
    model, batch = make_model(tie_first_query=False), preference_batch() | KEYS
    batch["reference_log_probs"] = torch.tensor([[0.5, -0.5], [0.0, 1.0], [-1.0, 0.3], [0.2, 0.1]])
    whole = gradients_in_pieces(model, batch, None)

    def in_pieces():
        model.train().zero_grad()
        total, loss, start = counts(batch), 0.0, 0
        for piece in micro_batches({k: v for k, v in batch.items() if k != "reference_log_probs"}, size):
            stop = start + len(piece["keys"])
            piece["reference_log_probs"], start = batch["reference_log_probs"][start:stop], stop
            output = model(**{name: value for name, value in piece.items() if name != "keys"})
            part = weighted_loss(output, model.config, counts(piece), total)
            part.backward()
            loss += part.item()
        return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    assert_same(in_pieces(), whole)


def test_a_micro_batch_has_no_padding_of_others():
    batch = make_batch() | KEYS
    lengths = batch["attention_mask"].sum(1)
    pieces = list(micro_batches(batch, 1))
    assert [piece["input_ids"].shape[1] for piece in pieces] == lengths.tolist()
    assert [len(piece["pixel_values"]) for piece in pieces] == batch["num_frames"].tolist()
    assert torch.equal(torch.cat([piece["pixel_values"] for piece in pieces]), batch["pixel_values"])
    assert [key for piece in pieces for key in piece["keys"]] == list("abcd")


@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"nothing in front"}))
def test_logits_in_pieces_give_the_same_losses_and_gradients(monkeypatch, layout):
    model, batch = make_model(layout=layout), make_batch(layout=layout) | KEYS
    whole = gradients_in_pieces(model, batch, None)
    expected = model(**{name: value for name, value in batch.items() if name != "keys"})
    sizes = []
    monkeypatch.setattr(model_objective, "LOGITS_AT_ONCE", 3 * model.config.text_config.vocab_size)
    model.language_model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    found = model(**{name: value for name, value in batch.items() if name != "keys"})
    assert sizes == [3] * 5 + [1]  # 16 labelled tokens, three at a time
    assert torch.equal(found.correct, expected.correct)
    torch.testing.assert_close(found.token_loss, expected.token_loss, atol=1e-6, rtol=0)
    assert_same(gradients_in_pieces(model, batch, None), whole)
    assert max(sizes) == 3
