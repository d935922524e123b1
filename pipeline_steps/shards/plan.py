"""Assign samples to splits and shards before any media are decoded.

Samples that share a video_id, the content of a non-empty file or (for text-only chats) a question with its answer form
a *group*. A group is never divided between splits, except for equal chats whose given splits differ.
"""

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.schemas import SPLITS
from pipeline_steps.shards.index import NO_BYTES, UNDECIDED

HASH_BITS = 48  # of Index.order


def plan_shards(index, splits, samples_per_shard):
    """Return {(split, shard): rows in the index, at most samples_per_shard}, in the order of the published shards.

    The samples of a split are sorted by hash, so every shard is a mixture. A shard holds the samples whose hash starts
    with the bits in its name: `p` holds all; if these are too many, `p0` and `p1` hold half each, and so on. Adding or
    removing a sample therefore changes, splits or merges only its own shard.
    """
    plan = {}
    for code, split in enumerate(SPLITS):
        rows = np.flatnonzero(splits == code)
        rows = rows[np.argsort(index.order[rows], kind="stable")]
        for name, start, stop in buckets(index.order[rows], samples_per_shard):
            plan[split, name] = rows[start:stop]
    return plan


def buckets(order, max_size):
    """Yield (name, start, stop) of every non-empty bucket. `order`: sorted hashes of HASH_BITS bits."""
    todo = [("p", 0, len(order))]
    while todo:
        name, start, stop = todo.pop()
        depth = len(name) - 1
        if stop - start <= max_size or depth == HASH_BITS:
            if stop > start:
                yield name, start, stop
            continue
        bit = np.uint64(1) << np.uint64(HASH_BITS - 1 - depth)
        middle = start + int(np.count_nonzero(order[start:stop] & bit == 0))
        todo += [(f"{name}1", middle, stop), (f"{name}0", start, middle)]


def assign_splits(index, validation_share, test_share):
    """Return the split of every row, int8 [N] indices into SPLITS: the given one, else chosen by the group's hash.

    Raises UserError if samples with the same media were given different splits.
    """
    groups = _groups(index)
    splits = _given(index, groups)
    undecided = np.flatnonzero(splits == UNDECIDED)
    order, sources = _hashes_and_sources(index, groups, len(splits))
    for source in np.unique(sources[undecided]):
        members = undecided[sources[undecided] == source]
        numbers = order[members] / 2**HASH_BITS
        chosen = np.full(len(members), SPLITS.index("train"), np.int8)
        chosen[numbers < test_share + validation_share] = SPLITS.index("validation")
        chosen[numbers < test_share] = SPLITS.index("test")
        _fill_empty_splits(chosen, numbers, validation_share, test_share)
        splits[members] = chosen
    return splits[groups]


def _groups(index):
    """Return the group of every row, numbered from 0. Raises UserError if equal media were given two splits."""
    media = index.rows_with_content()
    by_media = _components(index, media, index.contents[media])
    _refuse_two_splits(index, by_media)
    rows = np.concatenate([media, index.text_rows])
    by_text = _components(index, rows, np.concatenate([index.contents[media], index.texts]))
    torn = _num_given(index, by_text) > 1  # equal chats in two given splits; text_leaks reports them
    return np.unique(np.where(torn[by_text], by_media + len(torn), by_text), return_inverse=True)[1]


def _components(index, rows, contents):
    """Join rows that share a video_id or, among the given rows, `contents`. Returns each row's group number."""
    videos, video_of = np.unique(index.videos, return_inverse=True)
    names, content_of = np.unique(contents, return_inverse=True)
    size = len(videos) + len(names)
    edges = (np.ones(len(rows), bool), (video_of[rows], content_of + len(videos)))
    return connected_components(coo_array(edges, shape=(size, size)), directed=False)[1][video_of]


def _num_given(index, groups):
    """Return the number of distinct given splits of each group."""
    found = np.zeros((groups.max() + 1, len(SPLITS)), bool)
    given = index.splits != UNDECIDED
    found[groups[given], index.splits[given]] = True
    return found.sum(1)


def _given(index, groups):
    """Return the given split of every group, or UNDECIDED."""
    splits = np.full(groups.max() + 1, UNDECIDED, np.int8)
    np.maximum.at(splits, groups, index.splits)
    return splits


def _hashes_and_sources(index, groups, num_groups):
    """Return the hash of each group's alphabetically first video_id, and the source of its first row."""
    first = np.full(num_groups, len(index))
    np.minimum.at(first, groups, np.arange(len(index)))
    order = index.video_order[first]
    many = np.flatnonzero(index.videos != index.videos[first][groups])  # rows of groups with several video_ids
    names = {}
    for row in np.flatnonzero(np.isin(groups, groups[many])) if len(many) else ():
        video_id, group = index.read_row(row).video_id, int(groups[row])
        if group not in names or video_id < names[group]:
            names[group] = video_id
            order[group] = index.video_order[row]
    return order, index.sources[first]


def _fill_empty_splits(chosen, numbers, validation_share, test_share):
    """In small sets, give train, test and validation (in this order) at least one group each, if there are enough."""
    asked = {"train": 1.0, "test": test_share, "validation": validation_share}
    needed = [SPLITS.index(split) for split, share in asked.items() if share > 0][: len(chosen)]
    for split in needed:
        if (chosen == split).any():
            continue
        spare = [np.count_nonzero(chosen == code) - (code in needed) for code in range(len(SPLITS))]
        donors = np.flatnonzero(chosen == int(np.argmax(spare)))
        chosen[donors[np.argmin(numbers[donors])]] = split


def _refuse_two_splits(index, groups):
    torn = np.flatnonzero(_num_given(index, groups) > 1)
    if not len(torn):
        return
    rows = np.flatnonzero((groups == torn[0]) & (index.splits != UNDECIDED))
    one, other = (index.read_row(row) for row in (rows[0], rows[index.splits[rows] != index.splits[rows[0]]][0]))
    same, step = "the same video, by the files or video_ids of further samples", "Give all the same split"
    if one.sha256 == other.sha256 and one.sha256 not in (None, NO_BYTES):
        same, step = f"the same content (sha256 {one.sha256[:12]}...)", "Give both the same split, or remove one"
    elif one.video_id == other.video_id:
        same = f"the same video (video_id '{one.video_id}')"
        step = "Give both the same split, remove one or, if they are different videos, give them different video_ids"
    names = (f"'{sample.key}' (split {sample.split}, {sample.path or 'text-only'})" for sample in (one, other))
    raise UserError(f"samples {' and '.join(names)} hold {same}, which invalidates the evaluation. {step}.")
