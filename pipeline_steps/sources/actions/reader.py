"""Source `actions`: local folders of action recognition data sets, in the layout in which they are published.

    sources.actions: [{layout: ucf101, path: /data/ucf101, name: ucf101, fold: 1, num_options: 5, ...}]

Every clip has the item `action`, a question whose answer is the action in words, and, with `num_options`, the item
`action_choice`, multiple choice between the action and others of the data set. The data set's own lists give the splits
(`with_splits`). Media are read in place; `layouts/` has one module per layout.
"""

import hashlib
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path

from pydantic import ValidationError

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.hashing import media_sha256
from pipeline_steps.common.schemas import SPLITS, Quarantined, RawSample, slug
from pipeline_steps.monitoring.progress import progress_bar
from pipeline_steps.sources.actions import layouts
from pipeline_steps.sources.actions.listing import Clip, Listing
from pipeline_steps.sources.index import MAX_LISTED

QUESTION = "What action does the video show?"
TASK, CHOICE_TASK = "action", "action_choice"


def read(
    entry, quarantined: list[Quarantined], add_unreferenced: Callable[[str, list[str], Counter], None]
) -> Iterator[RawSample]:
    """Yield the samples of one entry (schema.Actions), split by split, and fill `quarantined`.

    add_unreferenced: called with the source, the first names and the number by reason of videos that no list names.
    Raises UserError, with file and line, for annotations that are invalid or contradict each other.
    """
    root = _root(entry)
    listing = import_module(f"{layouts.__name__}.{entry.layout}").read(root, entry)
    _check_options(entry, listing)
    _report_unreferenced(entry, listing, root, add_unreferenced)
    reader = _Reader(entry, listing.labels, quarantined)
    clips = with_splits(reader.without_leaks(reader.without_repetitions(listing.clips)), entry)
    clips = [clip for split in SPLITS for clip in selected(clips, split, entry)]
    for clip in progress_bar(f"reading {entry.name}", clips, unit="clip"):
        sample = reader.sample(clip)
        if sample is not None:
            yield sample


class _Reader:
    """Makes the samples of one entry, and quarantines clips."""

    def __init__(self, entry, labels: tuple[str, ...], quarantined: list[Quarantined]):
        self.entry, self.labels, self.quarantined = entry, labels, quarantined

    def without_repetitions(self, clips: list[Clip]) -> list[Clip]:
        """The clips without those that a line of the same split repeats. UserError if two lines disagree."""
        first: dict[str, Clip] = {}
        first_of_split: dict[tuple[str, str], Clip] = {}
        kept = []
        for clip in clips:
            other = first.setdefault(clip.name, clip)
            if other.label != clip.label:
                raise UserError(
                    f"{clip.where}: {clip.name} is {clip.label!r}, but {other.label!r} in {other.where}. Correct one."
                )
            same = first_of_split.setdefault((clip.name, clip.split), clip)
            if same is clip:  # in another split it is a leak, and reported as one
                kept.append(clip)
            else:
                self._reject(clip, f"listed twice: {same.where} and {clip.where}")
        return kept

    def without_leaks(self, clips: list[Clip]) -> list[Clip]:
        """The clips whose group is in no later split: of a group in two splits, the held-out clips are kept."""
        last: dict[str, Clip] = {}
        for clip in clips:
            other = last.setdefault(clip.group, clip)
            if SPLITS.index(clip.split) > SPLITS.index(other.split):
                last[clip.group] = clip
        kept = []
        for clip in clips:
            other = last[clip.group]
            if clip.split == other.split:
                kept.append(clip)
            else:
                self._reject(clip, f"in {clip.where}, but {other.where} holds out the same video ({clip.group})")
        return kept

    def sample(self, clip: Clip) -> RawSample | None:
        """The raw sample, or None if its file is missing or the record is invalid."""
        if clip.problem is not None:
            return self._reject(clip, clip.problem)
        try:
            sha256, size = _describe(clip.path)
        except FileNotFoundError:
            return self._reject(clip, f"missing media, named in {clip.where}")
        except OSError as error:
            return self._reject(clip, f"cannot be read ({error.strerror})")
        key = _key(self.entry, clip)
        try:
            return RawSample(
                key=key,
                source=self.entry.name,
                split=clip.split,
                video_id=clip.group,
                path=str(clip.path),
                kind="video",
                sha256=sha256,
                size=size,
                segment=clip.segment,
                items=_items(clip.label, self.labels, self.entry, key),
            )
        except ValidationError as error:
            return self._reject(clip, f"{clip.where}: {error.errors()[0]['msg']}"[:300])

    def _reject(self, clip: Clip, reason: str) -> None:
        row = Quarantined(key=_key(self.entry, clip), source=self.entry.name, path=str(clip.path), reason=reason)
        self.quarantined.append(row)


