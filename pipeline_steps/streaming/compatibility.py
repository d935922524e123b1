"""Whether packed data fit a network: asked before the work begins, not at the one long sample in the middle of it."""

import numpy as np

from pipeline_steps.common.errors import UserError


def check_compatibility(config, dataset, image_replication: int) -> None:
    """UserError that names the first sample of a `TokenizedShards` that the FoveatedVLMConfig cannot take."""
    where = f"{dataset.tokens_dir}/{dataset.split}"
    size, patch = dataset.image_size, config.vision_config.patch_size
    if size % patch:
        raise UserError(
            f"{dataset.shards_dir}: frames of {size} px, no multiple of the vision encoder's patches of {patch} px. "
            f"Set shards.image_size to {max(size // patch, 1) * patch}."
        )
    tokens, grid = config.num_visual_tokens_per_frame, size // patch
    if config.architecture == "multi_token" and tokens > grid * grid:
        raise UserError(
            f"model.num_visual_tokens_per_frame is {tokens}, but a network of the architecture multi_token takes "
            f"at most {grid * grid}, the patches of a frame of {size} px. Choose another one, or a "
            "larger shards.image_size."
        )
    limit = config.text_config.max_position_embeddings
    frames = dataset.index.shown_frames(image_replication)
    visual = frames * config.tokens_per_frame
    first = (frames > 0) & (config.layout == "vision_first")  # the token that begins the sequence
    lengths = np.maximum(dataset.index.num_tokens, dataset.index.num_rejected) + visual + first
    wrong = np.flatnonzero((frames > config.max_num_frames) | (lengths > limit))
    if not len(wrong):
        return
    number = int(wrong[0])
    row = dataset.rows[number]
    if frames[number] > config.max_num_frames:
        raise UserError(
            f"{where}: sample '{row['key']}' has {frames[number]} frames, the network takes at most "
            f"{config.max_num_frames}. Raise model.max_num_frames, or lower "
            + ("streaming.image_replication." if row["kind"] == "image" else "shards.max_frames.")
        )
    raise UserError(
        f"{where}: sample '{row['key']}' has {lengths[number]} tokens ({visual[number]} of them "
        f"visual), the language model reads at most {limit}. Lower tokens.max_tokens, shards.max_frames or "
        "model.num_visual_tokens_per_frame, or take a language model with more positions."
    )
