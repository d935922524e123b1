"""The sequences that planning reads frame by frame: samples with frames, up to the last visual token.

Shapes: B' samples with frames, F their frames, P visual tokens per frame, K queries per frame, E language width,
Q query width, S sequence up to the last visual token.
"""

import torch
from torch import Tensor
from transformers import DynamicCache

TIME_FEATURES = 32  # sines and cosines of a frame's time, periods from 2 pi to 2 pi * 1000


class VisualSequence:
    """Reads visual tokens with the language model and its key-value cache, frame by frame.

    model: the FoveatedVLMForConditionalGeneration; input_ids, attention_mask [B, S']; num_frames [B].
    """

    def __init__(self, model, input_ids: Tensor, attention_mask: Tensor, num_frames: Tensor):
        self.model = model
        self.rows = rows = (num_frames > 0).nonzero()[:, 0]  # [B']
        ids = input_ids[rows]
        is_visual = ids == model.config.visual_token_id
        length = int(is_visual.any(0).nonzero()[-1]) + 1
        self.input_ids, self.attention_mask = ids[:, :length], attention_mask[rows, :length]
        self.is_visual = is_visual[:, :length]
        self.num_frames = num_frames[rows]
        self.time_of_frame = frame_indices(self.num_frames)  # [F]
        samples = torch.arange(len(rows), device=ids.device)
        self.sample_of_frame = samples.repeat_interleave(self.num_frames, output_size=len(self.time_of_frame))
        self.tokens_per_frame = model.config.tokens_per_frame

    def frames_by_time(self) -> list[Tensor]:
        """For every t, the indices of the frames at position t of their sample: list of int64 [f]."""
        return [(self.time_of_frame == t).nonzero()[:, 0] for t in range(int(self.num_frames.max()))]

    def samples_of(self, frames: Tensor) -> Tensor:
        return self.sample_of_frame[frames]

    def start_cache(self) -> dict:
        """Read the text before the first visual token of every sample into a cache, aligned at its right end."""
        prefix, mask = self.text_before_frames()
        cache = {"keys_and_values": DynamicCache(config=self.model.config.text_config), "mask": mask}
        if prefix.shape[1]:
            self._run(self.model.embed(prefix, None), position_ids(mask), cache)
        return cache

    def text_before_frames(self) -> tuple[Tensor, Tensor]:
        """(input_ids, attention_mask) [B', longest] of the text before the first visual token, right-aligned."""
        before = self.is_visual.int().argmax(1)  # [B'] tokens before the first visual one, padding included
        longest = int(before.max())
        source = torch.arange(longest, device=before.device) - (longest - before)[:, None]  # [B', longest]
        prefix = self.input_ids.gather(1, source.clamp(min=0))
        return prefix, torch.where(source >= 0, self.attention_mask.gather(1, source.clamp(min=0)), 0)

    def step(self, visual_tokens: Tensor, frames: Tensor, cache: dict) -> Tensor:
        """Reads one frame of every sample that has one left: visual_tokens [f, P, E] -> hidden states [B', P, E].

        Samples without this frame get masked positions, which no later token attends to.
        """
        shape = (len(self.num_frames), self.tokens_per_frame)
        samples = self.samples_of(frames)
        dtype = self.model.language_model.get_input_embeddings().weight.dtype  # as in `embed`, also under autocast
        embeddings = visual_tokens.new_zeros(*shape, visual_tokens.shape[-1], dtype=dtype)
        embeddings = embeddings.index_copy(0, samples, visual_tokens.to(dtype))
        present = torch.zeros(shape, dtype=cache["mask"].dtype, device=embeddings.device).index_fill(0, samples, 1)
        cache["mask"] = torch.cat([cache["mask"], present], dim=1)
        return self._run(embeddings, position_ids(cache["mask"])[:, -self.tokens_per_frame :], cache)

    def _run(self, embeddings: Tensor, positions: Tensor, cache: dict) -> Tensor:
        return self.model.language_model.model(
            inputs_embeds=embeddings,
            attention_mask=cache["mask"],
            position_ids=positions,
            past_key_values=cache["keys_and_values"],
            use_cache=True,
        ).last_hidden_state


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions [B, S] that count real tokens only, so that padding has no effect on either side."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def frame_indices(num_frames: Tensor) -> Tensor:
    """num_frames [B] -> index of every frame within its sample, samples concatenated: int64 [F]."""
    starts = num_frames.cumsum(0) - num_frames
    total = int(num_frames.sum())
    return torch.arange(total, device=num_frames.device) - starts.repeat_interleave(num_frames, output_size=total)


def sinusoids(times: Tensor) -> Tensor:
    """times [F] -> their sines and cosines at geometrically spaced frequencies: [F, TIME_FEATURES]."""
    steps = torch.arange(TIME_FEATURES // 2, device=times.device) / (TIME_FEATURES // 2 - 1)
    angles = times.float()[:, None] * 1000.0**-steps
    return torch.cat([angles.sin(), angles.cos()], dim=1)
