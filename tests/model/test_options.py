"""Every option of the configuration does what it says; the baselines."""

import math

import pytest
import torch

from model import FoveatedVLMConfig, FoveatedVLMForConditionalGeneration
from model.queries import QueryAttention
from pipeline_steps.training.objectives.entropy import attention_entropy
from tests.model.tiny import FIRST_VISUAL, MODES, VISUAL, fine, make_batch, make_model, one_sample


def random_targets(seed=0):
    """One target patch in every frame of `make_batch` but the last, which shows none: bool [6, 16]."""
    targets = torch.zeros(6, 16, dtype=torch.bool)
    places = torch.randint(0, 16, (5,), generator=torch.Generator().manual_seed(seed))
    targets[torch.arange(5), places] = True
    return targets


def test_query_dim_and_bias_shape_the_projection():
    model = make_model(query_dim=10, query_bias=True)
    assert model.static_query.shape == (1, 10)
    assert (model.planner.out_features, model.query_projection.in_features) == (10, 10)
    assert model.query_projection.bias is not None
    assert make_model().query_projection.bias is None


def test_query_init_std_is_the_spread_of_the_learned_queries():
    for std in (0.02, 1.0):
        model = make_model(query_dim=2000, query_init_std=std, tie_first_query=False)
        for query in (model.static_query, model.first_query):
            assert query.std().item() == pytest.approx(std, rel=0.1)


@torch.no_grad()
def test_an_untied_first_query_looks_at_frame_0():
    tied, untied = make_model(), make_model(tie_first_query=False)
    assert not hasattr(tied, "first_query")
    queries = fine(untied).queries
    for first_frame in (0, 3, 4):
        assert torch.equal(queries[first_frame], untied.first_query)
        assert torch.equal(fine(tied).queries[first_frame], tied.static_query)


@torch.no_grad()
def test_an_added_update_sums_the_plans_of_the_frames_before():
    """Sample 0 of the batch has frames 0 to 2, sample 1 frame 3, sample 3 frames 4 and 5."""
    added, replaced = make_model(query_update="add"), make_model()
    plans, sums = fine(replaced).queries, fine(added).queries
    first = added.static_query
    assert torch.equal(sums[[0, 3, 4]], first.expand(3, -1, -1))
    for frame in (1, 2, 5):  # the coarse tokens, and so the plans, are those of the other model
        torch.testing.assert_close(sums[frame], sums[frame - 1] + plans[frame])
    iterated = fine(added, num_plans=3).queries  # frame t is final after t passes
    torch.testing.assert_close(iterated, fine(added, mode="autoregressive").queries)
    assert not torch.allclose(iterated[2], fine(replaced, mode="autoregressive").queries[2])


@pytest.mark.parametrize("queries", [1, 3])
@torch.no_grad()
def test_a_gated_update_keeps_a_part_of_the_query(queries):
    """Sample 0 of the batch has frames 0 to 2, sample 1 frame 3, sample 3 frames 4 and 5."""
    options = {"num_visual_tokens_per_frame": queries, "tie_first_query": False}
    gated = make_model(query_update="gated", **options)
    batch, gate = make_batch(queries), gated.query_gate
    seen = {}
    hooks = [
        module.register_forward_hook(
            lambda _, __, output, name=name: seen.update({name: output.unflatten(-1, (-1, 24))})
        )
        for name, module in (("planned", gated.planner), ("logits", gate))
    ]
    found = gated(**batch, mode="fine").queries
    for hook in hooks:
        hook.remove()
    planned, kept = (seen[name].reshape(found.shape) for name in ("planned", "logits"))
    kept = kept.sigmoid()
    assert kept.min() > 0.3
    assert kept.mean() == pytest.approx(torch.tensor(4.0).sigmoid().item(), abs=0.02)
    for frame in (1, 2, 5):
        torch.testing.assert_close(found[frame], planned[frame - 1] + kept[frame - 1] * found[frame - 1])
    gate.bias.zero_()
    iterated = gated(**batch, mode="fine", options={"num_plans": 3}).queries
    torch.testing.assert_close(iterated, gated(**batch, mode="autoregressive").queries)
    gate.weight.zero_()
    for bias, update in ((-1e4, "replace"), (1e4, "add")):
        other = make_model(query_update=update, **options)
        gate.bias.fill_(bias)
        other.load_state_dict(gated.state_dict(), strict=False)
        for mode in ("fine", "autoregressive"):
            outputs = (model(**batch, mode=mode).queries for model in (gated, other))
            torch.testing.assert_close(*outputs)


