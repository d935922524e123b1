"""How the attention changes over the frames of a clip: its entropy and its peak.

Both are computed from the heatmaps' attention maps: last layer, mean over heads and queries, patches only.
"""

import numpy as np

from pipeline_steps.inference.gaze import normalized_entropy


def curve(maps):
    """maps [T, N], every row summing to 1 -> (entropy [T], 0: one patch, 1: uniform; largest weight [T]). Both are NaN
    for an all-zero map."""
    return tuple(np.where(maps.any(-1), values, np.nan) for values in (normalized_entropy(maps), maps.max(-1)))


def mean_curves(clips):
    """{mode: {entropy, peak, num_clips}} of clips [{mode: maps [T, N]}]: per frame the mean entropy and peak over the
    clips with attention to a patch of that frame, and the number of those clips."""
    curves = {}
    for maps in clips:
        for mode, values in maps.items():
            curves.setdefault(mode, []).append(curve(values))
    return {mode: _mean(pairs) for mode, pairs in curves.items()}


def _mean(pairs):
    longest = max(len(entropy) for entropy, _ in pairs)
    padded = np.array([[np.pad(v, (0, longest - len(v)), constant_values=np.nan) for v in pair] for pair in pairs])
    entropy, peak = np.nanmean(padded, axis=0).round(6).tolist()
    return {"entropy": entropy, "peak": peak, "num_clips": (~np.isnan(padded[:, 0])).sum(0).tolist()}
