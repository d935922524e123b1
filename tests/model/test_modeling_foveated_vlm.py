"""The model's contracts: batch invariance, the three modes against each other, gradients, errors, round trip."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText, DynamicCache

from model import FoveatedVLMConfig, FoveatedVLMForConditionalGeneration
from model.constants import IGNORE_INDEX
from model.multi_token_encoder import pool_patches
from pipeline_steps.evaluation import scoring
from pipeline_steps.training import validation
from tests.model.tiny import BOS, LAYOUTS, MODES, PAD, as_batch, make_batch, make_model, one_sample, rows_of
from tests.objectives import training_model

OPTIONS = [
    {},
    {"num_visual_tokens_per_frame": 2},
    {"num_visual_tokens_per_frame": 4, "token_aggregation": "mean"},
    {"num_visual_tokens_per_frame": 2, "token_aggregation": "weighted", "attention_temperature": 0.5},
    {"attention": "shallow"},
    {"hard_attention": "top_k", "attention_top_k": 3, "num_passes": 2, "frame_time_embedding": "sinusoidal"},
    {"attention": "shallow", "hard_attention": "gumbel", "learnable_temperature": True},
    {"tie_first_query": False, "query_bias": True},
    {"query_update": "gated", "num_visual_tokens_per_frame": 2, "num_passes": 2},
    {"coarse_only": True},
    {"architecture": "multi_token", "num_visual_tokens_per_frame": 4},
]


BATCHES = [  # rows, further padding on the left and on the right
    ([0, 1, 2, 3], 0, 0),
    ([3, 2, 1, 0], 3, 2),
    ([1, 0], 0, 7),
    ([2, 1, 1, 2, 0], 4, 0),
    ([1], 2, 1),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_loss_and_logits_of_a_sample_do_not_depend_on_its_batch(mode, layout, options):
    model = make_model(**options)
    batch = make_batch(model.config.tokens_per_frame, layout)
    alone = [model(**one_sample(batch, row), mode=mode, options={"return_logits": True}) for row in range(4)]
    for rows, left, right in BATCHES:
        together = model(**rows_of(batch, rows, left, right), mode=mode, options={"return_logits": True})
        for place, row in enumerate(rows):
            own = slice(left, left + alone[row].token_loss.shape[1])
            assert alone[row].loss > 0
            torch.testing.assert_close(together.token_loss[place, own], alone[row].token_loss[0], atol=1e-5, rtol=0)
            torch.testing.assert_close(together.logits[place, own], alone[row].logits[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_what_stands_in_the_padding_is_never_read(mode):
    model, batch = make_model(), rows_of(make_batch(), [0, 1, 2, 3], 3, 2)
    filled = {**batch, "input_ids": torch.where(batch["attention_mask"] == 0, 7, batch["input_ids"])}
    expected, got = model(**batch, mode=mode), model(**filled, mode=mode)
    torch.testing.assert_close(got.token_loss, expected.token_loss, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layout", ["question_first", "vision_first"])
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_padding_within_a_sample_changes_nothing(mode, layout):
    """Positions count real tokens, and no token attends to padding: the text's distances stay as they were."""
    model, batch = make_model(), make_batch(layout=layout)
    expected = model(**batch, mode=mode).token_loss
    for at in (1, 14, 17):  # none is between frames
        holes = {
            name: torch.cat([batch[name][:, :at], torch.full((4, 2), value), batch[name][:, at:]], dim=1)
            for name, value in (("input_ids", PAD), ("attention_mask", 0), ("labels", IGNORE_INDEX))
        }
        got = model(**batch | holes, mode=mode).token_loss
        got = torch.cat([got[:, :at], got[:, at + 2 :]], dim=1)
        labelled_first = batch["labels"][:, at] != IGNORE_INDEX  # its loss is read off the hole before it
        got[labelled_first, at], wanted = 0, expected.clone()
        wanted[labelled_first, at] = 0
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


@torch.no_grad()
def test_fine_equals_autoregressive_for_one_frame_and_not_for_three():
    model, batch = make_model(), make_batch()
    fine, autoregressive = model(**batch, mode="fine"), model(**batch, mode="autoregressive")
    difference = (fine.token_loss - autoregressive.token_loss).abs().amax(1)
    assert (
        difference[1:].max() < 1e-5
    )  # text, one frame, and two frames: the second query is planned from the same first
    assert difference[0] > 1e-4


