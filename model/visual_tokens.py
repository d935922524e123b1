"""From frames and queries to visual tokens: at full or low resolution, with a window where the query looks, or shallow.

Shapes: F frames of the whole batch, f some of them, K queries and P visual tokens per frame, N patches, W patches of a
window, D vision width, Q query width, E language width.
"""

from dataclasses import replace

import torch
from torch import Tensor

from .fovea import allowed_at_low_resolution, downsample, on_full_grid, window_around_peak
from .foveated_encoder import EncodedFrames
from .option_checks import check_top_k
from .outputs import FrameTokens
from .queries import QueryAttention
from .visual_sequence import sinusoids


class VisualTokensMixin:
    """The vision side of `FoveatedVLMForConditionalGeneration`."""

    def connect(self, features: Tensor, times: Tensor) -> Tensor:
        """Vision features [F, P, D] at times [F] -> visual tokens [F, P, E], scaled like the token embeddings of the
        language model."""
        tokens = self.connector(features) * self.config.visual_scale
        if self.config.frame_time_embedding == "none":
            return tokens
        return tokens + self.time_projection(sinusoids(times).to(tokens.dtype))[:, None] * self.config.visual_scale

    def _query_attention(self, target_patches: Tensor | None = None) -> QueryAttention:
        """The configured `QueryAttention`. target_patches: bool [F, N], limits attention on frames that show the
        target."""
        config, temperature, allowed = self.config, None, None
        if config.learnable_temperature:
            temperature = self.log_temperature.exp()
        elif config.attention_temperature != 1.0:
            layers = self.config.vision_config.num_hidden_layers
            temperature = self.static_query.new_full((layers,), config.attention_temperature)
        if target_patches is not None:
            visible = target_patches.any(1, keepdim=True)  # [F, 1]: without a visible target attention is not limited
            allowed = torch.cat([~visible, target_patches | ~visible], dim=1)  # [F, N + 1], class token first
        return QueryAttention(temperature, config.hard_attention, config.attention_top_k, allowed, self.training)

    def _encode(
        self,
        pixel_values: Tensor,
        times: Tensor,
        queries: Tensor | None,
        query_attention: QueryAttention,
        output_attentions: bool,
    ) -> tuple[EncodedFrames, FrameTokens | None]:
        """Encodes the frames, at low resolution if so configured; with queries [F, K, Q] also returns their
        `FrameTokens`, from the same pass and without a window. ValueError if hard attention would keep every patch."""
        patch = self.config.vision_config.patch_size
        check_top_k(self.config, (pixel_values.shape[-2] // patch) * (pixel_values.shape[-1] // patch))
        encoded, found = self._encode_whole(
            self._downsample(pixel_values), times, queries, self._at_low_resolution(query_attention), output_attentions
        )
        if found is not None and output_attentions:
            found.attention_weights = on_full_grid(found.attention_weights, self.config.frame_downsampling)
        if self.config.fovea_size:
            encoded.pixel_values = pixel_values
        return encoded, found

    def _downsample(self, pixel_values: Tensor) -> Tensor:
        return downsample(pixel_values, self.config.frame_downsampling, self.config.vision_config.patch_size)

    def _at_low_resolution(self, query_attention: QueryAttention) -> QueryAttention:
        """The same at the low-resolution patches."""
        factor, allowed = self.config.frame_downsampling, query_attention.allowed
        if factor == 1 or allowed is None:
            return query_attention
        return replace(query_attention, allowed=allowed_at_low_resolution(allowed, factor))

    def _encode_whole(
        self,
        pixel_values: Tensor,
        times: Tensor,
        queries: Tensor | None,
        query_attention: QueryAttention,
        output_attentions: bool,
    ) -> tuple[EncodedFrames, FrameTokens | None]:
        """`_encode` of frames that the vision encoder sees as they are."""
        if self.config.attention == "shallow":
            encoded = self.vision_encoder.encode(pixel_values, need_patch_features=True)
            encoded = self.shallow_attention.prepare(encoded)
            return encoded, None if queries is None else self._attend_once(
                queries, encoded, times, query_attention, output_attentions
            )
        if queries is None:
            return self.vision_encoder.encode(pixel_values), None
        if self._is_vision_frozen():
            with torch.no_grad():  # the gradient of queries among the patches would pass through all patches
                encoded = self.vision_encoder.encode(pixel_values)
            return encoded, self._attend_once(queries, encoded, times, query_attention, output_attentions)
        rows = self._query_rows(queries)
        encoded = self.vision_encoder.encode(
            pixel_values, rows, output_attentions=output_attentions, query_attention=query_attention
        )
        return encoded, FrameTokens(self._tokens(encoded.query_output, times), queries, encoded.attention_weights)

    def _is_vision_frozen(self) -> bool:
        """Whether gradients are recorded, but none for the vision encoder."""
        return torch.is_grad_enabled() and not any(p.requires_grad for p in self.vision_encoder.parameters())

    def _attend(
        self,
        queries: Tensor,
        encoded: EncodedFrames,
        times: Tensor,
        query_attention: QueryAttention,
        output_attentions: bool,
    ) -> FrameTokens:
        """The `FrameTokens` of queries [f, K, Q] at encoded frames, with a window if the network has a fovea.
        query_attention: its `allowed` refers to the patches of the full-resolution frames."""
        if self.config.fovea_size:
            return self._foveate(queries, encoded, times, query_attention, output_attentions)
        low = self._at_low_resolution(query_attention)
        found = self._attend_once(queries, encoded, times, low, output_attentions)
        if output_attentions:
            found.attention_weights = on_full_grid(found.attention_weights, self.config.frame_downsampling)
        return found

    def _foveate(
        self,
        queries: Tensor,
        encoded: EncodedFrames,
        times: Tensor,
        query_attention: QueryAttention,
        output_attentions: bool,
    ) -> FrameTokens:
        """Looks at the low-resolution patches, encodes the window around the peak of the attention, and attends to
        both with the same queries."""
        rows, factor = self._query_rows(queries), self.config.frame_downsampling
        low = replace(self._at_low_resolution(query_attention), explicit=True)
        with torch.no_grad():
            _, seen = self.vision_encoder.attend(rows, encoded, output_attentions=True, query_attention=low)
            window = window_around_peak(seen[-1], factor, self.config.fovea_size)  # [f, W]
        attention = query_attention
        if attention.allowed is not None:
            in_window = attention.allowed[:, 1:].gather(1, window)
            attention = replace(attention, allowed=torch.cat([low.allowed, in_window], dim=1))
        if self._is_vision_frozen():
            with torch.no_grad():  # as in `_encode_whole`
                both = self.vision_encoder.encode_window(window, encoded)
            features, weights = self.vision_encoder.attend(rows, both, output_attentions, attention)
        else:
            both = self.vision_encoder.encode_window(window, encoded, rows, output_attentions, attention)
            features, weights = both.query_output, both.attention_weights
        weights = on_full_grid(weights, factor, window) if output_attentions else None
        return FrameTokens(self._tokens(features, times), queries, weights)

    def _attend_once(
        self,
        queries: Tensor,
        encoded: EncodedFrames,
        times: Tensor,
        query_attention: QueryAttention,
        output_attentions: bool,
    ) -> FrameTokens:
        """The `FrameTokens` of queries [f, K, Q] at the patches that are encoded."""
        attention = self.shallow_attention if self.config.attention == "shallow" else self.vision_encoder
        features, weights = attention.attend(self._query_rows(queries), encoded, output_attentions, query_attention)
        return FrameTokens(self._tokens(features, times), queries, weights)

    def _query_rows(self, queries: Tensor) -> Tensor:
        """Queries [F, K, Q] -> rows [F, K, D] in the dtype of the weights, like the patches, so that the residual
        stream has the same precision in every mode, also under autocast."""
        return self.query_projection(queries).to(self.query_projection.weight.dtype)

    def _tokens(self, features: Tensor, times: Tensor) -> Tensor:
        """Outputs of the queries of a frame [F, K, D] -> its visual tokens [F, P, E]."""
        if self.config.token_aggregation == "mean":
            features = features.mean(1, keepdim=True)
        elif self.config.token_aggregation == "weighted":
            features = (self.aggregation_score(features).softmax(1) * features).sum(1, keepdim=True)
        return self.connect(features, times)
