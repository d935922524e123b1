"""Checks of the arguments of `forward` and `generate`. Messages have the found and expected values and a fix."""

import torch
from torch import Tensor

from .constants import IGNORE_INDEX, MODES
from .option_checks import QUERY_SOURCES
from .options import FoveationOptions


def check_inputs(
    config,
    input_ids,
    attention_mask=None,
    pixel_values=None,
    num_frames=None,
    labels=None,
    frame_times=None,
    mode: str = "fine",
    options: FoveationOptions | None = None,
) -> None:
    """Raises ValueError if the arguments of `forward` or `generate` do not match each other or the configuration."""
    if input_ids.ndim != 2 or not input_ids.numel():
        raise ValueError(
            f"input_ids has shape {list(input_ids.shape)}, expected [samples, tokens] with at least one token"
        )
    for name, value in (("attention_mask", attention_mask), ("labels", labels)):
        if value is not None and value.shape != input_ids.shape:
            raise ValueError(
                f"{name} has shape {list(value.shape)}, input_ids {list(input_ids.shape)}. Pass one entry per token"
            )
    options = options or FoveationOptions()
    target_patches = options.target_patches
    if options.num_plans is not None and options.num_plans < 1:
        raise ValueError(f"num_plans={options.num_plans} must be at least 1. Without planning use mode='coarse'")
    source = options.query_source or config.query_source
    if mode not in MODES or source not in QUERY_SOURCES:
        raise ValueError(
            f"mode={mode!r} must be one of {', '.join(MODES)}; "
            f"query_source={source!r} must be one of {', '.join(QUERY_SOURCES)}"
        )
    frames = 0 if pixel_values is None else len(pixel_values)
    if num_frames is not None and (
        not torch.is_tensor(num_frames) or num_frames.ndim != 1 or num_frames.is_floating_point()
    ):
        found = f"{num_frames.dtype} {list(num_frames.shape)}" if torch.is_tensor(num_frames) else repr(num_frames)
        raise ValueError(f"num_frames is {found}, expected an integer tensor [samples]")
    if num_frames is not None and len(num_frames) != len(input_ids):
        raise ValueError(
            f"num_frames has {len(num_frames)} entries for {len(input_ids)} samples. Pass the number of frames of each "
            "sample"
        )
    if frames and not pixel_values.is_floating_point():
        raise ValueError(f"pixel_values has dtype {pixel_values.dtype}, expected normalised floats from the processor")
    if frames and frame_times is not None and tuple(frame_times.shape) != (frames,):
        raise ValueError(
            f"frame_times has shape {list(frame_times.shape)}, expected [{frames}], the time of each frame"
        )
    if source == "oracle" and config.architecture == "foveated" and frames:
        patch = config.vision_config.patch_size
        wanted = (frames, (pixel_values.shape[-2] // patch) * (pixel_values.shape[-1] // patch))
        found = None if target_patches is None else tuple(target_patches.shape)
        if found != wanted or target_patches.dtype != torch.bool:
            raise ValueError(
                f"query_source='oracle' needs target_patches for {frames} frames, bool {list(wanted)} [frames, "
                f"patches], got {None if found is None else f'{target_patches.dtype} {list(found)}'}. Pass the patches "
                "that show the target"
            )
    limit, length = config.text_config.max_position_embeddings, input_ids.shape[1]
    if length > limit:
        raise ValueError(
            f"input_ids has {length} tokens, but the language model's context is {limit}. Use fewer frames or a "
            "shorter text"
        )
    if options.text is not None:
        _check_places(config, options.text.places, input_ids, frames, labels)
        return
    _check_values(config, input_ids, attention_mask, num_frames, frames, labels)


def _check_places(config, places, input_ids, frames: int, labels) -> None:
    """Raises ValueError unless the indices are those of a batch of this shape. Nothing waits for a GPU."""
    shown = len(places.visual) / config.tokens_per_frame
    if tuple(places.shape) != tuple(input_ids.shape) or shown != frames or len(places.time_of_frame) != frames:
        raise ValueError(
            f"the packed text is of {list(places.shape)} tokens with {shown:g} frames of {config.tokens_per_frame} "
            f"visual tokens, but input_ids has shape {list(input_ids.shape)} and there are {frames} frames. Make the "
            "packed text of this batch"
        )
    if labels is not None and not places.has_labels:
        raise ValueError(
            "labels are given, but the packed text was made without labels, so there would be no loss. Pass labels to "
            "packed_text, too"
        )
    if places.longest_clip > config.max_num_frames:
        raise ValueError(
            f"a sample has {places.longest_clip} frames, the model takes at most {config.max_num_frames} "
            "(max_num_frames). Sample fewer frames"
        )


def _check_values(config, input_ids, attention_mask, num_frames, frames: int, labels) -> None:
    """Raises ValueError if values of the arguments do not match each other or the configuration. A GPU waits for it."""
    total = None if num_frames is None else int(num_frames.sum())
    if (total or 0) != frames:
        raise ValueError(
            f"num_frames sums to {total}, but pixel_values has {frames} frames. Concatenate the frames of all samples "
            "and pass the number of frames of each in num_frames"
        )
    per_frame = config.tokens_per_frame
    is_visual = input_ids == config.visual_token_id
    places = is_visual.sum(1)
    expected = torch.zeros_like(places) if num_frames is None else num_frames.to(places.device) * per_frame
    if wrong := _first_true(places != expected):
        row = wrong[0]
        raise ValueError(
            f"sample {row} has {int(places[row])} visual placeholders for {int(expected[row]) // per_frame} frames "
            f"of {per_frame} visual tokens each. input_ids must contain exactly {int(expected[row])}"
        )
    if attention_mask is not None and (wrong := _first_true(is_visual & (attention_mask == 0))):
        raise ValueError(
            f"sample {wrong[0]} has visual placeholders where attention_mask is 0. Set it to 1 at the frames"
        )
    check_tokens(config, input_ids, attention_mask, labels)
    if num_frames is not None and int(num_frames.max()) > config.max_num_frames:
        row = int(num_frames.argmax())
        raise ValueError(
            f"sample {row} has {int(num_frames[row])} frames, the model takes at most {config.max_num_frames} "
            "(max_num_frames). Sample fewer frames"
        )
    starts = (is_visual[:, 1:] & ~is_visual[:, :-1]).sum(1) + is_visual[:, 0]  # blocks of placeholders
    if len(starts) and int(starts.max()) > 1:
        row = int(starts.argmax())
        raise ValueError(
            f"sample {row} has visual placeholders in {int(starts[row])} blocks, expected 1. Text between frames is "
            "not supported; put it before or after all frames"
        )


def check_tokens(config, input_ids, attention_mask, labels) -> None:
    """Raises ValueError for an id outside the vocabulary, or a label that no text token can have. A GPU waits for
    it."""
    size, visual_id = config.text_config.vocab_size, config.visual_token_id
    if wrong := _first_true(((input_ids < 0) | (input_ids >= size)) & (input_ids != visual_id)):
        row, column = wrong
        raise ValueError(
            f"sample {row} has the token id {int(input_ids[row, column])} at place {column}, but the vocabulary has "
            f"{size} tokens and the visual placeholder is {visual_id}. Use the checkpoint's tokenizer"
        )
    if labels is None:
        return
    if wrong := _first_true(labels == visual_id):
        raise ValueError(f"sample {wrong[0]} has visual placeholders in labels. Set the labels there to {IGNORE_INDEX}")
    is_labelled = labels != IGNORE_INDEX
    if wrong := _first_true(is_labelled & ((labels < 0) | (labels >= size))):
        row, column = wrong
        raise ValueError(
            f"sample {row} has the label {int(labels[row, column])} at place {column}, but the vocabulary has {size} "
            f"tokens. Use token ids, or {IGNORE_INDEX} where there is no loss"
        )
    if attention_mask is not None and (wrong := _first_true(is_labelled & (attention_mask == 0))):
        raise ValueError(
            f"sample {wrong[0]} has labels where attention_mask is 0. Set them to {IGNORE_INDEX} at padding"
        )


def _first_true(mask) -> list[int] | None:
    """The indices of the first true element; None if there is none."""
    found = mask.nonzero()
    return found[0].tolist() if len(found) else None


def check_library_arguments(input_ids, output_hidden_states, use_cache, inputs_embeds, past_key_values) -> None:
    """Raises ValueError for arguments that the library's other models take and `forward` does not support."""
    if inputs_embeds is not None or input_ids is None:
        raise ValueError(
            "forward needs input_ids, not inputs_embeds: the frames belong to the placeholders of input_ids. Adapters "
            "that add embeddings to the prompt (prompt tuning) are not supported; use LoRA"
        )
    if past_key_values is not None or use_cache:
        raise ValueError(
            "forward keeps no key-value cache (use_cache, past_key_values): call generate, or stream to go on from a "
            "cache. Adapters that fill a cache (prefix tuning) are not supported; use LoRA"
        )
    if output_hidden_states:
        raise ValueError("forward returns last_hidden_state, not output_hidden_states. Leave it out")


def check_left_padded(attention_mask: Tensor) -> None:
    """Raises ValueError if a sample ends in padding, from which generation would continue."""
    ends = attention_mask[:, -1].bool()
    if not ends.all():
        row = int((~ends).nonzero()[0])
        length, real = attention_mask.shape[1], int(attention_mask[row].bool().sum())
        raise ValueError(
            f"sample {row} has {real} tokens in a row of {length} and ends in padding. Pad on the left to generate"
        )


def check_preference(config, chosen, rejected) -> None:
    """Raises ValueError unless the two answers, each (input_ids, attention_mask, labels), match each other."""
    if any(labels is None for _, _, labels in (chosen, rejected)):
        raise ValueError("labels are missing. Both answers need labels, which mark the answer tokens")
    samples, others = len(chosen[0]), len(rejected[0])
    if samples != others:
        raise ValueError(f"{samples} chosen answers but {others} rejected ones. Pass both for every sample")
    limit = config.text_config.max_position_embeddings
    for name, (ids, mask, labels) in (("chosen", chosen), ("rejected", rejected)):
        if ids.shape[1] > limit:
            raise ValueError(
                f"the {name} answers have {ids.shape[1]} tokens, but the language model's context is {limit}. Shorten "
                "them"
            )
        if mask.shape != ids.shape or labels.shape != ids.shape:
            raise ValueError(
                f"the {name} answers have input_ids {list(ids.shape)}, attention_mask {list(mask.shape)} and labels "
                f"{list(labels.shape)}. Pass one entry per token"
            )


def check_cache(model) -> None:
    """Raises ValueError if gradient checkpointing would disable the cache that autoregressive mode and generate
    need."""
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(
            "autoregressive mode and generate need a key-value cache, which gradient checkpointing disables in "
            "training mode. Call eval() or gradient_checkpointing_disable(), or train in mode='fine'"
        )


def check_new_tokens(config, length: int, new_tokens: int) -> None:
    """Raises ValueError if a prompt of this length and so many new tokens exceed the language model's context."""
    limit = config.text_config.max_position_embeddings
    if length + new_tokens > limit:
        raise ValueError(
            f"question and frames take {length} of the language model's {limit} positions, so max_new_tokens="
            f"{new_tokens} does not fit. Lower it to at most {max(0, limit - length)}"
        )
