"""Which sample goes into which split and shard, decided before anything is decoded.

Samples that share a video_id or the content of their file are one *group*: a group never ends up in two splits.
"""

import hashlib

from pipeline_steps.params import UserError
from pipeline_steps.records import SPLITS


def plan_shards(samples, validation_share, test_share, seed, samples_per_shard):
    """{(split, shard name): [samples, their split set]}. Samples are in hashed order: every shard is a mixture."""
    splits = assign_splits(samples, validation_share, test_share, seed)
    plan = {}
    for split in SPLITS:
        members = [s.model_copy(update={"split": split}) for s in samples if splits[s.key] == split]
        members.sort(key=lambda sample: uniform(seed, sample.key))
        for start in range(0, len(members), samples_per_shard):
            plan[split, f"{start // samples_per_shard:06d}"] = members[start : start + samples_per_shard]
    return plan


def assign_splits(samples, validation_share, test_share, seed):
    """{key: split}: the given split, else by the hash of the group. UserError if one group has two given splits."""
    splits, undecided = {}, {}
    for name, group in group_samples(samples).items():
        given = {sample.split: sample for sample in group if sample.split is not None}
        if len(given) > 1:
            _refuse(*list(given.values())[:2])
        if given:
            splits.update({sample.key: next(iter(given)) for sample in group})
        else:
            undecided.setdefault(group[0].source, {})[name] = group
    for groups in undecided.values():
        chosen = {name: _by_share(uniform(seed, name), validation_share, test_share) for name in groups}
        _fill_empty_splits(chosen, validation_share, test_share, seed)
        splits.update({sample.key: chosen[name] for name, group in groups.items() for sample in group})
    return splits


def group_samples(samples):
    """{name: samples}, joined by video_id and by sha256; the name is the alphabetically first video_id."""
    parent = {}

    def root(node):
        while parent.setdefault(node, node) != node:
            parent[node] = parent[parent[node]]  # halves the path for the next one
            node = parent[node]
        return node

    for sample in samples:
        if sample.sha256 is not None:
            parent[root(("sha256", sample.sha256))] = root(("video_id", sample.video_id))
    groups = {}
    for sample in samples:
        groups.setdefault(root(("video_id", sample.video_id)), []).append(sample)
    return {min(sample.video_id for sample in group): group for group in groups.values()}


def uniform(seed, name):
    """A number in [0, 1) that depends on nothing but the two arguments."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:6]) / 2**48


def _by_share(number, validation_share, test_share):
    if number < test_share:
        return "test"
    return "validation" if number < test_share + validation_share else "train"


def _fill_empty_splits(chosen, validation_share, test_share, seed):
    """Small sets: train, test and validation get at least one group each, in this order, as far as the groups go."""
    asked = {"train": 1.0, "test": test_share, "validation": validation_share}
    needed = [split for split, share in asked.items() if share > 0][: len(chosen)]
    for split in needed:
        if split in chosen.values():
            continue
        spare = {s: list(chosen.values()).count(s) - (s in needed) for s in SPLITS}
        donor = max(SPLITS, key=spare.__getitem__)
        moved = min((name for name in chosen if chosen[name] == donor), key=lambda name: uniform(seed, name))
        chosen[moved] = split


def _refuse(one, other):
    same = f"the same content (sha256 {one.sha256[:12]}...)" if one.sha256 == other.sha256 else "one and the same video"
    raise UserError(
        f"samples '{one.key}' (split {one.split}) and '{other.key}' (split {other.split}) hold {same}: what is "
        "trained on would be tested on. Give both the same split, or remove one of them."
    )
