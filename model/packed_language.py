"""The language model over the rows of a batch without padding, for everything that needs no key-value cache.

The layers are Llama's (Touvron et al. 2023, "LLaMA: Open and Efficient Foundation Language Models") with the weights
and modules of the library's, so hooks, adapters and sharding of linear layers work: such layers call their modules, all
others multiply by joined weights. Every sample attends to its own tokens only: on CUDA in half precision by torch's
variable-length kernel, elsewhere padded for the attention alone.

Shapes: N rows, B sequences, S rows of the longest, E language width, H heads, G key-value heads, C head width, F
frames, P visual tokens per frame, K queries per frame, Q query width.
"""

import inspect
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers.models.llama import modeling_llama

from .joined_weights import add_linear, in_compute_dtype, in_compute_dtypes, is_plain, join
from .packing import BatchPlaces, Continuation, Packing
from .rotary import rotary_angles, rotate_

_VARLEN = inspect.signature(varlen_attn).parameters
HALF = (torch.float16, torch.bfloat16)


class Reading(NamedTuple):
    """What all layers of one pass over rows share.

    cos, sin [N, 1, C]: rotary angles, signed as in `rotary_angles`. order, back: the places of the rows for attention
    (sorted, or padded [B, S]) and those of the attended rows; keys_order, keys_back: the same for the M earlier rows
    and these, None without earlier ones. starts, key_starts: of the variable-length kernel, with the longest sequences.
    mask: `later_mask` or None.
    """

    cos: Tensor
    sin: Tensor
    is_varlen: bool
    order: Tensor
    back: Tensor
    starts: Tensor
    longest: int
    keys_order: Tensor | None
    keys_back: Tensor | None
    key_starts: Tensor
    longest_keys: int
    mask: Tensor | None

    @classmethod
    def of(cls, rows: Tensor, angles: tuple[Tensor, Tensor], packing: Packing, is_varlen: bool) -> "Reading":
        """rows [N, E]: what the pass reads. packing: a Continuation if there are earlier rows."""
        cos, sin = (in_compute_dtype(angle)[:, None] for angle in angles)
        mask, keys = None, (None, None, packing.starts, packing.padded.shape[1])
        if isinstance(packing, Continuation):
            order = (packing.key_order, packing.key_places) if is_varlen else (packing.key_padded, packing.key_unpadded)
            keys = (*order, packing.key_starts, packing.key_padded.shape[1])
            mask = None if is_varlen else later_mask(packing, cos.dtype)  # of the queries: no layer casts it
        order = (packing.order, packing.places) if is_varlen else (packing.padded, packing.unpadded)
        return cls(cos, sin, is_varlen, *order, packing.starts, packing.padded.shape[1], *keys, mask)


class LayerWeights(NamedTuple):
    """Joined weights [out, in] of a layer: queries, keys and values; attention's output; gate and up; down."""

    heads: Tensor
    output: Tensor
    inner: Tensor
    down: Tensor

    @classmethod
    def of_layers(cls, layers: nn.ModuleList) -> list["LayerWeights"] | None:
        """The weights of all layers, or None if their modules must be called."""
        saves_memory = layers[0].gradient_checkpointing and layers[0].training
        if saves_memory or not all(is_plain(layer, LlamaDecoderLayer) and not _has_bias(layer) for layer in layers):
            return None
        if type(layers[0].mlp.act_fn) is not SILU:
            return None
        blocks = [(layer.self_attn, layer.mlp) for layer in layers]
        heads = join((own.q_proj.weight, own.k_proj.weight, own.v_proj.weight) for own, _ in blocks)
        inner = join((mlp.gate_proj.weight, mlp.up_proj.weight) for _, mlp in blocks)
        output = in_compute_dtypes([own.o_proj.weight for own, _ in blocks])
        down = in_compute_dtypes([mlp.down_proj.weight for _, mlp in blocks])
        return [cls(*own) for own in zip(heads, output, inner, down, strict=True)]


SILU = type(modeling_llama.ACT2FN["silu"])


def _has_bias(layer: nn.Module) -> bool:
    return layer.self_attn.q_proj.bias is not None or layer.mlp.up_proj.bias is not None


