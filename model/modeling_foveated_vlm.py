"""The foveated vision-language model: one visual token per frame, and the language model decides where to look next.

Shapes: B batch, F frames of the whole batch, T frames of one sample, K visual tokens per frame, N patches, D vision
width, Q query width, E language width, S sequence, V vocabulary.

Frames are not padded: `pixel_values` holds the frames of all samples one after another and `num_frames` [B] says how
many belong to which. `input_ids` holds K placeholders per frame where the visual tokens go, so the layout (question
first, vision first) is the input's business and every mode below is the same code for any of them:

coarse           the static query looks at every frame
fine             the queries are planned from the coarse tokens, shifted by one frame, all frames in parallel
autoregressive   frame by frame: the query of frame t is planned from what frames 0..t-1 showed; needs no coarse pass
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_foveated_vlm import MODES, QUERY_SOURCES, FoveatedVLMConfig
from .foveated_encoder import FoveatedEncoder, ShallowQueryAttention, VisionWalk
from .multi_token_encoder import pool_patches


@dataclass
class FoveatedVLMOutput(ModelOutput):
    """What `forward` returns; the per-token fields are aligned with `labels` (position s belongs to the token at s)."""

    loss: Tensor | None = None  # mean over the labelled tokens, plus the weighted coarse loss where asked
    token_loss: Tensor | None = None  # [B, S] nats, 0 where not labelled
    correct: Tensor | None = None  # [B, S] bool: the most likely token is the label
    logits: Tensor | None = None  # [B, S, V], only with return_logits
    loss_coarse: Tensor | None = None  # loss of the coarse pass, only with lambda_coarse > 0
    visual_tokens: Tensor | None = None  # [F, K, E]
    queries: Tensor | None = None  # [F, K, Q]
    attention_weights: Tensor | None = None  # [layers, F, heads, K, N + 1], only with output_attentions


@dataclass
class Look:
    """Visual tokens and how they came about."""

    visual_tokens: Tensor  # [F, K, E]
    queries: Tensor | None = None  # [F, K, Q]
    attention_weights: Tensor | None = None  # [layers, F, heads, K, N + 1]


class FoveatedVLMForConditionalGeneration(PreTrainedModel):
    config_class = FoveatedVLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("video", "text")
    _supports_sdpa = True
    _tied_weights_keys = {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"}

    def __init__(self, config: FoveatedVLMConfig):
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        self.vision_encoder = FoveatedEncoder(vision)
        self.language_model = AutoModelForCausalLM.from_config(text)
        self.connector = nn.Linear(vision.hidden_size, text.hidden_size)
        if config.architecture == "foveated":
            k = config.num_visual_tokens_per_frame
            self.static_query = nn.Parameter(torch.empty(k, config.query_dim))
            self.query_projection = nn.Linear(config.query_dim, vision.hidden_size, bias=config.query_bias)
            if not config.coarse_only:
                self.planner = nn.Linear(text.hidden_size, config.query_dim)
                if not config.tie_first_query:
                    self.first_query = nn.Parameter(torch.empty(k, config.query_dim))
            if config.attention == "shallow":
                self.shallow_attention = ShallowQueryAttention(vision)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Random start of everything that no pretrained backbone brings: unit-variance outputs for unit-variance
        inputs."""
        if module is self:
            for name in ("static_query", "first_query"):
                if hasattr(self, name):
                    nn.init.normal_(getattr(self, name), std=self.config.query_init_std)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    @classmethod
    def from_backbones(
        cls, vision_path: str | Path, language_path: str | Path, **options
    ) -> "FoveatedVLMForConditionalGeneration":
        """A new model around two pretrained folders in Hugging Face format; `options` are FoveatedVLMConfig fields.

        Raises ValueError when a folder holds another architecture or its weights do not fit its configuration.
        """
        vision_config, text_config = AutoConfig.from_pretrained(vision_path), AutoConfig.from_pretrained(language_path)
        if vision_config.model_type != "dinov2":
            raise ValueError(f"{vision_path} holds a {vision_config.model_type!r} model, expected 'dinov2'")
        vision_config.dtype = text_config.dtype = torch.float32  # master weights, whatever the folder was saved in
        language_model = AutoModelForCausalLM.from_pretrained(language_path, dtype=torch.float32)
        if options.get("visual_scale", "auto") == "auto":
            options["visual_scale"] = float(language_model.get_input_embeddings().weight.detach().std())
        options.setdefault("visual_token_id", text_config.vocab_size)
        model = cls(FoveatedVLMConfig(vision_config, text_config, **options))
        model.language_model.load_state_dict(language_model.state_dict())
        model.vision_encoder.load_state_dict(read_vision_weights(vision_path))
        return model

    # ---- looking: frames -> visual tokens

    def look(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor,
        num_frames: Tensor,
        mode: str,
        num_plans: int = 1,
        query_source: str = "planned",
        generator: torch.Generator | None = None,
        output_attentions: bool = False,
    ) -> list[Look]:
        """The visual tokens of all frames: one `Look` per pass, the last one being the mode's own.

        input_ids [B, S], attention_mask [B, S], pixel_values [F, 3, height, width], num_frames [B]. `num_plans` is the
        number of times that the fine mode plans its queries (2: once more from the fine tokens).
        """
        if self.config.architecture == "multi_token":
            walk = self.vision_encoder.walk(pixel_values, need_patch_features=True)
            pooled = pool_patches(walk.patch_features, self.config.num_visual_tokens_per_frame)
            return [Look(self.connect(pooled))]
        num_total = len(pixel_values)
        static = self.static_query.expand(num_total, -1, -1)  # [F, K, Q]
        first = (
            static
            if self.config.coarse_only or self.config.tie_first_query
            else self.first_query.expand(num_total, -1, -1)
        )
        choose = _QueryChoice(query_source, static, generator)
        if mode == "coarse" or self.config.coarse_only:
            return [self._walk(pixel_values, choose(static), output_attentions)[1]]
        language = _VisualSequence(self, input_ids, attention_mask, num_frames)
        if mode == "autoregressive":
            walk, _ = self._walk(pixel_values, None, output_attentions)
            return [self._look_autoregressively(walk, first, language, choose, output_attentions)]
        walk, coarse = self._walk(pixel_values, static, output_attentions)
        looks = [coarse]
        for _ in range(num_plans):
            planned = self.planner(language.hidden_states(looks[-1].visual_tokens))  # [F, K, Q]
            queries = choose(language.shift_by_one_frame(planned, first))
            looks.append(self._attend(queries, walk, output_attentions))
        return looks

    def connect(self, features: Tensor) -> Tensor:
        """Vision features [F, K, D] -> visual tokens [F, K, E] on the scale of the language model's embeddings."""
        return self.connector(features) * self.config.visual_scale

    def _walk(
        self, pixel_values: Tensor, queries: Tensor | None, output_attentions: bool
    ) -> tuple[VisionWalk, Look | None]:
        """The one pass over the vision encoder, with the look of the queries [F, K, Q] that ride along, if any."""
        if self.config.attention == "shallow":
            walk = self.vision_encoder.walk(pixel_values, need_patch_features=True)
            walk = self.shallow_attention.prepare(walk)
            return walk, None if queries is None else self._attend(queries, walk, output_attentions)
        if queries is None:
            return self.vision_encoder.walk(pixel_values), None
        walk = self.vision_encoder.walk(
            pixel_values, self.query_projection(queries), output_attentions=output_attentions
        )
        return walk, Look(self.connect(walk.query_output), queries, walk.attention_weights)

    def _attend(self, queries: Tensor, walk: VisionWalk, output_attentions: bool) -> Look:
        attention = self.shallow_attention if self.config.attention == "shallow" else self.vision_encoder
        features, weights = attention.attend(self.query_projection(queries), walk, output_attentions)
        return Look(self.connect(features), queries, weights)

    def _look_autoregressively(self, walk, first, language: "_VisualSequence", choose, output_attentions: bool) -> Look:
        """Frame by frame with the language model's key-value cache: linear in the number of frames."""
        order, looks = [], []
        planned, cache = None, language.start_cache()
        for frames in language.frames_by_time():  # frames: int64 [samples that have this frame], indices into F
            queries = first[frames] if planned is None else planned[language.samples_of(frames)]
            look = self._attend(choose(queries, frames), walk.select_frames(frames), output_attentions)
            hidden = language.step(look.visual_tokens, frames, cache)  # [B', K, E]
            planned = self.planner(hidden)
            order.append(frames)
            looks.append(look)
        back = torch.cat(order).argsort()
        weights = torch.cat([look.attention_weights for look in looks], dim=1)[:, back] if output_attentions else None
        tokens = torch.cat([look.visual_tokens for look in looks])[back]
        return Look(tokens, torch.cat([look.queries for look in looks])[back], weights)

    # ---- reading: visual tokens and text -> losses, answers

    def embed(self, input_ids: Tensor, visual_tokens: Tensor | None) -> Tensor:
        """Token embeddings [B, S, E] with the visual tokens [F, K, E] in their places."""
        is_visual = input_ids == self.config.visual_token_id  # an id outside the vocabulary: no text can hold it
        embeddings = self.language_model.get_input_embeddings()(input_ids.masked_fill(is_visual, 0))
        if visual_tokens is None:
            return embeddings
        return embeddings.masked_scatter(is_visual[..., None].expand_as(embeddings), visual_tokens.to(embeddings.dtype))

    def read(self, input_ids: Tensor, attention_mask: Tensor, visual_tokens: Tensor | None) -> Tensor:
        """Hidden states [B, S, E] of the language model over text and visual tokens."""
        return self.language_model.model(
            inputs_embeds=self.embed(input_ids, visual_tokens),
            attention_mask=attention_mask,
            position_ids=position_ids(attention_mask),
            use_cache=False,
        ).last_hidden_state

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        num_frames: Tensor | None = None,
        labels: Tensor | None = None,
        mode: str = "fine",
        num_plans: int = 1,
        query_source: str = "planned",
        generator: torch.Generator | None = None,
        output_attentions: bool = False,
        return_logits: bool = False,
    ) -> FoveatedVLMOutput:
        """Loss of the labelled tokens in one of the modes.

        input_ids [B, S] with K placeholders per frame, attention_mask [B, S] (1 = real token; default all),
        pixel_values [F, 3, height, width] (None or no frames: text only), num_frames [B], labels [B, S] with -100
        where nothing is asked. Raises ValueError when placeholders and frames do not match or a mode or query source
        is unknown.
        """
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self._check_inputs(input_ids, pixel_values, num_frames, mode, query_source)
        looks: list[Look] = []
        if pixel_values is not None and len(pixel_values):
            looks = self.look(
                input_ids,
                attention_mask,
                pixel_values,
                num_frames,
                mode,
                num_plans,
                query_source,
                generator,
                output_attentions,
            )
        look = looks[-1] if looks else Look(None)
        output = self._losses(self.read(input_ids, attention_mask, look.visual_tokens), labels, return_logits)
        if labels is not None and self.config.lambda_coarse > 0 and self.training and len(looks) > 1:
            coarse = self._losses(self.read(input_ids, attention_mask, looks[0].visual_tokens), labels, False)
            output.loss_coarse = coarse.loss
            output.loss = output.loss + self.config.lambda_coarse * coarse.loss
        output.visual_tokens, output.queries = look.visual_tokens, look.queries
        output.attention_weights = look.attention_weights
        return output

    def _losses(self, hidden: Tensor, labels: Tensor | None, return_logits: bool) -> FoveatedVLMOutput:
        """Cross-entropy at the labelled positions only: the vocabulary projection of the others is never computed."""
        output = FoveatedVLMOutput()
        if return_logits:
            output.logits = self.language_model.lm_head(hidden)
        if labels is None:
            return output
        asked = labels[:, 1:] != -100  # [B, S - 1]: the state at s predicts the token at s + 1
        logits = self.language_model.lm_head(hidden[:, :-1][asked]).float()  # [labelled, V]
        targets = labels[:, 1:][asked]
        losses = F.cross_entropy(logits, targets, reduction="none")
        output.loss = losses.mean() if len(losses) else hidden.sum() * 0.0
        output.token_loss = torch.zeros(labels.shape, dtype=losses.dtype, device=losses.device)
        output.token_loss[:, 1:][asked] = losses.detach()
        output.correct = torch.zeros(labels.shape, dtype=torch.bool, device=losses.device)
        output.correct[:, 1:][asked] = logits.argmax(-1) == targets
        return output

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        num_frames: Tensor | None = None,
        mode: str = "autoregressive",
        query_source: str = "planned",
        **generation_options,
    ) -> Tensor:
        """Answer with the library's own generation (greedy, sampling, beams: its options apply). Returns new tokens
        [B, S'].

        `input_ids` [B, S] must be left-padded, as for any batched generation.
        """
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self._check_inputs(input_ids, pixel_values, num_frames, mode, query_source)
        tokens = None
        if pixel_values is not None and len(pixel_values):
            tokens = self.look(input_ids, attention_mask, pixel_values, num_frames, mode, query_source=query_source)[
                -1
            ].visual_tokens
        embeddings = self.embed(input_ids, tokens)
        return self.language_model.generate(
            inputs_embeds=embeddings, attention_mask=attention_mask, **generation_options
        )

    def _check_inputs(self, input_ids, pixel_values, num_frames, mode: str, query_source: str) -> None:
        if mode not in MODES or query_source not in QUERY_SOURCES:
            raise ValueError(
                f"mode={mode!r} must be one of {', '.join(MODES)}; "
                f"query_source={query_source!r} must be one of {', '.join(QUERY_SOURCES)}"
            )
        frames = 0 if pixel_values is None else len(pixel_values)
        if frames and (num_frames is None or int(num_frames.sum()) != frames):
            told = None if num_frames is None else int(num_frames.sum())
            raise ValueError(f"num_frames adds up to {told} but pixel_values holds {frames} frames")
        per_frame = self.config.num_visual_tokens_per_frame
        places = (input_ids == self.config.visual_token_id).sum(1)
        expected = torch.zeros_like(places) if num_frames is None else num_frames.to(places.device) * per_frame
        if not torch.equal(places, expected):
            row = int((places != expected).nonzero()[0])
            raise ValueError(
                f"sample {row} has {int(places[row])} visual placeholders for {int(expected[row]) // per_frame} frames "
                f"of {per_frame} visual tokens each: give input_ids exactly {int(expected[row])} of them"
            )


