"""A DINOv2 vision encoder with additional query rows that attend to the patches in every layer.

Shapes: F frames, N patches (without the class token), K query rows per frame, D vision width, H heads, C = D / H, Q
query width, L layers.

The modules below are DINOv2's (Oquab et al. 2023, "DINOv2: Learning Robust Visual Features without Supervision") and
have the key names of the published checkpoints, so weights load by name with any version of `transformers`. In
addition, `encode` caches the keys and values of every layer, and query rows can pass through the layers. A query row
attends to the class token and the patches of its frame. Neither patches nor other query rows attend to it, so the patch
features do not depend on the queries.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .joined_weights import in_compute_dtype, in_compute_dtypes, is_plain, join
from .queries import QueryAttention

PLAIN = QueryAttention()


class LayerWeights(NamedTuple):
    """Weights of a layer as a training step multiplies by them: queries, keys and values joined, layer scales as part
    of the projection before them."""

    heads: Tensor  # [3 D, D]
    heads_bias: Tensor | None  # [3 D]
    query: Tensor  # [D, D], for query rows alone
    query_bias: Tensor | None
    output: Tensor  # [D, D]
    output_bias: Tensor  # [D]
    inner: Tensor  # [inner, D]
    inner_bias: Tensor  # [inner]
    outer: Tensor  # [D, inner]
    outer_bias: Tensor  # [D]

    @classmethod
    def of_layers(cls, layers: nn.ModuleList) -> list["LayerWeights"] | None:
        """The weights of all layers, or None if their modules must be called."""
        if not all(is_plain(layer, Layer) for layer in layers):
            return None
        parts = [(own.query, own.key, own.value) for own in (layer.attention.attention for layer in layers)]
        nothing = [None] * len(parts)
        heads, query = join([part.weight for part in own] for own in parts), [own[0].weight for own in parts]
        biases, query_biases = nothing, nothing
        if parts[0][0].bias is not None:
            biases = join([part.bias for part in own] for own in parts)
            query_biases = in_compute_dtypes([own[0].bias for own in parts])
        output = scaled([(layer.attention.output.dense, layer.layer_scale1) for layer in layers])
        outer = scaled([(layer.mlp.fc2, layer.layer_scale2) for layer in layers])
        inner = [in_compute_dtypes([getattr(layer.mlp.fc1, own) for layer in layers]) for own in ("weight", "bias")]
        query = in_compute_dtypes(query)
        return [cls(*own) for own in zip(heads, biases, query, query_biases, *output, *inner, *outer, strict=True)]


def scaled(parts: list[tuple[nn.Linear, "LayerScale"]]) -> tuple[list[Tensor], list[Tensor]]:
    """(weights, biases) of linear layers, each followed by its layer scale: W x + b, times s, is (s W) x + s b."""
    scale = torch.stack([scale.lambda1 for _, scale in parts])  # [L, D]
    weights = torch.stack([linear.weight for linear, _ in parts]) * scale[..., None]
    biases = torch.stack([linear.bias for linear, _ in parts]) * scale
    return in_compute_dtype(weights).unbind(), in_compute_dtype(biases).unbind()


@dataclass
class EncodedFrames:
    """Result of one pass of the frames through the vision encoder."""

    keys: list[Tensor]  # L x [F, H, N + 1, C]
    values: list[Tensor]  # L x [F, H, N + 1, C]
    query_output: Tensor | None = None  # [F, K, D], after the final layer norm
    patch_features: Tensor | None = None  # [F, N + 1, D], after the final layer norm; row 0 is the class token
    attention_weights: Tensor | None = None  # [L, F, H, K, N + 1]
    weights: list[LayerWeights] | None = None  # for other queries at the same frames; None: call the modules
    pixel_values: Tensor | None = None  # [F, 3, side, side] at full resolution, with a fovea only

    def select_frames(self, index: Tensor) -> "EncodedFrames":
        """Keys and values of a subset of the frames (index: int64 [f])."""
        keys, values = ([part[index] for part in parts] for parts in (self.keys, self.values))
        pixels = None if self.pixel_values is None else self.pixel_values[index]
        return EncodedFrames(keys, values, weights=self.weights, pixel_values=pixels)


class PatchEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        size = config.patch_size
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=size, stride=size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.projection(pixel_values).flatten(2).transpose(1, 2)  # [F, N, D]


class Embeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        num_patches = (config.image_size // config.patch_size) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.register_buffer("mask_token", torch.zeros(1, config.hidden_size))  # in published checkpoints, unused here
        self.patch_embeddings = PatchEmbeddings(config)
        self.position_embeddings = nn.Parameter(torch.zeros(1, num_patches + 1, config.hidden_size))

    def forward(self, pixel_values: Tensor) -> Tensor:
        height, width = pixel_values.shape[-2:]
        patches = self.patch_embeddings(pixel_values)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        return tokens + self.interpolated_positions(height, width)

    def of_window(self, pixel_values: Tensor, window: Tensor) -> Tensor:
        """Some patches of the frames [F, 3, height, width] with their positions in the frame: window [F, W] -> [F, W,
        D]."""
        patch, (height, width) = self.config.patch_size, pixel_values.shape[-2:]
        row, column = window // (width // patch), window % (width // patch)  # [F, W]
        cells = pixel_values.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # [F, 3, rows, patch, columns, patch]
        frames = torch.arange(len(window), device=window.device)[:, None]
        cells = cells[frames, :, row, :, column]  # [F, W, 3, patch, patch]
        rows = self.patch_embeddings(cells.flatten(0, 1)).view(*window.shape, -1)
        return rows + self.interpolated_positions(height, width)[0, 1:][window]

    def interpolated_positions(self, height: int, width: int) -> Tensor:
        """Position embeddings for a frame size, resized bicubically as in DINOv2 if it is not the pretraining size."""
        patch, trained = self.config.patch_size, self.config.image_size
        if (height, width) == (trained, trained):
            return self.position_embeddings
        side = trained // patch
        class_position, patch_positions = self.position_embeddings[:, :1], self.position_embeddings[:, 1:]
        grid = patch_positions.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid.float(), size=(height // patch, width // patch), mode="bicubic", align_corners=False)
        return torch.cat([class_position, grid.to(class_position.dtype).flatten(2).transpose(1, 2)], dim=1)


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, bias = config.hidden_size, config.qkv_bias
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, width, bias=bias)
        self.value = nn.Linear(width, width, bias=bias)


class AttentionOutput(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)


class Attention(nn.Module):
    """Attention of patch and query rows to the class token and the patches of their frame."""

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.attention = SelfAttention(config)
        self.output = AttentionOutput(config)

    def split_heads(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [F, H, rows, C]

    def keys_and_values(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.split_heads(self.attention.key(rows)), self.split_heads(self.attention.value(rows))

    def forward(
        self,
        rows: Tensor,
        keys: Tensor,
        values: Tensor,
        query_attention: QueryAttention,
        num_patch_rows: int = 0,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """rows [F, rows, D]: the first `num_patch_rows` are class token and patches, the rest query rows, which attend
        as `query_attention` says. Returns (output [F, rows, D], attention weights of the query rows or None)."""
        queries = self.split_heads(self.attention.query(rows))
        mixed, weights = self.mix(queries, keys, values, query_attention, num_patch_rows, output_attentions)
        return self.output.dense(mixed), weights

    def mix(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        query_attention: QueryAttention,
        num_patch_rows: int,
        output_attentions: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """`forward` between its projections: queries [F, H, rows, C] -> (mixed [F, rows, D], weights or None)."""
        query_heads = queries[:, :, num_patch_rows:]
        weights = None
        if query_heads.shape[2] and (output_attentions or not query_attention.is_plain):
            weights = query_attention.weights(query_heads, keys)
        if query_attention.is_plain or not query_heads.shape[2]:
            mixed = F.scaled_dot_product_attention(queries, keys, values)
        else:
            patches = F.scaled_dot_product_attention(queries[:, :, :num_patch_rows], keys, values)
            mixed = torch.cat([patches, weights @ values], dim=2) if num_patch_rows else weights @ values
        return mixed.transpose(1, 2).flatten(2), weights if output_attentions else None


class LayerScale(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.lambda1 = nn.Parameter(config.layerscale_value * torch.ones(config.hidden_size))

    def forward(self, rows: Tensor) -> Tensor:
        return rows * self.lambda1


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        inner = int(config.hidden_size * config.mlp_ratio)
        self.fc1 = nn.Linear(config.hidden_size, inner)
        self.fc2 = nn.Linear(inner, config.hidden_size)

    def forward(self, rows: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(rows)))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config)
        self.layer_scale1 = LayerScale(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.layer_scale2 = LayerScale(config)

    def forward(
        self,
        rows: Tensor,
        query_attention: QueryAttention,
        num_patch_rows: int,
        skip_patches: bool,
        output_attentions: bool,
        weights: LayerWeights | None = None,
        context: tuple[Tensor, Tensor] | None = None,
    ):
        """rows [F, N + 1 + K, D] (K may be 0) -> (rows, keys, values, attention weights of the query rows or None).

        skip_patches: return the query rows only, for the last layer if nothing uses its patches. weights: of this
        layer, or None to call its modules. context: keys and values of other patches of the frame, which all rows
        attend to; they come first in the result.
        """
        normed = self.norm1(rows)
        if weights is not None and not skip_patches:
            heads = F.linear(normed, weights.heads, weights.heads_bias).unflatten(2, (3, self.attention.num_heads, -1))
            queries, keys, values = heads.permute(2, 0, 3, 1, 4).unbind()  # [F, H, rows, C]
            if num_patch_rows < rows.shape[1]:
                keys, values = keys[:, :, :num_patch_rows], values[:, :, :num_patch_rows]
        else:  # keys and values that are kept do not hold the memory of the queries
            keys, values = self.attention.keys_and_values(normed[:, :num_patch_rows].contiguous())  # one copy for both
            if skip_patches:
                rows, normed, num_patch_rows = rows[:, num_patch_rows:], normed[:, num_patch_rows:], 0
            queries = self._queries(normed, weights)
        if context is not None:
            keys, values = (torch.cat(both, dim=2) for both in zip(context, (keys, values), strict=True))
        rows, seen = self.read(rows, queries, keys, values, query_attention, num_patch_rows, output_attentions, weights)
        return rows, keys, values, seen

    def _queries(self, normed: Tensor, weights: LayerWeights | None) -> Tensor:
        if weights is None:
            return self.attention.split_heads(self.attention.attention.query(normed))
        return self.attention.split_heads(F.linear(normed, weights.query, weights.query_bias))

    def read(
        self,
        rows: Tensor,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        query_attention: QueryAttention,
        num_patch_rows: int,
        output_attentions: bool,
        weights: LayerWeights | None,
    ):
        """Attention and feed-forward of rows [F, rows, D] with these queries [F, H, rows, C] -> (rows, attention
        weights or None)."""
        mixed, seen = self.attention.mix(queries, keys, values, query_attention, num_patch_rows, output_attentions)
        if weights is None:
            rows = rows + self.layer_scale1(self.attention.output.dense(mixed))
            return rows + self.layer_scale2(self.mlp(self.norm2(rows))), seen
        rows = rows + F.linear(mixed, weights.output, weights.output_bias)
        inner = F.gelu(F.linear(self.norm2(rows), weights.inner, weights.inner_bias))
        return rows + F.linear(inner, weights.outer, weights.outer_bias), seen

    def attend(
        self,
        rows: Tensor,
        keys: Tensor,
        values: Tensor,
        query_attention: QueryAttention,
        output_attentions: bool,
        weights: LayerWeights | None = None,
    ):
        """The layer for query rows only, with cached keys and values: [F, K, D] -> (rows, weights or None)."""
        queries = self._queries(self.norm1(rows), weights)
        return self.read(rows, queries, keys, values, query_attention, 0, output_attentions, weights)


class LayerStack(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])


class FoveatedEncoder(nn.Module):
    """DINOv2 with query rows of the vision width D. config: a `Dinov2Config`."""

    def __init__(self, config):
        super().__init__()
        if getattr(config, "use_swiglu_ffn", False) or config.hidden_act != "gelu":
            raise ValueError(
                f"the vision encoder's feed-forward (hidden_act={config.hidden_act!r}, use_swiglu_ffn="
                f"{config.use_swiglu_ffn}) is not supported. Use dinov2-small, -base or -large, which have gelu"
            )
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = LayerStack(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False  # set by PreTrainedModel.gradient_checkpointing_enable

    def encode(
        self,
        pixel_values: Tensor,
        query_rows: Tensor | None = None,
        need_patch_features: bool = False,
        output_attentions: bool = False,
        query_attention: QueryAttention = PLAIN,
    ) -> EncodedFrames:
        """Encodes the frames, optionally together with query rows, and caches the keys and values of every layer.

        pixel_values [F, 3, height, width] (multiples of the patch size), query_rows [F, K, D] or None. Without
        `need_patch_features` the last layer of the patches is skipped because nothing uses it.
        """
        self._check_frames(pixel_values)
        rows = self.embeddings(pixel_values)  # [F, N + 1, D]
        return self._encode_rows(rows, query_rows, need_patch_features, output_attentions, query_attention)

    def encode_window(
        self,
        window: Tensor,
        encoded: EncodedFrames,
        query_rows: Tensor | None = None,
        output_attentions: bool = False,
        query_attention: QueryAttention = PLAIN,
    ) -> EncodedFrames:
        """Encodes a window of full-resolution patches of frames that are encoded at low resolution.

        window: int64 [F, W], places in the grid of `encoded.pixel_values`. Patches of the window and query rows attend
        to the low-resolution patches and to the window. The result has the keys and values of both, in this order.
        """
        rows = self.embeddings.of_window(encoded.pixel_values, window)  # [F, W, D]
        return self._encode_rows(rows, query_rows, False, output_attentions, query_attention, encoded)

    def _encode_rows(
        self,
        rows: Tensor,
        query_rows: Tensor | None,
        need_patch_features: bool,
        output_attentions: bool,
        query_attention: QueryAttention,
        context: EncodedFrames | None = None,
    ) -> EncodedFrames:
        """rows: of patches; context: other patches of the frames, which the rows attend to."""
        num_patch_rows = rows.shape[1]
        if query_rows is not None:
            rows = torch.cat([rows, query_rows], dim=1)  # [F, N + 1 + K, D]
        saves_memory = self.gradient_checkpointing and self.training
        is_training = (
            torch.is_grad_enabled() and not saves_memory
        )  # else copies of the weights cost more than they save
        joined = context.weights if context else LayerWeights.of_layers(self.encoder.layer) if is_training else None
        encoded, weights = EncodedFrames([], [], weights=joined), []
        last = len(self.encoder.layer) - 1
        for index, layer in enumerate(self.encoder.layer):
            skip_patches = index == last and not need_patch_features
            own = query_attention.of_layer(index)
            before = context and (context.keys[index], context.values[index])
            arguments = (rows, own, num_patch_rows, skip_patches, output_attentions, joined and joined[index], before)
            rows, keys, values, seen = self._run(layer, *arguments)
            encoded.keys.append(keys)
            encoded.values.append(values)
            weights.append(seen)
        rows = self.layernorm(rows)
        if query_rows is not None:
            encoded.query_output = rows[:, -query_rows.shape[1] :]
            encoded.attention_weights = torch.stack(weights) if output_attentions else None
        if need_patch_features:
            encoded.patch_features = rows[:, :num_patch_rows]
        return encoded

    def attend(
        self,
        query_rows: Tensor,
        encoded: EncodedFrames,
        output_attentions: bool = False,
        query_attention: QueryAttention = PLAIN,
    ) -> tuple[Tensor, Tensor | None]:
        """Passes query rows [F, K, D] through all layers, attending to the cached keys and values.

        Returns (features [F, K, D] after the final layer norm, attention weights [L, F, H, K, N + 1] or None).
        """
        rows, weights = query_rows, []
        for index, (layer, keys, values) in enumerate(
            zip(self.encoder.layer, encoded.keys, encoded.values, strict=True)
        ):
            own, joined = query_attention.of_layer(index), encoded.weights and encoded.weights[index]
            rows, seen = self._run(layer.attend, rows, keys, values, own, output_attentions, joined)
            weights.append(seen)
        return self.layernorm(rows), torch.stack(weights) if output_attentions else None

    def _run(self, function, *arguments):
        """function(*arguments), with gradient checkpointing if it is enabled."""
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(function, *arguments)
        return function(*arguments)

    def _check_frames(self, pixel_values: Tensor) -> None:
        patch, channels = self.config.patch_size, self.config.num_channels
        shape = pixel_values.shape
        if pixel_values.ndim != 4 or shape[1] != channels or shape[2] % patch or shape[3] % patch:
            raise ValueError(
                f"pixel_values has shape {tuple(shape)}, expected [frames, {channels}, "
                f"height, width] with height and width multiples of the patch size {patch}. Resize the frames first"
            )
