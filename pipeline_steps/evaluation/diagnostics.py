"""Automated sanity checks of the gaze: each has a value, bounds and a verdict.

The bounds are wide: a failed check means that something is broken, not that the accuracy is low. F frames.
"""

from dataclasses import dataclass

import numpy as np
import torch

from pipeline_steps.common.diagnostic_results import Check, Diagnostics
from pipeline_steps.evaluation.attention_probes import RANDOM

NO_QUERIES = "not applicable: a multi_token network has no queries"
NO_PLAN = "not applicable: a coarse-only network plans no queries"
SHORT = "no clip has planned queries in two consecutive frames"


@dataclass(frozen=True)
class Rule:
    meaning: str
    low: float | None
    high: float | None
    reason: str  # likely cause of a value out of bounds


RULES = {
    "query_spread": Rule(
        "standard deviation of the planned queries over frames and clips, divided by their root mean square",
        0.05,
        None,
        "every frame of every clip gets nearly the same query: the planner ignores the previous frames",
    ),
    "query_similarity": Rule(
        "mean cosine of the planned queries of consecutive frames",
        None,
        0.98,
        "the query does not move from frame to frame",
    ),
    "projection_bias": Rule(
        "b / (b + w): b is the norm of the query projection's bias, w the mean norm of projected queries without bias",
        None,
        0.35,
        "the bias dominates, so that all queries are nearly the same",
    ),
    "attention_entropy": Rule(
        "entropy of the last layer's attention divided by its maximum, mean over heads and frames",
        None,
        0.98,
        "attention is uniform: the queries select nothing",
    ),
    "max_attention": Rule(
        "largest attention weight of the sharpest head of all layers, in multiples of the uniform weight",
        3.0,
        None,
        "attention is nearly uniform in every head of every layer",
    ),
    "focus_ratio": Rule(
        "largest patch weight divided by the mean patch weight, last layer, mean over heads and frames",
        2.0,
        None,
        "attention over the patches is nearly uniform in the last layer",
    ),
    "fine_coarse_cosine": Rule(
        "mean cosine of the fine and the coarse visual token of a frame, over frames with a planned query",
        None,
        0.98,
        "planned queries extract the same features as the static query",
    ),
    "output_correlation": Rule(
        "mean correlation of a frame's visual tokens with the planned query and with a random query",
        None,
        0.98,
        "a random query gives the same visual token: the query has no effect",
    ),
    "token_similarity": Rule(
        "mean cosine of the visual tokens of different frames of a clip",
        None,
        0.98,
        "all frames become the same token: the representation has collapsed",
    ),
    "collapse_in_training": Rule(
        "token_similarity in the last diagnostics row of the training metrics (stage1.csv to stage3.csv)",
        None,
        0.98,
        "all frames became the same token during training",
    ),
    "plan_sensitivity": Rule(
        "relative change of a planned query divided by the relative change of its input hidden state (random 1 % step)",
        0.05,
        None,
        "the planned query does not depend on the language model's state",
    ),
    "path_agreement": Rule(
        "largest difference of an item's loss per token between mode coarse and control static_query. Both use the "
        "static query on different code paths, so they should be equal",
        None,
        0.001,
        "the parallel and the frame-by-frame code path disagree",
    ),
}


def diagnose(model, observed, table, training_rows):
    """`Diagnostics`, or None if there were no clips.

    observed: `attention_probes.ProbeResults` or None. table: item table. training_rows: rows of stage1.csv to
    stage3.csv, in order.
    """
    if observed is None:
        return None
    values = measure(model, observed) | {
        "collapse_in_training": collapse(training_rows),
        "path_agreement": path_agreement(model.config, table),
    }
    shown = {mode: probes for mode, probes in observed.modes.items() if probes.entropy is not None}
    return Diagnostics(
        checks={name: check(RULES[name], values[name]) for name in RULES},
        entropy={mode: clipped(probes.entropy) for mode, probes in shown.items()},
        peak={mode: clipped(probes.peak) for mode, probes in shown.items()},
        num_items=len(observed.num_frames),
        num_frames=sum(observed.num_frames),
    )


def clipped(shares):
    """Shares [L, H] as lists, clipped to 0..1 against rounding errors."""
    return np.clip(shares, 0, 1).tolist()