class LlamaDecoderLayer(modeling_llama.LlamaDecoderLayer):
    """The library's layer, which also reads packed rows. It has the library's class name, by which `device_map` and
    sharding find the layers of a model."""

    def forward(self, hidden_states: Tensor, *arguments, packed: tuple | None = None, **others):
        """As in the library; with `packed`, the last arguments of `read_packed`, that of packed rows."""
        if packed is None:
            return super().forward(hidden_states, *arguments, **others)
        return self.read_packed(hidden_states, *arguments, *packed)

    def read_packed(
        self,
        rows: Tensor,
        earlier: Tensor | None,
        weights: LayerWeights | None,
        reading: Reading,
        keep: int,
    ) -> tuple[Tensor, Tensor | None]:
        """Rows [N, E] -> (rows [N, E], keys and values of the first `keep` rows [keep, 2 G, C], None for 0).

        earlier [M, 2 G, C]: keys and values of the rows before. weights: None to call the modules.
        """
        attention, mlp = self.self_attn, self.mlp
        normed = in_compute_dtype(rms_norm(rows, self.input_layernorm))
        groups = attention.config.num_key_value_heads
        projected, heads = normed, weights and weights.heads
        if weights is None:
            parts = (attention.q_proj, attention.k_proj, attention.v_proj)
            projected = torch.cat([part(normed) for part in parts], dim=1)
        options = (attention.scaling, attention.attention_dropout if self.training else 0.0)
        mixed, held = attend(projected, heads, earlier, reading, groups, keep, *options)
        if weights is None:
            rows = rows + attention.o_proj(mixed)
            normed = in_compute_dtype(rms_norm(rows, self.post_attention_layernorm))
            return rows + mlp.down_proj(mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed)), held
        rows = add_linear(rows, mixed, weights.output)
        normed = in_compute_dtype(rms_norm(rows, self.post_attention_layernorm))
        return add_linear(rows, SwiGLU.apply(F.linear(normed, weights.inner)), weights.down), held


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


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up of [N, 2 I], gate first (Shazeer 2020, "GLU Variants Improve Transformer")."""

    @staticmethod
    def forward(ctx, inner: Tensor) -> Tensor:
        gate, up = inner.chunk(2, dim=1)
        activated = F.silu(gate)
        ctx.save_for_backward(inner, activated)
        return activated * up

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        inner, activated = ctx.saved_tensors
        (gate, up), found = inner.chunk(2, dim=1), torch.empty_like(inner)
        of_gate, of_up = found.chunk(2, dim=1)
        torch.mul(gradient, activated, out=of_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
        return found


class Gather(torch.autograd.Function):
    """values [N, ...] at the places `order` [...], where every value has one place `back` [N] that counts. Others
    repeat a value as padding: no result may depend on them, so the gradient is gathered instead of summed."""

    @staticmethod
    def forward(values: Tensor, order: Tensor, back: Tensor) -> Tensor:
        return gather(values, order)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx, gradient):
        (back,) = ctx.saved_tensors
        return gather_back(gradient, back), None, None


def gather(values: Tensor, order: Tensor) -> Tensor:
    return values.index_select(0, order.flatten()).unflatten(0, order.shape)


def gather_back(values: Tensor, back: Tensor) -> Tensor:
    """values [places or B, S, ...] -> those of the rows [N, ...]."""
    return values.flatten(0, values.ndim - 3).index_select(0, back)


class OwnHeads(torch.autograd.Function):
    """Turned heads of rows that see no earlier ones, gathered for attention: (heads [places, H + 2 G, C], keys and
    values of the first `keep` rows [keep, 2 G, C])."""

    @staticmethod
    def forward(ctx, rows, weight, cos, sin, order, back, groups, keep):
        """rows [N, E] and weight [(H + 2 G) C, E], or the projected rows [N, (H + 2 G) C] and None."""
        heads = project(rows, weight, cos, sin, groups)
        ctx.save_for_backward(rows, weight, cos, sin, back)
        ctx.groups, ctx.keep = groups, keep
        return gather(heads, order), heads[:keep, -2 * groups :].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, of_held):
        rows, weight, cos, sin, back = ctx.saved_tensors
        found = gather_back(gradient, back)
        if ctx.keep:
            found[: ctx.keep, -2 * ctx.groups :].add_(of_held)
        return *project_backward(found, rows, weight, cos, sin, ctx.groups, ctx.needs_input_grad), *[None] * 6


class LaterHeads(torch.autograd.Function):
    """Turned heads of rows that see earlier ones [M, 2 G, C], gathered for attention: (queries [places, H, C], keys and
    values of the earlier rows and of these [places, 2 G, C])."""

    @staticmethod
    def forward(ctx, rows, weight, earlier, cos, sin, order, back, keys_order, keys_back, groups):
        """rows, weight: as in `OwnHeads`."""
        heads = project(rows, weight, cos, sin, groups)
        ctx.save_for_backward(rows, weight, cos, sin, back, keys_back)
        ctx.groups = groups
        keys = torch.cat([earlier, heads[:, -2 * groups :]])
        return gather(heads[:, : -2 * groups], order), gather(keys, keys_order)

    @staticmethod
    @once_differentiable
    def backward(ctx, of_queries, of_keys):
        rows, weight, cos, sin, back, keys_back = ctx.saved_tensors
        of_keys, num_earlier = gather_back(of_keys, keys_back), len(keys_back) - len(back)
        found = torch.cat([gather_back(of_queries, back), of_keys[num_earlier:]], dim=1)
        needed = ctx.needs_input_grad
        of_rows, of_weight = project_backward(found, rows, weight, cos, sin, ctx.groups, needed)
        return of_rows, of_weight, of_keys[:num_earlier], *[None] * 7


def project(rows: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, groups: int) -> Tensor:
    """Heads [N, H + 2 G, C] of rows (as in `OwnHeads`), queries and keys turned."""
    projected = rows.clone() if weight is None else F.linear(rows, weight)
    heads = projected.unflatten(1, (-1, cos.shape[-1]))
    rotate_(heads[:, :-groups], cos, sin)
    return heads


def project_backward(found, rows, weight, cos, sin, groups, needed) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of rows and weight from that of the turned heads, which is overwritten."""
    rotate_(found[:, :-groups], cos, sin, sign=-1)
    found = found.flatten(1)
    if weight is None:
        return found, None
    return found @ weight if needed[0] else None, found.t() @ rows if needed[1] else None


