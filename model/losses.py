"""Loss terms beside the cross-entropy of the text.

Shapes: F frames, K tokens per frame, E language width, L layers, H heads, N patches, B batch.
"""

from torch import Tensor
from torch.nn import functional as F


def attention_entropy(weights: Tensor) -> Tensor:
    """Entropy in nats of attention weights [..., N + 1] over their last axis: [...]."""
    return -(weights * weights.clamp_min(1e-12).log()).sum(-1)


def entropy_margin_loss(fine: Tensor, coarse: Tensor, margin: float) -> Tensor:
    """How far the planned looks are from being sharper than the coarse ones by `margin` nats: mean over all heads of
    relu(H(fine) - H(coarse) + margin), of the last layer. Attention weights [L, F, H, K, N + 1]; the coarse ones are a
    reference and get no gradient."""
    return F.relu(attention_entropy(fine[-1]) - attention_entropy(coarse[-1]).detach() + margin).mean()


def contrastive_loss(fine: Tensor, coarse: Tensor, margin: float) -> Tensor:
    """Cosine similarity above `margin` of a frame's fine and coarse tokens [F, K, E]: mean of
    relu(cos(fine, coarse) - margin). It pushes the planned look to find something else than the static one, which gets
    no gradient."""
    return F.relu(F.cosine_similarity(fine, coarse.detach(), dim=-1) - margin).mean()


def dpo_loss(chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float):
    """Direct preference optimisation (Rafailov et al. 2023, equation 7): mean over samples of
    -log sigmoid(beta * ((chosen - reference_chosen) - (rejected - reference_rejected))).

    All arguments are summed answer log-probabilities [B]. Returns (loss, reward margin [B] in nats).
    """
    margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    return -F.logsigmoid(margin).mean(), margin.detach()
