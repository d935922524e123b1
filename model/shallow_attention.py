"""Queries that attend to the final patch features only (ablation A1)."""

from torch import Tensor, nn

from .foveated_encoder import PLAIN, Attention, EncodedFrames
from .queries import QueryAttention


class ShallowQueryAttention(nn.Module):
    """One cross-attention layer from the queries to the final patch features (ablation A1).

    It has its own projections and a residual connection, like a decoder layer. Keys and values are computed once per
    frame.
    """

    def __init__(self, config):
        super().__init__()
        self.query_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def prepare(self, encoded: EncodedFrames) -> EncodedFrames:
        """Keys and values of the patch features, as an `EncodedFrames` of one layer. Needs `encoded.patch_features`."""
        keys, values = self.attention.keys_and_values(encoded.patch_features)
        return EncodedFrames([keys], [values], patch_features=encoded.patch_features)

    def attend(
        self,
        query_rows: Tensor,
        encoded: EncodedFrames,
        output_attentions: bool = False,
        query_attention: QueryAttention = PLAIN,
    ) -> tuple[Tensor, Tensor | None]:
        """Like `FoveatedEncoder.attend`, with one layer."""
        normed, query_attention = self.query_norm(query_rows), query_attention.of_layer(0)
        mixed, weights = self.attention(
            normed, encoded.keys[0], encoded.values[0], query_attention, output_attentions=output_attentions
        )
        return self.layernorm(query_rows + mixed), weights[None] if output_attentions else None
