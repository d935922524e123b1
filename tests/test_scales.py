"""conf/scale/: what each composes to, the networks they describe, and that they differ in parameters alone."""

import re

import pytest
import torch
from transformers import Dinov2Config, LlamaConfig

from model import FoveatedVLMConfig, FoveatedVLMForConditionalGeneration
from pipeline_steps.backbones.language_model import build_language_model
from pipeline_steps.backbones.tokenizer import train_tokenizer
from pipeline_steps.backbones.vision_encoder import build_vision_encoder
from pipeline_steps.common import params
from pipeline_steps.training.parameters import trainable_parameters
from tests.model.test_published_sizes import NOMINAL, SIZES, count

SCALES = sorted(path.stem for path in (params.ROOT / "conf/scale").glob("*.yaml"))
PRETRAINED = {"smollm2_135m": "135M", "smollm2_360m": "360M", "smollm2_1_7b": "1.7B"}


def composed(*overrides):
    text = params.compose(overrides)
    return params.check(" ".join(overrides), params.parse("conf/", text))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("others", [(), ("data=folder",), ("ablation=A6",), ("ablation=F1",)], ids=" ".join)
def test_every_scale_composes_with_every_kind_of_group(scale, others):
    parameters = composed(f"scale={scale}", *others)
    assert parameters.shards.image_size % 14 == 0
    assert parameters.model.max_num_frames >= max(parameters.shards.max_frames, parameters.streaming.image_replication)


def test_no_code_asks_for_the_scale():
    names = re.compile("|".join({*PRETRAINED, "small_gpu"}))
    files = [file for place in ("model", "pipeline_steps") for file in (params.ROOT / place).rglob("*.py")]
    assert [file for file in files if names.search(file.read_text())] == []


def test_the_published_scales_are_all_here():
    assert set(SCALES) == {"none", "tiny", "small_gpu", *PRETRAINED}


@pytest.mark.parametrize("scale", PRETRAINED)
def test_a_pretrained_scale_is_the_published_network(scale):
    """Its repositories, parameter counts and learning rates per group, on the meta device."""
    parameters, size = composed(f"scale={scale}"), PRETRAINED[scale]
    hub = parameters.backbones.hub
    assert (parameters.backbones.kind, hub.vision.repository) == ("hub", "facebook/dinov2-small")
    assert hub.language.repository == f"HuggingFaceTB/SmolLM2-{size}-Instruct"
    language, vision, *expected = SIZES[size]
    text, options = LlamaConfig(**language), parameters.model.model_dump() | {"visual_scale": 0.14}
    with torch.device("meta"):
        model = FoveatedVLMForConditionalGeneration(
            FoveatedVLMConfig(Dinov2Config(**vision), text, visual_token_id=text.vocab_size, **options)
        )
    assert count(model) == sum(expected) == pytest.approx(NOMINAL[size], rel=0.01)
    common = parameters.training.common
    _, table = trainable_parameters(model, parameters.training.stage1, common.weight_decay, common.optimizer)
    assert [(row["group"], row["trainable"]) for row in table] == [
        ("connector", expected[2]),
        ("vision", expected[1]),
        ("language", expected[0]),
    ]
    assert table[0]["learning_rate"] == pytest.approx(100 * table[1]["learning_rate"])
    assert table[1]["learning_rate"] == table[2]["learning_rate"]


@pytest.mark.parametrize("scale", PRETRAINED)
def test_alignment_converges_to_one_rate_with_which_instruction_tuning_begins(scale):
    training = composed(f"scale={scale}").training
    converged = training.stage1.converged_learning_rate
    assert training.stage1.schedule == "converging"
    assert converged.connector == converged.vision == converged.language
    assert training.stage2.learning_rate == converged
    assert training.stage3.learning_rate.connector < converged.connector / 10


def test_the_largest_scale_divides_its_network():
    common = composed("scale=smollm2_1_7b").training.common
    assert (common.sharding, common.activation_checkpointing, common.micro_batch_size) == ("fsdp", True, "auto")


def test_small_gpu_has_the_sizes_that_its_file_names():
    text = (params.ROOT / "conf/scale/small_gpu.yaml").read_text()
    vision, language = (float(found) for found in re.findall(r"(\d+\.\d) M\b", text))
    embedded = composed("scale=small_gpu").backbones.embedded
    assert count(build_vision_encoder(embedded)) / 1e6 == pytest.approx(vision, abs=0.06)
    tokenizer = train_tokenizer(embedded.vocabulary_size, embedded.max_positions)
    assert count(build_language_model(embedded, tokenizer)) / 1e6 == pytest.approx(language, abs=0.06)
    assert embedded.image_size // embedded.patch_size == 16
