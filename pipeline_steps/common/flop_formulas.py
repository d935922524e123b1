"""Floating-point operations of one sample, from shapes alone. One multiply-accumulate = 2 FLOPs.

Counted: every matrix product and convolution that the code runs, at the sizes it runs them (attention over the whole
context, as the kernels compute it; the vocabulary projection only at positions with a loss). Not counted: norms,
softmax, activations, residual additions, rotary embeddings, the loss itself, padding, and recomputation (attention
weights for heatmaps, layers in the backward pass of activation checkpointing). tests/pipeline_steps/test_flops.py
compares the sums with `torch.utils.flop_counter.FlopCounterMode` on the real network.

Names: T frames, N patches, D vision width, K queries and P visual tokens per frame, Q query width, E language width.
"""

import copy
from dataclasses import asdict, dataclass

from model.modeling_foveated_vlm import TIME_FEATURES


@dataclass(frozen=True)
class Sample:
    """Lengths of one sample, in tokens and frames."""

    num_frames: int
    num_text_tokens: int  # everything but the visual tokens
    num_tokens_before: int  # text tokens before the first visual token
    num_labels: int  # tokens with a loss


@dataclass(frozen=True)
class Trained:
    """Which groups of weights are trained; the others are frozen. `connector`: all weights outside both backbones."""

    connector: bool = True
    vision: bool = True
    language: bool = True


ALL_TRAINED = Trained()


@dataclass(frozen=True)
class Components:
    """FLOPs of the parts of one forward pass; `flop_results.Components` is the schema of the same in result files."""

    vision_encoder: float
    query_passes: float
    connector: float
    planner: float
    language_model: float
    vocabulary_projection: float


@dataclass(frozen=True)
class ModeFlops:
    """FLOPs of one forward pass with loss and of its backward pass; `flop_results.ModeFlops` is its schema in files."""

    components: Components
    language_passes: list[float]  # FLOPs of the language model's passes: the planning passes, then the full sequence
    language_positions: list[int]  # positions that each reads
    num_query_passes: int  # per frame; 0: the network has no queries
    total: float  # sum of the components
    backward: float


def linear(rows, inputs, outputs):
    """FLOPs of a matrix product [rows, inputs] x [inputs, outputs]."""
    return 2 * rows * inputs * outputs


def attention(rows, context, width):
    """Scores and weighted sum of `rows` queries over `context` keys; `width` is the width of all heads together."""
    return 2 * linear(rows, width, context)


def vision_rows(config, rows, context=None):
    """One vision layer for `rows` rows of one frame, without keys and values: query and output projection, attention
    to `context` positions (default: the frame's), feed-forward."""
    width, inner = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
    return (
        2 * linear(rows, width, width)
        + attention(rows, context or num_vision_rows(config), width)
        + 2 * linear(rows, width, inner)
    )


def vision_keys_and_values(config):
    """Keys and values of one layer for one frame."""
    return 2 * linear(num_vision_rows(config), config.hidden_size, config.hidden_size)


