"""The predecessor's five preliminary diagnostics, of a finished network and on held-out clips.

The predecessor asked them in this order to find out why fine and coarse losses were equal: does the next-frame head
rely on the previous latent, do tokens differ between queries, what does the attention temperature do, does the query
projection make queries alike, and does the head react to the state. F frames, K queries per frame, Q query width.
"""

import numpy as np
import torch

from pipeline_steps.common.diagnostic_results import PreliminaryDiagnostics
from pipeline_steps.evaluation.attention_probes import RANDOM
from pipeline_steps.evaluation.diagnostics import NO_PLAN, NO_QUERIES, SHORT, cosine
from pipeline_steps.evaluation.next_frame import VIDEOS, fine_name

NO_VIDEOS = "the split has no videos"
NOT_TRAINED = "not trained with the next-frame objective"
PAIRS = {"static / planned": ("coarse", "fine"), "static / random": ("coarse", RANDOM)}


def collect(model, observed, temperatures, next_frame):
    """`PreliminaryDiagnostics`, or None if there were no clips.

    observed: `attention_probes.ProbeResults` or None; temperatures: of `temperature_sweep.measure`; next_frame:
    `NextFrameResult`, None if the network was trained without that objective.
    """
    if observed is None:
        return None
    found = {
        "previous_latent": NOT_TRAINED,
        "feature_similarity": feature_similarity(model.config, observed),
        "temperature": temperatures or NO_QUERIES,
        "query_projection": query_projection(model, observed),
        "head_sensitivity": NOT_TRAINED,
    }
    if next_frame is not None:
        score = next_frame.groups.get(VIDEOS)
        if score is None:
            found["previous_latent"] = found["head_sensitivity"] = NO_VIDEOS
        else:
            found["previous_latent"] = previous_latent(score, fine_name(model.config))
            found["head_sensitivity"] = known(state=score.state_sensitivity, previous=score.previous_sensitivity)
    missing = {name: value for name, value in found.items() if isinstance(value, str)}
    empty = {name: [] if name == "temperature" else None for name in missing}
    return PreliminaryDiagnostics(**(found | empty), not_measured=missing, num_items=len(observed.num_frames))


def known(**values):
    return {name: value for name, value in values.items() if value is not None}


def previous_latent(score, fine):
    """{input: loss without it, loss: with all inputs} of a `NextFrameScore`; no_previous is left out if the head takes
    no previous latent. fine: name of the loss with all inputs."""
    return known(
        loss=score.loss.get(fine, score.loss["coarse"]),
        no_previous=score.loss.get("no_previous"),
        no_state=score.no_state,
        shuffled_state=score.loss.get("shuffled_state"),
    )


def feature_similarity(config, observed):
    """{measure and pair of queries: value} of the frames after the first (whose query is not planned), or the reason
    why there is none. cosine: mean over frames. distance: its mean, relative to the mean norm."""
    if config.architecture != "foveated":
        return NO_QUERIES
    later = observed.times > 0
    if not later.any():
        return SHORT
    found = {}
    for name, (mode, other) in PAIRS.items():
        if config.coarse_only and "fine" in (mode, other):
            continue
        one, two = (observed.modes[key].tokens[later] for key in (mode, other))
        norm = np.linalg.norm(one, axis=-1).mean() + np.linalg.norm(two, axis=-1).mean()
        found[f"cosine {name}"] = float(cosine(one, two).mean())
        found[f"distance {name}"] = float(2 * np.linalg.norm(one - two, axis=-1).mean() / max(norm, 1e-12))
    return found


@torch.inference_mode()
def query_projection(model, observed):
    """{before, after: mean cosine of planned and static queries before and after their projection}, or the reason why
    there is none."""
    if model.config.architecture != "foveated":
        return NO_QUERIES
    if model.config.coarse_only:
        return NO_PLAN
    later = observed.times > 0
    if not later.any():
        return SHORT
    before, after = [], []
    for mode in ("coarse", "fine"):
        queries = observed.modes[mode].queries[later].reshape(-1, model.config.query_dim)  # [F * K, Q]
        weight = model.query_projection.weight
        before.append(queries)
        after.append(model.query_projection(torch.from_numpy(queries).to(weight)).double().cpu().numpy())
    return {"before": float(cosine(*before).mean()), "after": float(cosine(*after).mean())}