def test_the_gate_learns():
    model = make_model(query_update="gated").train()
    fine(model, num_plans=1).loss.backward()
    assert model.query_gate.weight.grad.abs().max() > 0
    assert model.query_gate.bias.grad.abs().max() > 0
    assert not hasattr(make_model(query_update="add"), "query_gate")
    assert not hasattr(make_model(query_update="gated", coarse_only=True), "query_gate")


@pytest.mark.parametrize("attention", ["deep", "shallow"])
@torch.no_grad()
def test_temperature_sharpens_the_queries_and_leaves_the_patches_alone(attention):
    entropies, keys = [], []
    for temperature in (0.2, 1.0, 5.0):
        model = make_model(attention=attention, attention_temperature=temperature)
        output = fine(model, output_attentions=True)
        entropies.append(attention_entropy(output.attention_weights).mean().item())
        keys.append(model.vision_encoder.encode(make_batch()["pixel_values"]).keys[-1])
    assert entropies[0] < entropies[1] < entropies[2]
    assert torch.equal(keys[0], keys[1])


def test_a_learnable_temperature_starts_at_the_fixed_one_and_learns():
    fixed, learned = make_model(attention_temperature=0.5), make_model(attention_temperature=0.5)
    learned = make_model(attention_temperature=0.5, learnable_temperature=True)
    assert learned.log_temperature.tolist() == pytest.approx([math.log(0.5)] * 2)
    learned.load_state_dict(fixed.state_dict(), strict=False)
    torch.testing.assert_close(fine(learned).token_loss, fine(fixed).token_loss)
    fine(learned).loss.backward()
    assert learned.log_temperature.grad.abs().min() > 0
    assert len(make_model(attention="shallow", learnable_temperature=True).log_temperature) == 1


@pytest.mark.parametrize("attention", ["deep", "shallow"])
@pytest.mark.parametrize(("hard", "places"), [("top_k", 3), ("gumbel", 1)])
@torch.no_grad()
def test_hard_attention_takes_so_many_places(attention, hard, places):
    model = make_model(attention=attention, hard_attention=hard, attention_top_k=3)
    for mode in MODES:
        weights = fine(model, mode=mode, output_attentions=True).attention_weights
        assert ((weights > 0).sum(-1) == places).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert not torch.equal(fine(model).token_loss, fine(make_model(attention=attention)).token_loss)


def test_gumbel_is_sampled_in_training_only_and_straight_through():
    model = make_model(hard_attention="gumbel")
    assert torch.equal(fine(model).token_loss, fine(model).token_loss)
    model.train()
    torch.manual_seed(1)
    one, other = fine(model), fine(model)
    assert not torch.equal(one.token_loss, other.token_loss)
    one.loss.backward()
    assert model.planner.weight.grad.abs().max() > 0  # the soft gradient reaches the planner through the hard choice
    torch.manual_seed(1)
    assert torch.equal(fine(model).token_loss, one.token_loss)


def test_weights_of_query_attention():
    queries, keys = torch.eye(3)[None, None, :1] * 3, torch.eye(3)[None, None]  # logits [sqrt 3, 0, 0]
    soft = QueryAttention().weights(queries, keys)
    torch.testing.assert_close(soft[0, 0, 0], torch.tensor([3**0.5, 0, 0]).softmax(0))
    allowed = torch.tensor([[False, True, True]])
    assert QueryAttention(allowed=allowed).weights(queries, keys)[0, 0, 0].tolist() == [0, 0.5, 0.5]
    assert QueryAttention(hard="top_k", top_k=1).weights(queries, keys)[0, 0, 0].tolist() == [1, 0, 0]


