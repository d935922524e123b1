"""Gaze accuracy: does attention fall on the object that the answer needs? Boxes are mapped to the patch grid.

The ground truth is a `GroundTruth` of pipeline_steps/streaming/targets.py. T frames, L layers, H heads, K queries per
frame, N patches in row-major order.
"""

import numpy as np

from pipeline_steps.common.metrics import Gaze

SHARES = ("peak_on_target", "peak_on_any_object", "mass_on_target", "chance", "chance_among_objects")


def attention_maps(weights):
    """Attention as maps over the patches: weights [L, T, H, K, 1 + N] -> [L, T, N].

    Mean over heads and queries; the class token (first column) is dropped and each map is rescaled to sum to 1. The map
    of a frame whose queries attend only to the class token is all zeros.
    """
    return _rescaled(np.asarray(weights, dtype=np.float64).mean(axis=(2, 3))[..., 1:])


def normalized_entropy(weights):
    """Entropy of weights [..., N], each row summing to 1, divided by log(N): [...]. 0: all on one
    entry, 1: uniform."""
    logs = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    return -(weights * logs).sum(-1) / np.log(weights.shape[-1])


def head_maps(weights):
    """Like `attention_maps`, per head: weights [L, T, H, K, 1 + N] -> [L, H, T, N], mean over queries. The map of a
    head that attends only to the class token is all zeros."""
    return _rescaled(np.asarray(weights, dtype=np.float64).mean(axis=3)[..., 1:].swapaxes(1, 2))


def _rescaled(patches):
    total = patches.sum(axis=-1, keepdims=True)
    return np.divide(patches, total, out=np.zeros_like(patches), where=total > 0)


def on_patches(maps, patches):
    """maps [..., T, N], patches bool [T, N] -> (whether the strongest patch is among `patches`: bool [..., T], never of
    an all-zero map; attention mass on `patches`: [..., T])."""
    peaks = maps.argmax(-1)[..., None]
    hits = np.take_along_axis(np.broadcast_to(patches, maps.shape), peaks, axis=-1)[..., 0]
    return hits & maps.any(-1), (maps * patches).sum(-1)


def summary(maps, truth):
    """Sums of one item over the frames that show the target, except the first frame, which has no planned query. maps
    [L, T, N]."""
    hits, mass = on_patches(maps, truth.target)
    any_hits, _ = on_patches(maps, truth.any_object)
    visible = truth.target.any(-1)
    planned = visible & (np.arange(len(visible)) > 0)
    return {
        "gaze_frames": int(planned.sum()),
        "peak_on_target": int(hits[-1, planned].sum()),
        "peak_on_any_object": int(any_hits[-1, planned].sum()),
        "mass_on_target": float(mass[-1, planned].sum()),
        "chance": float(truth.target[planned].mean(-1).sum()),
        "chance_among_objects": float((truth.target[planned].sum(-1) / truth.any_object[planned].sum(-1)).sum()),
        "per_layer": hits[:, planned].sum(-1).tolist(),
        "per_frame": np.where(visible, hits[-1], np.nan).tolist(),
    }


def head_summary(maps, truth):
    """Sums of one item as in `summary`, per layer and head (flattened). maps [L, H, T, N]."""
    hits, mass = on_patches(maps, truth.target)
    planned = truth.target.any(-1) & (np.arange(maps.shape[2]) > 0)
    sums = {"per_head": hits[..., planned].sum(-1), "mass_per_head": mass[..., planned].sum(-1)}
    return {name: values.ravel().tolist() for name, values in sums.items()}


def aggregate(rows, interval):
    """`Gaze` of the items in a DataFrame of `summary` columns, or None if no frame shows a target.

    interval: function of (numerators, denominators, clips) per item.
    """
    rows = rows[rows["gaze_frames"] > 0]
    if rows.empty:
        return None
    frames = int(rows["gaze_frames"].sum())
    tracks = rows["per_frame"].tolist()
    longest = max(map(len, tracks))
    # NaN: target not visible, or clip too short
    padded = np.array([[*track, *[np.nan] * (longest - len(track))] for track in tracks])
    present = ~np.isnan(padded)
    layers = len(rows["per_layer"].iloc[0])
    heads = [name for name in ("per_head", "mass_per_head") if name in rows]
    return Gaze(
        **{
            name: np.minimum(np.array(rows[name].tolist()).sum(0) / frames, 1.0).reshape(layers, -1).tolist()
            for name in heads
        },
        **{name: min(float(rows[name].sum()) / frames, 1.0) for name in SHARES},
        peak_on_target_interval=interval(
            rows["peak_on_target"].to_numpy(), rows["gaze_frames"].to_numpy(), clips=rows["key"]
        ),
        num_frames=frames,
        per_layer=np.minimum(np.array(rows["per_layer"].tolist()).sum(0) / frames, 1.0).tolist(),
        per_frame=[
            float(np.nansum(padded[:, t]) / present[:, t].sum()) if present[:, t].any() else None
            for t in range(longest)
        ],
    )
