"""Check before training or evaluation that packed data fit the network, instead of failing at a long sample later."""

import numpy as np

from pipeline_steps.common.errors import UserError


def check_compatibility(config, dataset, image_replication: int) -> None:
    """Raise UserError if a sample of a `TokenizedShards` does not fit the FoveatedVLMConfig; it names the first one."""
    where = f"{dataset.tokens_dir}/{dataset.split}"
    size, patch = dataset.image_size, config.vision_config.patch_size
    if size % patch:
        raise UserError(
            f"{dataset.shards_dir}: the frames have {size} px, not a multiple of the vision encoder's patch size of "
            f"{patch} px. Set shards.image_size to {max(size // patch, 1) * patch}."
        )
    low_patch, grid = patch * config.frame_downsampling, size // patch
    if size % low_patch or config.fovea_size > grid:
        raise UserError(
            f"{dataset.shards_dir}: the frames have {size} px, {grid} patches a side. model.frame_downsampling "
            f"{config.frame_downsampling} needs a multiple of {low_patch} px, and model.fovea_size "
            f"{config.fovea_size} at least so many patches. Change shards.image_size or these options."
        )
    tokens, grid = config.num_visual_tokens_per_frame, size // low_patch
    if config.architecture == "multi_token" and tokens > grid * grid:
        raise UserError(
            f"model.num_visual_tokens_per_frame is {tokens}, but the architecture multi_token supports at "
            f"most {grid * grid}, the number of patches in a frame of {size} px. Lower it, or raise "
            "shards.image_size."
        )
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
