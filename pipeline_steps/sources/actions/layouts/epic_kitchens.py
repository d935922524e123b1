"""EPIC-KITCHENS-100: 90,000 actions in long recordings of 37 participants; every sample is a segment of a recording.

EPIC_100_train.csv, EPIC_100_validation.csv            start_timestamp, stop_timestamp, verb_class, noun_class, ...
EPIC_100_verb_classes.csv, EPIC_100_noun_classes.csv   id, key
in the folder or in one directly in it, such as epic-kitchens-100-annotations;
{participant}/videos/{video}.MP4                       in the folder or in its folder EPIC-KITCHENS
The action is the keys of verb and noun: `turn-on` and `board:chopping` become `turn on chopping board`. The test list
has no labels and is not read.
"""

import re
from pathlib import Path

from pipeline_steps.common.errors import UserError
from pipeline_steps.sources.actions.listing import Clip, Listing, find_file, read_csv, video_files

COLUMNS = ("narration_id", "participant_id", "video_id", "start_timestamp", "stop_timestamp", "verb_class")
COLUMNS += ("noun_class",)
TIMESTAMP = re.compile(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)")


def read(root, entry):
    where = f"sources.actions '{entry.name}'"
    verbs = _classes(find_file(root, ("EPIC_100_verb_classes.csv",), where))
    nouns = _classes(find_file(root, ("EPIC_100_noun_classes.csv",), where))
    videos = root / "EPIC-KITCHENS" if (root / "EPIC-KITCHENS").is_dir() else root
    present = {path for path in video_files(videos) if path.parent.name == "videos"}
    clips = []
    for split in ("train", "validation"):
        path = find_file(root, (f"EPIC_100_{split}.csv",), where)
        clips += [_clip(place, row, split, videos, present, verbs, nouns) for place, row in read_csv(path, COLUMNS)]
    return Listing(clips, tuple(sorted({clip.label for clip in clips})), present)


def _classes(path: Path) -> tuple[Path, dict[str, str]]:
    """Return the path and {id: key in natural words}."""
    words = {}
    for where, row in read_csv(path, ("id", "key")):
        if row["id"] in words:
            raise UserError(f"{where}: the id {row['id']} occurs twice. Remove one line.")
        words[row["id"]] = " ".join(reversed(row["key"].split(":"))).replace("-", " ")
    return path, words


def _clip(where, row, split, videos, present, verbs, nouns) -> Clip:
    participant, video = row["participant_id"], row["video_id"]
    if not re.fullmatch(rf"{re.escape(participant)}_\w+", video):
        raise UserError(f"{where}: participant_id is {participant!r}, but video_id is {video!r}. Correct the line.")
    path = videos / participant / "videos" / f"{video}.MP4"
    if path not in present and path.with_suffix(".mp4") in present:
        path = path.with_suffix(".mp4")
    return Clip(
        name=row["narration_id"],
        label=f"{_word(where, row, 'verb_class', verbs)} {_word(where, row, 'noun_class', nouns)}",
        split=split,
        group=f"epic_kitchens-{video}",
        path=path,
        where=where,
        segment=(_seconds(where, row, "start_timestamp"), _seconds(where, row, "stop_timestamp")),
    )


def _word(where, row, name, classes) -> str:
    path, words = classes
    if row[name] not in words:
        raise UserError(f"{where}: {name} is {row[name]}, but {path} has no such id. Use files of one version.")
    return words[row[name]]


def _seconds(where, row, name) -> float:
    match = TIMESTAMP.fullmatch(row[name])
    if match is None:
        raise UserError(f"{where}: {name} is {row[name]!r}, expected hours:minutes:seconds, such as 00:01:02.50.")
    return round(int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3]), 3)
