"""The predecessor's algorithm on the weights of our network: the reference that every speed figure is a ratio to.

Written anew from its description, as plainly as it was, and equal to the network in what it computes:

- Frames are padded to the longest clip of the batch. Padded frames skip the vision encoder, but their zero features
  pass the connector and the language model.
- The vision encoder runs over the patches layer by layer, and computes keys and values of every layer a second time for
  its queries. The static query and the planned ones then attend to them in a pass of their own each, over all frames.
- The language model projects every position, padding included, to the vocabulary.
- Autoregressive mode lays out the keys and values of all frames again at every frame and in every layer, and takes one
  frame of them. The text after the frames is read from the language model's cache.

The predecessor let text attend to padded frames, so a sample's loss depended on the others of its batch. Here the
padding stands at the end of each sequence, where causal attention does not reach it: as many positions and the same
attention kernels, without the mistake.

Shapes: B batch, T frames of the longest sample, F frames without padding, R text tokens of the longest sample, P visual
tokens per frame, N patches, D vision width, Q query width, E language width, V vocabulary, S = R + T P sequence,
A text tokens before the frames of the longest such text.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from model import FoveatedVLMForConditionalGeneration, FoveatedVLMOutput
from model.constants import IGNORE_INDEX, MODES
from model.multi_token_encoder import pool_patches

PLAIN = {  # options that the predecessor did not have, with the values that it can stand for
    "query_source": "planned",
    "attention_temperature": 1.0,
    "learnable_temperature": False,
    "hard_attention": "none",
    "token_aggregation": "none",
    "blind": False,
}


@dataclass
class PaddedBatch:
    """What the predecessor's loader gave: frames and text apart, both padded, and where each goes."""

    pixel_values: Tensor  # [B, T, 3, height, width], zeros where there is no frame
    frame_mask: Tensor  # bool [B, T]
    frame_times: Tensor  # [B, T]
    text_ids: Tensor  # int64 [B, R]
    labels: Tensor  # int64 [B, S]
    lengths: Tensor  # int64 [B] real tokens and visual tokens
    order: Tensor  # int64 [B, S] into (text, visual tokens): the sequences, real positions first
    plan_order: Tensor  # int64 [B, A + T P] the same up to the last frame, which is all that planning needs
    frame_places: Tensor  # int64 [B, T P] of the visual tokens in plan_order
    step_order: Tensor  # int64 [B, A + T P + R'] the order in which autoregressive mode reads
    step_mask: Tensor | None  # [B, A + T P + R'], None without padding
    step_places: Tensor  # int64 [B, S] of the sequences' positions in step_order
    num_before: int  # A

    def to(self, device: str) -> "PaddedBatch":
        """The same on another device."""
        return self._each(lambda value: value.to(device, non_blocking=True))

    def pin_memory(self) -> "PaddedBatch":
        """The same in page-locked memory."""
        return self._each(Tensor.pin_memory)

    def _each(self, change) -> "PaddedBatch":
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return PaddedBatch(**{name: change(v) if torch.is_tensor(v) else v for name, v in values.items()})