@torch.no_grad()
def test_sources_of_queries():
    model = make_model()
    by_source = {
        source: fine(model, query_source=source, generator=torch.Generator().manual_seed(0)).queries
        for source in ("planned", "static", "random", "fixed")
    }
    assert (by_source["static"] == model.static_query).all()
    directions = {name: queries / queries.norm(dim=-1, keepdim=True) for name, queries in by_source.items()}
    torch.testing.assert_close(directions["fixed"], directions["fixed"][:1].expand_as(directions["fixed"]))
    assert (directions["random"][1:] - directions["random"][:1]).abs().amax((1, 2)).min() > 0.05
    for source in ("random", "fixed"):
        torch.testing.assert_close(by_source[source][0].norm(), by_source["planned"][0].norm())
    for source, queries in by_source.items():  # as an option of the configuration, the same
        configured = fine(make_model(query_source=source), generator=torch.Generator().manual_seed(0)).queries
        assert torch.equal(configured, queries)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("attention", ["deep", "shallow"])
@torch.no_grad()
def test_the_oracle_looks_at_the_target_and_nowhere_else(mode, attention):
    model, targets = make_model(query_source="oracle", attention=attention), random_targets()
    weights = fine(model, mode=mode, target_patches=targets, output_attentions=True).attention_weights
    on_target = (weights[..., 1:] * targets[None, :, None, None]).sum(-1)  # [L, F, H, K]
    torch.testing.assert_close(on_target[:, :5], torch.ones_like(on_target[:, :5]))
    free = weights[:, 5]  # the frame without a target
    assert ((free > 0).sum(-1) == 17).all()
    with pytest.raises(ValueError, match=r"needs target_patches for 6 frames.*got None"):
        fine(model, mode=mode)


@pytest.mark.parametrize("count", [1, 2, 4, 9])
@pytest.mark.parametrize("aggregation", ["none", "mean", "weighted"])
@torch.no_grad()
def test_several_queries_per_frame(count, aggregation):
    model = make_model(num_visual_tokens_per_frame=count, token_aggregation=aggregation)
    per_frame = count if aggregation == "none" else 1
    assert model.config.tokens_per_frame == per_frame
    for mode in MODES:
        output = fine(model, mode=mode)
        assert output.visual_tokens.shape == (6, per_frame, 48)
        assert output.queries.shape == (6, count, 24)
        assert len(torch.unique(output.queries[1], dim=0)) == count  # different looks at one frame


@torch.no_grad()
def test_mean_aggregation_is_the_mean_of_the_looks():
    several = make_model(num_visual_tokens_per_frame=3, token_aggregation="mean")
    apart = make_model(num_visual_tokens_per_frame=3)
    apart.load_state_dict({k: v for k, v in several.state_dict().items() if not k.startswith("planner")}, strict=False)
    pixels = make_batch()["pixel_values"]
    one, three = (fine(model, mode="coarse", pixel_values=pixels).visual_tokens for model in (several, apart))
    torch.testing.assert_close(one, three.mean(1, keepdim=True))


@pytest.mark.parametrize("network", [{}, {"attention": "shallow"}, {"frame_downsampling": 2, "fovea_size": 2}], ids=str)
@torch.no_grad()
def test_top_k_that_would_keep_every_patch_is_refused(network):
    """Positions are the 16 patches, or 4 at low resolution and 4 of the window, and the class token."""
    count = 8 if network.get("fovea_size") else 16
    options = {"hard_attention": "top_k", "num_visual_tokens_per_frame": 2} | network
    message = rf"attention_top_k={count + 1} .* {count + 1} positions, the {count} patches .* at most {count}, or set"
    for mode in MODES:
        with pytest.raises(ValueError, match=message):
            fine(make_model(attention_top_k=count + 1, **options), mode=mode)
        fine(make_model(attention_top_k=count, **options), mode=mode)
        fine(make_model(**options | {"hard_attention": "none", "attention_top_k": 500}), mode=mode)
    weights = fine(make_model(attention_top_k=count, **options), output_attentions=True).attention_weights
    if count == 16:
        assert ((weights > 0).sum(-1) == 16).all()


