"""Automated checks of whether the gaze works at all: each has a value, bounds and a verdict.

The bounds are wide: a failed check means that something is broken, not that the accuracy is low. F frames.
"""

from dataclasses import dataclass

import numpy as np
import torch

from pipeline_steps.common.metrics import Check, Diagnostics
from pipeline_steps.evaluation.attention_probes import RANDOM

NO_QUERIES = "not applicable to ordinary visual tokens: the network has no queries"
NO_PLAN = "the network is coarse-only: it uses the static query and plans none"
SHORT = "no clip has planned queries in two consecutive frames"


@dataclass(frozen=True)
class Rule:
    meaning: str
    low: float | None
    high: float | None
    reason: str  # what a value out of bounds points to


RULES = {
    "query_spread": Rule(
        "standard deviation of the planned queries over frames and clips, as a share of their root mean square",
        0.05,
        None,
        "every frame of every clip gets nearly the same query: the planner ignores the previous frames",
    ),
    "query_similarity": Rule(
        "cosine of the planned queries of consecutive frames, mean",
        None,
        0.98,
        "the query does not move from frame to frame",
    ),
    "projection_bias": Rule(
        "length of the query projection's bias over the sum of it and the mean length that its weights give queries",
        None,
        0.35,
        "the bias dominates, so that all queries are nearly the same",
    ),
    "attention_entropy": Rule(
        "entropy of the last layer's attention as a share of its maximum, mean over heads and frames",
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
        "largest weight of a patch over the mean patch weight, last layer, mean over heads and frames",
        2.0,
        None,
        "attention over the patches is nearly uniform in the last layer",
    ),
    "fine_coarse_cosine": Rule(
        "cosine of the fine and the coarse visual token of a frame, mean over frames with a planned query",
        None,
        0.98,
        "planned queries extract the same features as the static query",
    ),
    "output_correlation": Rule(
        "correlation of a frame's visual tokens for the planned and for a random query, mean",
        None,
        0.98,
        "a random query gives the same visual token: the query has no effect",
    ),
    "token_similarity": Rule(
        "cosine of the visual tokens of different frames of a clip, mean",
        None,
        0.98,
        "all frames become the same token: the representation has collapsed",
    ),
    "collapse_in_training": Rule(
        "token_similarity of the last diagnostics row of the training tables",
        None,
        0.98,
        "all frames became the same token while the network was trained",
    ),
    "plan_sensitivity": Rule(
        "relative change of a planned query over that of the hidden state it is planned from (a random step of 1 %)",
        0.05,
        None,
        "the planned query does not depend on the language model's state",
    ),
    "path_agreement": Rule(
        "largest difference of an item's loss per token between the coarse mode and the control static_query, which "
        "should be equal: both use the static query, on different code paths",
        None,
        0.001,
        "the parallel and the frame-by-frame path disagree",
    ),
}


def diagnose(model, observed, table, training_rows):
    """`Diagnostics`, or None if there were no clips.

    observed: `attention_probes.ProbeResults` or None. table: item table. training_rows: rows of the training tables,
    in their order.
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
    """Shares [L, H] as lists, without what rounding puts beyond 0 and 1."""
    return np.clip(shares, 0, 1).tolist()


def check(rule, value):
    """`Check` of a number, or of a str: why there is none."""
    if isinstance(value, str):
        verdict, value, reason = "not applicable", None, value
    else:
        inside = (rule.low is None or value >= rule.low) and (rule.high is None or value <= rule.high)
        verdict, reason = "ok" if inside else "suspicious", rule.reason
    return Check(verdict=verdict, value=value, low=rule.low, high=rule.high, meaning=rule.meaning, reason=reason)


def measure(model, observed):
    """{check: number, or why there is none} of the checks that are computed from the probes."""
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
    planned = times > 0  # no plan for the first frame
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
    """Standard deviation over the rows of queries [F, Q], over their root mean square."""
    return float(np.sqrt(queries.var(axis=0).mean() / np.square(queries).mean()))


def cosine(a, b):
    """Of the rows of two arrays [n, d]: [n]."""
    return (a * b).sum(-1) / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-12)


def correlation(a, b):
    """Pearson correlation of the rows of two arrays [n, d], over d: [n]."""
    return cosine(a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True))


def similarity_in_order(queries, planned):
    """Mean cosine of consecutive rows that are both planned (the first planned row of a clip has an unplanned one
    before it)."""
    both = planned[1:] & planned[:-1]
    return float(cosine(queries[1:], queries[:-1])[both].mean()) if both.any() else SHORT


def similarity_within(tokens, clips):
    """Mean cosine of all pairs of rows of the same clip; clips [F]."""
    unit = tokens / np.maximum(np.linalg.norm(tokens, axis=-1, keepdims=True), 1e-12)
    pairs = []
    for clip in np.unique(clips):
        rows = unit[clips == clip]
        pairs.append((rows @ rows.T)[np.triu_indices(len(rows), 1)])
    pairs = np.concatenate(pairs)
    return float(pairs.mean()) if len(pairs) else "no clip has two frames"


@torch.inference_mode()
def bias_share(projection, model, queries):
    """Length of the projection's bias over the sum of it and the mean length of what its weights make of the queries
    [F, K * Q]; 0 without a bias."""
    if projection.bias is None:
        return 0.0
    rows = torch.from_numpy(queries).to(projection.weight).reshape(-1, model.config.query_dim)
    bias, length = projection.bias.norm(), (rows @ projection.weight.T).norm(dim=-1).mean()
    return float(bias / (bias + length).clamp_min(1e-12))


def collapse(rows):
    """The last token similarity that training recorded, or why there is none."""
    known = [row["token_similarity"] for row in rows if row.get("token_similarity")]
    return float(known[-1]) if known else "the training tables hold no diagnostics"


def path_agreement(config, table):
    """Largest difference of an item's loss per token between coarse and static_query, or why there is none."""
    if config.architecture != "foveated":
        return NO_QUERIES
    pairs = table[table["mode"].isin(["coarse", "static_query"])]
    losses = pairs.assign(loss=pairs["loss_sum"] / pairs["num_tokens"]).pivot(
        index=["task", "key", "item"], columns="mode", values="loss"
    )
    if "static_query" not in losses:
        return "the controls were not measured"
    if config.query_source not in ("planned", "static"):
        return f"not applicable to the query source '{config.query_source}'"
    return float((losses["static_query"] - losses["coarse"]).abs().max())
