"""Find samples that leak between splits: identical chats, and media with near-duplicate frames.

Every held-out sample is compared with all training samples, and every test sample with all validation samples.
"""

from dataclasses import dataclass

import numpy as np

from pipeline_steps.common.errors import UserError, listing
from pipeline_steps.common.files import write_jsonl
from pipeline_steps.common.schemas import SPLITS
from pipeline_steps.shards.hashes import NUM_FRAMES, WORDS

BANDS = WORDS * 4  # bands of 16 bits per hash
MAX_DISTANCE = 2 * BANDS - 1  # largest distance for which some band differs by at most one bit
CHUNK = 2**20  # pairs compared at a time
MAX_LISTED = 20  # pairs shown in the terminal
TRAIN, VALIDATION, TEST = range(len(SPLITS))


@dataclass(frozen=True)
class Leak:
    """Two samples as (split, key), and why they count as the same."""

    held_out: tuple
    other: tuple
    reason: str


def text_leaks(index, splits):
    """Return a Leak for every held-out chat with an item in train, and every test chat with one in validation."""
    rows, texts = index.text_rows, index.texts
    names, text_of = np.unique(texts, return_inverse=True)
    first = np.full((len(names), len(SPLITS)), len(index))  # first row of each text in each split
    np.minimum.at(first, (text_of, splits[rows]), rows)
    leaks = []
    for split, other in ((TEST, TRAIN), (VALIDATION, TRAIN), (TEST, VALIDATION)):
        found = np.flatnonzero((splits[rows] == split) & (first[text_of, other] < len(index)))
        for row, text in dict(zip(rows[found].tolist(), text_of[found].tolist(), strict=True)).items():
            pair = (_name(index, splits, row), _name(index, splits, first[text, other]))
            leaks.append(Leak(*pair, reason="the same question and answer"))
    return leaks


def _name(index, splits, row):
    return SPLITS[splits[row]], index.read_row(int(row)).key


def frame_leaks(files, max_distance):
    """Return a Leak for every held-out sample with a near-duplicate. files: {split: [packed/.../NAME.npz]}."""
    hashes = {split: _load(paths) for split, paths in files.items()}
    leaks = []
    for split, other in (("test", "train"), ("validation", "train"), ("test", "validation")):
        nearest, distances = near_duplicates(hashes[split], hashes[other], max_distance)
        found = np.flatnonzero(nearest >= 0)
        pairs = zip(_keys(files[split], found), _keys(files[other], nearest[found]), distances[found], strict=True)
        for key, other_key, distance in pairs:
            reason = f"near-duplicate frames: {distance} of {NUM_FRAMES * WORDS * 64} bits differ"
            leaks.append(Leak((split, key), (other, other_key), reason))
    return leaks


def _load(paths):
    parts = [np.load(path)["hashes"] for path in paths]
    return np.concatenate([np.empty((0, NUM_FRAMES, WORDS), np.uint64), *parts])


def _keys(paths, rows):
    """Return the keys at these rows of the concatenated files."""
    if not len(rows):
        return []
    stops = np.cumsum([len(np.load(path)["keys"]) for path in paths])
    cached = {i: np.load(paths[i])["keys"] for i in set(np.searchsorted(stops, rows, side="right").tolist())}
    places = [(int(np.searchsorted(stops, row, side="right")), int(row)) for row in rows]
    return [cached[i][row - int(stops[i])].decode() for i, row in places]  # negative index, from the end of the file


