"""FLOP formulas against the counter of PyTorch on the real network."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2Config, LlamaConfig, LlamaForCausalLM

from model.configuration_foveated_vlm import FoveatedVLMConfig
from model.constants import IGNORE_INDEX
from model.foveated_encoder import FoveatedEncoder
from model.modeling_foveated_vlm import FoveatedVLMForConditionalGeneration
from pipeline_steps.common import flop_formulas as formulas
from pipeline_steps.common.flop_formulas import Sample
from pipeline_steps.flops import scales, serving
from tests.model.tiny import as_batch, with_options
from tests.objectives import section, training_model

pytestmark = pytest.mark.usefixtures("separate_projections")

VISUAL = 128
SAMPLE = Sample(num_frames=5, num_text_tokens=23, num_tokens_before=9, num_labels=7)


def make_config(**options):
    vision = Dinov2Config(image_size=56, patch_size=14, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
    text = LlamaConfig(
        vocab_size=128,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
    )
    options = {"query_dim": 24, "visual_scale": 0.1, "visual_token_id": VISUAL, **options}
    return FoveatedVLMConfig(vision, text, **options)


def batch_of(config, sample):
    k = config.tokens_per_frame
    after = sample.num_text_tokens - sample.num_tokens_before
    ids = [5] * sample.num_tokens_before + [VISUAL] * (sample.num_frames * k) + [7] * after
    labels = [IGNORE_INDEX] * (len(ids) - sample.num_labels) + [7] * sample.num_labels
    return {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "pixel_values": torch.randn(sample.num_frames, 3, 56, 56),
        "num_frames": torch.tensor([sample.num_frames]),
    }


def objective(second_pass_probability=0.0, **weights):
    """weights: of the objectives by name."""
    changes = {name: {"weight": weight} for name, weight in weights.items()}
    return section(second_pass_probability=second_pass_probability, **changes)


def counted_training(config, sample, num_plans=1, **weights):
    """A training step."""
    torch.manual_seed(0)
    training = training_model(
        FoveatedVLMForConditionalGeneration(config), **{name: {"weight": weight} for name, weight in weights.items()}
    )
    arguments = batch_of(config, sample)
    arguments |= {"attention_mask": torch.ones_like(arguments["input_ids"])}
    batch = as_batch(arguments, config.visual_token_id)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        training(batch, num_plans, training.counts(batch))[0].backward()
    return counter.get_total_flops()


def counted(config, sample, backward=False, **options):
    torch.manual_seed(0)
    network = FoveatedVLMForConditionalGeneration(config).train(backward)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # the fused CPU kernel is unknown to the counter
        arguments = batch_of(config, sample) | {"return_logits": False} | options
        loss = network(**with_options(arguments)).loss
        if backward:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("mode", ["coarse", "fine", "autoregressive"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention": "shallow"},
        {"coarse_only": True},
        {"architecture": "multi_token", "num_visual_tokens_per_frame": 16},
        {"num_visual_tokens_per_frame": 3},
        {"num_visual_tokens_per_frame": 3, "token_aggregation": "weighted", "frame_time_embedding": "sinusoidal"},
        {"num_passes": 2, "attention_temperature": 0.5, "hard_attention": "top_k"},
        {"frame_downsampling": 2},
        {"frame_downsampling": 2, "fovea_size": 2},
    ],
    ids=["deep", "shallow", "coarse_only", "multi_token", "three_queries", "aggregated", "passes", "low", "fovea"],
)
def test_forward_agrees_with_the_counter(mode, options):
    config = make_config(**options)
    expected = counted(config, SAMPLE, mode=mode)
    assert formulas.forward(config, SAMPLE, mode).total == pytest.approx(expected, rel=1e-6)


def test_second_planning_pass_agrees_with_the_counter():
    config = make_config()
    assert formulas.forward(config, SAMPLE, "fine", 2).total == pytest.approx(
        counted(config, SAMPLE, mode="fine", num_plans=2), rel=1e-6
    )


@pytest.mark.parametrize("num_plans", [1, 2])
def test_training_agrees_with_the_counter(num_plans):
    config = make_config()
    expected = counted(config, SAMPLE, backward=True, mode="fine", num_plans=num_plans)
    assert expected == counted_training(config, SAMPLE, num_plans)
    assert formulas.training_step(config, SAMPLE, objective(num_plans - 1.0)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "options", [{"coarse_only": True}, {"architecture": "multi_token", "num_visual_tokens_per_frame": 16}]
)
def test_training_of_single_pass_arms_agrees_with_the_counter(options):
    config = make_config(**options)
    expected = counted(config, SAMPLE, backward=True, mode="fine")
    assert formulas.training_step(config, SAMPLE, objective()) == pytest.approx(expected, rel=1e-6)


FOVEA = {"frame_downsampling": 2, "fovea_size": 3}


@pytest.mark.parametrize(
    "options",
    [
        {**FOVEA, "num_visual_tokens_per_frame": 2},
        {**FOVEA, "num_passes": 2, "query_update": "add"},
        {**FOVEA, "query_source": "static"},
        {**FOVEA, "query_source": "static", "num_passes": 2},
        {"frame_downsampling": 2, "attention": "shallow"},
    ],
    ids=str,
)
def test_training_with_a_fovea_agrees_with_the_counter(options):
    assert_agrees(options, SAMPLE, ("coarse", "fine", "autoregressive"), 1e-6)


def test_vision_flops_of_a_fovea_fall_by_more_than_four():
    """At the sizes of conf/study/fovea.yaml: 257 rows, against 17 and a window of 16 patches."""
    vision = Dinov2Config(image_size=112, patch_size=7, hidden_size=64, num_hidden_layers=3, num_attention_heads=4)
    text = make_config().text_config

    def vision_flops(**options):
        config = FoveatedVLMConfig(vision, text, query_dim=64, visual_scale=0.1, visual_token_id=VISUAL, **options)
        return formulas.forward(config, SAMPLE, "autoregressive").components.vision_encoder

    full, low = vision_flops(), vision_flops(frame_downsampling=4)
    fovea = vision_flops(frame_downsampling=4, fovea_size=4)
    assert low < fovea < full / 4


VISION_FIRST = Sample(num_frames=5, num_text_tokens=23, num_tokens_before=1, num_labels=7)
EVERY_CONFIGURATION = [
    *(
        {"attention": attention, "num_visual_tokens_per_frame": k, "token_aggregation": way, "num_passes": passes}
        for attention in ("deep", "shallow")
        for k, way in ((1, "none"), (4, "none"), (4, "mean"), (4, "weighted"))
        for passes in (1, 3)
    ),
    *({"architecture": "multi_token", "num_visual_tokens_per_frame": k} for k in (1, 4, 16)),
    *({"coarse_only": True, "attention": attention} for attention in ("deep", "shallow")),
    *({"query_source": source} for source in ("static", "random", "fixed")),
    {"query_source": "static", "attention": "shallow"},
    {"query_source": "static", "num_passes": 2},
    {"query_update": "add", "tie_first_query": False, "query_bias": True},
    {"query_update": "gated"},
    {"query_update": "gated", "num_visual_tokens_per_frame": 2, "num_passes": 2},
    {"learnable_temperature": True},
    {"hard_attention": "gumbel"},
    {"blind": True},
]
WEIGHTS = [{"coarse": 0.5, "contrastive": 0.1}, {"entropy": 0.1}]


def assert_agrees(options, sample, modes, tolerance):
    config = make_config(**options)
    for mode in modes:
        found = formulas.forward(config, sample, mode)
        assert found.total == pytest.approx(counted(config, sample, mode=mode), rel=1e-6)
        both = counted(config, sample, backward=True, mode=mode)
        step = formulas.training_step(config, sample, objective())
        trained = step if mode == "fine" else found.total + found.backward
        assert trained == pytest.approx(both, rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("sample", [SAMPLE, VISION_FIRST], ids=["question_first", "vision_first"])
@pytest.mark.parametrize("options", EVERY_CONFIGURATION, ids=str)
def test_every_configuration_agrees_with_the_counter(options, sample):
    assert_agrees(options, sample, ("coarse", "fine", "autoregressive"), 1e-6)


@pytest.mark.parametrize("sample", [SAMPLE, VISION_FIRST], ids=["question_first", "vision_first"])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_every_objective_agrees_with_the_counter(weights, sample):
    """Within 1 % with the entropy loss, whose recomputed attention weights (.2 %) are not counted."""
    config = make_config()
    found = formulas.training_step(config, sample, objective(**weights))
    expected = counted_training(config, sample, **weights)
    assert found == pytest.approx(expected, rel=0.01 if "entropy" in weights else 1e-6)


@pytest.mark.parametrize("options", [{}, {"query_source": "static"}], ids=str)
def test_backward_agrees_with_the_counter(options):
    assert_agrees(options, VISION_FIRST, ("fine", "autoregressive"), 1e-6)


def test_language_pass_by_hand():
    """Two layers, 3 positions over 5: queries 48 x 48, keys and values 48 x 16 each (two heads of 8), output 48 x 48,
    scores and mixture 3 x 5 x 48 each, gate, up and down 48 x 80: 2 x 2 x (6912 + 4608 + 6912 + 1440 + 34560)."""
    assert formulas.language_pass(make_config().text_config, 3, 5) == 2 * 2 * (6912 + 4608 + 6912 + 1440 + 34560)


def test_vision_encoder_flops_by_hand():
    """One frame of 17 rows, width 32, inner 128, three layers. Per layer keys and values 2 x 17 x 32 x 32 = 34816, the
    rest 34816 + attention 2 x 17 x 17 x 32 = 18496 + feed-forward 2 x 17 x 32 x 128 = 139264; the last layer's rest is
    skipped; patches 16 x 588 x 32 = 301056. Times two."""
    expected = 2 * (301056 + 3 * 34816 + 2 * (34816 + 18496 + 139264))
    assert formulas.vision_encoder_flops(make_config().vision_config, need_last_layer=False) == expected


def test_mean_of_several_counts():
    results = [formulas.forward(make_config(), Sample(frames, 23, 9, 7), "fine") for frames in (1, 3)]
    found = formulas.mean(results)
    assert found.total == sum(result.total for result in results) / 2
    assert found.language_positions == [(10 + 12) / 2, (15 + 17) / 2]


# ---- the pretrained sizes, on the meta device: no weights, no memory


def on_meta(function, *arguments, **options):
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH):
        result = function(*arguments, **options)
    return result, counter.get_total_flops()


@pytest.mark.parametrize(("scale", "num_weights"), [("135M", 134.5e6), ("360M", 361.8e6), ("1.7B", 1711.4e6)])
def test_language_models_agree_with_the_counter(scale, num_weights):
    config = scales.language_config(scale)
    with torch.device("meta"):
        network = LlamaForCausalLM(config)
        embeddings = torch.empty(1, 136, config.hidden_size)
    assert sum(weight.numel() for weight in network.parameters()) == pytest.approx(num_weights, rel=1e-3)
    output, reading = on_meta(network.model, inputs_embeds=embeddings, use_cache=True)
    assert formulas.language_pass(config, 136, 136) == pytest.approx(reading, rel=1e-6)
    cache, token = output.past_key_values, embeddings[:, :1]
    _, decoding = on_meta(network, inputs_embeds=token, past_key_values=cache, use_cache=True)
    assert serving.decode_step(config, 137) == pytest.approx(decoding, rel=1e-6)
    stored = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
    assert serving.key_value_bytes(config, 137, bytes_per_number=4) == stored


def test_dinov2_small_agrees_with_the_counter():
    vision = scales.vision_config()
    config = FoveatedVLMConfig(vision, scales.language_config("135M"), query_dim=384)
    with torch.device("meta"):
        encoder = FoveatedEncoder(vision).eval()
        frames, queries = torch.empty(3, 3, 224, 224), torch.empty(3, 1, 384)
    assert sum(weight.numel() for weight in encoder.parameters()) == pytest.approx(21.67e6, rel=1e-2)
    encoded, looking = on_meta(encoder.encode, frames)
    assert 3 * formulas.vision_encoder_flops(vision, need_last_layer=False) == pytest.approx(looking, rel=1e-6)
    _, asking = on_meta(encoder.attend, queries, encoded)
    projection = 3 * formulas.linear(1, 384, 384)
    assert 3 * formulas.query_pass_flops(config) == pytest.approx(asking + projection, rel=1e-6)
    assert serving.vision_bytes(config, 3, 4) == sum(part.nbytes for part in (*encoded.keys, *encoded.values))