SHAPES = [
    {},
    {"num_visual_tokens_per_frame": 2},
    {"attention": "shallow"},
    {"tie_first_query": False},
    {"tie_first_query": False, "num_visual_tokens_per_frame": 2, "query_update": "gated"},
]


@pytest.mark.parametrize("options", SHAPES, ids=str)
@torch.no_grad()
def test_planning_as_often_as_there_are_frames_ends_at_the_autoregressive_tokens(options):
    model = make_model(**options)
    for layout in LAYOUTS:
        batch = make_batch(model.config.tokens_per_frame, layout)
        fine, autoregressive = (
            model(**batch, mode="fine", options={"num_plans": 3}),
            model(**batch, mode="autoregressive"),
        )
        torch.testing.assert_close(fine.visual_tokens, autoregressive.visual_tokens, atol=1e-5, rtol=0)
        torch.testing.assert_close(fine.queries, autoregressive.queries, atol=1e-5, rtol=0)
        torch.testing.assert_close(fine.token_loss, autoregressive.token_loss, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_autoregressive_look_at_a_prefix_is_the_prefix_of_the_look(layout, options):
    model = make_model(**options)
    per_frame = model.config.tokens_per_frame
    sample, at = one_sample(make_batch(per_frame, layout), 0), LAYOUTS[layout][0]
    whole = model(**sample, mode="autoregressive")
    assert (whole.visual_tokens[1] - whole.visual_tokens[2]).abs().max() > 1e-3
    for frames in (1, 2):
        cut = [sample["input_ids"][:, : at + frames * per_frame], sample["input_ids"][:, at + 3 * per_frame :]]
        prefix = model(
            torch.cat(cut, dim=1),
            pixel_values=sample["pixel_values"][:frames],
            num_frames=torch.tensor([frames]),
            mode="autoregressive",
        )
        torch.testing.assert_close(prefix.visual_tokens, whole.visual_tokens[:frames], atol=1e-5, rtol=0)
        torch.testing.assert_close(prefix.queries, whole.queries[:frames], atol=1e-5, rtol=0)


@torch.no_grad()
def test_later_frames_do_not_reach_earlier_looks():
    model, sample = make_model(), one_sample(make_batch(), 0)
    other = {**sample, "pixel_values": torch.cat([sample["pixel_values"][:2], torch.zeros(1, 3, 56, 56)])}
    for mode in MODES:
        one, changed = (model(**inputs, mode=mode).visual_tokens for inputs in (sample, other))
        torch.testing.assert_close(one[:2], changed[:2], atol=1e-6, rtol=0)
        assert (one[2] - changed[2]).abs().max() > 1e-3


@torch.no_grad()
def test_queries_depend_on_the_question_that_stands_first_and_on_none_that_stands_last():
    model = make_model()
    for layout, place in (("question_first", 1), ("vision_first", 6)):
        sample = one_sample(make_batch(layout=layout), 0)
        other = {**sample, "input_ids": sample["input_ids"].clone()}
        other["input_ids"][0, place] = 5 if sample["input_ids"][0, place] != 5 else 6
        for mode in ("fine", "autoregressive"):
            first, second = model(**sample, mode=mode).queries, model(**other, mode=mode).queries
            assert torch.equal(first[0], second[0])  # frame 0 has the learned first query
            if layout == "question_first":
                assert (first[1:] - second[1:]).abs().amax((1, 2)).min() > 1e-3
            else:
                assert torch.equal(first, second)


@pytest.mark.parametrize("mode", ["fine", "autoregressive"])
@torch.no_grad()
def test_identical_frames_get_different_queries_over_time_after_a_bos_or_a_question(mode):
    """With nothing in front, attention over equal tokens is equal at every place: then all planned queries are one."""
    model, differences = make_model(tie_first_query=True), {}
    for layout in LAYOUTS:
        sample = one_sample(make_batch(layout=layout), 0)
        assert layout != "vision_first" or sample["input_ids"][0, 0] == BOS
        still = {**sample, "pixel_values": sample["pixel_values"][:1].expand(3, -1, -1, -1)}
        queries = model(**still, mode=mode).queries
        differences[layout] = (queries[1] - queries[2]).abs().max().item()
    assert differences["question_first"] > 1e-4
    assert differences["vision_first"] > 1e-4
    assert mode == "autoregressive" or differences["nothing in front"] < 1e-5


@pytest.mark.parametrize("attention", ["deep", "shallow"])
@torch.no_grad()
def test_keys_and_values_are_computed_once_per_frame(attention):
    model, batch, rows = make_model(attention=attention), make_batch(), []
    attentions = [layer.attention.attention for layer in model.vision_encoder.encoder.layer]
    attentions += [model.shallow_attention.attention.attention] if attention == "shallow" else []
    for module in attentions:
        for projection in (module.key, module.value):
            projection.register_forward_hook(lambda module, args, output: rows.append((module, args[0].shape[:2])))
    for mode in MODES:
        rows.clear()
        model(**batch, mode=mode, options={"num_plans": 3})
        assert len({id(module) for module, _ in rows}) == len(rows) == 2 * len(attentions)  # each projection once
        assert all(shape == (6, 17) for _, shape in rows)  # six frames, class token + 16 patches


@torch.no_grad()
def test_attention_weights_are_on_request_and_change_nothing():
    model, batch = make_model(), make_batch()
    for mode in MODES:
        plain, shown = model(**batch, mode=mode), model(**batch, mode=mode, options={"output_attentions": True})
        assert plain.attention_weights is None
        assert torch.equal(plain.token_loss, shown.token_loss)
        assert shown.attention_weights.shape == (2, 6, 4, 1, 17)
        torch.testing.assert_close(shown.attention_weights.sum(-1), torch.ones(2, 6, 4, 1))


@torch.no_grad()
def test_controls_replace_the_planned_queries():
    model, batch = make_model(), make_batch()
    planned = model(**batch, mode="autoregressive")
    draws = [
        model(
            **batch,
            mode="autoregressive",
            options={"query_source": "random", "generator": torch.Generator().manual_seed(seed)},
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0].queries, draws[1].queries)
    assert not torch.equal(draws[0].queries, draws[2].queries)
    assert (draws[0].token_loss - planned.token_loss).abs().max() > 1e-4
    torch.testing.assert_close(draws[0].queries[0].norm(), planned.queries[0].norm())
    static = model(**batch, mode="autoregressive", options={"query_source": "static"}).queries
    assert (static == static[0]).all()


def ask_for_the_end_of_turn_only(batch: dict) -> dict:
    """Only the last token is asked for: the end of turn, which is also the padding's id."""
    batch["labels"][:, :] = IGNORE_INDEX
    last = batch["attention_mask"].sum(1) - 1
    batch["input_ids"][torch.arange(4), last] = PAD
    batch["labels"][torch.arange(4), last] = PAD
    return batch


def without_gradient(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0}


ALL_PARTS = [
    {"tie_first_query": False},
    {"tie_first_query": False, "attention": "shallow", "query_bias": True},
    {"tie_first_query": False, "num_visual_tokens_per_frame": 2, "token_aggregation": "weighted"},
    {"learnable_temperature": True, "frame_time_embedding": "sinusoidal"},
    {"query_update": "gated", "num_visual_tokens_per_frame": 2, "token_aggregation": "weighted"},
]


@pytest.mark.parametrize("options", ALL_PARTS, ids=str)
def test_gradients_reach_every_parameter(options):
    model = make_model(**options).train()
    batch = ask_for_the_end_of_turn_only(make_batch(model.config.tokens_per_frame))
    model(**batch, mode="fine").loss.backward()
    assert without_gradient(model) == set()


def test_the_static_query_learns_through_what_is_planned_from_its_tokens():
    """Its own tokens reach the loss of the fine pass by way of the planner only."""
    model = make_model(tie_first_query=False).train()
    model.planner.requires_grad_(False).weight.zero_()
    model(**make_batch(), mode="fine").loss.backward()
    assert model.static_query.grad.abs().max() == 0
    assert model.first_query.grad.abs().max() > 0


@pytest.mark.parametrize("frozen", [{"vision"}, {"language"}, {"connector"}, {"vision", "language"}], ids=sorted)
def test_frozen_parts_get_no_gradient_and_let_it_through(frozen):
    model = make_model(tie_first_query=False).train()
    parts = {
        "vision": [model.vision_encoder],
        "language": [model.language_model],
        "connector": [model.connector, model.planner, model.query_projection],
    }
    for part in frozen:
        for module in parts[part]:
            module.requires_grad_(False)
    model(**make_batch(), mode="fine").loss.backward()
    expected = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert expected
    assert without_gradient(model) == expected
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def projected_rows(model, call) -> list[int]:
    """Number of states in every call of the vocabulary projection."""
    rows = []
    hook = model.language_model.lm_head.register_forward_pre_hook(lambda _, args: rows.append(args[0][..., 0].numel()))
    call()
    hook.remove()
    return rows


def test_only_labelled_positions_are_projected_to_the_vocabulary():
    """By the network without logits, and so in training, validation and evaluation."""
    model, batch = make_model(), make_batch()
    labelled = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    own = as_batch(batch)
    training = training_model(model)
    calls = {
        "network": lambda: model(**batch, options={"return_logits": False}),
        "training": lambda: training(own, 1, training.counts(own)),
        "validation": lambda: validation.infer(SimpleNamespace(training_model=training), own, "fine"),
        "evaluation": lambda: scoring.forward(model, own, "fine"),
    }
    assert {name: projected_rows(model, call) for name, call in calls.items()} == {name: [labelled] for name in calls}
    assert projected_rows(model, lambda: model(**batch)) == [labelled, batch["input_ids"].numel()]


@torch.no_grad()
def test_logits_are_returned_as_by_the_librarys_models():
    model, batch = make_model(), make_batch()
    unlabelled = {name: value for name, value in batch.items() if name != "labels"}
    for mode in MODES:
        whole, without = model(**batch, mode=mode), model(**batch, mode=mode, options={"return_logits": False})
        assert whole.logits.shape == (*batch["input_ids"].shape, 64)
        assert torch.equal(model.get_output_embeddings()(whole.last_hidden_state), whole.logits)
        assert without.logits is None
        assert without.last_hidden_state is None
        assert torch.equal(whole.loss, without.loss)
        assert torch.equal(model(**unlabelled, mode=mode).logits, whole.logits)
        torch.testing.assert_close(model(**unlabelled, mode=mode, logits_to_keep=3).logits, whole.logits[:, -3:])
        some = torch.tensor([0, 5])
        torch.testing.assert_close(model(**unlabelled, mode=mode, logits_to_keep=some).logits, whole.logits[:, some])
        as_tuple = model(**batch, mode=mode, return_dict=False)
        assert len(as_tuple) == len(whole)
        assert torch.equal(as_tuple[0], whole.loss)
        assert torch.equal(as_tuple[1], whole.logits)
        assert torch.equal(model(**unlabelled, mode=mode, return_dict=False)[0], whole.logits)
    assert model(**batch, output_attentions=True).attention_weights is not None


@torch.no_grad()
def test_the_loss_is_divided_by_the_number_that_is_given():
    model, batch = make_model(), make_batch()
    labelled = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    for number in (40, torch.tensor(40)):
        torch.testing.assert_close(model(**batch, num_items_in_batch=number).loss, model(**batch).loss * labelled / 40)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"inputs_embeds": torch.zeros(4, 3, 48)}, "needs input_ids, not inputs_embeds"),
        ({"input_ids": None}, "needs input_ids, not inputs_embeds"),
        ({"past_key_values": DynamicCache()}, "keeps no key-value cache"),
        ({"use_cache": True}, "keeps no key-value cache"),
        ({"output_hidden_states": True}, "returns last_hidden_state, not output_hidden_states"),
    ],
    ids=lambda value: next(iter(value), None) if isinstance(value, dict) else "",
)
def test_arguments_that_cannot_be_served_are_refused(argument, message):
    with pytest.raises(ValueError, match=message):
        make_model()(**(make_batch() | argument))


def test_text_only_batch_works():
    model, sample = make_model(), one_sample(make_batch(), 1)
    sample.pop("pixel_values"), sample.pop("num_frames")
    for mode in MODES:
        assert torch.isfinite(model(**sample, mode=mode).loss)


@pytest.mark.parametrize("options", [{}, {"query_update": "gated"}], ids=str)
@torch.no_grad()
def test_save_and_load_round_trip(options, tmp_path):
    model, batch = make_model(**options), make_batch()
    model.save_pretrained(tmp_path)
    again = FoveatedVLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**batch).token_loss, model(**batch).token_loss)
    assert again.config.query_dim == 24
    assert again.config.vision_config.hidden_size == 32
    assert isinstance(AutoModelForImageTextToText.from_pretrained(tmp_path), FoveatedVLMForConditionalGeneration)


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
