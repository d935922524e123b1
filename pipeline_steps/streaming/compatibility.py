"""Check before training or evaluation that packed data fit the network, instead of failing at a long sample later."""

import numpy as np

from model.option_checks import check_top_k
from pipeline_steps.common.errors import UserError


def check_compatibility(config, dataset, image_replication: int) -> None:
    """Raise UserError if a sample of a `TokenizedShards` does not fit the FoveatedVLMConfig; it names the first one."""
    check_frames(config, config.vision_config.patch_size, dataset.image_size, dataset.shards_dir)
    where = f"{dataset.tokens_dir}/{dataset.split}"
    limit = config.text_config.max_position_embeddings
    frames = dataset.index.shown_frames(image_replication)
    visual = frames * config.tokens_per_frame
    first = (frames > 0) & (config.layout == "vision_first")  # the bos token before the frames
    lengths = np.maximum(dataset.index.num_tokens, dataset.index.num_rejected) + visual + first
    wrong = np.flatnonzero((frames > config.max_num_frames) | (lengths > limit))
    if not len(wrong):
        return
    number = int(wrong[0])
    row = dataset.rows[number]
    if frames[number] > config.max_num_frames:
        raise UserError(
            f"{where}: sample '{row['key']}' has {frames[number]} frames, the network supports at most "
            f"{config.max_num_frames}. Raise model.max_num_frames, or lower "
            + ("streaming.image_replication." if row["kind"] == "image" else "shards.max_frames.")
        )
    raise UserError(
        f"{where}: sample '{row['key']}' has {lengths[number]} tokens ({visual[number]} of them "
        f"visual), the language model supports at most {limit}. Lower tokens.max_tokens, shards.max_frames or "
        "model.num_visual_tokens_per_frame, or use a language model with more positions."
    )


def check_frames(options, patch: int, size: int, where) -> None:
    """Raise UserError if frames with sides of `size` px do not fit a vision encoder with patches of `patch` px and the
    options of the network (a FoveatedVLMConfig or section `model`). where: what sets the size, for messages."""
    if size % patch:
        raise UserError(
            f"{where}: the frames have {size} px, not a multiple of the vision encoder's patch size of "
            f"{patch} px. Set shards.image_size to {max(size // patch, 1) * patch}."
        )
    low_patch, side = patch * options.frame_downsampling, size // patch
    if size % low_patch:
        raise UserError(
            f"{where}: the frames have {size} px, model.frame_downsampling {options.frame_downsampling} needs a "
            f"multiple of {low_patch} px. Change it or shards.image_size."
        )
    if options.fovea_size > side:
        raise UserError(
            f"{where}: the frames have {size} px, {side} patches a side, fewer than model.fovea_size "
            f"{options.fovea_size}. Lower it or raise shards.image_size."
        )
    tokens, num_low = options.num_visual_tokens_per_frame, (size // low_patch) ** 2
    if options.architecture == "multi_token" and tokens > num_low:
        raise UserError(
            f"{where}: model.num_visual_tokens_per_frame is {tokens}, but the architecture multi_token supports at "
            f"most {num_low}, the number of patches in a frame of {size} px. Lower it, or raise shards.image_size."
        )
    try:
        check_top_k(options, side**2)
    except ValueError as error:
        raise UserError(f"{where}: with frames of {size} px, model.{error}.") from None
