"""The layers as fixed operations on fixed memory, for the frame step (frame_step.py): those of the language model over
a cache of a fixed size, and those of the vision encoder for the queries.

Shapes: B samples, K queries and P visual tokens per frame, N patches, D vision width, E language width, G key-value
heads, R query heads per key-value head, C head width, S places of the cache.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .rotary import rotary_angles, rotate

PLACES = 64  # the cache's size is rounded up to a multiple: fewer shapes, aligned rows


class LanguageCache:
    """The language model's keys and values in tensors of fixed size, and where its next tokens go.

    All samples share the place of the next token; a sample without a token there skips it: no later token of the
    sample attends to that place, and positions count real tokens only.
    """

    def __init__(self, model, batch_size: int, num_places: int):
        """num_places: S, rounded up to a multiple of PLACES."""
        text, language = model.config.text_config, model.language_model.model
        weight = language.embed_tokens.weight
        dtype, device = weight.dtype, weight.device
        self.num_places = -(-num_places // PLACES) * PLACES
        self.layers = [LanguageLayer.of(layer) for layer in language.layers]
        self.norm, self.epsilon = language.norm.weight, language.norm.variance_epsilon
        self.activation = language.layers[0].mlp.act_fn
        self.num_heads, self.num_groups = text.num_attention_heads, text.num_key_value_heads
        head_width = language.layers[0].self_attn.head_dim
        shape = (2, len(language.layers), batch_size, text.num_key_value_heads, self.num_places, head_width)
        self.keys, self.values = torch.zeros(shape, dtype=dtype, device=device)  # each [layers, B, G, S, C]
        self.per_layer = list(zip(self.layers, self.keys, self.values, strict=True))
        self.lowest = torch.finfo(dtype).min
        self.bias = torch.full((batch_size, 1, 1, self.num_places), self.lowest, dtype=dtype, device=device)
        self.places = torch.arange(self.num_places, device=device)
        self.next_place = torch.zeros(1, dtype=torch.long, device=device)
        self.num_read = torch.zeros(batch_size, dtype=torch.long, device=device)  # real tokens of every sample
        self.cos, self.sin = rotary_angles(language.rotary_emb, weight, self.places)  # [S, C]

    def reset(self) -> None:
        self.keys.zero_()  # a NaN of an earlier clip would pass the bias
        self.values.zero_()
        self.bias.fill_(self.lowest)
        self.next_place.zero_()
        self.num_read.zero_()

    def read(self, embeddings: Tensor, present: Tensor, within: int | None = None) -> Tensor:
        """Reads embeddings [B, P, E] at the next P places, of which `present` [B, P] says which are real: the hidden
        states [B, P, E]. within: attend to so many places only, all that are taken (None: to all)."""
        batch_size, length, width = embeddings.shape
        num_heads, groups = self.num_heads, self.num_groups
        places = self.next_place + self.places[:length]  # [P]
        positions = (self.num_read[:, None] + present.cumsum(1) - 1).clamp(min=0)  # [B, P]
        hidden_places = (~present).to(self.bias.dtype) * self.lowest  # [B, P]
        self.bias.index_copy_(3, places, hidden_places[:, None, None])
        bias = self.bias[..., :within]  # [B, 1, 1, S]
        if length > 1:
            later = self.places[:within] > places[:, None]  # [P, S]
            bias = bias.masked_fill(later, self.lowest).repeat(1, 1, num_heads // groups, 1)  # [B, 1, R P, S]
        cos, sin = self.cos[positions][:, :, None], self.sin[positions][:, :, None]  # [B, P, 1, C]
        half = cos.shape[-1] // 2
        rows = embeddings.reshape(-1, width)  # [B P, E]
        split = (batch_size, groups, num_heads // groups * length, 2 * half)
        for layer, keys, values in self.per_layer:
            normed = torch.rms_norm(rows, (width,), layer.norm1, self.epsilon)
            turned = torch.cat([F.linear(normed, *layer.query), F.linear(normed, *layer.key)], dim=1)
            turned = turned.view(batch_size, length, num_heads + groups, 2 * half)
            turned = rotate(turned, cos, sin)
            own_values = F.linear(normed, *layer.value).view(batch_size, length, groups, 2 * half)
            keys.index_copy_(2, places, turned[:, :, num_heads:].transpose(1, 2))
            values.index_copy_(2, places, own_values.transpose(1, 2))
            queries = turned[:, :, :num_heads]  # [B, P, G R, C]
            if length > 1:  # the heads of a group become rows: keys and values are not repeated
                queries = queries.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(
                queries.reshape(split), keys[:, :, :within], values[:, :, :within], bias, scale=layer.scaling
            )  # [B, G, R P, C]
            if length > 1:
                mixed = mixed.unflatten(2, (-1, length)).permute(0, 3, 1, 2, 4)
            rows = _add_linear(rows, mixed.reshape(len(rows), -1), *layer.output)
            normed = torch.rms_norm(rows, (width,), layer.norm2, self.epsilon)
            inner = self.activation(F.linear(normed, *layer.gate)) * F.linear(normed, *layer.up)
            rows = _add_linear(rows, inner, *layer.down)
        self.next_place += length
        self.num_read += present.sum(1)
        return torch.rms_norm(rows, (width,), self.norm, self.epsilon).view(batch_size, length, width)


@dataclass
class LanguageLayer:
    """The weights of a layer of the language model, as they lie in the model: calling its modules costs a CPU more than
    the work of a small one. Linear layers are (weight, bias or None)."""

    norm1: Tensor
    query: tuple
    key: tuple
    value: tuple
    output: tuple
    norm2: Tensor
    gate: tuple
    up: tuple
    down: tuple
    scaling: float

    @classmethod
    def of(cls, layer) -> "LanguageLayer":
        attention, mlp = layer.self_attn, layer.mlp
        linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        inner = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        return cls(norms[0], *map(_weights, linears), norms[1], *map(_weights, inner), attention.scaling)


def _weights(module) -> tuple:
    return module.weight, module.bias


def _add_linear(rows: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """rows + linear(inputs)."""
    rows = torch.addmm(rows, inputs, weight.t())
    return rows if bias is None else rows + bias


class QueryEncoder:
    """`FoveatedEncoder.attend` for one frame of every sample, with the weights as they lie in the model."""

    def __init__(self, encoder):
        self.num_heads = encoder.config.num_attention_heads
        self.epsilon = encoder.config.layer_norm_eps
        self.norm = _weights(encoder.layernorm)
        self.layers = [
            (
                _weights(layer.norm1),
                _weights(layer.attention.attention.query),
                _weights(layer.attention.output.dense),
                layer.layer_scale1.lambda1,
                _weights(layer.norm2),
                _weights(layer.mlp.fc1),
                _weights(layer.mlp.fc2),
                layer.layer_scale2.lambda1,
            )
            for layer in encoder.encoder.layer
        ]

    def __call__(self, rows: Tensor, keys: list[Tensor], values: list[Tensor], attention, output_attentions: bool):
        """Query rows [B, K, D], keys and values per layer [B, heads, N + 1, C], QueryAttention -> (features [B, K, D],
        attention weights [layers, B, heads, K, N + 1] or None)."""
        batch_size, num_queries, width = rows.shape
        split, seen = (batch_size, num_queries, self.num_heads, -1), []
        rows = rows.reshape(-1, width)
        for index, weights in enumerate(self.layers):
            norm1, query, dense, scale1, norm2, fc1, fc2, scale2 = weights
            query_heads = F.linear(torch.layer_norm(rows, (width,), *norm1, self.epsilon), *query)
            query_heads = query_heads.view(split).transpose(1, 2)  # [B, heads, K, C]
            if output_attentions or not attention.is_plain:
                seen.append(attention.of_layer(index).weights(query_heads, keys[index]))
            if attention.is_plain:
                mixed = F.scaled_dot_product_attention(query_heads, keys[index], values[index])
            else:
                mixed = seen[-1] @ values[index]
            mixed = F.linear(mixed.transpose(1, 2).reshape(-1, width), *dense)
            rows = torch.addcmul(rows, mixed, scale1)
            normed = torch.layer_norm(rows, (width,), *norm2, self.epsilon)
            rows = torch.addcmul(rows, F.linear(F.gelu(F.linear(normed, *fc1)), *fc2), scale2)
        features = torch.layer_norm(rows, (width,), *self.norm, self.epsilon).view(batch_size, num_queries, width)
        return features, torch.stack(seen) if output_attentions else None
