"""The most likely token at every scored position, without a second forward pass.

The network computes logits only at labelled positions, in their order; a forward hook on `lm_head` records them.
"""

from contextlib import contextmanager

import numpy as np


@contextmanager
def predicted_tokens(model):
    """Around forward passes with labels: a list that gets the token ids of each projection (int64 arrays)."""
    found = []
    head = model.language_model.lm_head
    hook = head.register_forward_hook(lambda _, inputs, logits: found.append(logits.argmax(-1).cpu().numpy()))
    try:
        yield found
    finally:
        hook.remove()


def by_item(found, num_tokens):
    """The ids of one batch as one array per item, which has `num_tokens` [B] scored ones. ValueError when the
    number of recorded positions differs."""
    ids = np.concatenate([np.zeros(0, np.int64), *(piece.reshape(-1) for piece in found)])
    if len(ids) != sum(num_tokens):
        raise ValueError(
            f"the network computed logits at {len(ids)} positions, but {sum(num_tokens)} tokens are scored"
        )
    return np.split(ids, np.cumsum(num_tokens)[:-1])
