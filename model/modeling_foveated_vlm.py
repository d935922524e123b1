"""The foveated vision-language model: one visual token per frame, queried by the language model.

Shapes: B batch, F frames of the whole batch, T frames of one sample, K queries per frame, P visual tokens per frame
(K, or 1 where they are aggregated), Q query width, E language width, S sequence, V vocabulary.

Frames are not padded: `pixel_values` is the concatenation of the frames of all samples, and `num_frames` [B] has the
number of frames of each. `input_ids` contains P placeholders per frame at the positions of the visual tokens, so the
layout (question first, vision first) is determined by the input, and all modes work with both:

coarse           the static query on every frame
fine             queries planned from the coarse tokens, shifted by one frame, all frames in parallel
autoregressive   frame by frame: the query of frame t is planned from frames 0..t-1; no coarse pass
"""

import copy
import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from .compiled import compile_layers
from .configuration_foveated_vlm import FoveatedVLMConfig
from .foveated_encoder import EncodedFrames, FoveatedEncoder
from .frame_step import choose_step, continues_from_cache, step_through_frames
from .generation_checks import GenerationChecksMixin, check_generation, set_new_tokens
from .input_checks import check_cache, check_inputs, check_left_padded, check_library_arguments
from .loading import LoadingMixin
from .multi_token_encoder import pool_patches
from .options import FoveationOptions
from .outputs import FoveatedVLMOutput, FrameTokens
from .packed_language import PackedText, read_packed_rows
from .packing import BatchPlaces
from .preference import PreferenceMixin
from .queries import QuerySource
from .shallow_attention import ShallowQueryAttention
from .streaming_session import StreamingMixin
from .text_loss import TextLossMixin
from .visual_sequence import TIME_FEATURES, VisualSequence
from .visual_tokens import VisualTokensMixin

GATE_BIAS = 4.0  # a gated update starts close to an added one: sigmoid(4) = .98


