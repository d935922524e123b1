"""Values that the options of the network may have, alone and together. Needs neither torch nor transformers.

`options` is anything that has them as attributes: a `FoveatedVLMConfig`, or section `model` of params.yaml. Every
message begins with the name of an option.
"""

import math

LAYOUTS = ("question_first", "vision_first")
ARCHITECTURES = ("foveated", "multi_token")
ATTENTIONS = ("deep", "shallow")
QUERY_SOURCES = ("planned", "static", "random", "fixed", "oracle")
HARD_ATTENTIONS = ("none", "top_k", "gumbel")
QUERY_UPDATES = ("replace", "add", "gated")
TOKEN_AGGREGATIONS = ("none", "mean", "weighted")
FRAME_TIMES = ("none", "sinusoidal")
CHOICES = {
    "architecture": ARCHITECTURES,
    "attention": ATTENTIONS,
    "layout": LAYOUTS,
    "query_update": QUERY_UPDATES,
    "query_source": QUERY_SOURCES,
    "hard_attention": HARD_ATTENTIONS,
    "token_aggregation": TOKEN_AGGREGATIONS,
    "frame_time_embedding": FRAME_TIMES,
}
BOOLEANS = ("query_bias", "tie_first_query", "learnable_temperature", "coarse_only", "blind")
WITHOUT_QUERIES = {  # values of multi_token, which averages patches: others would change nothing
    "query_source": "planned",
    "hard_attention": "none",
    "token_aggregation": "none",
    "learnable_temperature": False,
    "num_passes": 1,
    "coarse_only": False,
}
LARGE = 1e9
RANGES = {
    "query_dim": (1, LARGE),
    "query_init_std": (0, LARGE),
    "attention_temperature": (1e-3, LARGE),
    "attention_top_k": (1, LARGE),
    "num_visual_tokens_per_frame": (1, LARGE),
    "num_passes": (1, 3),
    "frame_downsampling": (1, LARGE),
    "fovea_size": (0, LARGE),
    "max_num_frames": (1, LARGE),
}
INTEGERS = (
    "query_dim",
    "attention_top_k",
    "num_visual_tokens_per_frame",
    "num_passes",
    "frame_downsampling",
    "fovea_size",
    "max_num_frames",
)


def check_options(options) -> None:
    """Raises ValueError for an unknown choice, a number out of range, another type, or incompatible options."""
    for name, allowed in CHOICES.items():
        if getattr(options, name) not in allowed:
            raise ValueError(f"{name}={getattr(options, name)!r} is not one of {', '.join(allowed)}")
    for name in BOOLEANS:
        if not isinstance(getattr(options, name), bool):
            raise ValueError(f"{name}={getattr(options, name)!r} must be True or False")
    for name, (smallest, largest) in RANGES.items():
        value = getattr(options, name)
        wrong = isinstance(value, bool) or not isinstance(value, int if name in INTEGERS else (int, float))
        if wrong or not smallest <= value <= largest:
            kind = "an integer" if name in INTEGERS else "a number"
            raise ValueError(f"{name}={value!r} must be {kind} from {smallest} to {largest}")
    scale = options.visual_scale
    is_number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if scale != "auto" and not (is_number and 0 < scale < math.inf):
        raise ValueError(f"visual_scale={scale!r} must be a number above 0, or auto")
    _check_fovea(options)
    if options.architecture == "multi_token":
        _check_multi_token(options)
    elif options.coarse_only and options.num_passes > 1:
        raise ValueError(
            f"num_passes={options.num_passes} with coarse_only=True: there is only the coarse pass, so this changes "
            "nothing. Set num_passes to 1, or coarse_only to False"
        )


def _check_multi_token(options) -> None:
    side = math.isqrt(options.num_visual_tokens_per_frame)
    if side**2 != options.num_visual_tokens_per_frame:
        raise ValueError(
            f"num_visual_tokens_per_frame={options.num_visual_tokens_per_frame} must be a square number for "
            f"architecture='multi_token', for example {side**2} or {(side + 1) ** 2}"
        )
    for name, value in WITHOUT_QUERIES.items():
        if getattr(options, name) != value:
            raise ValueError(
                f"{name}={getattr(options, name)!r} with architecture='multi_token': it has no queries, so this would "
                f"change nothing. Set {name} to {value!r}, or architecture to 'foveated'"
            )


def _check_fovea(options) -> None:
    if not options.fovea_size:
        return
    if options.frame_downsampling == 1:
        raise ValueError(
            f"fovea_size={options.fovea_size} with frame_downsampling=1: the whole frame has full resolution already. "
            "Set frame_downsampling to 2 or more, or fovea_size to 0"
        )
    wanted = {"architecture": "foveated", "attention": "deep", "coarse_only": False}
    for name, value in wanted.items():
        if getattr(options, name) != value:
            raise ValueError(
                f"fovea_size={options.fovea_size} with {name}={getattr(options, name)!r}: the window follows queries "
                f"that pass through the vision encoder after the coarse pass. Set {name} to {value!r}, or "
                "fovea_size to 0 (a fixed query with a window: query_source='static')"
            )


def check_top_k(options, num_patches: int) -> None:
    """Raises ValueError if `top_k` would keep all positions of a frame of so many patches: the class token and the
    patches that are encoded, which are those at low resolution and, with a fovea, those of the window."""
    if options.architecture != "foveated" or options.hard_attention != "top_k":
        return
    encoded = num_patches // options.frame_downsampling**2 + options.fovea_size**2
    if options.attention_top_k > encoded:
        raise ValueError(
            f"attention_top_k={options.attention_top_k} keeps everything: a query attends to {encoded + 1} positions, "
            f"the {encoded} patches of a frame that are encoded and the class token. Lower it to at most {encoded}, or "
            "set hard_attention to 'none'"
        )
