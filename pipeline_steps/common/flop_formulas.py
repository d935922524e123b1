"""Floating-point operations of one sample, from shapes alone. One multiply-accumulate = 2 FLOPs.

Counted: every matrix product and convolution that the code runs, at the sizes it runs them (attention over the whole
context, as the kernels compute it; the vocabulary projection only at positions with a loss). Not counted: norms,
softmax, activations, residual additions, rotary embeddings, the loss itself, padding, and what is computed a second
time (attention weights for pictures, layers in the backward pass of activation checkpointing).
tests/pipeline_steps/test_flops.py holds the sums against
`torch.utils.flop_counter.FlopCounterMode` on the real network.

Names: T frames, N patches, D vision width, K queries and P visual tokens per frame, Q query width, E language width.
"""

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
    """Which groups of weights are trained (`connector`: all that no backbone brings along); the others are frozen."""

    connector: bool = True
    vision: bool = True
    language: bool = True


ALL_TRAINED = Trained()


@dataclass(frozen=True)
class Components:
    """FLOPs of the parts of one forward pass; `metrics.Components` is the form in a file."""

    vision_walk: float
    query_walk: float
    connector: float
    planner: float
    language_model: float
    vocabulary_projection: float


@dataclass(frozen=True)
class ModeFlops:
    """What one forward pass with loss costs, and its backward pass; `metrics.ModeFlops` is the form in a file."""

    components: Components
    language_passes: list[float]  # FLOPs of the language model's passes: the planning ones, then that over everything
    language_positions: list[int]  # positions of each
    num_looks: int  # of every query at its frame; 0: no queries
    total: float  # sum of the components
    backward: float


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
    return query_projection(config) + query_layers(config) + query_attention(config)


def query_projection(config):
    """The K queries of one frame on their way to the vision encoder's width."""
    return linear(config.num_visual_tokens_per_frame, config.query_dim, config.vision_config.hidden_size)


def query_layers(config):
    """Products with weights of the K queries of one frame in the layers that they pass through."""
    vision, k = config.vision_config, config.num_visual_tokens_per_frame
    if config.attention == "deep":
        return vision.num_hidden_layers * vision_rows(vision, k) - query_attention(config)
    return 2 * linear(k, vision.hidden_size, vision.hidden_size)


def query_attention(config):
    """Scores and mixtures of the K queries of one frame in the layers that they pass through."""
    vision = config.vision_config
    layers = vision.num_hidden_layers if config.attention == "deep" else 1
    return layers * attention(config.num_visual_tokens_per_frame, num_vision_rows(vision), vision.hidden_size)


def connector(config):
    """From what was found in one frame to its visual tokens."""
    return time_projection(config) + connector_of_features(config)


def time_projection(config):
    """The features of one frame's time."""
    return linear(1, TIME_FEATURES, config.text_config.hidden_size) if config.frame_time_embedding != "none" else 0


def connector_of_features(config):
    """The connector without the time."""
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
    """Scores and mixtures of a `language_pass`."""
    return config.num_hidden_layers * attention(rows, context, config.num_attention_heads * head_width(config))


