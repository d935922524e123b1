"""Cost of an answer, caches and activations against what the real network does and keeps."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.modeling_foveated_vlm import FoveatedVLMForConditionalGeneration
from pipeline_steps.common.flop_formulas import Sample
from pipeline_steps.flops import scales, serving
from tests.pipeline_steps.test_flops import SAMPLE, batch_of, make_config

pytestmark = pytest.mark.usefixtures("separate_projections")

ARMS = [
    {},
    {"attention": "shallow"},
    {"coarse_only": True},
    {"architecture": "multi_token", "num_visual_tokens_per_frame": 16},
]


@pytest.mark.parametrize("num_tokens", [1, 6])
@pytest.mark.parametrize("options", ARMS, ids=["deep", "shallow", "coarse_only", "multi_token"])
def test_answer_flops_agree_with_generate(options, num_tokens):
    config = make_config(**options)
    network = FoveatedVLMForConditionalGeneration(config).eval().requires_grad_(False)  # for the counter's hooks
    prompt = Sample(SAMPLE.num_frames, SAMPLE.num_text_tokens - SAMPLE.num_labels, SAMPLE.num_tokens_before, 0)
    inputs = {name: value for name, value in batch_of(config, prompt).items() if name != "labels"}
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        network.generate(**inputs, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False)
    found = serving.answer(config, SAMPLE, num_tokens, bytes_per_number=4)
    assert found.total == pytest.approx(counter.get_total_flops(), rel=1e-6)
    assert found.num_prompt_tokens == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("options", ARMS, ids=["deep", "shallow", "coarse_only", "multi_token"])
def test_decoding_grows_with_the_context_unless_the_cache_has_a_fixed_size(options):
    found = serving.answer(make_config(**options), SAMPLE, 20, bytes_per_number=4)
    grows = found.per_decoded_token > found.first_decoded_token
    assert grows == (options in (ARMS[2], ARMS[3]))
    assert found.total == pytest.approx(found.prefill + 19 * found.per_decoded_token)


def test_cache_of_the_pretrained_sizes_by_hand():
    """2 x 30 layers x 3 heads x 64 = 11520 numbers a position; 2 x 32 x 5 x 64 = 20480; 2 x 24 x 32 x 64 = 98304."""
    sizes = [serving.key_value_bytes(scales.language_config(name), 1, 2) for name in ("135M", "360M", "1.7B")]
    assert sizes == [2 * 11520, 2 * 20480, 2 * 98304]


def test_only_foveated_networks_cache_keys_and_values_of_the_frames():
    """64 frames of 257 rows: 2 x 12 layers x 384 numbers a row, in bf16 303 MB; one layer where they look at one."""
    scaled = {
        name: scales.scaled("135M", {**options, "visual_scale": 0.1})
        for name, options in (("deep", {}), ("shallow", {"attention": "shallow"}), ("multi", ARMS[3]))
    }
    sizes = {name: serving.vision_bytes(config, 64, 2) for name, config in scaled.items()}
    assert sizes == {"deep": 64 * 257 * 2 * 12 * 384 * 2, "shallow": 64 * 257 * 2 * 384 * 2, "multi": 0}


def kept_bytes(config, sample):
    """Bytes that automatic differentiation keeps for each further training sample: no weights, no copies of weights."""
    two, one = (kept_bytes_of_batch(config, sample, number) for number in (2, 1))
    return two - one


def kept_bytes_of_batch(config, sample, batch_size):
    network = FoveatedVLMForConditionalGeneration(config).train()
    own = {weight.untyped_storage().data_ptr() for weight in (*network.parameters(), *network.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        batch = {name: torch.cat([values] * batch_size) for name, values in batch_of(config, sample).items()}
        output = network(**batch, mode="fine", options={"return_logits": False})
    assert output.loss.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize(
    "options",
    [
        *ARMS,
        {"num_visual_tokens_per_frame": 4},
        {"num_passes": 2},
        {"frame_downsampling": 2},
        {"frame_downsampling": 2, "fovea_size": 2},
    ],
    ids=str,
)
def test_activation_memory_is_within_ten_per_cent_of_saved_tensors(options):
    config = make_config(**options)
    found = serving.training_memory(config, SAMPLE, bytes_per_number=4)
    assert sum(found.model_dump().values()) == pytest.approx(kept_bytes(config, SAMPLE), rel=0.1)