class FoveatedVLMForConditionalGeneration(
    LoadingMixin,
    VisualTokensMixin,
    TextLossMixin,
    PreferenceMixin,
    StreamingMixin,
    GenerationChecksMixin,
    PreTrainedModel,
    GenerationMixin,
):
    config_class = FoveatedVLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("video", "text")
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # for the library's Trainer: `forward` takes num_items_in_batch
    _tied_weights_keys = {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"}

    def __init__(self, config: FoveatedVLMConfig):
        config.check_options()
        if config.visual_token_id is None or config.visual_scale == "auto":
            raise ValueError(
                f"visual_token_id={config.visual_token_id} and visual_scale={config.visual_scale!r} depend on the "
                "language model. Build the model with from_backbones, or set both to numbers"
            )
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        self.vision_encoder = FoveatedEncoder(vision)
        self.language_model = AutoModelForCausalLM.from_config(text)
        read_packed_rows(self.language_model)
        self.connector = nn.Linear(vision.hidden_size, text.hidden_size)
        if config.frame_time_embedding == "sinusoidal":
            self.time_projection = nn.Linear(TIME_FEATURES, text.hidden_size, bias=False)
        if config.architecture == "foveated":
            self._build_query_path(config)
        self.post_init()

    def _build_query_path(self, config: FoveatedVLMConfig) -> None:
        vision, text = config.vision_config, config.text_config
        queries = config.num_visual_tokens_per_frame
        self.static_query = nn.Parameter(torch.empty(queries, config.query_dim))
        self.query_projection = nn.Linear(config.query_dim, vision.hidden_size, bias=config.query_bias)
        if not config.coarse_only:
            width = queries // config.tokens_per_frame * config.query_dim
            self.planner = nn.Linear(text.hidden_size, width)
            if config.query_update == "gated":
                self.query_gate = nn.Linear(text.hidden_size, width)
            if not config.tie_first_query:
                self.first_query = nn.Parameter(torch.empty(queries, config.query_dim))
        if config.attention == "shallow":
            self.shallow_attention = ShallowQueryAttention(vision)
        if config.learnable_temperature:
            layers = 1 if config.attention == "shallow" else vision.num_hidden_layers
            self.log_temperature = nn.Parameter(torch.empty(layers))
        if config.token_aggregation == "weighted":
            self.aggregation_score = nn.Linear(vision.hidden_size, 1, bias=False)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialises all weights without pretrained values, so that unit-variance inputs give unit-variance
        outputs."""
        if module is self:
            for name in ("static_query", "first_query"):
                if hasattr(self, name):
                    nn.init.normal_(getattr(self, name), std=self.config.query_init_std)
            if hasattr(self, "log_temperature"):
                nn.init.constant_(self.log_temperature, math.log(self.config.attention_temperature))
            if hasattr(self, "time_projection"):
                nn.init.zeros_(self.time_projection.weight)
            if hasattr(self, "query_gate"):
                nn.init.constant_(self.query_gate.bias, GATE_BIAS)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    # ---- frames -> visual tokens

    def encode_frames(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        num_frames: Tensor | None = None,
        frame_times: Tensor | None = None,
        mode: str = "fine",
        options: FoveationOptions | dict | None = None,
    ) -> list[FrameTokens]:
        """The visual tokens of all frames: one `FrameTokens` per pass, [] without frames. The last entry is the result
        of the mode; in fine mode the first entry is the coarse pass.

        Arguments and errors as in `forward`.
        """
        options = FoveationOptions.of(options)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        frames = (pixel_values, num_frames)
        self._check_inputs(input_ids, attention_mask, *frames, None, frame_times, mode, options)
        return self._encode_frames(input_ids, attention_mask, *frames, frame_times, mode, options)

    def _encode_frames(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None,
        num_frames: Tensor | None,
        frame_times: Tensor | None,
        mode: str,
        options: FoveationOptions,
    ) -> list[FrameTokens]:
        """`encode_frames` with arguments that have been checked."""
        if pixel_values is None or not len(pixel_values):
            return []
        text = options.text or self.packed_text(input_ids, attention_mask, num_frames)
        output_attentions = options.output_attentions
        config = self.config
        pixel_values = pixel_values.to(self.connector.weight.dtype)
        times = text.places.time_of_frame if frame_times is None else frame_times  # [F]
        if config.blind:
            pixel_values = torch.zeros_like(pixel_values)
        if config.architecture == "multi_token":
            encoded = self.vision_encoder.encode(self._downsample(pixel_values), need_patch_features=True)
            pooled = pool_patches(encoded.patch_features, config.num_visual_tokens_per_frame)
            return [FrameTokens(self.connect(pooled, times))]
        static = self.static_query.expand(len(pixel_values), -1, -1)  # [F, K, Q]
        has_first = not (config.coarse_only or config.tie_first_query)
        first = self.first_query.expand(len(pixel_values), -1, -1) if has_first else static
        choose = QuerySource(options.query_source or config.query_source, static, options.generator)
        query_attention = self._query_attention()
        chosen = self._query_attention(options.target_patches if choose.source == "oracle" else None)
        if mode == "coarse" or config.coarse_only:
            return [self._encode(pixel_values, times, choose(static), chosen, output_attentions)[1]]
        if mode == "autoregressive":
            check_cache(self)
            language = VisualSequence(self, input_ids, attention_mask, num_frames)
            encoded, _ = self._encode(pixel_values, times, None, query_attention, output_attentions)
            arguments = (encoded, times, first, language, choose, chosen, output_attentions)
            kind = choose_step(self, options.frame_step)
            if kind == "dynamic":
                return [self._encode_autoregressively(*arguments)]
            return [step_through_frames(self, kind, *arguments)]
        encoded, coarse = self._encode(pixel_values, times, static, query_attention, output_attentions)
        passes = [coarse]
        for _ in range(config.num_passes if options.num_plans is None else options.num_plans):
            queries = static
            if choose.source != "static":
                hidden = text.at_frames(passes[-1].visual_tokens)  # [F, P, E]
                planned = self._plan(hidden)  # [F, K, Q]
                if config.query_update == "add":
                    planned = first + text.running_sum(planned)
                elif config.query_update == "gated":
                    planned = text.running_sum(planned, self._kept(hidden), first)
                queries = choose(text.shift_by_one_frame(planned, first))
            passes.append(self._attend(queries, encoded, times, chosen, output_attentions))
        return passes

    def _check_inputs(
        self, input_ids, attention_mask, pixel_values, num_frames, labels, frame_times, mode, options
    ) -> None:
        """Raises ValueError unless the arguments match each other and this network."""
        frames = (pixel_values, num_frames)
        check_inputs(self.config, input_ids, attention_mask, *frames, labels, frame_times, mode, options)
        if options.text is not None and options.text.language_model is not self.language_model:
            raise ValueError("the packed text belongs to another network. Make it with this network's packed_text")

    def packed_text(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        num_frames: Tensor | None = None,
        labels: Tensor | None = None,
        places: BatchPlaces | None = None,
    ) -> PackedText:
        """The text of a batch as the language model reads it, for FoveationOptions. Calls that share it read the text
        before the frames once.

        places: the indices of the batch; None: computed here, which synchronises with the GPU. The others as in
        `forward`.
        """
        if places is None:
            places = BatchPlaces.of(
                input_ids, attention_mask, num_frames, labels, visual_id=self.config.visual_token_id
            )
        return PackedText(self, places)

    def _plan(self, hidden: Tensor) -> Tensor:
        """Hidden states at the visual tokens [f, P, E] -> the planner's output [f, K, Q]."""
        planned = self.planner(hidden).to(self.static_query.dtype)  # [f, P, K / P * Q]
        return planned.reshape(len(planned), self.config.num_visual_tokens_per_frame, self.config.query_dim)

    def _kept(self, hidden: Tensor) -> Tensor:
        """Hidden states at the visual tokens [f, P, E] -> what a gated update keeps of the queries [f, K, Q]."""
        kept = self.query_gate(hidden).to(self.static_query.dtype).sigmoid()
        return kept.reshape(len(kept), self.config.num_visual_tokens_per_frame, self.config.query_dim)

    def next_queries(self, hidden: Tensor, queries: Tensor) -> Tensor:
        """The queries of the next frame [f, K, Q], from the hidden states at the visual tokens of a frame [f, P, E] and
        the queries that were planned for it [f, K, Q]."""
        planned = self._plan(hidden)
        if self.config.query_update == "gated":
            return planned + self._kept(hidden) * queries
        return planned + queries if self.config.query_update == "add" else planned

    def _encode_autoregressively(
        self,
        encoded: EncodedFrames,
        times: Tensor,
        first: Tensor,
        language: VisualSequence,
        choose,
        query_attention,
        output_attentions,
    ) -> FrameTokens:
        """Encodes frame by frame with the language model's key-value cache: linear in the number of frames."""
        order, passes = [], []
        planned, cache = None, language.start_cache()
        for frames in language.frames_by_time():  # frames: int64 [samples that have this frame], indices into F
            queries = choose(first[frames] if planned is None else planned[language.samples_of(frames)], frames)
            seen = encoded.select_frames(frames)
            frame_tokens = self._attend(
                queries, seen, times[frames], query_attention.select_frames(frames), output_attentions
            )
            hidden = language.step(frame_tokens.visual_tokens, frames, cache)  # [B', P, E]
            planned = self.next_queries(hidden, first[: len(hidden)] if planned is None else planned)  # [B', K, Q]
            order.append(frames)
            passes.append(frame_tokens)
        back = torch.cat(order).argsort()
        weights = (
            torch.cat([frame_tokens.attention_weights for frame_tokens in passes], dim=1)[:, back]
            if output_attentions
            else None
        )
        tokens = torch.cat([frame_tokens.visual_tokens for frame_tokens in passes])[back]
        return FrameTokens(tokens, torch.cat([frame_tokens.queries for frame_tokens in passes])[back], weights)

    # ---- visual tokens and text -> losses

    def embed(self, input_ids: Tensor, visual_tokens: Tensor | None) -> Tensor:
        """Token embeddings [B, S, E] with the visual tokens [F, P, E] at their placeholders."""
        is_visual = input_ids == self.config.visual_token_id  # an id outside the vocabulary
        embeddings = self.language_model.get_input_embeddings()(input_ids.masked_fill(is_visual, 0))
        if visual_tokens is None:
            return embeddings
        return embeddings.masked_scatter(is_visual[..., None].expand_as(embeddings), visual_tokens.to(embeddings.dtype))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        num_frames: Tensor | None = None,
        labels: Tensor | None = None,
        frame_times: Tensor | None = None,
        mode: str = "fine",
        options: FoveationOptions | dict | None = None,
        *,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values=None,
    ) -> FoveatedVLMOutput | tuple:
        """Encodes the frames in one of the modes, computes logits and the loss of the labelled tokens.

        input_ids [B, S] with P placeholders per frame, attention_mask [B, S] (1 = real token; default all),
        pixel_values [F, 3, height, width] (None or no frames: text only), num_frames [B], labels [B, S] with
        IGNORE_INDEX at tokens without a loss, frame_times [F] seconds since the start of each clip. options: override
        the configuration; `return_logits` False leaves out the logits.

        As in the library's models: logits_to_keep, logits of the last so many positions (0: all) or of these positions
        (an integer tensor); num_items_in_batch, what the sum of the losses is divided by (default: the number of
        labelled tokens); output_attentions, the option of this name; return_dict, False for a tuple.
        output_hidden_states, use_cache, inputs_embeds and past_key_values are not supported and must be off.

        Raises ValueError if placeholders and frames do not match, there is text between frames, a limit is exceeded, a
        mode or query source is unknown, or an argument is not supported.
        """
        check_library_arguments(input_ids, output_hidden_states, use_cache, inputs_embeds, past_key_values)
        options = FoveationOptions.of(options)
        if output_attentions:
            options = replace(options, output_attentions=True)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        frames = (pixel_values, num_frames)
        self._check_inputs(input_ids, attention_mask, *frames, labels, frame_times, mode, options)
        text = options.text or self.packed_text(input_ids, attention_mask, num_frames, labels)
        options = replace(options, text=text)
        passes = self._encode_frames(input_ids, attention_mask, *frames, frame_times, mode, options)
        last = passes[-1] if passes else FrameTokens(None)
        wanted = (options.return_logits, options.loss_only, logits_to_keep, num_items_in_batch)
        output = self._score(text, last.visual_tokens, labels is not None, *wanted)
        output.visual_tokens, output.queries = last.visual_tokens, last.queries
        output.attention_weights = last.attention_weights
        output.passes = passes if options.output_passes else None
        return output.to_tuple() if return_dict is False else output

    # ---- answering

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        num_frames: Tensor | None = None,
        frame_times: Tensor | None = None,
        mode: str = "autoregressive",
        options: FoveationOptions | dict | None = None,
        **generation_options,
    ) -> Tensor:
        """Generates answers with `generate` of transformers and its options (greedy, sampling, beams, streamers).
        Returns the new tokens [B, S'].

        `input_ids` [B, S] must be left-padded. The other arguments are those of `forward`.

        Raises ValueError as in `forward`, for padding on the right, for an answer that may exceed the language model's
        context, and for a way to generate that needs the ids of the whole prompt or a cache of the caller's
        (`generation_checks.py`).
        """
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        check_left_padded(attention_mask)
        check_cache(self)
        settings = copy.deepcopy(generation_options.pop("generation_config", None) or self.generation_config)
        others = settings.update(**generation_options)  # options outside GenerationConfig, such as a streamer
        check_generation(settings, others)
        set_new_tokens(settings, self.config, input_ids.shape[1])
        passes = self.encode_frames(input_ids, attention_mask, pixel_values, num_frames, frame_times, mode, options)
        read = passes[-1].read if passes and continues_from_cache(settings) else None
        prompt = read.prompt(self, input_ids, attention_mask, settings.max_new_tokens) if read else None
        if prompt is None:
            visual_tokens = passes[-1].visual_tokens if passes else None
            prompt = {"inputs_embeds": self.embed(input_ids, visual_tokens), "attention_mask": attention_mask}
        elif "disable_compile" not in generation_options:
            settings.disable_compile = True  # the library compiles for a static cache: minutes, on request only
        return self.language_model.generate(**prompt, generation_config=settings, **others)

    def compile_hot_paths(self, **options) -> None:
        """torch.compile for every layer of the vision encoder and of the language model, in place (`compiled.py`).

        An operation that cannot be compiled is an error. options: of torch.compile. Weights and their names do not
        change. Calls with a key-value cache (autoregressive mode, `generate`) are not compiled because the cache grows.
        """
        compile_layers(self.vision_encoder.encoder.layer, self.language_model.model.layers, **options)