class _QueryChoice:
    """Which queries are used in place of the planned ones: the controls of the evaluation."""

    def __init__(self, source: str, static: Tensor, generator: torch.Generator | None):
        self.source, self.static, self.noise = source, static, None
        if source == "random":  # drawn once for all frames, so that every mode and batch order sees the same
            self.noise = torch.randn(static.shape, generator=generator, device=static.device, dtype=static.dtype)

    def __call__(self, queries: Tensor, frames: Tensor | None = None) -> Tensor:
        """queries [f, K, Q] of the given frames (all by default) -> the queries to use; random ones keep each query's
        norm."""
        if self.source == "planned":
            return queries
        if self.source == "static":
            return self.static[: len(queries)]
        noise = self.noise if frames is None else self.noise[frames]
        return noise / noise.norm(dim=-1, keepdim=True) * queries.norm(dim=-1, keepdim=True)


class _VisualSequence:
    """The part of a batch that planning reads: samples with frames, up to their last visual token."""

    def __init__(
        self, model: FoveatedVLMForConditionalGeneration, input_ids: Tensor, attention_mask: Tensor, num_frames: Tensor
    ):
        self.model = model
        rows = (num_frames > 0).nonzero()[:, 0]  # [B']
        ids = input_ids[rows]
        is_visual = ids == model.config.visual_token_id
        length = int(is_visual.any(0).nonzero()[-1]) + 1
        self.input_ids, self.attention_mask, self.is_visual = (
            ids[:, :length],
            attention_mask[rows, :length],
            is_visual[:, :length],
        )
        self.num_frames = num_frames[rows]
        self.sample_of_frame = torch.repeat_interleave(
            torch.arange(len(rows), device=ids.device), self.num_frames
        )  # [F]
        starts = self.num_frames.cumsum(0) - self.num_frames  # [B'] index of each sample's first frame
        self.time_of_frame = torch.arange(len(self.sample_of_frame), device=ids.device) - starts[self.sample_of_frame]
        self.tokens_per_frame = model.config.num_visual_tokens_per_frame

    def hidden_states(self, visual_tokens: Tensor) -> Tensor:
        """Hidden states at the visual tokens, in parallel: [F, K, E] -> [F, K, E]."""
        hidden = self.model.read(self.input_ids, self.attention_mask, visual_tokens)
        return hidden[self.is_visual].unflatten(0, (-1, self.tokens_per_frame))

    def shift_by_one_frame(self, planned: Tensor, first: Tensor) -> Tensor:
        """Frame t gets the query planned after frame t - 1, frame 0 the first query: [F, K, Q] -> [F, K, Q]."""
        return torch.where((self.time_of_frame == 0)[:, None, None], first, planned.roll(1, dims=0))

    def frames_by_time(self) -> list[Tensor]:
        """For every time t, the frame indices of the samples that have a frame t."""
        return [(self.time_of_frame == t).nonzero()[:, 0] for t in range(int(self.num_frames.max()))]

    def samples_of(self, frames: Tensor) -> Tensor:
        return self.sample_of_frame[frames]

    def start_cache(self) -> dict:
        """Read the text before the first visual token of every sample into a cache, aligned at its right end."""
        before = self.is_visual.int().argmax(1)  # [B'] tokens before the first visual one, padding included
        longest = int(before.max())
        source = torch.arange(longest, device=before.device) - (longest - before)[:, None]  # [B', longest]
        prefix = self.input_ids.gather(1, source.clamp(min=0))
        mask = torch.where(source >= 0, self.attention_mask.gather(1, source.clamp(min=0)), 0)
        cache = {"keys_and_values": DynamicCache(config=self.model.config.text_config), "mask": mask}
        if longest:
            self._run(self.model.embed(prefix, None), position_ids(mask), cache)
        return cache

    def step(self, visual_tokens: Tensor, frames: Tensor, cache: dict) -> Tensor:
        """Read one frame of every sample that still has one: visual_tokens [f, K, E] -> hidden states [B', K, E].

        A sample without this frame gets a masked place, which no later token attends to.
        """
        shape = (len(self.num_frames), self.tokens_per_frame)
        samples = self.samples_of(frames)
        embeddings = visual_tokens.new_zeros(*shape, visual_tokens.shape[-1]).index_copy(0, samples, visual_tokens)
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
    """Positions [B, S] that count real tokens only, so that padding on either side changes nothing."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def read_vision_weights(path: str | Path) -> dict[str, Tensor]:
    """The DINOv2 weights of a folder by published key names, in fp32. Raises ValueError for a folder without
    safetensors."""
    folder = Path(path)
    index = folder / "model.safetensors.index.json"
    names = (
        sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else ["model.safetensors"]
    )
    if not (folder / names[0]).exists():
        raise ValueError(f"{folder} has no model.safetensors: save the DINOv2 backbone there with safetensors weights")
    weights = {}
    for name in names:
        weights.update(load_file(folder / name))
    return {key.removeprefix("dinov2."): value.float() for key, value in weights.items()}