def attend(
    rows: Tensor,
    weight: Tensor | None,
    earlier: Tensor | None,
    reading: Reading,
    groups: int,
    keep: int,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor | None]:
    """Causal attention within every sequence, to earlier rows [M, 2 G, C] and these: (mixed rows [N, H C], keys and
    values of the first `keep` rows). rows, weight: as in `OwnHeads`."""
    cos, sin, held = reading.cos, reading.sin, None
    places = (reading.order, reading.back)
    if earlier is None:
        heads, held = OwnHeads.apply(rows, weight, cos, sin, *places, groups, keep)
        queries, keys, values = heads.split([heads.shape[-2] - 2 * groups, groups, groups], dim=-2)
    else:
        queries, keys = LaterHeads.apply(
            rows, weight, earlier, cos, sin, *places, reading.keys_order, reading.keys_back, groups
        )
        keys, values = keys.chunk(2, dim=-2)
    if reading.is_varlen:
        mixed = attend_varlen(queries, keys, values, reading, scale)
        return Gather.apply(mixed, reading.back, reading.order).flatten(1), held if keep else None
    queries, keys, values = (part.transpose(1, 2) for part in (queries, keys, values))  # [B, heads, S, C]
    is_grouped = True if queries.shape[1] != groups else False  # noqa: SIM210 (compiled, a comparison is no bool)
    options = {"dropout_p": dropout, "scale": scale, "enable_gqa": is_grouped}
    mixed = F.scaled_dot_product_attention(
        queries, keys, values, reading.mask, is_causal=reading.mask is None, **options
    )
    return Unpad.apply(mixed.transpose(1, 2), reading.back).flatten(1), held if keep else None


class Unpad(torch.autograd.Function):
    """[B, S, H, C] -> the rows at the places `back` [N] among them: [N, H, C]. Places occur once."""

    @staticmethod
    def forward(values: Tensor, back: Tensor) -> Tensor:
        return gather_back(values, back)

    @staticmethod
    def setup_context(ctx, inputs, output):
        values, back = inputs
        ctx.save_for_backward(back)
        ctx.shape = values.shape

    @staticmethod
    def backward(ctx, gradient):
        (back,) = ctx.saved_tensors
        found = gradient.new_zeros(ctx.shape)
        found.flatten(0, 1).index_copy_(0, back, gradient)
        return found, None


def later_mask(packing: Continuation, dtype: torch.dtype) -> Tensor:
    """Which keys a padded query sees: [B, 1, queries, keys] of this dtype, 0 or -inf, made once for all layers."""
    queries, keys = (torch.arange(own.shape[1], device=own.device) for own in (packing.padded, packing.key_padded))
    is_later = keys > (packing.before[:, None] + queries)[:, None, :, None]
    return torch.zeros(is_later.shape, dtype=dtype, device=keys.device).masked_fill_(is_later, float("-inf"))