@torch.no_grad()
def test_weighted_aggregation_weights_the_looks_by_their_scores():
    several = make_model(num_visual_tokens_per_frame=3, token_aggregation="weighted")
    torch.nn.init.normal_(several.aggregation_score.weight)
    apart = make_model(num_visual_tokens_per_frame=3)
    apart.load_state_dict({k: v for k, v in several.state_dict().items() if not k.startswith("planner")}, strict=False)
    looks = []  # [6, 3, 32]
    apart.connector.register_forward_pre_hook(lambda module, arguments: looks.append(arguments[0]))
    pixels = make_batch()["pixel_values"]
    one, three = (fine(model, mode="coarse", pixel_values=pixels).visual_tokens for model in (several, apart))
    scores = (looks[0] * several.aggregation_score.weight[0]).sum(2)
    weights = scores.exp() / scores.exp().sum(1, keepdim=True)  # [6, 3]
    assert (weights.max(1).values > 0.4).all()
    torch.testing.assert_close(one, (weights[..., None] * three).sum(1, keepdim=True))


@torch.no_grad()
def test_more_passes_come_closer_to_the_autoregressive_tokens():
    sample = one_sample(make_batch(), 0)
    models = [make_model(num_passes=n) for n in (1, 2, 3)]
    tokens = [model(**sample, mode="fine").visual_tokens for model in models]
    autoregressive = models[0](**sample, mode="autoregressive").visual_tokens
    distances = [(token - autoregressive).abs().max().item() for token in tokens]
    assert distances[0] > 1e-4
    assert distances[2] < 1e-5
    torch.testing.assert_close(tokens[1], models[0](**sample, mode="fine", options={"num_plans": 2}).visual_tokens)


@torch.no_grad()
def test_visual_scale_scales_the_tokens():
    one, ten = make_model(visual_scale=0.1), make_model(visual_scale=1.0)
    torch.testing.assert_close(fine(ten, mode="coarse").visual_tokens, 10 * fine(one, mode="coarse").visual_tokens)


@torch.no_grad()
def test_frame_times_start_silent_and_tell_frames_apart():
    model, plain = make_model(frame_time_embedding="sinusoidal"), make_model()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k != "time_projection.weight"})
    assert torch.equal(fine(model).token_loss, fine(plain).token_loss)  # zero at the start
    torch.nn.init.normal_(model.time_projection.weight)
    still = {"pixel_values": torch.zeros(6, 3, 56, 56), "mode": "coarse"}
    tokens = fine(model, **still).visual_tokens
    assert (tokens[0] - tokens[1]).abs().max() > 1e-3
    assert torch.equal(tokens[0], tokens[3])  # frame 0 of two samples
    later = fine(model, **still, frame_times=torch.tensor([5.0, 6, 7, 5, 5, 6])).visual_tokens
    assert (later[0] - tokens[0]).abs().max() > 1e-3


@torch.no_grad()
def test_sixteen_and_forty_nine_pooled_tokens():
    for side, count in ((56, 16), (98, 49)):
        model = make_model(architecture="multi_token", num_visual_tokens_per_frame=count)
        batch = make_batch()
        sample = one_sample(batch, 2)
        ids = sample["input_ids"]
        places = torch.full((1, count), VISUAL)
        ids = torch.cat([ids[:, : FIRST_VISUAL[2]], places, ids[:, FIRST_VISUAL[2] + 1 :]], dim=1)
        output = model(ids, pixel_values=torch.randn(1, 3, side, side), num_frames=torch.tensor([1]))
        assert output.visual_tokens.shape == (1, count, 48)
        assert not any(
            "query" in name or "planner" in name for name, _ in model.named_parameters() if "encoder" not in name
        )


