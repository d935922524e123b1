"""FLOPs and memory of an answer, and memory of a training sample, computed from shapes as in flop_formulas.py.

An answer (`generate`): the frames are encoded one after another with the language model's key-value cache; the text
after them is read over this cache and gives the first token (together: prefill); then every further token is one
position over the whole context (decode). Networks that plan use caches of a fixed size, and attention covers them
whole; the others read the prompt in one pass and have a growing cache.

Memory: the key-value cache holds 2 x layers x key-value heads x head width numbers per position; the queries need the
keys and values of every vision layer of every frame until the last frame has been encoded. Activations of a training
sample are the tensors that autograd saves, with fused attention (no saved scores) and without activation
checkpointing; weights, gradients and optimizer state are excluded:

vision layer         18 D numbers per row: the two norms' inputs and outputs, queries, keys, values, mixture, the dense
                     layer's and the feed-forward's outputs before their scales, the feed-forward's inner width (4 D)
                     before and after its activation; the last layer 4 D unless something reads its patches; D more for
                     the patches' normed rows without the queries that pass through with them; 14 D for a query row,
                     which has no keys and values of its own; and the pixels
language layer       6 E + 3 A + 2 C + 4 I numbers per position of every pass: per norm its input, the normed and the
                     scaled rows; queries, mixture and output (A wide), keys and values (C wide); gate, its activation,
                     up and their product (I)
vocabulary           V numbers in fp32 per labelled position

D vision width, E language width, A, C width of all query heads and of all key-value heads, I feed-forward width.
"""

from model.static_layers import PLACES
from pipeline_steps.common.flop_formulas import (
    Sample,
    at_low_resolution,
    forward,
    head_width,
    language_pass,
    linear,
    num_vision_rows,
)
from pipeline_steps.common.flop_results import AnswerCost, TrainingMemory

FP32 = 4  # bytes


def answer(config, sample, num_tokens, bytes_per_number):
    """`AnswerCost` of `num_tokens` >= 1 generated tokens; the prompt is the Sample without its labelled tokens."""
    text = config.text_config
    prompt = Sample(sample.num_frames, sample.num_text_tokens - sample.num_labels, sample.num_tokens_before, 1)
    length = prompt.num_text_tokens + prompt.num_frames * config.tokens_per_frame
    planning = forward(config, prompt, "autoregressive").language_positions[:-1]
    size = length + num_tokens  # of the cache
    contexts = [size if planning else length + number for number in range(1, num_tokens)]
    prefill = prefill_flops(config, prompt, size)
    steps = [decode_step(text, context) for context in contexts]
    return AnswerCost(
        num_prompt_tokens=length,
        num_answer_tokens=num_tokens,
        prefill=prefill,
        first_decoded_token=decode_step(text, contexts[0] if contexts else length + 1),
        per_decoded_token=sum(steps) / len(steps) if steps else 0.0,
        total=prefill + sum(steps),
        key_value_bytes=key_value_bytes(text, length + num_tokens - 1, bytes_per_number),
        vision_bytes=vision_bytes(config, sample.num_frames, bytes_per_number),
    )


def prefill_flops(config, prompt, size):
    """FLOPs until the first token of a Sample with one labelled token; size: positions of the cache of the answer."""
    result = forward(config, prompt, "autoregressive")
    *planning, total = result.language_positions
    if not planning:
        return result.total - sum(result.language_passes) + language_pass(config.text_config, total, total)
    text, tokens, before = config.text_config, config.tokens_per_frame, prompt.num_tokens_before
    places = -(-planning[0] // PLACES) * PLACES  # of the frames' cache
    reading = language_pass(text, before, before) + prompt.num_frames * language_pass(text, tokens, places)
    reading += language_pass(text, total - planning[0], size)
    return result.total - sum(result.language_passes) + reading


def decode_step(text, context):
    """FLOPs of one position over `context` positions (itself included), with its logits."""
    return language_pass(text, 1, context) + linear(1, text.hidden_size, text.vocab_size)


def key_value_bytes(text, num_positions, bytes_per_number):
    """Size of the language model's key-value cache."""
    return 2 * text.num_hidden_layers * text.num_key_value_heads * head_width(text) * num_positions * bytes_per_number


def vision_bytes(config, num_frames, bytes_per_number):
    """Size of the vision encoder's keys and values that the queries attend to; 0 for `multi_token`."""
    vision = at_low_resolution(config).vision_config
    if config.architecture == "multi_token":
        return 0
    layers = 1 if config.attention == "shallow" else vision.num_hidden_layers
    return 2 * layers * num_frames * num_vision_rows(vision) * vision.hidden_size * bytes_per_number


def training_memory(config, sample, bytes_per_number):
    """`TrainingMemory` of one sample in fine mode."""
    result = forward(config, sample, "fine")
    config = at_low_resolution(config)
    vision, text = config.vision_config, config.text_config
    width, inner = vision.hidden_size, int(vision.hidden_size * vision.mlp_ratio)
    query_rows = result.num_query_passes * sample.num_frames * config.num_visual_tokens_per_frame
    per_row = 10 * width + 2 * inner
    needs_last = config.architecture == "multi_token" or config.attention == "shallow"
    per_frame_row = (vision.num_hidden_layers - 1) * per_row + (per_row if needs_last else 4 * width)
    if not needs_last:
        per_frame_row += vision.num_hidden_layers * width
    per_frame = num_vision_rows(vision) * per_frame_row + vision.num_channels * vision.image_size**2
    if config.fovea_size:  # every plan has a window, with its own copy of all keys and values
        size, num_windows = config.fovea_size**2, result.num_query_passes - 1
        window = size * (per_frame_row - width + vision.num_channels * vision.patch_size**2)
        copies = vision.num_hidden_layers * 2 * width * num_vision_rows(vision)
        per_frame += num_windows * (window + copies)
    heads = text.num_attention_heads * head_width(text), text.num_key_value_heads * head_width(text)
    per_position = 6 * text.hidden_size + 3 * heads[0] + 2 * heads[1] + 4 * text.intermediate_size
    layers = 1 if config.attention == "shallow" else vision.num_hidden_layers
    return TrainingMemory(
        vision_bytes=sample.num_frames * per_frame * bytes_per_number,
        query_bytes=layers * query_rows * (per_row - 4 * width) * bytes_per_number,
        language_bytes=text.num_hidden_layers * sum(result.language_positions) * per_position * bytes_per_number,
        vocabulary_bytes=sample.num_labels * text.vocab_size * FP32,
    )
