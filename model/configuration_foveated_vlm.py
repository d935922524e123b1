"""Configuration of the foveated vision-language model."""

from transformers import AutoConfig, LlamaConfig, PreTrainedConfig
from transformers.models.dinov2.configuration_dinov2 import Dinov2Config

from .option_checks import check_options


class FoveatedVLMConfig(PreTrainedConfig):
    """Everything that determines the network's outputs.

    Args:
        vision_config: a `Dinov2Config` or its dict.
        text_config: the language model's configuration (Llama type) or its dict.
        architecture: `foveated`, or `multi_token`: the baseline that gives the language model average-pooled patch
            tokens.
        attention: `deep`: queries pass through every layer of the vision encoder; `shallow`: they attend once to the
            patches of the last layer.
        layout: position of the frames: `question_first` (after the user's text) or `vision_first` (after a BOS token).
        query_dim: width of the queries between planner and vision encoder.
        query_init_std: initial standard deviation of the learned static and first query.
        query_bias: whether the projection of the queries into the vision encoder has a bias.
        tie_first_query: whether frame 0 of the fine pass uses the static query instead of a learned query of its own.
        query_update: whether the planner's output replaces the previous query (`replace`), is added to it (`add`) or to
            a part of it (`gated`: every element times a number from 0 to 1 that is computed from the same hidden state,
            at first .98).
        query_source: which queries replace the planned ones, in training and at inference: `planned` (none), `static`
            (the static query on every frame), `random` (a new one for every frame), `fixed` (one random query for all
            frames of a batch) or `oracle` (planned, with attention limited to the target's patches: an upper bound
            where they are known).
        attention_temperature: divides the attention logits of the queries; below 1 sharpens.
        learnable_temperature: whether every layer learns its temperature, initialised with `attention_temperature`.
        hard_attention: `none`; `top_k`: each head keeps its `attention_top_k` largest logits; `gumbel`: each head
            samples one position.
        attention_top_k: number of positions that `top_k` keeps, fewer than a query attends to.
        num_visual_tokens_per_frame: queries per frame (a square number for `multi_token`). Also the tokens per frame,
            unless they are aggregated.
        token_aggregation: how the outputs of several queries become visual tokens: `none` (one token each), `mean`, or
            `weighted` (by a learned score). With the latter two a frame has one token, from which all queries of the
            next frame are planned.
        num_passes: fine passes in parallel mode, 1 to 3. Each plans new queries from the tokens of the previous pass.
        frame_downsampling: the vision encoder sees the frames reduced by this factor; 1: as they are.
        fovea_size: side, in patches of the full-resolution frame, of the window that is encoded in addition where a
            planned query looks (`fovea.py`); 0: none. The coarse pass has no window. Needs deep attention and
            frame_downsampling of 2 or more.
        coarse_only: train and answer with the static query only (ablation A6).
        blind: replace every frame by the mean colour, in training and at inference (a control).
        frame_time_embedding: `none`, or `sinusoidal`: add a learned projection (initially zero) of the frame's time to
            its visual tokens. The time is `frame_times` (seconds), or the frame index if that is not given.
        visual_scale: initial standard deviation of the visual tokens. `from_backbones` replaces "auto" by the standard
            deviation of the language model's token embeddings.
        max_num_frames: largest number of frames per sample; more are an error.
        visual_token_id: id of the placeholder for a visual token in `input_ids`.

    Raises ValueError for a language model of another architecture, an unknown choice, a number out of range or another
    type; the message has the value and what is allowed.
    """

    model_type = "foveated_vlm"
    sub_configs = {"vision_config": Dinov2Config, "text_config": AutoConfig}
    keys_to_ignore_at_inference = [  # by the library's Trainer, whose predictions are the logits
        "token_loss",
        "correct",
        "last_hidden_state",
        "visual_tokens",
        "queries",
        "attention_weights",
        "passes",
    ]

    def __init__(
        self,
        vision_config=None,
        text_config=None,
        architecture: str = "foveated",
        attention: str = "deep",
        layout: str = "question_first",
        query_dim: int = 384,
        query_init_std: float = 1.0,
        query_bias: bool = False,
        tie_first_query: bool = True,
        query_update: str = "replace",
        query_source: str = "planned",
        attention_temperature: float = 1.0,
        learnable_temperature: bool = False,
        hard_attention: str = "none",
        attention_top_k: int = 4,
        num_visual_tokens_per_frame: int = 1,
        token_aggregation: str = "none",
        num_passes: int = 1,
        frame_downsampling: int = 1,
        fovea_size: int = 0,
        coarse_only: bool = False,
        blind: bool = False,
        frame_time_embedding: str = "none",
        visual_scale: float | str = "auto",
        max_num_frames: int = 64,
        visual_token_id: int | None = None,
        **kwargs,
    ):
        self.vision_config = _as_config(vision_config, Dinov2Config)
        is_dict = isinstance(text_config, dict)
        model_type = text_config.get("model_type") if is_dict else getattr(text_config, "model_type", None)
        if model_type not in (None, "llama"):
            raise ValueError(
                f"text_config: model_type={model_type!r} is not supported, only 'llama'. Use a language model of this "
                "architecture"
            )
        self.text_config = _as_config(text_config, LlamaConfig)
        self.architecture = architecture
        self.attention = attention
        self.layout = layout
        self.query_dim = query_dim
        self.query_init_std = query_init_std
        self.query_bias = query_bias
        self.tie_first_query = tie_first_query
        self.query_update = query_update
        self.query_source = query_source
        self.attention_temperature = attention_temperature
        self.learnable_temperature = learnable_temperature
        self.hard_attention = hard_attention
        self.attention_top_k = attention_top_k
        self.num_visual_tokens_per_frame = num_visual_tokens_per_frame
        self.token_aggregation = token_aggregation
        self.num_passes = num_passes
        self.frame_downsampling = frame_downsampling
        self.fovea_size = fovea_size
        self.coarse_only = coarse_only
        self.blind = blind
        self.frame_time_embedding = frame_time_embedding
        self.visual_scale = visual_scale
        self.max_num_frames = max_num_frames
        self.visual_token_id = visual_token_id
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__init__(**kwargs)
        self.check_options()

    def check_options(self) -> None:
        """Raises ValueError for an unknown choice, a number out of range, another type, or incompatible options.

        The network calls it again because options can change after construction (`from_pretrained(path, option=...)`).
        """
        check_options(self)
        vocabulary, visual_id = self.text_config.vocab_size, self.visual_token_id
        if visual_id is not None and (isinstance(visual_id, bool) or not isinstance(visual_id, int)):
            raise ValueError(f"visual_token_id={visual_id!r} must be an integer of {vocabulary} or more, or None")
        if visual_id is not None and visual_id < vocabulary:
            raise ValueError(
                f"visual_token_id={visual_id} is inside the vocabulary of {vocabulary} tokens. Use an id of "
                f"{vocabulary} or more, so that text cannot contain the placeholder"
            )

    @property
    def tokens_per_frame(self) -> int:
        """Visual tokens per frame, which is the number of its placeholders in `input_ids`."""
        aggregated = self.architecture == "foveated" and self.token_aggregation != "none"
        return 1 if aggregated else self.num_visual_tokens_per_frame

    def get_text_config(self, *args, **kwargs):
        return self.text_config


def _as_config(value, config_class):
    if value is None:
        return config_class()
    return config_class(**value) if isinstance(value, dict) else value
