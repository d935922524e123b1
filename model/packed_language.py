"""The language model over the rows of a batch without padding, for everything that needs no key-value cache.

The layers are Llama's (Touvron et al. 2023, "LLaMA: Open and Efficient Foundation Language Models") with the weights
and modules of the library's, so hooks, adapters and sharding of linear layers work. Every sample attends to its own
tokens only: on CUDA in half precision by torch's variable-length kernel, elsewhere padded for the attention alone.

Shapes: N rows, B sequences, S rows of the longest, E language width, H heads, G key-value heads, C head width, F
frames, P visual tokens per frame, K queries per frame, Q query width.
"""

import inspect
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers.models.llama import modeling_llama

from .packing import BatchPlaces, Continuation, Packing

_VARLEN = inspect.signature(varlen_attn).parameters
HALF = (torch.float16, torch.bfloat16)


class LlamaDecoderLayer(modeling_llama.LlamaDecoderLayer):
    """The library's layer, which also reads packed rows. It has the library's class name, by which `device_map` and
    sharding find the layers of a model."""

    def forward(self, hidden_states: Tensor, *arguments, packed: tuple | None = None, **others):
        """As in the library; with `packed`, the arguments of `read_packed` after the rows, that of packed rows."""
        if packed is None:
            return super().forward(hidden_states, *arguments, **others)
        return self.read_packed(hidden_states, *arguments, *packed)

    def read_packed(
        self, rows: Tensor, earlier: Tensor | None, cos: Tensor, sin: Tensor, indices: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """Rows [N, E] -> (rows [N, E], their keys and values [N, 2 G, C]).

        cos, sin [N, 1, C]: rotary angles, the first half of sin negated. earlier [M, 2 G, C]: keys and values of the
        rows before. indices: of `attend` or, with rows before, of `attend_later`.
        """
        attention, mlp = self.self_attn, self.mlp
        normed = in_compute_dtype(rms_norm(rows, self.input_layernorm))
        turned = torch.cat([attention.q_proj(normed), attention.k_proj(normed)], dim=1)
        turned = turned.unflatten(1, (-1, attention.head_dim))  # [N, H + G, C]
        cos, sin = cos.to(turned.dtype), sin.to(turned.dtype)
        turned = torch.addcmul(turned * cos, turned.roll(turned.shape[-1] // 2, -1), sin)
        values = attention.v_proj(normed).unflatten(1, (-1, attention.head_dim))  # [N, G, C]
        heads = torch.cat([turned, values], dim=1)
        own = heads[:, -2 * values.shape[1] :]
        options = (attention.scaling, attention.attention_dropout if self.training else 0.0)
        if earlier is None:
            mixed = attend(heads, values.shape[1], *indices, *options)
        else:
            queries = heads[:, : -2 * values.shape[1]]
            mixed = attend_later(queries, torch.cat([earlier, own]), *indices, *options)
        rows = rows + attention.o_proj(mixed)
        normed = in_compute_dtype(rms_norm(rows, self.post_attention_layernorm))
        return rows + mlp.down_proj(mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed)), own


def read_packed_rows(language_model: nn.Module) -> None:
    """Makes the layers of a LlamaForCausalLM read packed rows, too. Weights and their names do not change.

    ValueError for layers of another architecture, which this forward pass would compute wrongly."""
    for layer in language_model.model.layers:
        if type(layer) is not modeling_llama.LlamaDecoderLayer:
            raise ValueError(f"text_config: {type(layer).__name__} is not supported, only Llama's layers")
        layer.__class__ = LlamaDecoderLayer


def rms_norm(rows: Tensor, norm: nn.Module) -> Tensor:
    if type(norm) is not modeling_llama.LlamaRMSNorm or hasattr(norm, "_hf_hook"):  # adapters; offloaded weights
        return norm(rows)
    return F.rms_norm(rows, (rows.shape[-1],), norm.weight, norm.variance_epsilon)


def in_compute_dtype(rows: Tensor) -> Tensor:
    """rows in the dtype in which autocast multiplies: cast once for all linear layers that read them."""
    device = rows.device.type
    return rows.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else rows


class Pad(torch.autograd.Function):
    """rows [N, ...] -> [B, S, ...], where padding repeats a row. No result may depend on the padding: its gradient is
    dropped, so the gradient of the rows is gathered instead of summed."""

    @staticmethod
    def forward(rows: Tensor, padded: Tensor, unpadded: Tensor) -> Tensor:
        return rows.index_select(0, padded.flatten()).unflatten(0, padded.shape)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx, gradient):
        (unpadded,) = ctx.saved_tensors
        return gradient.flatten(0, 1).index_select(0, unpadded), None, None


def attend(
    heads: Tensor,
    groups: int,
    starts: Tensor,
    order: Tensor,
    places: Tensor,
    padded: Tensor,
    unpadded: Tensor,
    scale: float,
    dropout: float,
) -> Tensor:
    """Causal attention within every sequence: queries, keys and values [N, H + 2 G, C] -> [N, H C]. The others are
    those of `Packing`."""
    split = [heads.shape[1] - 2 * groups, groups, groups]
    if uses_varlen(heads, dropout):
        longest, sorted_heads = padded.shape[1], heads.index_select(0, order)
        mixed = attend_varlen(*sorted_heads.split(split, dim=1), starts, starts, longest, longest, scale)
        return mixed.index_select(0, places)
    queries, keys, values = Pad.apply(heads, padded, unpadded).transpose(1, 2).split(split, dim=1)  # [B, H, S, C]
    mixed = F.scaled_dot_product_attention(
        queries, keys, values, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=split[0] != groups
    )
    return unpad(mixed, unpadded)


def attend_later(
    queries: Tensor,
    keys_and_values: Tensor,
    starts: Tensor,
    padded: Tensor,
    unpadded: Tensor,
    mask: Tensor,
    key_starts: Tensor,
    key_padded: Tensor,
    key_unpadded: Tensor,
    key_order: Tensor,
    scale: float,
    dropout: float,
) -> Tensor:
    """Causal attention of rows to earlier rows of their sequence and to each other: queries [N, H, C], keys and values
    [M + N, 2 G, C] -> [N, H C]. mask: `later_mask`; the others are those of `Continuation`."""
    groups = keys_and_values.shape[1] // 2
    if uses_varlen(queries, dropout):
        keys, values = keys_and_values.index_select(0, key_order).split(groups, dim=1)
        lengths = (padded.shape[1], key_padded.shape[1])
        return attend_varlen(queries, keys, values, starts, key_starts, *lengths, scale)
    keys, values = Pad.apply(keys_and_values, key_padded, key_unpadded).transpose(1, 2).split(groups, dim=1)
    queries = Pad.apply(queries, padded, unpadded).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(
        queries, keys, values, mask, dropout_p=dropout, scale=scale, enable_gqa=queries.shape[1] != groups
    )
    return unpad(mixed, unpadded)


def later_mask(packing: Continuation, dtype: torch.dtype) -> Tensor:
    """Which keys a padded query sees: [B, 1, queries, keys] of this dtype, 0 or -inf, made once for all layers."""
    queries, keys = (torch.arange(own.shape[1], device=own.device) for own in (packing.padded, packing.key_padded))
    is_later = keys > (packing.before[:, None] + queries)[:, None, :, None]
    return torch.zeros(is_later.shape, dtype=dtype, device=keys.device).masked_fill_(is_later, float("-inf"))


@cache
def _has_kernel(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= (8, 0)


def unpad(mixed: Tensor, unpadded: Tensor) -> Tensor:
    """[B, H, S, C] -> the rows among the places [N, H C]."""
    return mixed.transpose(1, 2).flatten(0, 1).flatten(1).index_select(0, unpadded)


def uses_varlen(heads: Tensor, dropout: float) -> bool:
    """Whether torch's variable-length kernel takes these: it needs compute capability 8.0 (Ampere)."""
    return (
        heads.is_cuda
        and heads.dtype in HALF
        and not dropout
        and heads.shape[-1] % 8 == 0
        and _has_kernel(heads.device.index)
    )


def attend_varlen(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    key_starts: Tensor,
    longest: int,
    longest_keys: int,
    scale: float,
) -> Tensor:
    """Causal attention by torch's variable-length kernel, in which the last query of a sequence sees its last key."""
    options = {"window_size": (-1, 0)} if "window_size" in _VARLEN else {"is_causal": True}
    if "enable_gqa" in _VARLEN:
        options["enable_gqa"] = True
    else:
        repeats = queries.shape[1] // keys.shape[1]
        keys, values = (part.repeat_interleave(repeats, 1) for part in (keys, values))
    if "scale" in _VARLEN:
        options["scale"] = scale
    else:
        queries = queries * (scale * queries.shape[-1] ** 0.5)
    starts, key_starts = starts.int(), key_starts.int()
    return varlen_attn(queries, keys, values, starts, key_starts, longest, longest_keys, **options).flatten(1)


class PackedText:
    """The text of a batch with visual tokens in it, as the language model reads it."""

    def __init__(self, model, places: BatchPlaces):
        """model: the FoveatedVLMForConditionalGeneration. places: on its device."""
        self.language_model, self.places = model.language_model, places
        self.tokens_per_frame = model.config.tokens_per_frame
        # of the first rows, once planning has read them: hidden states [A, E], keys and values per layer [M, 2 G, C]
        self._opening: tuple[Tensor, list[Tensor] | None] | None = None
        self._embeddings: Tensor | None = None
        self._with_gradients = False  # whether both were computed with gradients

    def _renew(self) -> None:
        """Forgets what was computed without gradients where they are needed now."""
        if torch.is_grad_enabled() and not self._with_gradients:
            self._opening, self._embeddings, self._with_gradients = None, None, True

    @property
    def embeddings(self) -> Tensor:
        """[N, E], without visual tokens."""
        self._renew()
        if self._embeddings is None:
            self._embeddings = self.language_model.get_input_embeddings()(self.places.ids)
        return self._embeddings

    def hidden_states(self, visual_tokens: Tensor | None) -> Tensor:
        """Hidden states of all rows: visual tokens [F, P, E] (None without frames) -> [N, E]."""
        self._renew()
        places, opening = self.places, self._opening
        if visual_tokens is None or opening is None:
            rows = self.embeddings
            if visual_tokens is not None:
                rows = self._with_visual(rows, places.num_first + places.visual, visual_tokens)
            return self._read(rows, places.whole)[0]
        hidden, earlier = opening
        rows = self._with_visual(self.embeddings[places.num_first :], places.visual, visual_tokens)
        return torch.cat([hidden, self._read(rows, places.rest, earlier)[0]])

    def at_frames(self, visual_tokens: Tensor) -> Tensor:
        """Hidden states at the visual tokens, which planning reads: [F, P, E] -> [F, P, E]."""
        self._renew()
        places, rows = self.places, visual_tokens.flatten(0, 1).to(self.embeddings.dtype)
        if self._opening is not None:
            hidden, _ = self._read(rows, places.frames, self._opening[1])
        else:
            text = self.embeddings[: places.num_first]
            hidden, held = self._read(torch.cat([text, rows]), places.opening, keep=places.num_before)
            self._opening = hidden[: places.num_first], held or None
            hidden = hidden[places.num_first :]
        return hidden.unflatten(0, (-1, self.tokens_per_frame))

    @staticmethod
    def _with_visual(rows: Tensor, index: Tensor, visual_tokens: Tensor) -> Tensor:
        return rows.index_copy(0, index, visual_tokens.flatten(0, 1).to(rows.dtype))

    def _read(
        self, rows: Tensor, packing: Packing | Continuation, earlier: list[Tensor] | None = None, keep: int = 0
    ) -> tuple[Tensor, list[Tensor]]:
        """Reads rows, after the earlier ones whose keys and values per layer are given: (hidden states, own keys and
        values per layer)."""
        model = self.language_model.model
        cos, sin = (angles[0][:, None] for angles in model.rotary_emb(rows[None], packing.positions[None]))
        half = sin.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        if earlier is None:
            indices = (packing.starts, packing.order, packing.places, packing.padded, packing.unpadded)
        else:
            keys = (packing.key_starts, packing.key_padded, packing.key_unpadded, packing.key_order)
            attention = model.layers[0].self_attn
            dropout = attention.attention_dropout if self.language_model.training else 0.0
            heads = in_compute_dtype(rows).new_empty(0, attention.head_dim)
            mask = None if uses_varlen(heads, dropout) else later_mask(packing, rows.dtype)
            indices = (packing.starts, packing.padded, packing.unpadded, mask, *keys)
        held = []
        for layer, past in zip(model.layers, earlier or [None] * len(model.layers), strict=True):
            rows, own = layer(rows, past, packed=(cos, sin, indices))  # by place: checkpointing sees these gradients
            if keep:
                held.append(own[:keep].clone())  # a view would keep the queries of all rows, too
        return rms_norm(rows, model.norm), held

    def shift_by_one_frame(self, planned: Tensor, first: Tensor) -> Tensor:
        """[F, K, Q] -> [F, K, Q]: frame t gets the query planned after frame t - 1, frame 0 gets the first query."""
        return torch.where((self.places.time_of_frame == 0)[:, None, None], first, planned.roll(1, dims=0))

    def running_sum(self, values: Tensor) -> Tensor:
        """Cumulative sum over the frames of each sample: [F, K, Q] -> [F, K, Q]."""
        places = self.places
        clips = values.new_zeros(len(places.frames.before), places.longest_clip, *values.shape[1:])
        index = places.sample_of_frame, places.time_of_frame
        return clips.index_put(index, values).cumsum(1)[index]