def head_width(config):
    """Width of one attention head of the language model."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def forward(config, sample, mode, num_plans=None, trained=ALL_TRAINED):
    """`ModeFlops` of one forward pass with loss. mode: coarse, fine or autoregressive; num_plans: times that the
    fine mode plans (default: the configuration's num_passes); trained: the groups that `backward` is for, all of them
    in autoregressive mode.

    A `multi_token` network and one trained coarse-only are the same in every mode.
    """
    vision, text, frames = config.vision_config, config.text_config, sample.num_frames
    num_plans = config.num_passes if num_plans is None else num_plans
    multi_token = config.architecture == "multi_token"
    planning = bool(frames) and not multi_token and not config.coarse_only and mode != "coarse"
    shallow = not multi_token and config.attention == "shallow"

    num_query_passes = 0 if multi_token else 1  # query passes per frame: one, in fine mode one more per plan
    planned, passes = 0, []
    if planning:
        passes = planning_passes(config, sample, mode, num_plans)
        num_query_passes, planned = (1 + num_plans, num_plans * frames) if mode == "fine" else (1, frames)
    total = sample.num_text_tokens + frames * config.tokens_per_frame
    passes.append((total, language_pass(text, total, total)))
    components = Components(
        vision_walk=frames * (vision_walk(vision, multi_token or shallow) + shallow * vision_keys_and_values(vision)),
        query_walk=frames * num_query_passes * query_walk(config) if num_query_passes else 0,
        connector=max(num_query_passes, 1) * frames * connector(config),
        planner=planned * linear(config.num_visual_tokens_per_frame, text.hidden_size, config.query_dim),
        language_model=sum(flops for _, flops in passes),
        vocabulary_projection=linear(sample.num_labels, text.hidden_size, text.vocab_size),
    )
    once = sum(vars(components).values())
    if planning and mode == "autoregressive":
        forgone = without_gradient(config, sample, components, passes)
        backward = 2 * (once - forgone) - frames * patch_embedding(vision)  # the pixels need no gradient
    else:
        backward = parallel_backward(config, sample, components, passes, num_query_passes, trained)
    return ModeFlops(
        components=components,
        language_passes=[flops for _, flops in passes],
        language_positions=[positions for positions, _ in passes],
        num_looks=num_query_passes,
        total=once,
        backward=backward,
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


def without_gradient(config, sample, components, passes):
    """FLOPs of autoregressive mode that have no backward pass because nothing reads what they made.

    Static queries in place of the planned ones: all of planning. Else the last frame's plan, and of the text before the
    frames the last layer beyond its keys and values.
    """
    text = config.text_config
    if config.query_source == "static":
        return passes[0][1] + components.planner
    before, read_until = sample.num_tokens_before, passes[0][0]
    keys_and_values = 2 * linear(before, text.hidden_size, text.num_key_value_heads * head_width(text))
    last_layer = language_pass(text, before, before) / text.num_hidden_layers - keys_and_values
    last_plan = language_pass(text, config.tokens_per_frame, read_until) + components.planner / sample.num_frames
    return last_layer + last_plan


def parallel_backward(config, sample, components, passes, num_query_passes, trained):
    """Backward pass of coarse and fine mode: of every matrix product as much as forward for the gradient of its
    weights, where they are trained, and as much for that of its input, where anything below is trained. Attention's is
    twice the forward one: half for the queries, half for the keys and values.

    The patches of a frozen vision encoder need no gradient and count none, whether or not the code computes one. Static
    queries in place of the planned ones leave no gradient to planning or to the query passes that
    only planning reads. Queries that pass through the layers together with the patches have a gradient of zeros up to
    the last layer.
    """
    text, vision, frames = config.text_config, config.vision_config, sample.num_frames
    if not (frames or trained.language) or not any(vars(trained).values()):
        return 0
    flops = language_backward(text, passes[-1], trained) + components.vocabulary_projection * (trained.language + 1)
    if not frames:
        return flops
    shallow_keys = frames * vision_keys_and_values(vision) * (num_query_passes > 0 and config.attention == "shallow")
    flops += shallow_keys * (trained.connector + trained.vision)
    if trained.vision:
        flops += 2 * (components.vision_walk - shallow_keys) - frames * patch_embedding(vision)  # none of the pixels
    if not num_query_passes:
        connected = connector_of_features(config) * (trained.connector + trained.vision)
        return flops + frames * (connected + time_projection(config) * trained.connector)
    num_planned = num_query_passes - 1
    if config.query_source == "static" and num_planned:
        if config.lambda_coarse > 0:
            flops += frames * query_pass_backward(config, trained, planned=False)
        elif config.attention == "deep" and trained.vision:
            last_layer = vision_rows(vision, config.num_visual_tokens_per_frame)
            flops += 2 * frames * (query_walk(config) - last_layer)
        return flops + frames * query_pass_backward(config, trained, planned=False)
    flops += sum(language_backward(text, one, trained) for one in passes[:-1])
    flops += components.planner * (trained.connector + 1)
    looked = query_pass_backward(config, trained, planned=False) + num_planned * query_pass_backward(
        config, trained, planned=True
    )
    return flops + frames * looked


def query_pass_backward(config, trained, planned):
    """Backward pass of the queries of one frame, without that of the patches. planned: whether its queries are."""
    deep = config.attention == "deep"
    queries_need = planned or trained.connector
    rows_need = queries_need or trained.vision
    weights = trained.vision if deep else trained.connector
    keys_need = trained.vision or (not deep and trained.connector)
    return (
        query_projection(config) * (trained.connector + queries_need)
        + query_layers(config) * (weights + rows_need)
        + query_attention(config) * (rows_need + keys_need)
        + connector_of_features(config) * (trained.connector + rows_need)
        + time_projection(config) * trained.connector
    )


def language_backward(text, one, trained):
    """Backward pass of one of the language model's (positions, FLOPs) over nothing but itself, whose input needs a
    gradient."""
    positions, flops = one
    mixing = language_attention(text, positions, positions)
    return (flops - mixing) * (trained.language + 1) + 2 * mixing


def training_flops(config, sample, num_plans, trained=ALL_TRAINED, rejected=None):
    """FLOPs of one sample in a training step that plans `num_plans` times: forward and backward.

    rejected: the Sample with the other answer of a preference. The frames are encoded once for both, by the network
    and, forward only, by the reference.
    """
    result = forward(config, sample, "coarse" if config.coarse_only else "fine", num_plans, trained)
    step = result.total + result.backward
    if rejected is not None:
        again = reading(config, rejected)
        return step + again + reading_backward(config, rejected, trained) + result.total + again
    if config.lambda_coarse > 0 and result.num_looks > 1 and sample.num_frames:
        step += reading(config, sample) + reading_backward(config, sample, trained)
    return step


def reading(config, sample):
    """The language model over the whole sample, with the logits of its labels."""
    text, length = config.text_config, sample.num_text_tokens + sample.num_frames * config.tokens_per_frame
    return language_pass(text, length, length) + linear(sample.num_labels, text.hidden_size, text.vocab_size)


def reading_backward(config, sample, trained):
    """Backward pass of a `reading`; none of text that only frozen weights read."""
    if not (trained.language or (sample.num_frames and any(vars(trained).values()))):
        return 0
    text, length = config.text_config, sample.num_text_tokens + sample.num_frames * config.tokens_per_frame
    vocabulary = linear(sample.num_labels, text.hidden_size, text.vocab_size)
    once = language_backward(text, (length, language_pass(text, length, length)), trained)
    return once + vocabulary * (trained.language + 1)


def training_step(config, sample):
    """FLOPs of one training sample when every weight is trained: forward and backward.

    The second planning counts with its probability.
    """
    once, twice = (training_flops(config, sample, config.num_passes + more) for more in (0, 1))
    return once + config.second_pass_probability * (twice - once)


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