def pad(
    config,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    pixel_values: Tensor | None = None,
    num_frames: Tensor | None = None,
    labels: Tensor | None = None,
    frame_times: Tensor | None = None,
) -> PaddedBatch:
    """The arguments of the network's `forward` as the predecessor's batch. Padding of `input_ids` on either side is
    left out first, so position s of a sequence is the sample's token s."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    labels = torch.full_like(input_ids, IGNORE_INDEX) if labels is None else labels
    counts = torch.zeros(len(input_ids), dtype=torch.int64) if num_frames is None else num_frames
    rows = [(ids[own], row[own]) for ids, row, own in zip(input_ids, labels, mask.bool(), strict=True)]
    places = [(ids == config.visual_token_id).nonzero()[:, 0].tolist() for ids, _ in rows]
    before = max((own[0] for own in places if own), default=0)
    texts = [ids[ids != config.visual_token_id] for ids, _ in rows]
    starts = [own[0] if own else min(len(text), before) for own, text in zip(places, texts, strict=True)]
    sizes = Sizes(
        text=max(map(len, texts)),
        visual=max(map(len, places)),
        before=before,
        after=max(len(text) - start for text, start in zip(texts, starts, strict=True)),
    )
    orders = [
        _orders(len(text), len(own), start, sizes) for text, own, start in zip(texts, places, starts, strict=True)
    ]
    order, plan_order, step_order, step_mask, step_places = map(torch.stack, zip(*orders, strict=True))
    frame_mask = torch.arange(int(counts.max())) < counts[:, None]
    frames = torch.zeros(*frame_mask.shape, *(pixel_values.shape[1:] if frame_mask.any() else (3, 1, 1)))
    times = torch.arange(frame_mask.shape[1]).expand(frame_mask.shape).float()
    if frame_mask.any():
        frames[frame_mask] = pixel_values
    if frame_times is not None:
        times[frame_mask] = frame_times
    return PaddedBatch(
        pixel_values=frames,
        frame_mask=frame_mask,
        frame_times=times,
        text_ids=torch.stack([F.pad(text, (0, sizes.text - len(text))) for text in texts]),
        labels=torch.stack([F.pad(row, (0, order.shape[1] - len(row)), value=IGNORE_INDEX) for _, row in rows]),
        lengths=torch.tensor([len(ids) for ids, _ in rows]),
        order=order,
        plan_order=plan_order,
        frame_places=torch.tensor(starts)[:, None] + torch.arange(sizes.visual),
        step_order=step_order,
        step_mask=None if bool(step_mask.all()) else step_mask,
        step_places=step_places,
        num_before=before,
    )


@dataclass
class Sizes:
    """The most of any sample of a batch: text tokens, visual tokens, text tokens before and after the frames."""

    text: int
    visual: int
    before: int
    after: int


def _orders(num_text: int, num_visual: int, start: int, most: Sizes) -> tuple[Tensor, ...]:
    """order, plan_order, step_order, step_mask and step_places of one sample, whose frames come after `start` of its
    text tokens."""
    text, visual = torch.arange(most.text), most.text + torch.arange(most.visual)
    head, tail = text[:start], text[start:num_text]
    real, padded = visual[:num_visual], visual[num_visual:]
    left, right = (text.new_zeros(count) for count in (most.before - start, most.after - len(tail)))
    mask = torch.zeros(most.before + most.visual + most.after, dtype=torch.int64)
    mask[len(left) : most.before + num_visual] = 1
    mask[most.before + most.visual :][: len(tail)] = 1
    read = mask.nonzero()[:, 0]
    return (
        torch.cat([head, real, tail, padded, text[num_text:]]),
        torch.cat([head, real, padded, left]),
        torch.cat([left, head, visual, tail, right]),
        mask,
        F.pad(read, (0, most.text + most.visual - len(read))),
    )


class Original(nn.Module):
    """The predecessor's forward passes over the modules of a network, whose parameters it shares.

    Raises ValueError for a network with options that the predecessor did not have.
    """

    def __init__(self, network: FoveatedVLMForConditionalGeneration):
        super().__init__()
        config = network.config
        wrong = [f"{name}={getattr(config, name)!r}" for name, value in PLAIN.items() if getattr(config, name) != value]
        if config.architecture == "foveated" and config.num_visual_tokens_per_frame != 1:
            wrong.append(f"num_visual_tokens_per_frame={config.num_visual_tokens_per_frame}")
        if config.query_update == "gated":
            wrong.append("query_update='gated'")
        if wrong:
            raise ValueError(f"the original had no {', '.join(wrong)}: compare a network without")
        self.network, self.config = network, config

    def forward(self, batch: PaddedBatch, mode: str = "fine", num_plans: int | None = None) -> FoveatedVLMOutput:
        """Loss (mean over the labelled tokens; nan without one) and logits [B, S, V] of every position."""
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} must be one of {', '.join(MODES)}")
        planned = self.config.architecture == "foveated" and not self.config.coarse_only
        if mode == "autoregressive" and planned and batch.frame_mask.shape[1]:
            hidden = self._autoregressive(batch)
        else:
            tokens = self._visual_tokens(batch, (num_plans or self.config.num_passes) * (mode != "coarse" and planned))
            hidden = self._language(_take(self._sequence(batch, tokens), batch.order))
        logits = self.network.language_model.lm_head(hidden)
        targets = batch.labels[:, 1:].flatten()
        loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets, ignore_index=IGNORE_INDEX)
        return FoveatedVLMOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def first_token(self, batch: PaddedBatch, mode: str = "autoregressive") -> Tensor:
        """The most likely next token of every sample: int64 [B]."""
        logits = self(batch, mode).logits
        return logits[torch.arange(len(logits), device=logits.device), batch.lengths - 1].argmax(-1)

    # ---- vision

    def _visual_tokens(self, batch: PaddedBatch, num_plans: int) -> Tensor:
        """[B, T P, E] of the coarse pass, or of the last of `num_plans` planned ones."""
        network, mask = self.network, batch.frame_mask
        if not mask.shape[1]:
            return batch.pixel_values.new_zeros(len(mask), 0, self.config.text_config.hidden_size)
        features, keys_and_values = self._encode(batch.pixel_values[mask])
        if self.config.architecture == "multi_token":
            return self._connect(batch, pool_patches(features, self.config.tokens_per_frame))
        static = network.static_query  # [1, Q]
        seen = self._attend(static.expand(len(features), 1, -1), keys_and_values)
        for _ in range(num_plans):
            hidden = self._language(_take(self._sequence(batch, self._connect(batch, seen)), batch.plan_order))
            planned = network.planner(_take(hidden, batch.frame_places)).to(static.dtype)  # [B, T, Q]
            first = self._first_query().expand(len(mask), 1, -1)
            if self.config.query_update == "add":
                planned = first + planned.cumsum(1)
            queries = torch.cat([first, planned[:, :-1]], dim=1)
            seen = self._attend(queries[mask][:, None], keys_and_values)
        return self._connect(batch, seen)

    def _encode(self, frames: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Patch features [F, N + 1, D], and of every layer the keys and values [F, N + 1, D] that queries attend to."""
        encoder = self.network.vision_encoder
        rows, keys_and_values = encoder.embeddings(frames.to(self.network.dtype)), []
        for layer in encoder.encoder.layer:
            keys_and_values.append(_keys_and_values(layer.attention.attention, layer.norm1(rows)))
            rows = self._layer(layer, rows, _keys_and_values(layer.attention.attention, layer.norm1(rows)))
        features = encoder.layernorm(rows)
        if self.config.architecture == "foveated" and self.config.attention == "shallow":
            keys_and_values = [_keys_and_values(self.network.shallow_attention.attention.attention, features)]
        return features, keys_and_values

    def _attend(self, queries: Tensor, keys_and_values: list[tuple[Tensor, Tensor]]) -> Tensor:
        """What queries [F, 1, Q] find in their frames: [F, 1, D]."""
        projection = self.network.query_projection
        rows = projection(queries).to(projection.weight.dtype)
        if self.config.attention == "shallow":
            own = self.network.shallow_attention
            mixed = self._attention(own.attention, own.query_norm(rows), *keys_and_values[0])
            return own.layernorm(rows + mixed)
        encoder = self.network.vision_encoder
        for layer, pair in zip(encoder.encoder.layer, keys_and_values, strict=True):
            rows = self._layer(layer, rows, pair)
        return encoder.layernorm(rows)

    def _layer(self, layer: nn.Module, rows: Tensor, keys_and_values: tuple[Tensor, Tensor]) -> Tensor:
        mixed = self._attention(layer.attention, layer.norm1(rows), *keys_and_values)
        rows = rows + layer.layer_scale1(mixed)
        return rows + layer.layer_scale2(layer.mlp(layer.norm2(rows)))

    def _attention(self, attention: nn.Module, rows: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        heads = self.config.vision_config.num_attention_heads
        split = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (attention.attention.query(rows), keys, values)]
        return attention.output.dense(F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))

    def _connect(self, batch: PaddedBatch, features: Tensor) -> Tensor:
        """Features of the real frames [F, P, D] -> visual tokens of all [B, T P, E]."""
        padded = features.new_zeros(*batch.frame_mask.shape, *features.shape[1:])
        padded[batch.frame_mask] = features
        return self.network.connect(padded.flatten(0, 1), batch.frame_times.flatten()).reshape(
            len(padded), -1, self.config.text_config.hidden_size
        )

    def _first_query(self) -> Tensor:
        return self.network.static_query if self.config.tie_first_query else self.network.first_query

    # ---- language

    def _sequence(self, batch: PaddedBatch, visual_tokens: Tensor) -> Tensor:
        """Text and visual tokens one after the other [B, R + T P, E]: what the orders point into."""
        text = self.network.language_model.get_input_embeddings()(batch.text_ids)
        return torch.cat([text, visual_tokens.to(text.dtype)], dim=1)

    def _language(self, embeddings: Tensor) -> Tensor:
        return self.network.language_model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state

    def _autoregressive(self, batch: PaddedBatch) -> Tensor:
        """Hidden states [B, S, E], read frame by frame."""
        network, mask = self.network, batch.frame_mask
        size, most = mask.shape
        _, keys_and_values = self._encode(batch.pixel_values[mask])
        sequence = self._sequence(batch, batch.pixel_values.new_zeros(size, most, self.config.text_config.hidden_size))
        cache, hidden = DynamicCache(config=self.config.text_config), []

        def read(embeddings: Tensor) -> Tensor:
            start = sum(piece.shape[1] for piece in hidden)
            known = {}
            if batch.step_mask is not None:
                own = batch.step_mask[:, : start + embeddings.shape[1]]
                known = {"attention_mask": own, "position_ids": (own.cumsum(1) - 1).clamp(min=0)[:, start:]}
            options = {"past_key_values": cache, "use_cache": True}
            hidden.append(network.language_model.model(inputs_embeds=embeddings, **known, **options).last_hidden_state)
            return hidden[-1]

        if batch.num_before:
            read(_take(sequence, batch.step_order[:, : batch.num_before]))
        queries = self._first_query().expand(size, 1, -1)
        for t in range(most):
            seen = self._attend(queries, [tuple(_frame(x, mask, t) for x in pair) for pair in keys_and_values])
            tokens = network.connect(seen, batch.frame_times[:, t]).to(sequence.dtype)
            planned = network.planner(read(tokens)).to(queries.dtype)
            queries = queries + planned if self.config.query_update == "add" else planned
        if batch.step_order.shape[1] > batch.num_before + most:
            read(_take(sequence, batch.step_order[:, batch.num_before + most :]))
        return _take(torch.cat(hidden, dim=1), batch.step_places)


def _keys_and_values(attention: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
    return attention.key(rows), attention.value(rows)


def _frame(real: Tensor, mask: Tensor, t: int) -> Tensor:
    """Keys or values of frame t of every sample [B, N + 1, D], out of all frames laid out anew [B, T, N + 1, D]."""
    laid_out = real.new_zeros(*mask.shape, *real.shape[1:])
    laid_out[mask] = real
    return laid_out[:, t]


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """rows [B, n, E] at index [B, m]: [B, m, E]."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))
