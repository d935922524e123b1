"""Configuration of the foveated vision-language model."""

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.dinov2.configuration_dinov2 import Dinov2Config

MODES = ("coarse", "fine", "autoregressive")
LAYOUTS = ("question_first", "vision_first")
ARCHITECTURES = ("foveated", "multi_token")
ATTENTIONS = ("deep", "shallow")
QUERY_SOURCES = ("planned", "static", "random", "fixed", "oracle")
HARD_ATTENTIONS = ("none", "top_k", "gumbel")
QUERY_UPDATES = ("replace", "add")
TOKEN_AGGREGATIONS = ("none", "mean", "weighted")
FRAME_TIMES = ("none", "sinusoidal")
MAX_PASSES = 3


class FoveatedVLMConfig(PreTrainedConfig):
    """Everything that determines the network's outputs.

    Args:
        vision_config: a `Dinov2Config` or its dict.
        text_config: the language model's configuration (Llama type) or its dict.
        architecture: `foveated`, or `multi_token`: the baseline that gives the language model average-pooled patch
            tokens.
        attention: `deep` queries walk through every layer of the vision encoder; `shallow` ones see the last layer's
            patches once.
        layout: where the frames stand: `question_first` (after the user's text) or `vision_first` (after a BOS token).
        query_dim: width of the queries between planner and vision encoder.
        query_init_std: standard deviation of the learned static and first query at the start.
        query_bias: whether the projection of the query into the vision encoder has a bias.
        tie_first_query: whether frame 0 of the fine pass uses the static query (else a query of its own).
        query_update: whether the planner's output is the next query (`replace`) or is added to the last one (`add`).
        query_source: what stands in for the planned queries, in training and in use: `planned` (the model itself),
            `static` (the static query on every frame), `random` (new for every frame), `fixed` (one random query for
            all frames) or `oracle` (planned, and limited to the target's patches: an upper bound where they are known).
        attention_temperature: the logits of the queries' attention are divided by it; below 1 is sharper.
        learnable_temperature: whether every layer learns its temperature, from `attention_temperature` on.
        hard_attention: `none`; `top_k` keeps the `attention_top_k` strongest places of every head; `gumbel` takes one.
        attention_top_k: places that `top_k` keeps.
        num_visual_tokens_per_frame: queries per frame (a square number for `multi_token`), and tokens per frame unless
            aggregated.
        token_aggregation: how the looks of several queries become tokens: `none` (a token each), `mean`, or `weighted`
            (by a learned score): one token per frame, from which all queries of the next one are planned.
        num_passes: fine passes in parallel training and use, 1 to 3: each plans anew from the tokens of the one before.
        second_pass_probability: share of training steps on which the queries are planned once more, from fine tokens.
        lambda_coarse: weight of the text loss of the coarse pass in training.
        lambda_entropy: weight of the entropy-margin loss (planned looks sharper than coarse ones) in training.
        entropy_margin: by how many nats.
        lambda_contrastive: weight of the contrastive loss (fine tokens unlike coarse ones) in training.
        contrastive_margin: cosine similarity below which it is zero.
        coarse_only: train and answer with the static query alone (ablation A6).
        blind: every frame is replaced by the mean colour, in training and in use (the control).
        frame_time_embedding: `none`, or `sinusoidal`: a learned projection (zero at the start) of the frame's time,
            `frame_times` if given, else its index, is added to its visual tokens.
        visual_scale: standard deviation of the visual tokens at the start; "auto" is replaced by
            the standard deviation of the language model's token embeddings in `from_backbones`.
        max_num_frames: frames of one sample; more are an error.
        dpo_beta: strength of the reference in preference training.
        visual_token_id: id of the placeholder that a visual token replaces in `input_ids`.

    Raises ValueError for an unknown choice or a number out of its range, naming both.
    """

    model_type = "foveated_vlm"
    sub_configs = {"vision_config": Dinov2Config, "text_config": AutoConfig}

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
        second_pass_probability: float = 0.5,
        lambda_coarse: float = 0.0,
        lambda_entropy: float = 0.0,
        entropy_margin: float = 0.5,
        lambda_contrastive: float = 0.0,
        contrastive_margin: float = 0.5,
        coarse_only: bool = False,
        blind: bool = False,
        frame_time_embedding: str = "none",
        visual_scale: float | str = "auto",
        max_num_frames: int = 64,
        dpo_beta: float = 0.1,
        visual_token_id: int | None = None,
        **kwargs,
    ):
        self.vision_config = _as_config(vision_config, Dinov2Config)
        text_class = (
            CONFIG_MAPPING[text_config.get("model_type", "llama")]
            if isinstance(text_config, dict)
            else CONFIG_MAPPING["llama"]
        )
        self.text_config = _as_config(text_config, text_class)
        self.architecture = _choice("architecture", architecture, ARCHITECTURES)
        self.attention = _choice("attention", attention, ATTENTIONS)
        self.layout = _choice("layout", layout, LAYOUTS)
        self.query_dim = query_dim
        self.query_init_std = query_init_std
        self.query_bias = query_bias
        self.tie_first_query = tie_first_query
        self.query_update = _choice("query_update", query_update, QUERY_UPDATES)
        self.query_source = _choice("query_source", query_source, QUERY_SOURCES)
        self.attention_temperature = _at_least("attention_temperature", attention_temperature, 1e-3)
        self.learnable_temperature = learnable_temperature
        self.hard_attention = _choice("hard_attention", hard_attention, HARD_ATTENTIONS)
        self.attention_top_k = _at_least("attention_top_k", attention_top_k, 1)
        self.num_visual_tokens_per_frame = _at_least("num_visual_tokens_per_frame", num_visual_tokens_per_frame, 1)
        self.token_aggregation = _choice("token_aggregation", token_aggregation, TOKEN_AGGREGATIONS)
        self.num_passes = _at_least("num_passes", num_passes, 1)
        if num_passes > MAX_PASSES:
            raise ValueError(f"num_passes={num_passes} is above {MAX_PASSES}: use autoregressive mode, their limit")
        self.second_pass_probability = second_pass_probability
        self.lambda_coarse = _at_least("lambda_coarse", lambda_coarse, 0)
        self.lambda_entropy = _at_least("lambda_entropy", lambda_entropy, 0)
        self.entropy_margin = entropy_margin
        self.lambda_contrastive = _at_least("lambda_contrastive", lambda_contrastive, 0)
        self.contrastive_margin = contrastive_margin
        self.coarse_only = coarse_only
        self.blind = blind
        self.frame_time_embedding = _choice("frame_time_embedding", frame_time_embedding, FRAME_TIMES)
        self.visual_scale = visual_scale
        self.max_num_frames = _at_least("max_num_frames", max_num_frames, 1)
        self.dpo_beta = _at_least("dpo_beta", dpo_beta, 0)
        self.visual_token_id = visual_token_id
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__init__(**kwargs)

    @property
    def tokens_per_frame(self) -> int:
        """Visual tokens, and so placeholders in `input_ids`, of one frame."""
        aggregated = self.architecture == "foveated" and self.token_aggregation != "none"
        return 1 if aggregated else self.num_visual_tokens_per_frame

    def get_text_config(self, *args, **kwargs):
        return self.text_config


def _as_config(value, config_class):
    if value is None:
        return config_class()
    return config_class(**value) if isinstance(value, dict) else value


def _choice(name: str, value, allowed: tuple[str, ...]):
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}")
    return value


def _at_least(name: str, value, smallest):
    if value < smallest:
        raise ValueError(f"{name}={value} is below {smallest}, the smallest value that makes sense")
    return value
