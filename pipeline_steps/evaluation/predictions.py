"""The most likely token at every scored position, without a second forward pass.

The network computes logits only at labelled positions, in order; a forward hook on `lm_head` records them.
"""

from contextlib import contextmanager

import numpy as np


@contextmanager
def predicted_tokens(model):
    """Yields a list that collects the predicted token ids (int64 arrays) of forward passes with labels."""
    found = []
    head = model.language_model.lm_head
    hook = head.register_forward_hook(lambda _, inputs, logits: found.append(logits.argmax(-1).cpu().numpy()))
    try:
        yield found
    finally:
        hook.remove()


def by_item(found, num_tokens):
    """The ids of one batch split into one array per item, of num_tokens[i] ids. ValueError if the number of
    recorded positions differs from their sum."""
    ids = np.concatenate([np.zeros(0, np.int64), *(piece.reshape(-1) for piece in found)])
    if len(ids) != sum(num_tokens):
        raise ValueError(
            f"the network computed logits at {len(ids)} positions, but {sum(num_tokens)} tokens are scored"
        )
    return np.split(ids, np.cumsum(num_tokens)[:-1])