def check(rule, value):
    """`Check` of a value: a number, or a str with the reason why there is none."""
    if isinstance(value, str):
        verdict, value, reason = "not applicable", None, value
    else:
        inside = (rule.low is None or value >= rule.low) and (rule.high is None or value <= rule.high)
        verdict, reason = "ok" if inside else "suspicious", rule.reason
    return Check(verdict=verdict, value=value, low=rule.low, high=rule.high, meaning=rule.meaning, reason=reason)


def measure(model, observed):
    """{check: number, or the reason why there is none} for the checks computed from the probes."""
    probes, clips, times = observed.modes, observed.clips, observed.times
    own = probes["autoregressive"]
    values = {"token_similarity": similarity_within(own.tokens, clips)}
    if own.queries is None:
        return dict.fromkeys(RULES, NO_QUERIES) | values
    values |= {
        "attention_entropy": float(own.entropy[-1].mean()),
        "max_attention": float(own.peak.max() * observed.num_places),
        "focus_ratio": own.focus,
        "projection_bias": bias_share(model.query_projection, model, own.queries),
        "output_correlation": float(correlation(own.tokens, probes[RANDOM].tokens).mean()),
    }
    planned = times > 0  # the first frame has no planned query
    if model.config.coarse_only:
        return dict.fromkeys(RULES, NO_PLAN) | values
    if not planned.any():
        return dict.fromkeys(RULES, SHORT) | values
    return values | {
        "query_spread": relative_std(own.queries[planned]),
        "query_similarity": similarity_in_order(own.queries, planned),
        "fine_coarse_cosine": float(cosine(probes["fine"].tokens, probes["coarse"].tokens)[planned].mean()),
        "plan_sensitivity": observed.sensitivity,
    }


def relative_std(queries):
    """Standard deviation over the rows of queries [F, Q], divided by their root mean square."""
    return float(np.sqrt(queries.var(axis=0).mean() / np.square(queries).mean()))


def cosine(a, b):
    """Cosine of the rows of two arrays [n, d]: [n]."""
    return (a * b).sum(-1) / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-12)


def correlation(a, b):
    """Pearson correlation of the rows of two arrays [n, d], over d: [n]."""
    return cosine(a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True))


def similarity_in_order(queries, planned):
    """Mean cosine of consecutive rows that are both planned (this excludes pairs across two
    clips, whose second row is a first frame)."""
    both = planned[1:] & planned[:-1]
    return float(cosine(queries[1:], queries[:-1])[both].mean()) if both.any() else SHORT


def similarity_within(tokens, clips):
    """Mean cosine of all pairs of rows from the same clip; clips [F]: clip index of each row."""
    unit = tokens / np.maximum(np.linalg.norm(tokens, axis=-1, keepdims=True), 1e-12)
    pairs = []
    for clip in np.unique(clips):
        rows = unit[clips == clip]
        pairs.append((rows @ rows.T)[np.triu_indices(len(rows), 1)])
    pairs = np.concatenate(pairs)
    return float(pairs.mean()) if len(pairs) else "no clip has two frames"


@torch.inference_mode()
def bias_share(projection, model, queries):
    """b / (b + w): b is the norm of the projection's bias, w the mean norm of the queries [F, K * Q] after projection
    without bias. 0 without a bias."""
    if projection.bias is None:
        return 0.0
    rows = torch.from_numpy(queries).to(projection.weight).reshape(-1, model.config.query_dim)
    bias, length = projection.bias.norm(), (rows @ projection.weight.T).norm(dim=-1).mean()
    return float(bias / (bias + length).clamp_min(1e-12))


def collapse(rows):
    """The last token similarity that training logged, or the reason why there is none."""
    known = [row["token_similarity"] for row in rows if row.get("token_similarity")]
    return float(known[-1]) if known else "the training metrics have no diagnostics rows"


def path_agreement(config, table):
    """Largest difference of an item's loss per token between coarse and static_query, or the reason why there is
    none."""
    if config.architecture != "foveated":
        return NO_QUERIES
    if config.fovea_size:
        return "the coarse pass has no window, the control static_query has"
    pairs = table[table["mode"].isin(["coarse", "static_query"])]
    losses = pairs.assign(loss=pairs["loss_sum"] / pairs["num_tokens"]).pivot(
        index=["task", "key", "item"], columns="mode", values="loss"
    )
    if "static_query" not in losses:
        return "the controls were not measured"
    if config.query_source not in ("planned", "static"):
        return f"not applicable to the query source '{config.query_source}'"
    return float((losses["static_query"] - losses["coarse"]).abs().max())
