"""Configuration of the foveated vision-language model."""

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.dinov2.configuration_dinov2 import Dinov2Config

MODES = ("coarse", "fine", "autoregressive")
LAYOUTS = ("question_first", "vision_first")
ARCHITECTURES = ("foveated", "multi_token")
ATTENTIONS = ("deep", "shallow")
QUERY_SOURCES = ("planned", "static", "random")


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
        num_visual_tokens_per_frame: queries, and so tokens, per frame. A square number for `multi_token`.
        coarse_only: train and answer with the static query alone (ablation A6).
        second_pass_probability: share of training steps on which the queries are planned once more, from fine tokens.
        lambda_coarse: weight of the loss of the coarse pass in training.
        visual_scale: standard deviation of the visual tokens at the start; "auto" is replaced by
            the standard deviation of the language model's token embeddings in `from_backbones`.
        visual_token_id: id of the placeholder that a visual token replaces in `input_ids`.
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
        num_visual_tokens_per_frame: int = 1,
        coarse_only: bool = False,
        second_pass_probability: float = 0.5,
        lambda_coarse: float = 0.0,
        visual_scale: float | str = "auto",
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
        self.num_visual_tokens_per_frame = num_visual_tokens_per_frame
        self.coarse_only = coarse_only
        self.second_pass_probability = second_pass_probability
        self.lambda_coarse = lambda_coarse
        self.visual_scale = visual_scale
        self.visual_token_id = visual_token_id
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__init__(**kwargs)

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
