"""Floating-point operations of one sample, from shapes alone. One multiply-accumulate = 2 FLOPs.

Counted: every matrix product and convolution that the code runs, at the sizes it runs them (attention over the whole
context, as the kernels compute it; the vocabulary projection only where a loss is asked). Not counted: norms,
softmax, activations, residual additions, rotary embeddings, the loss itself, and the attention weights that are
computed a second time for pictures. tests/pipeline_steps/test_flops.py holds the sums against
`torch.utils.flop_counter.FlopCounterMode` on the real network.

Names: T frames, N patches, D vision width, K queries and P visual tokens per frame, Q query width, E language width.
"""

from dataclasses import dataclass

from model.modeling_foveated_vlm import TIME_FEATURES
from pipeline_steps.metrics import Components, ModeFlops


@dataclass(frozen=True)
class Sample:
    """Lengths of one sample, in tokens and frames."""

    num_frames: int
    num_text_tokens: int  # everything but the visual tokens
    num_tokens_before: int  # text tokens before the first visual token
    num_labels: int  # tokens with a loss


def linear(rows, inputs, outputs):
    """A matrix product [rows, inputs] x [inputs, outputs]."""
    return 2 * rows * inputs * outputs


def attention(rows, context, width):
    """Scores and mixture: `rows` queries over `context` keys, all heads together `width` wide."""
    return 2 * linear(rows, width, context)


def vision_rows(config, rows):
    """One vision layer without its keys and values: query and output projection, attention, feed-forward, for `rows`
    rows of one frame."""
    width, inner = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
    return (
        2 * linear(rows, width, width)
        + attention(rows, num_vision_rows(config), width)
        + 2 * linear(rows, width, inner)
    )


def vision_keys_and_values(config):
    """Keys and values of one layer for one frame."""
    return 2 * linear(num_vision_rows(config), config.hidden_size, config.hidden_size)


