"""What `forward` and `generate` refuse, each with both numbers and the next step."""

import torch
from torch import Tensor

from .configuration_foveated_vlm import MODES, QUERY_SOURCES


def check_inputs(config, input_ids, pixel_values, num_frames, mode: str, query_source, target_patches) -> None:
    """Raises ValueError where the arguments of `forward` or `generate` do not fit each other or the configuration."""
    source = query_source or config.query_source
    if mode not in MODES or source not in QUERY_SOURCES:
        raise ValueError(
            f"mode={mode!r} must be one of {', '.join(MODES)}; "
            f"query_source={source!r} must be one of {', '.join(QUERY_SOURCES)}"
        )
    frames = 0 if pixel_values is None else len(pixel_values)
    if num_frames is not None and len(num_frames) != len(input_ids):
        raise ValueError(
            f"num_frames has {len(num_frames)} entries for {len(input_ids)} samples: give the number of frames of each"
        )
    if frames and (num_frames is None or int(num_frames.sum()) != frames):
        told = None if num_frames is None else int(num_frames.sum())
        raise ValueError(
            f"num_frames adds up to {told} but pixel_values holds {frames} frames: give the frames of all samples one "
            "after another and the number of each in num_frames"
        )
    if source == "oracle" and frames and (target_patches is None or len(target_patches) != frames):
        told = None if target_patches is None else len(target_patches)
        raise ValueError(
            f"query_source='oracle' needs target_patches for {frames} frames, got {told}: pass bool [frames, patches]"
        )
    limit, length = config.text_config.max_position_embeddings, input_ids.shape[1]
    if length > limit:
        raise ValueError(
            f"input_ids has {length} tokens but the language model reads at most {limit}: take fewer frames or a "
            "shorter text"
        )
    per_frame = config.tokens_per_frame
    is_visual = input_ids == config.visual_token_id
    places = is_visual.sum(1)
    expected = torch.zeros_like(places) if num_frames is None else num_frames.to(places.device) * per_frame
    if not torch.equal(places, expected):
        row = int((places != expected).nonzero()[0])
        raise ValueError(
            f"sample {row} has {int(places[row])} visual placeholders for {int(expected[row]) // per_frame} frames "
            f"of {per_frame} visual tokens each: give input_ids exactly {int(expected[row])} of them"
        )
    if num_frames is not None and int(num_frames.max()) > config.max_num_frames:
        row = int(num_frames.argmax())
        raise ValueError(
            f"sample {row} has {int(num_frames[row])} frames, the model takes at most {config.max_num_frames} "
            "(max_num_frames): sample fewer frames of the clip"
        )
    starts = (is_visual[:, 1:] & ~is_visual[:, :-1]).sum(1) + is_visual[:, 0]  # blocks of placeholders
    if len(starts) and int(starts.max()) > 1:
        row = int(starts.argmax())
        raise ValueError(
            f"sample {row} has its visual placeholders in {int(starts[row])} blocks, expected 1: frame by frame, text "
            "between frames would not be read. Put it before or after all of them"
        )


def check_left_padded(attention_mask: Tensor) -> None:
    """Raises ValueError where generation would go on from padding instead of a sample's last token."""
    ends = attention_mask[:, -1].bool()
    if not ends.all():
        row = int((~ends).nonzero()[0])
        length, real = attention_mask.shape[1], int(attention_mask[row].bool().sum())
        raise ValueError(
            f"sample {row} has {real} tokens in a row of {length} and ends in padding: pad on the left to generate"
        )