@torch.no_grad()
def test_a_blind_model_sees_the_mean_colour():
    blind, seeing = make_model(blind=True), make_model()
    for mode in MODES:
        black = torch.zeros(6, 3, 56, 56)
        torch.testing.assert_close(
            fine(blind, mode=mode).token_loss, fine(seeing, mode=mode, pixel_values=black).token_loss
        )
    assert (fine(blind).token_loss - fine(seeing).token_loss).abs().max() > 1e-4


@torch.no_grad()
def test_coarse_only_has_no_planner_and_looks_the_same_in_every_mode():
    for attention in ("deep", "shallow"):
        model = make_model(coarse_only=True, attention=attention)
        assert not hasattr(model, "planner")
        losses = [fine(model, mode=mode).token_loss for mode in MODES]
        assert torch.equal(losses[0], losses[1])
        assert torch.equal(losses[0], losses[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_passes": 4}, "num_passes=4 must be an integer from 1 to 3"),
        ({"num_passes": 0}, "num_passes=0 must be an integer from 1 to 3"),
        ({"num_passes": 1.5}, "num_passes=1.5 must be an integer"),
        ({"query_dim": 0}, "query_dim=0 must be an integer from 1"),
        ({"attention_temperature": 0.0}, "attention_temperature=0.0 must be a number from 0.001"),
        ({"attention_temperature": math.nan}, "attention_temperature=nan must be a number"),
        ({"visual_scale": "big"}, "visual_scale='big' must be a number above 0, or auto"),
        (
            {"visual_token_id": 10},
            "visual_token_id=10 is inside the vocabulary of 32000 tokens. Use an id of 32000 or more",
        ),
        (
            {"architecture": "multi_token", "num_visual_tokens_per_frame": 5},
            "must be a square number.*, for example 4 or 9",
        ),
        *(
            (
                {"architecture": "multi_token", "num_visual_tokens_per_frame": 4, name: value},
                f"{name}={value!r} with architecture='multi_token': it has no queries, so this would change nothing",
            )
            for name, value in (
                ("query_source", "oracle"),
                ("hard_attention", "gumbel"),
                ("token_aggregation", "mean"),
                ("learnable_temperature", True),
                ("num_passes", 2),
                ("coarse_only", True),
            )
        ),
        ({"coarse_only": True, "num_passes": 2}, "num_passes=2 with coarse_only=True: there is only the coarse pass"),
        ({"hard_attention": "topk"}, "hard_attention='topk' is not one of none, top_k, gumbel"),
        ({"token_aggregation": "max"}, "is not one of none, mean, weighted"),
        ({"visual_scale": None}, "visual_scale=None must be a number above 0, or auto"),
        ({"visual_token_id": "5"}, "visual_token_id='5' must be an integer of 32000 or more, or None"),
        *(
            ({name: value}, f"{name}={value!r} must be True or False")
            for name in ("query_bias", "tie_first_query", "learnable_temperature", "coarse_only", "blind")
            for value in ("false", 0, None)
        ),
        *(
            ({"text_config": {"model_type": name}}, f"text_config: model_type='{name}' is not supported, only 'llama'")
            for name in ("bogus", "gpt2", "dinov2")
        ),
    ],
)
def test_configuration_names_the_value_and_the_limit(change, message):
    with pytest.raises(ValueError, match=message):
        FoveatedVLMConfig(**change)


def test_options_set_after_the_start_are_checked_too(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="hard_attention='topk' is not one of"):
        FoveatedVLMForConditionalGeneration.from_pretrained(tmp_path, hard_attention="topk")


@pytest.mark.parametrize("option", [{"visual_token_id": None}, {"visual_scale": "auto"}])
def test_a_network_needs_what_its_language_model_decides(option):
    with pytest.raises(ValueError, match="Build the model with from_backbones, or set both to numbers"):
        make_model(**option)


def test_the_placeholder_stays_outside_a_resized_vocabulary():
    model = make_model()
    assert len(model.resize_token_embeddings(60).weight) == 60
    with pytest.raises(ValueError, match="80 tokens would include the visual placeholder, id 64"):
        model.resize_token_embeddings(80)