def with_splits(clips: list[Clip], entry) -> list[Clip]:
    """The clips with this pipeline's splits, which are those of the data set's lists if there is a labelled test list.

    Otherwise, validation clips become test clips. Without validation clips, the share `validation_share` of the groups
    of the training clips, chosen by `seed`, becomes the validation split: at least one group, and never all.
    """
    lists = {clip.split for clip in clips}
    if "test" not in lists and "validation" in lists:
        print(f"{entry.name}: no labelled test list, so its validation list is the split test")
        clips = [replace(clip, split="test") if clip.split == "validation" else clip for clip in clips]
    elif "validation" in lists:
        return clips
    groups = {clip.group for clip in clips if clip.split == "train"}
    number = min(max(1, round(entry.validation_share * len(groups))), len(groups) - 1)
    if number < 1 or not entry.validation_share:
        return clips
    carved = {*sorted(groups, key=lambda group: (_rank(entry, "validation", group), group))[:number]}
    print(f"{entry.name}: {number} of {len(groups)} groups of its training list are the split validation")
    return [
        replace(clip, split="validation") if clip.split == "train" and clip.group in carved else clip for clip in clips
    ]


def selected(clips: list[Clip], split: str, entry) -> list[Clip]:
    """At most `max_samples` clips of the split, chosen by `seed`; a larger number keeps the smaller choice."""
    own, limit = [clip for clip in clips if clip.split == split], getattr(entry.max_samples, split)
    if limit is None or len(own) <= limit:
        return own
    return sorted(own, key=lambda clip: (_rank(entry, "max_samples", clip.name), clip.name))[:limit]


def _root(entry) -> Path:
    root = Path(os.path.abspath(Path(entry.path).expanduser()))
    if not root.is_dir():
        problem = "is a file, not a folder" if root.exists() else "does not exist"
        raise UserError(f"sources.actions '{entry.name}': path {root} {problem}. Set it to the data set's folder.")
    return root


def _check_options(entry, listing: Listing) -> None:
    if entry.num_options is not None and entry.num_options > len(listing.labels):
        raise UserError(
            f"sources.actions '{entry.name}': num_options is {entry.num_options}, but the data set has "
            f"{len(listing.labels)} actions. Lower it, or set it to null."
        )


def _report_unreferenced(entry, listing: Listing, root: Path, add_unreferenced) -> None:
    names = sorted(str(path.relative_to(root)) for path in listing.present - {clip.path for clip in listing.clips})
    add_unreferenced(entry.name, names[:MAX_LISTED], Counter({"in no list with labels": len(names)}))


@lru_cache(4096)  # segments of one long recording follow each other
def _describe(path: Path) -> tuple[str, int]:
    """Return (sha256, size in bytes) of a file."""
    return media_sha256(path), path.stat().st_size


def _items(label: str, labels: tuple[str, ...], entry, key: str) -> list[dict]:
    items = [{"user": QUESTION, "assistant": label, "task": TASK}]
    if entry.num_options is not None:
        generator = random.Random(f"{entry.seed} options {key}")
        options = generator.sample(labels, entry.num_options)
        if label not in options:
            options[generator.randrange(entry.num_options)] = label
        choice = {"options": options, "correct_option": options.index(label)}
        items.append({"user": QUESTION, **choice, "task": CHOICE_TASK})
    return items


def _key(entry, clip: Clip) -> str:
    return f"{entry.name}-{slug(clip.name)}"


def _rank(entry, what: str, name: str) -> int:
    """A pseudo-random number that depends on the seed, what it is for, and the name."""
    return int.from_bytes(hashlib.sha256(f"{entry.seed} {what} {name}".encode()).digest()[:8])