def num_vision_rows(config):
    """Patches and the class token."""
    return (config.image_size // config.patch_size) ** 2 + 1


def vision_walk(config, need_last_layer):
    """The pass over one frame that leaves the keys and values of every layer; without `need_last_layer` the patches
    skip the rest of it."""
    full_layers = config.num_hidden_layers - (not need_last_layer)
    keys_and_values = config.num_hidden_layers * vision_keys_and_values(config)
    return patch_embedding(config) + keys_and_values + full_layers * vision_rows(config, num_vision_rows(config))


def patch_embedding(config):
    """The convolution that makes the patches of one frame."""
    return linear(num_vision_rows(config) - 1, config.num_channels * config.patch_size**2, config.hidden_size)


def query_walk(config):
    """The K queries of one frame: their projection into the vision encoder and their way through it."""
    vision, k = config.vision_config, config.num_visual_tokens_per_frame
    projection = linear(k, config.query_dim, vision.hidden_size)
    if config.attention == "deep":
        return projection + vision.num_hidden_layers * vision_rows(vision, k)
    width = vision.hidden_size
    return projection + 2 * linear(k, width, width) + attention(k, num_vision_rows(vision), width)


def connector(config):
    """From what was found in one frame to its visual tokens."""
    vision, text = config.vision_config, config.text_config
    flops = linear(config.tokens_per_frame, vision.hidden_size, text.hidden_size)
    if config.frame_time_embedding != "none":
        flops += linear(1, TIME_FEATURES, text.hidden_size)
    if config.architecture == "foveated" and config.token_aggregation == "weighted":
        flops += linear(config.num_visual_tokens_per_frame, vision.hidden_size, 1)
    return flops


def language_pass(config, rows, context):
    """`rows` new positions over a context of `context` positions (themselves included): grouped-query attention,
    gated feed-forward."""
    width, head = config.hidden_size, head_width(config)
    query_width, key_width = config.num_attention_heads * head, config.num_key_value_heads * head
    projections = 2 * linear(rows, width, query_width) + 2 * linear(rows, width, key_width)
    feed_forward = 3 * linear(rows, width, config.intermediate_size)
    return config.num_hidden_layers * (projections + attention(rows, context, query_width) + feed_forward)


def head_width(config):
    """Width of one attention head of the language model."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def forward(config, sample, mode, num_plans=None):
    """`ModeFlops` of one forward pass with loss. mode: coarse, fine or autoregressive; num_plans: times that the
    fine mode plans (default: the configuration's num_passes).

    A `multi_token` network and one trained coarse-only have a single way to look, whatever the mode.
    """
    vision, text, frames = config.vision_config, config.text_config, sample.num_frames
    num_plans = config.num_passes if num_plans is None else num_plans
    multi_token = config.architecture == "multi_token"
    planning = bool(frames) and not multi_token and not config.coarse_only and mode != "coarse"
    shallow = not multi_token and config.attention == "shallow"

    looks = 0 if multi_token else 1  # every frame is looked at once, in fine mode once more per plan
    planned, passes = 0, []
    if planning:
        passes = planning_passes(config, sample, mode, num_plans)
        looks, planned = (1 + num_plans, num_plans * frames) if mode == "fine" else (1, frames)
    total = sample.num_text_tokens + frames * config.tokens_per_frame
    passes.append((total, language_pass(text, total, total)))
    components = Components(
        vision_walk=frames * (vision_walk(vision, multi_token or shallow) + shallow * vision_keys_and_values(vision)),
        query_walk=frames * looks * query_walk(config) if looks else 0,
        connector=max(looks, 1) * frames * connector(config),
        planner=planned * linear(config.num_visual_tokens_per_frame, text.hidden_size, config.query_dim),
        language_model=sum(flops for _, flops in passes),
        vocabulary_projection=linear(sample.num_labels, text.hidden_size, text.vocab_size),
    )
    once = sum(components.model_dump().values())
    forgone = without_gradient(config, sample, mode, components, passes, looks) if planning else 0
    return ModeFlops(
        components=components,
        language_passes=[flops for _, flops in passes],
        language_positions=[positions for positions, _ in passes],
        num_looks=looks,
        total=once,
        backward=2 * (once - forgone) - frames * patch_embedding(vision),  # the pixels need no gradient
    )


def planning_passes(config, sample, mode, num_plans):
    """[(positions, FLOPs)] of the language model's passes that plan queries; they read up to the last visual token."""
    text, tokens, before = config.text_config, config.tokens_per_frame, sample.num_tokens_before
    read_until = before + sample.num_frames * tokens
    if mode == "fine":
        return num_plans * [(read_until, language_pass(text, read_until, read_until))]
    contexts = (before + (t + 1) * tokens for t in range(sample.num_frames))
    steps = sum(language_pass(text, tokens, context) for context in contexts)
    return [(read_until, language_pass(text, before, before) + steps)]


def without_gradient(config, sample, mode, components, passes, looks):
    """FLOPs of planning that have no backward pass because nothing reads what they made.

    Static queries in place of the planned ones: all of planning and of the looks that only it reads (a look that rides
    along with the patches has a gradient of zeros up to the last layer). Autoregressive mode: the last frame's plan,
    and of the text before the frames the last layer beyond its keys and values.
    """
    text, vision = config.text_config, config.vision_config
    if config.query_source == "static":
        unread = sum(flops for _, flops in passes[:-1]) + components.planner
        riding = config.attention == "deep" and looks > 1
        last_layer = vision_rows(vision, config.num_visual_tokens_per_frame) if riding else 0
        looked = (looks - 1) * connector(config) + (looks - 1 - riding) * query_walk(config) + last_layer
        return unread + sample.num_frames * looked
    if mode == "fine":
        return 0
    before, read_until = sample.num_tokens_before, passes[0][0]
    keys_and_values = 2 * linear(before, text.hidden_size, text.num_key_value_heads * head_width(text))
    last_layer = language_pass(text, before, before) / text.num_hidden_layers - keys_and_values
    last_plan = language_pass(text, config.tokens_per_frame, read_until) + components.planner / sample.num_frames
    return last_layer + last_plan


def training_step(config, sample):
    """FLOPs of one training sample when every weight is trained: forward and backward.

    The second planning counts with its probability.
    """
    once, twice = (forward(config, sample, "fine", config.num_passes + more) for more in (0, 1))
    step = once.total + once.backward
    step += config.second_pass_probability * (twice.total + twice.backward - step)
    if config.lambda_coarse > 0 and not config.coarse_only and config.architecture == "foveated":
        length = sample.num_text_tokens + sample.num_frames * config.tokens_per_frame
        step += 3 * language_pass(config.text_config, length, length)
        step += 3 * linear(sample.num_labels, config.text_config.hidden_size, config.text_config.vocab_size)
    return step


def mean(results):
    """Mean `ModeFlops` of several samples."""
    entries = [result.model_dump() for result in results]
    return ModeFlops.model_validate(_mean(entries))


def _mean(entries):
    if isinstance(entries[0], dict):
        return {name: _mean([entry[name] for entry in entries]) for name in entries[0]}
    if isinstance(entries[0], list):
        return [_mean(list(values)) for values in zip(*entries, strict=True)]
    return sum(entries) / len(entries)
