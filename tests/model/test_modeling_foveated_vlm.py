"""The model's contracts: batch invariance, the three modes against each other, gradients, errors, round trip."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

from model import FoveatedVLMConfig, FoveatedVLMForConditionalGeneration
from model.multi_token_encoder import pool_patches
from tests.model.tiny import FIRST_VISUAL, MODES, PAD, make_batch, make_model, one_sample

OPTIONS = [
    {},
    {"num_visual_tokens_per_frame": 2},
    {"num_visual_tokens_per_frame": 4, "token_aggregation": "mean"},
    {"num_visual_tokens_per_frame": 2, "token_aggregation": "weighted", "attention_temperature": 0.5},
    {"attention": "shallow"},
    {"hard_attention": "top_k", "attention_top_k": 3, "num_passes": 2, "frame_time_embedding": "sinusoidal"},
    {"attention": "shallow", "hard_attention": "gumbel", "learnable_temperature": True},
    {"tie_first_query": False, "query_bias": True},
    {"coarse_only": True},
    {"architecture": "multi_token", "num_visual_tokens_per_frame": 4},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_loss_and_logits_of_a_sample_do_not_depend_on_its_batch(mode, options):
    model = make_model(**options)
    batch = make_batch(model.config.tokens_per_frame)
    together = model(**batch, mode=mode, return_logits=True)
    for row in range(4):
        sample = one_sample(batch, row)
        alone = model(**sample, mode=mode, return_logits=True)
        size = sample["input_ids"].shape[1]
        torch.testing.assert_close(alone.token_loss[0], together.token_loss[row, :size], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone.logits[0], together.logits[row, :size], atol=1e-5, rtol=0)


@torch.no_grad()
def test_left_padding_changes_nothing():
    model, batch = make_model(), make_batch()
    padded = dict(batch)
    for name, value in (("input_ids", PAD), ("attention_mask", 0), ("labels", -100)):
        padded[name] = torch.nn.functional.pad(batch[name], (5, 0), value=value)
    for mode in MODES:
        expected, got = model(**batch, mode=mode), model(**padded, mode=mode)
        torch.testing.assert_close(got.token_loss[:, 5:], expected.token_loss, atol=1e-5, rtol=0)


@torch.no_grad()
def test_fine_equals_autoregressive_for_one_frame_and_not_for_three():
    model, batch = make_model(), make_batch()
    fine, autoregressive = model(**batch, mode="fine"), model(**batch, mode="autoregressive")
    difference = (fine.token_loss - autoregressive.token_loss).abs().amax(1)
    assert (
        difference[1:].max() < 1e-5
    )  # text, one frame, and two frames: the second query is planned from the same first
    assert difference[0] > 1e-4


@torch.no_grad()
def test_planning_as_often_as_there_are_frames_ends_at_the_autoregressive_tokens():
    model, sample = make_model(), one_sample(make_batch(), 0)
    fine, autoregressive = model(**sample, mode="fine", num_plans=3), model(**sample, mode="autoregressive")
    torch.testing.assert_close(fine.visual_tokens, autoregressive.visual_tokens, atol=1e-5, rtol=0)


@torch.no_grad()
def test_autoregressive_look_at_a_prefix_is_the_prefix_of_the_look():
    model, sample = make_model(), one_sample(make_batch(), 0)
    whole = model(**sample, mode="autoregressive").visual_tokens
    at = FIRST_VISUAL[0]
    ids = torch.cat([sample["input_ids"][:, : at + 2], sample["input_ids"][:, at + 3 :]], dim=1)
    prefix = model(ids, pixel_values=sample["pixel_values"][:2], num_frames=torch.tensor([2]), mode="autoregressive")
    torch.testing.assert_close(prefix.visual_tokens, whole[:2], atol=1e-5, rtol=0)


@torch.no_grad()
def test_queries_depend_on_the_question_that_stands_first():
    model, sample = make_model(), one_sample(make_batch(), 0)
    other = {**sample, "input_ids": sample["input_ids"].clone()}
    other["input_ids"][0, 1] = 5 if sample["input_ids"][0, 1] != 5 else 6
    for mode in ("fine", "autoregressive"):
        first, second = model(**sample, mode=mode).queries, model(**other, mode=mode).queries
        assert torch.equal(first[0], second[0])  # frame 0 has the learned first query
        assert (first[1:] - second[1:]).abs().max() > 1e-3


@torch.no_grad()
def test_identical_frames_get_different_queries_over_time():
    model, sample = make_model(), one_sample(make_batch(), 0)
    still = {**sample, "pixel_values": sample["pixel_values"][:1].expand(3, -1, -1, -1)}
    queries = model(**still, mode="fine").queries
    assert (queries[1] - queries[2]).abs().max() > 1e-4


@torch.no_grad()
def test_keys_and_values_are_computed_once_per_frame():
    model, batch, calls = make_model(), make_batch(), []
    for layer in model.vision_encoder.encoder.layer:
        layer.attention.attention.key.register_forward_hook(lambda module, args, output: calls.append(args[0].shape))
    for mode in MODES:
        calls.clear()
        model(**batch, mode=mode, num_plans=2)
        assert [tuple(shape[:2]) for shape in calls] == [
            (6, 17)
        ] * 2  # two layers, six frames, class token + 16 patches


@torch.no_grad()
def test_attention_weights_are_on_request_and_change_nothing():
    model, batch = make_model(), make_batch()
    for mode in MODES:
        plain, shown = model(**batch, mode=mode), model(**batch, mode=mode, output_attentions=True)
        assert plain.attention_weights is None
        assert torch.equal(plain.token_loss, shown.token_loss)
        assert shown.attention_weights.shape == (2, 6, 4, 1, 17)
        torch.testing.assert_close(shown.attention_weights.sum(-1), torch.ones(2, 6, 4, 1))


@torch.no_grad()
def test_controls_replace_the_planned_queries():
    model, batch = make_model(), make_batch()
    planned = model(**batch, mode="autoregressive")
    draws = [
        model(**batch, mode="autoregressive", query_source="random", generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0].queries, draws[1].queries)
    assert not torch.equal(draws[0].queries, draws[2].queries)
    assert (draws[0].token_loss - planned.token_loss).abs().max() > 1e-4
    torch.testing.assert_close(draws[0].queries[0].norm(), planned.queries[0].norm())
    static = model(**batch, mode="autoregressive", query_source="static").queries
    assert (static == static[0]).all()


def test_gradients_reach_every_part_and_the_end_of_turn_token():
    model, batch = make_model(tie_first_query=False).train(), make_batch()
    batch["labels"][:, :] = -100
    size = batch["attention_mask"].sum(1) - 1
    batch["input_ids"][torch.arange(4), size] = PAD
    batch["labels"][torch.arange(4), size] = PAD  # only the end of turn is asked for, and it is the pad id
    model(**batch, mode="fine").loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    last = "vision_encoder.encoder.layer.1."
    assert [name for name in without if not name.startswith(last)] == []
    assert model.static_query.grad.abs().max() > 0
    assert model.first_query.grad.abs().max() > 0


def test_lambda_coarse_adds_the_loss_of_the_coarse_pass():
    model, batch = make_model(lambda_coarse=0.5).train(), make_batch()
    output = model(**batch, mode="fine")
    coarse, fine = model.eval()(**batch, mode="coarse").loss, model(**batch, mode="fine").loss
    torch.testing.assert_close(output.loss, fine + 0.5 * coarse)


def test_only_labelled_positions_are_projected_to_the_vocabulary():
    model, batch, rows = make_model(), make_batch(), []
    model.language_model.lm_head.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    model(**batch)
    assert rows == [int((batch["labels"] != -100).sum())]


def test_text_only_batch_works():
    model, sample = make_model(), one_sample(make_batch(), 1)
    sample.pop("pixel_values"), sample.pop("num_frames")
    for mode in MODES:
        assert torch.isfinite(model(**sample, mode=mode).loss)


def test_generate_gives_the_most_likely_tokens_of_forward():
    model, sample = make_model(), one_sample(make_batch(), 0)
    inputs = {name: sample[name] for name in ("input_ids", "pixel_values", "num_frames")}
    new = model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)
    ids = sample["input_ids"]
    for token in new[0]:
        logits = model(
            ids, None, sample["pixel_values"], sample["num_frames"], mode="autoregressive", return_logits=True
        ).logits
        assert int(logits[0, -1].argmax()) == int(token)
        ids = torch.cat([ids, token[None, None]], dim=1)


@torch.no_grad()
def test_save_and_load_round_trip(tmp_path):
    model, batch = make_model(), make_batch()
    model.save_pretrained(tmp_path)
    again = FoveatedVLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**batch).token_loss, model(**batch).token_loss)
    assert again.config.query_dim == 24
    assert again.config.vision_config.hidden_size == 32
    assert isinstance(AutoModelForImageTextToText.from_pretrained(tmp_path), FoveatedVLMForConditionalGeneration)


def test_backbones_saved_in_bf16_are_trained_in_fp32(tmp_path):
    """N05: bf16 weights under a bf16 optimizer lose most small steps."""
    model = make_model()
    model.language_model.to(torch.bfloat16).save_pretrained(tmp_path / "language")
    model.vision_encoder.config.save_pretrained(tmp_path / "vision")
    weights = {name: value.to(torch.bfloat16) for name, value in model.vision_encoder.state_dict().items()}
    save_file(weights, tmp_path / "vision/model.safetensors")
    new = FoveatedVLMForConditionalGeneration.from_backbones(tmp_path / "vision", tmp_path / "language", query_dim=24)
    assert {p.dtype for p in new.parameters()} == {torch.float32}
    new.save_pretrained(tmp_path / "whole")
    again = FoveatedVLMForConditionalGeneration.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert again.config.visual_token_id == 64
    assert again.config.visual_scale > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "fin"}, "mode='fin' must be one of coarse, fine, autoregressive"),
        ({"query_source": "oracel"}, "query_source='oracel'"),
        ({"num_frames": torch.tensor([3, 0, 1, 1])}, "adds up to 5 but pixel_values holds 6 frames"),
        ({"num_frames": torch.tensor([2, 1, 1, 2])}, "sample 0 has 3 visual placeholders for 2 frames"),
        ({"pixel_values": torch.zeros(6, 3, 50, 56)}, "multiples of the patch size 14"),
    ],
)
def test_wrong_input_names_both_numbers(change, message):
    with pytest.raises(ValueError, match=message):
        make_model()(**(make_batch() | change))


@pytest.mark.parametrize("change", [{"layout": "question"}, {"attention": "depe"}, {"architecture": "fovea"}])
def test_configuration_refuses_unknown_choices(change):
    with pytest.raises(ValueError, match="is not one of"):
        FoveatedVLMConfig(**change)


def test_pooling_averages_a_square_grid():
    features = torch.arange(17.0)[None, :, None]  # row 0 is the class token
    assert pool_patches(features, 16)[0, :, 0].tolist() == list(range(1, 17))
    assert pool_patches(features, 4)[0, :, 0].tolist() == [3.5, 5.5, 11.5, 13.5]
    with pytest.raises(ValueError, match=r"num_visual_tokens_per_frame=49 .* at most 16"):
        pool_patches(features, 49)
