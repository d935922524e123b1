"""Kinetics-400, -600 and -700: clips of 10 s that were cut from YouTube videos.

train.csv, val.csv (validate, validation), test.csv, also as kinetics_400_train.csv and so on, in the folder or in one
directly in it, with the columns label, youtube_id, time_start, time_end, split. A test list without labels is not read;
lists may be absent.
{id}_{start}_{end}.mp4 (or another video format), start and end in seconds with six digits or as in the list, anywhere
in the folder: `{split}/{label}/...`, `{split}/...` or flat. Uncut videos are not cut here.
"""

import re
from pathlib import Path

from pipeline_steps.common.errors import UserError
from pipeline_steps.sources.actions.listing import Clip, Listing, csv_columns, find_files, read_csv, video_files

SPLITS = {"train": ("train",), "validation": ("val", "validate", "validation"), "test": ("test",)}
LIST = re.compile(r"(?:kinetics[-_]?\d*(?:[-_]2020)?[-_])?(?P<split>train|val|validate|validation|test)\.csv")
COLUMNS = ("label", "youtube_id", "time_start", "time_end")


def read(root, entry):
    where = f"sources.actions '{entry.name}'"
    lists = _lists(root, where)
    present = set(video_files(root))
    by_stem = {}
    for path in sorted(present):
        by_stem.setdefault(path.stem, []).append(path)
    rows = {split: read_csv(path, COLUMNS) for split, path in lists.items()}
    labels, reference = _labels(lists, rows)
    folders = {_plain(label): label for label in labels}
    clips = [_clip(place, row, split, root, by_stem, folders) for split, found in rows.items() for place, row in found]
    for place, row in (one for found in rows.values() for one in found):
        if row["label"] not in labels:
            raise UserError(
                f"{place}: the label {row['label']!r} is none of the {len(labels)} labels in {reference}. Use lists "
                "of one version."
            )
    return Listing(clips, tuple(sorted(labels)), present)


def _lists(root: Path, where: str) -> dict[str, Path]:
    """Return {split: its csv with labels}."""
    folders = [root, *sorted(entry for entry in root.iterdir() if entry.is_dir())]
    names = sorted({path.name for folder in folders for path in folder.glob("*.csv") if LIST.fullmatch(path.name)})
    found = {}
    for split, aliases in SPLITS.items():
        paths = find_files(root, tuple(name for name in names if LIST.fullmatch(name)["split"] in aliases))
        if len(paths) > 1:
            raise UserError(f"{where}: {paths[0]} and {paths[1]} are both lists of {split} clips. Keep one of them.")
        if paths and not (split == "test" and "label" not in csv_columns(paths[0])):
            found[split] = paths[0]
    if not found:
        raise UserError(
            f"{where}: no train.csv, val.csv or test.csv with labels in {root} or in a folder directly in it. Add the "
            "annotations, or set path to the folder that holds the data set."
        )
    return found


def _labels(lists, rows) -> tuple[set[str], Path]:
    """Return the labels of the first list (train, if it is there), and its path."""
    split = next(iter(lists))
    return {row["label"] for _, row in rows[split]}, lists[split]


def _clip(where, row, split, root, by_stem, folders) -> Clip:
    start, end = (_seconds(where, name, row[name]) for name in ("time_start", "time_end"))
    if row.get("split", split) not in SPLITS[split]:
        raise UserError(f"{where}: split is {row['split']!r}, but this is the list of {split} clips. Correct one.")
    video = row["youtube_id"]
    stems = dict.fromkeys((f"{video}_{start:06d}_{end:06d}", f"{video}_{start}_{end}"))
    paths = [path for stem in stems for path in by_stem.get(stem, ())]
    if len(paths) > 1:  # copies in the folders of other splits or labels
        paths = [path for path in paths if _is_of_split(path.relative_to(root), split)] or paths
        paths = [path for path in paths if _plain(path.parent.name) == _plain(row["label"])] or paths
    if paths:
        _check_folder(where, row["label"], paths[0], folders)
    return Clip(
        name=f"{video}_{start:06d}_{end:06d}",
        label=row["label"],
        split=split,
        group=video,
        path=paths[0] if paths else root / f"{next(iter(stems))}.mp4",
        where=where,
        problem=f"{paths[0]} and {paths[1]} have the same name" if len(paths) > 1 else None,
    )


def _seconds(where, name, value) -> int:
    if not re.fullmatch(r"\d{1,6}(\.0+)?", value):
        raise UserError(f"{where}: {name} is {value!r}, expected whole seconds.")
    return int(float(value))


def _is_of_split(path: Path, split: str) -> bool:
    """Whether a folder of the path names the split: `train`, `kinetics_400_val` ..."""
    words = {word for part in path.parts[:-1] for word in re.split("[-_ ]", part.lower())}
    return not words.isdisjoint(SPLITS[split])


def _check_folder(where, label, path, folders) -> None:
    """Raise UserError if the file is in the folder of another label."""
    other = folders.get(_plain(path.parent.name), label)
    if other != label:
        raise UserError(f"{where}: the label is {label!r}, but {path} is in the folder of {other!r}. Correct one.")


def _plain(label: str) -> str:
    return label.lower().replace("_", " ")