@cache
def _has_kernel(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= (8, 0)


def uses_varlen(device: torch.device, dtype: torch.dtype, head_width: int, dropout: float) -> bool:
    """Whether torch's variable-length kernel takes such heads: it needs compute capability 8.0 (Ampere)."""
    is_possible = device.type == "cuda" and dtype in HALF and not dropout and head_width % 8 == 0
    return is_possible and _has_kernel(device.index)


def attend_varlen(queries: Tensor, keys: Tensor, values: Tensor, reading: Reading, scale: float) -> Tensor:
    """Causal attention by torch's variable-length kernel, in which the last query of a sequence sees its last key:
    [N, H, C]."""
    options = {"window_size": (-1, 0), "scale": scale}
    if "enable_gqa" in _VARLEN:
        options["enable_gqa"] = True
    else:  # torch 2.11 takes one key-value head per head only
        repeats = queries.shape[1] // keys.shape[1]
        keys, values = (part.repeat_interleave(repeats, 1) for part in (keys, values))
    starts, key_starts = reading.starts.int(), reading.key_starts.int()
    lengths = (reading.longest, reading.longest_keys)
    return varlen_attn(queries, keys, values, starts, key_starts, *lengths, **options)


class PackedText:
    """The text of a batch with visual tokens in it, as the language model reads it."""

    def __init__(self, model, places: BatchPlaces):
        """model: the FoveatedVLMForConditionalGeneration. places: on its device."""
        self.language_model, self.places = model.language_model, places
        self.tokens_per_frame = model.config.tokens_per_frame
        # of the first rows, once planning has read them: hidden states [A, E], keys and values per layer [M, 2 G, C]
        self._opening: tuple[Tensor, list[Tensor] | None] | None = None
        self._embeddings: Tensor | None = None
        self._weights: list[LayerWeights] | None = None  # of this batch's passes
        self._with_gradients: bool | None = None  # whether these were computed with gradients; None: not yet

    def _renew(self) -> None:
        """Forgets what was computed without gradients where they are needed now. Joins the weights at first."""
        if self._with_gradients is None or (torch.is_grad_enabled() and not self._with_gradients):
            self._opening, self._embeddings, self._with_gradients = None, None, torch.is_grad_enabled()
            self._weights = LayerWeights.of_layers(self.language_model.model.layers)

    @property
    def embeddings(self) -> Tensor:
        """[N, E], without visual tokens."""
        self._renew()
        if self._embeddings is None:
            self._embeddings = self.language_model.get_input_embeddings()(self.places.ids)
        return self._embeddings

    def hidden_states(self, visual_tokens: Tensor | None) -> Tensor:
        """Hidden states of all rows: visual tokens [F, P, E] (None without frames) -> [N, E]. ValueError unless every
        placeholder has a visual token."""
        places = self.places
        num_tokens = 0 if visual_tokens is None else visual_tokens.shape[0] * visual_tokens.shape[1]
        if num_tokens != len(places.visual):
            raise ValueError(
                f"{num_tokens} visual tokens for {len(places.visual)} visual placeholders. Pass the visual_tokens that "
                "encode_frames gives for these samples"
            )
        self._renew()
        opening = self._opening
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
        """Reads rows, after the earlier ones whose keys and values per layer are given: (hidden states, keys and values
        of the first `keep` rows per layer)."""
        model = self.language_model.model
        attention = model.layers[0].self_attn
        dropout = attention.attention_dropout if self.language_model.training else 0.0
        device = rows.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
        is_varlen = uses_varlen(rows.device, dtype, attention.head_dim, dropout)
        angles = rotary_angles(model.rotary_emb, rows, packing.positions)
        reading = Reading.of(rows, angles, packing, is_varlen)
        nothing = [None] * len(model.layers)
        held = []
        for layer, past, weights in zip(
            model.layers, earlier or nothing, self._weights or nothing, strict=True
        ):  # by place: checkpointing sees these gradients
            rows, own = layer(rows, past, packed=(weights, reading, keep))
            held.append(own)
        return rms_norm(rows, model.norm), held if keep else []

    def shift_by_one_frame(self, planned: Tensor, first: Tensor) -> Tensor:
        """[F, K, Q] -> [F, K, Q]: frame t gets the query planned after frame t - 1, frame 0 gets the first query."""
        return torch.where((self.places.time_of_frame == 0)[:, None, None], first, planned.roll(1, dims=0))

    def running_sum(self, values: Tensor, kept: Tensor | None = None, first: Tensor | None = None) -> Tensor:
        """Cumulative sum over the frames of each sample: [F, K, Q] -> [F, K, Q].

        kept [F, K, Q]: what each frame keeps of the sum before it, which starts from `first` [F, K, Q]; None: all, from
        0.
        """
        index = self.places.sample_of_frame, self.places.time_of_frame
        clips = self._by_clip(values)
        if kept is None:
            return clips.cumsum(1)[index]
        total, sums = self._by_clip(first)[:, 0], []
        for change, share in zip(clips.unbind(1), self._by_clip(kept).unbind(1), strict=True):
            total = change + share * total
            sums.append(total)
        return torch.stack(sums, dim=1)[index]

    def _by_clip(self, values: Tensor) -> Tensor:
        """[F, K, Q] -> [B, T, K, Q], zeros after the end of a clip."""
        places = self.places
        clips = values.new_zeros(len(places.frames.before), places.longest_clip, *values.shape[1:])
        return clips.index_put((places.sample_of_frame, places.time_of_frame), values)