def near_duplicates(queries, references, max_distance):
    """Find the nearest near-duplicate in `references` [R, frames, words] for each of `queries` [Q, frames, words].

    Returns (row in references or -1, number of differing bits over all frames), both [Q]. Two samples are
    near-duplicates if more than half of the frames with contrast in both differ by at most `max_distance` bits.

    The search is exact: hashes are looked up by bands of 16 bits. If two hashes differ by fewer than 32 bits, at least
    one of their 16 bands differs by at most one bit, so only pairs with such a band are compared, which is far fewer
    than Q * R. Raises ValueError if max_distance exceeds MAX_DISTANCE.
    """
    if max_distance > MAX_DISTANCE:
        raise ValueError(f"max_distance is {max_distance}, expected at most {MAX_DISTANCE}")
    nearest = np.full(len(queries), -1)
    distances = np.full(len(queries), NUM_FRAMES * WORDS * 64 + 1)
    for frame in range(NUM_FRAMES):
        for q, r in _candidates(queries[:, frame], references[:, frame], max_distance):
            bits = np.bitwise_count(queries[q] ^ references[r]).sum(-1, dtype=np.int64)
            known = queries[q].any(-1) & references[r].any(-1)
            same = ((bits <= max_distance) & known).sum(1) * 2 > known.sum(1)
            q, r, total = q[same], r[same], bits[same].sum(1)
            order = np.lexsort((r, total, q))  # each query's first row is its nearest
            q, first = np.unique(q[order], return_index=True)
            r, total = r[order][first], total[order][first]
            better = (total < distances[q]) | ((total == distances[q]) & (r < nearest[q]))
            nearest[q[better]], distances[q[better]] = r[better], total[better]
    return nearest, distances


def _candidates(queries, references, max_distance):
    """Yield chunks (q, r) of indices of hashes [., words] with contrast that differ by at most max_distance bits."""
    known_queries, known = np.flatnonzero(queries.any(1)), np.flatnonzero(references.any(1))
    query_bands, bands = (hashes.view(np.uint16) for hashes in (queries[known_queries], references[known]))
    masks = np.uint16(1) << np.arange(16, dtype=np.uint16) if max_distance >= BANDS else []
    for band in range(BANDS):
        values = np.ascontiguousarray(bands[:, band])
        order = known[np.argsort(values, kind="stable")]
        ends = np.concatenate([[0], np.cumsum(np.bincount(values, minlength=2**16))])
        for mask in (np.uint16(0), *masks):
            wanted = (query_bands[:, band] ^ mask).astype(np.int64)
            for q, places in _ranges(ends[wanted], ends[wanted + 1]):
                q, r = known_queries[q], order[places]
                close = np.bitwise_count(queries[q] ^ references[r]).sum(1, dtype=np.int64) <= max_distance
                if close.any():
                    yield q[close], r[close]


def _ranges(starts, stops):
    """Yield chunks (i, place) of about CHUNK pairs, for every place in range(starts[i], stops[i])."""
    ends = np.cumsum(stops - starts)
    begin = 0
    while begin < len(starts):
        done = ends[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, done + CHUNK, side="right")))
        counts = (stops - starts)[begin:end]
        i = np.repeat(np.arange(begin, end), counts)
        yield i, np.arange(len(i)) + np.repeat(starts[begin:end] - (ends[begin:end] - counts - done), counts)
        begin = end


def check(leaks, index, path):
    """Raise UserError if there are leaks, and write all of them to `path`. index: of the samples, for their files."""
    if not leaks:
        path.unlink(missing_ok=True)
        return
    paths = index.paths({key for leak in leaks for _, key in (leak.held_out, leak.other)})
    rows = [
        {"split": a.held_out[0], "key": a.held_out[1], "path": paths[a.held_out[1]]}
        | {"other_split": a.other[0], "other_key": a.other[1], "other_path": paths[a.other[1]], "reason": a.reason}
        for a in leaks
    ]
    write_jsonl(path, rows)
    lines = []
    for leak in leaks[:MAX_LISTED]:
        pair = (f"'{key}' ({split}, {paths[key] or 'text-only'})" for split, key in (leak.held_out, leak.other))
        lines.append(f"{' and '.join(pair)}: {leak.reason}")
    raise UserError(
        f"{len(leaks)} held-out samples also occur in another split, which invalidates the evaluation.\n"
        f"{listing(lines, len(leaks))}\n"
        f"Full list: {path}. Give both samples of a pair the same video_id or split, or remove one; "
        "shards.max_hash_distance: null disables this check."
    )
