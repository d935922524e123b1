"""Networks of the project's sizes with random weights, and batches of random frames and text for them.

Imports torch, transformers (and PyYAML, which transformers needs) and Pillow alone. Random weights change neither time
nor memory.

Shapes: B samples, T frames of a sample, F frames of a batch.
"""

from pathlib import Path

import torch
import yaml
from transformers import Dinov2Config, LlamaConfig

from model import FoveatedVLMConfig
from model.constants import IGNORE_INDEX
from model.packing import BatchPlaces
from pipeline_steps.flops.scales import LANGUAGE_MODELS, scaled
from pipeline_steps.streaming.batch import Batch

CONF = Path(__file__).resolve().parent.parent / "conf"
SCALES = {  # by size: its file in conf/scale
    "tiny": "tiny",
    "small_gpu": "small_gpu",
    "135M": "smollm2_135m",
    "360M": "smollm2_360m",
    "1.7B": "smollm2_1_7b",
}
# Frames of 32 samples: 18 of 8 frames, as stills that are repeated, and clips of 1 to 64; any 8 in a row are mixed
MIXTURE = (8, 64, 8, 20, 8, 4, 8, 38, 8, 64, 8, 8, 10, 8, 44, 8, 1, 8, 24, 8, 64, 8, 8, 16, 8, 52, 8, 6, 8, 30, 8, 8)
TEXT_TOKENS = (48, 170)  # of a sample, shortest and longest; half of them are labelled
CLIP_TEXT_TOKENS = (32, 16)  # before and after the frames, of `clips`
BOS, PAD, FIRST = 1, 2, 3  # token ids


def read_scale(size: str) -> dict:
    """The parameters of a size: conf/config.yaml with the size's file of conf/scale."""
    return _merged(yaml.safe_load((CONF / "config.yaml").read_text()), _read(SCALES[size]))


def _read(scale: str) -> dict:
    own = yaml.safe_load((CONF / f"scale/{scale}.yaml").read_text()) or {}
    values: dict = {}
    for name in own.pop("defaults", ["_self_"]):
        values = _merged(values, own if name == "_self_" else _read(name))
    return values


def _merged(values: dict, changes: dict) -> dict:
    """`values` with those of `changes`, dict by dict."""
    both = {name: _merged(values[name], new) for name, new in changes.items() if isinstance(values.get(name), dict)}
    return values | changes | both


def network_config(size: str) -> FoveatedVLMConfig:
    """The network that a scale trains. size: of SCALES."""
    parameters = read_scale(size)
    options = parameters["model"] | {"visual_scale": 0.14}
    if size in LANGUAGE_MODELS:
        config = scaled(size, options)
    else:
        config = FoveatedVLMConfig(*embedded_configs(parameters["backbones"]["embedded"]), **options)
    config.visual_token_id = config.text_config.vocab_size
    return config


def embedded_configs(embedded: dict) -> tuple[Dinov2Config, LlamaConfig]:
    """Of the backbones that the stage `backbones` makes from its section `embedded`."""
    vision = Dinov2Config(
        image_size=embedded["image_size"],
        patch_size=embedded["patch_size"],
        hidden_size=embedded["vision_width"],
        num_hidden_layers=embedded["vision_layers"],
        num_attention_heads=embedded["vision_heads"],
        mlp_ratio=4,
        layerscale_value=1.0,
    )
    text = LlamaConfig(
        vocab_size=embedded["vocabulary_size"],
        hidden_size=embedded["language_width"],
        intermediate_size=4 * embedded["language_width"] * 2 // 3,
        num_hidden_layers=embedded["language_layers"],
        num_attention_heads=embedded["language_heads"],
        num_key_value_heads=embedded["language_kv_heads"],
        max_position_embeddings=embedded["max_positions"],
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        initializer_range=0.05,
    )
    return vision, text


def mixture(config: FoveatedVLMConfig, num_samples: int, seed: int = 0) -> Batch:
    """A training batch of `num_samples` samples with the frames of MIXTURE, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    counts = [MIXTURE[number % len(MIXTURE)] for number in range(num_samples)]
    sizes = torch.randint(TEXT_TOKENS[0], TEXT_TOKENS[1] + 1, (num_samples,), generator=generator).tolist()
    starts = [size // 4 if config.layout == "question_first" else 1 for size in sizes]
    return make_batch(config, counts, sizes, starts, [size // 2 for size in sizes], generator)


def clips(config: FoveatedVLMConfig, num_samples: int, num_frames: int, seed: int = 0) -> Batch:
    """A batch without padding: samples of `num_frames` frames between CLIP_TEXT_TOKENS, labelled after them."""
    before, after = CLIP_TEXT_TOKENS
    sizes, starts = [before + after] * num_samples, [before if config.layout == "question_first" else 1] * num_samples
    generator = torch.Generator().manual_seed(seed)
    return make_batch(config, [num_frames] * num_samples, sizes, starts, [after] * num_samples, generator)


def make_batch(
    config: FoveatedVLMConfig,
    num_frames: list[int],
    num_text: list[int],
    starts: list[int],
    num_labels: list[int],
    generator: torch.Generator,
) -> Batch:
    """Random text and frames. Per sample: frames, text tokens, how many of these stand before the frames, and how many
    at the end are labelled."""
    sizes = [text + n * config.tokens_per_frame for text, n in zip(num_text, num_frames, strict=True)]
    shape = (len(sizes), max(sizes))
    ids = torch.randint(FIRST, config.text_config.vocab_size, shape, generator=generator)
    mask, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORE_INDEX)
    for row, (size, n, start, labelled) in enumerate(zip(sizes, num_frames, starts, num_labels, strict=True)):
        ids[row, 0] = BOS
        ids[row, start : start + n * config.tokens_per_frame] = config.visual_token_id
        ids[row, size:] = PAD
        mask[row, :size] = 1
        labels[row, size - labelled : size] = ids[row, size - labelled : size]
    side, total = config.vision_config.image_size, sum(num_frames)
    return Batch(
        input_ids=ids,
        attention_mask=mask,
        labels=labels,
        score_mask=labels != IGNORE_INDEX,
        places=BatchPlaces.of(ids, mask, torch.tensor(num_frames), labels, visual_id=config.visual_token_id),
        keys=[str(row) for row in range(len(sizes))],
        num_frames=torch.tensor(num_frames),
        pixel_values=torch.randn(total, 3, side, side, generator=generator),
        frame_times=torch.cat([torch.arange(n) for n in num_frames]).float(),
    )