def num_vision_rows(config):
    """Rows of one frame: its patches and the class token."""
    return (config.image_size // config.patch_size) ** 2 + 1


def vision_encoder_flops(config, need_last_layer):
    """The pass of one frame's patches through the encoder, which caches keys and values of every layer. Without
    `need_last_layer` only the last layer's keys and values are computed."""
    full_layers = config.num_hidden_layers - (not need_last_layer)
    keys_and_values = config.num_hidden_layers * vision_keys_and_values(config)
    return patch_embedding(config) + keys_and_values + full_layers * vision_rows(config, num_vision_rows(config))


def patch_embedding(config):
    """The patch-embedding convolution of one frame."""
    return linear(num_vision_rows(config) - 1, config.num_channels * config.patch_size**2, config.hidden_size)


def at_low_resolution(config):
    """The configuration with the frames' size as the vision encoder sees it."""
    if config.frame_downsampling == 1:
        return config
    low = copy.copy(config)
    low.vision_config, low.frame_downsampling = copy.copy(config.vision_config), 1
    low.vision_config.image_size = config.vision_config.image_size // config.frame_downsampling
    return low


def window_flops(config):
    """The pass of the window of one frame, without its queries. config: `at_low_resolution`."""
    vision, size = config.vision_config, config.fovea_size**2
    context = num_vision_rows(vision) + size
    keys_and_values = vision.num_hidden_layers * 2 * linear(size, vision.hidden_size, vision.hidden_size)
    others = (vision.num_hidden_layers - 1) * vision_rows(vision, size, context)
    return window_embedding(config) + keys_and_values + others


def window_embedding(config):
    """The patch-embedding convolution of the window of one frame."""
    vision = config.vision_config
    return linear(config.fovea_size**2, vision.num_channels * vision.patch_size**2, vision.hidden_size)


def window_attention(config):
    """Attention of the K queries of one frame to its window, over all layers."""
    vision = config.vision_config
    one = attention(config.num_visual_tokens_per_frame, config.fovea_size**2, vision.hidden_size)
    return vision.num_hidden_layers * one


def gaze_flops(config):
    """The pass of the K queries of one frame that finds the window: over the low-resolution patches, no gradient."""
    return query_layers(config) + query_attention(config)


def query_pass_flops(config):
    """One pass of the K queries of one frame: projection to the vision width, then the encoder layers."""
    return query_projection(config) + query_layers(config) + query_attention(config)


def planner(config):
    """FLOPs of planning the queries of a frame, with the gate of a gated update."""
    matrices = 2 if config.query_update == "gated" else 1
    return matrices * linear(config.num_visual_tokens_per_frame, config.text_config.hidden_size, config.query_dim)


def query_projection(config):
    """Projection of the K queries of one frame to the vision encoder's width."""
    return linear(config.num_visual_tokens_per_frame, config.query_dim, config.vision_config.hidden_size)


def query_layers(config):
    """Weight products of the K queries of one frame, over the layers that the queries pass through."""
    vision, k = config.vision_config, config.num_visual_tokens_per_frame
    if config.attention == "deep":
        return vision.num_hidden_layers * vision_rows(vision, k) - query_attention(config)
    return 2 * linear(k, vision.hidden_size, vision.hidden_size)


def query_attention(config):
    """Attention scores and weighted sums of the K queries of one frame, over the layers that they pass through."""
    vision = config.vision_config
    layers = vision.num_hidden_layers if config.attention == "deep" else 1
    return layers * attention(config.num_visual_tokens_per_frame, num_vision_rows(vision), vision.hidden_size)


def connector(config):
    """From the features of one frame to its visual tokens."""
    return time_projection(config) + connector_of_features(config)


def time_projection(config):
    """Projection of one frame's time features."""
    return linear(1, TIME_FEATURES, config.text_config.hidden_size) if config.frame_time_embedding != "none" else 0


def connector_of_features(config):
    """The connector without the time projection."""
    vision, text = config.vision_config, config.text_config
    flops = linear(config.tokens_per_frame, vision.hidden_size, text.hidden_size)
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
    return config.num_hidden_layers * (projections + feed_forward) + language_attention(config, rows, context)


def language_attention(config, rows, context):
    """Attention scores and weighted sums of a `language_pass`."""
    return config.num_hidden_layers * attention(rows, context, config.num_attention_heads * head_width(config))


def head_width(config):
    """Width of one attention head of the language model."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def forward(config, sample, mode, num_plans=None, trained=ALL_TRAINED, coarse_loss=False):
    """`ModeFlops` of one forward pass with loss. mode: coarse, fine or autoregressive. num_plans: number of
    planning passes in fine mode (default: the configuration's num_passes). trained: the groups that `backward` trains;
    in autoregressive mode `backward` always trains all of them. coarse_loss: whether the coarse tokens have a loss of
    their own.

    `multi_token` and coarse-only networks cost the same in every mode.
    """
    config = at_low_resolution(config)
    vision, text, frames = config.vision_config, config.text_config, sample.num_frames
    num_plans = config.num_passes if num_plans is None else num_plans
    multi_token = config.architecture == "multi_token"
    planning = bool(frames) and not multi_token and not config.coarse_only and mode != "coarse"
    shallow = not multi_token and config.attention == "shallow"

    num_query_passes = 0 if multi_token else 1  # per frame: one, and in fine mode one more per plan
    planned, passes = 0, []
    if planning:
        passes = planning_passes(config, sample, mode, num_plans)
        num_query_passes, planned = (1 + num_plans, len(passes) * frames) if mode == "fine" else (1, frames)
    num_windows = 0  # per frame
    if planning and config.fovea_size:
        num_windows = num_plans if mode == "fine" else 1
    passes.append(full_pass(config, sample, planning and mode == "fine" and bool(passes)))
    components = Components(
        vision_encoder=frames
        * (
            vision_encoder_flops(vision, multi_token or shallow)
            + shallow * vision_keys_and_values(vision)
            + num_windows * window_flops(config)
        ),
        query_passes=frames
        * (num_query_passes * query_pass_flops(config) + num_windows * (gaze_flops(config) + window_attention(config)))
        if num_query_passes
        else 0,
        connector=max(num_query_passes, 1) * frames * connector(config),
        planner=planned * planner(config),
        language_model=sum(pass_flops(text, one) for one in passes),
        vocabulary_projection=linear(sample.num_labels, text.hidden_size, text.vocab_size),
    )
    once = sum(vars(components).values())
    if planning and mode == "autoregressive":
        without_backward = without_gradient(config, sample, components, passes)
        without_backward += frames * num_windows * gaze_flops(config)
        embedding = patch_embedding(vision) + num_windows * window_embedding(config)
        backward = 2 * (once - without_backward) - frames * embedding  # no gradient of the pixels
    else:
        backward = parallel_backward(
            config, sample, components, passes, num_query_passes, num_windows, trained, coarse_loss
        )
    return ModeFlops(
        components=components,
        language_passes=[pass_flops(text, one) for one in passes],
        language_positions=[sum(rows for rows, _ in one) for one in passes],
        num_query_passes=num_query_passes,
        total=once,
        backward=backward,
    )


def planning_passes(config, sample, mode, num_plans):
    """The language model's passes that plan queries, as lists of (rows, context); each stops at the last visual token.

    In fine mode the first one reads the text before the frames for all later passes, and with static queries there are
    none.
    """
    tokens, before = config.tokens_per_frame, sample.num_tokens_before
    if mode == "fine":
        visual = sample.num_frames * tokens
        passes = [[(before + visual, before + visual)]] + (num_plans - 1) * [[(visual, before + visual)]]
        return [] if config.query_source == "static" else passes
    return [[(before, before), *((tokens, before + (t + 1) * tokens) for t in range(sample.num_frames))]]


def full_pass(config, sample, after_planning=False):
    """The pass over the whole sequence, as a list of (rows, context). after_planning: the text before the frames has
    been read."""
    total = sample.num_text_tokens + sample.num_frames * config.tokens_per_frame
    return [(total - after_planning * sample.num_tokens_before, total)]


def pass_flops(text, one):
    """FLOPs of a pass, a list of (rows, context)."""
    return sum(language_pass(text, rows, context) for rows, context in one)


def without_gradient(config, sample, components, passes):
    """FLOPs of autoregressive mode without a backward pass, because no loss depends on their result.

    With static queries this is all of planning. Otherwise it is the plan made after the last frame, and the last layer
    of the text before the frames except its keys and values.
    """
    text, before = config.text_config, sample.num_tokens_before
    if config.query_source == "static":
        return pass_flops(text, passes[0]) + components.planner
    keys_and_values = 2 * linear(before, text.hidden_size, text.num_key_value_heads * head_width(text))
    last_layer = language_pass(text, before, before) / text.num_hidden_layers - keys_and_values
    planning_length = before + sample.num_frames * config.tokens_per_frame
    last_plan = language_pass(text, config.tokens_per_frame, planning_length) + components.planner / sample.num_frames
    return last_layer + last_plan


def parallel_backward(config, sample, components, passes, num_query_passes, num_windows, trained, coarse_loss):
    """FLOPs of the backward pass of coarse and fine mode. Each matrix product costs its forward FLOPs once for the
    gradient of its weights, if they are trained, and once for the gradient of its input, if anything below is trained.
    Attention costs twice its forward FLOPs: half for the queries, half for the keys and values.

    A frozen vision encoder needs no gradient of the patches; none is counted even if the code computes one. With static
    queries neither planning nor the query passes that feed only planning get a gradient, nor do their windows. The
    gradient of queries that pass through the layers together with the patches is zero up to the last layer.
    """
    text, vision, frames = config.text_config, config.vision_config, sample.num_frames
    if not (frames or trained.language) or not any(vars(trained).values()):
        return 0
    flops = pass_backward(text, passes[-1], trained) + components.vocabulary_projection * (trained.language + 1)
    if not frames:
        return flops
    shallow_keys = frames * vision_keys_and_values(vision) * (num_query_passes > 0 and config.attention == "shallow")
    flops += shallow_keys * (trained.connector + trained.vision)
    if trained.vision:
        windows = frames * num_windows * window_flops(config)
        flops += 2 * (components.vision_encoder - shallow_keys - windows) - frames * patch_embedding(vision)
        num_trained = min(num_windows, 1) if config.query_source == "static" else num_windows
        flops += frames * num_trained * (2 * window_flops(config) - window_embedding(config))  # none of the pixels
    if not num_query_passes:
        connected = connector_of_features(config) * (trained.connector + trained.vision)
        return flops + frames * (connected + time_projection(config) * trained.connector)
    num_planned = num_query_passes - 1
    if config.query_source == "static" and num_planned:
        if coarse_loss:
            flops += frames * query_pass_backward(config, trained, planned=False)
        elif config.attention == "deep" and trained.vision:
            last_layer = vision_rows(vision, config.num_visual_tokens_per_frame)
            flops += 2 * frames * (query_pass_flops(config) - last_layer)
        return flops + frames * query_pass_backward(config, trained, planned=False, with_window=num_windows > 0)
    flops += sum(pass_backward(text, one, trained) for one in passes[:-1])
    flops += components.planner * (trained.connector + 1)
    query_passes = query_pass_backward(config, trained, planned=False) + num_planned * query_pass_backward(
        config, trained, planned=True, with_window=num_windows > 0
    )
    return flops + frames * query_passes


def query_pass_backward(config, trained, planned, with_window=False):
    """Backward pass of the queries of one frame, without the patches. planned: whether the queries are planned."""
    deep = config.attention == "deep"
    queries_need = planned or trained.connector
    rows_need = queries_need or trained.vision
    weights = trained.vision if deep else trained.connector
    keys_need = trained.vision or (not deep and trained.connector)
    return (
        query_projection(config) * (trained.connector + queries_need)
        + query_layers(config) * (weights + rows_need)
        + (query_attention(config) + with_window * window_attention(config)) * (rows_need + keys_need)
        + connector_of_features(config) * (trained.connector + rows_need)
        + time_projection(config) * trained.connector
    )


def language_backward(text, rows, context, trained):
    """Backward pass of `rows` positions over `context` ones, whose input needs a gradient."""
    mixing = language_attention(text, rows, context)
    return (language_pass(text, rows, context) - mixing) * (trained.language + 1) + 2 * mixing


def pass_backward(text, one, trained):
    """Backward pass of a pass, a list of (rows, context)."""
    return sum(language_backward(text, rows, context, trained) for rows, context in one)


def training_flops(config, sample, num_plans, trained=ALL_TRAINED, rejected=None, coarse_loss=False):
    """FLOPs of one sample in a training step that plans `num_plans` times: forward and backward.

    rejected: the Sample with the rejected answer of a preference pair. The network encodes the frames once for both
    answers, and so does the reference model, forward only. coarse_loss: the text loss of the coarse pass is trained on
    as well.
    """
    mode = "coarse" if config.coarse_only else "fine"
    result = forward(config, sample, mode, num_plans, trained, coarse_loss)
    step = result.total + result.backward
    if rejected is not None:
        again = full_language_pass(config, rejected)
        return step + again + full_language_pass_backward(config, rejected, trained) + result.total + again
    if coarse_loss and result.num_query_passes > 1 and sample.num_frames:
        text, again = config.text_config, full_pass(config, sample, after_planning=config.query_source != "static")
        vocabulary = linear(sample.num_labels, text.hidden_size, text.vocab_size)
        step += pass_flops(text, again) + pass_backward(text, again, trained) + vocabulary * (trained.language + 2)
    return step


def full_language_pass(config, sample):
    """The language model over the whole sequence, with the logits at its labels."""
    text = config.text_config
    vocabulary = linear(sample.num_labels, text.hidden_size, text.vocab_size)
    return pass_flops(text, full_pass(config, sample)) + vocabulary


def full_language_pass_backward(config, sample, trained):
    """Backward pass of a `full_language_pass`; 0 for text that only frozen weights process."""
    if not (trained.language or (sample.num_frames and any(vars(trained).values()))):
        return 0
    text = config.text_config
    vocabulary = linear(sample.num_labels, text.hidden_size, text.vocab_size)
    return pass_backward(text, full_pass(config, sample), trained) + vocabulary * (trained.language + 1)


def training_step(config, sample, objective):
    """FLOPs of one training sample when every weight is trained: forward and backward. objective: section
    training.<stage>.objective.

    A second planning pass counts with its probability.
    """
    options = {"coarse_loss": objective.coarse.weight > 0}
    once, twice = (training_flops(config, sample, config.num_passes + more, **options) for more in (0, 1))
    return once + objective.second_pass_probability * (twice - once)


def mean(results):
    """Mean `ModeFlops` of several samples."""
    entries = _mean([asdict(result) for result in results])
    return ModeFlops(**{**entries, "components": Components(**entries["components"])})


def _mean(entries):
    if isinstance(entries[0], dict):
        return {name: _mean([entry[name] for entry in entries]) for name in entries[0]}
    if isinstance(entries[0], list):
        return [_mean(list(values)) for values in zip(*entries, strict=True)]
    return sum(entries) / len(entries)
