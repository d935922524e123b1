"""Something-Something v2: 220,847 clips of 174 templates, such as `Putting [something] onto [something]`.

20bn-something-something-v2/{id}.webm
labels/train.json, validation.json   [{id, label, template, placeholders}]; the template, without brackets, is the label
labels/test.json                     [{id}]
labels/test-answers.csv              `{id};{template without brackets}`, optional; without it the test list is not read
labels/labels.json                   {template without brackets: number}
The JSON files may also be called something-something-v2-train.json and so on, as in the first release.
"""

from pathlib import Path

from pipeline_steps.common.errors import UserError
from pipeline_steps.sources.actions.listing import (
    Clip,
    Listing,
    check_rows,
    find_file,
    find_files,
    find_folder,
    read_json,
    read_lines,
    video_files,
)

FOLDER = "20bn-something-something-v2"


def read(root, entry):
    where = f"sources.actions '{entry.name}'"
    videos = find_folder(root, FOLDER, where)
    label_file = _find(root, "labels", where)
    labels = read_json(label_file)
    if not isinstance(labels, dict) or not labels:
        raise UserError(f"{label_file}: expected {{template: number}}, found {str(labels)[:60]}. Download it again.")
    clips = []
    for split in ("train", "validation"):
        path = _find(root, split, where)
        for place, video, row in _entries(path, ("id", "template")):
            clips.append(_clip(place, video, row["template"], split, videos, label_file, labels))
    answers = find_files(root, ("test-answers.csv",))
    if answers:
        clips += _test_clips(_find(root, "test", where), answers[0], videos, label_file, labels)
    return Listing(clips, tuple(sorted(labels)), set(video_files(videos)))


def _find(root: Path, name: str, where: str) -> Path:
    return find_file(root, (f"{name}.json", f"something-something-v2-{name}.json"), where)


def _entries(path: Path, required: tuple[str, ...]):
    """Yield (place for messages, id, entry) of a list of objects."""
    content = read_json(path)
    if not isinstance(content, list):
        raise UserError(f"{path}: expected a list of objects, found {str(content)[:60]}. Download the file again.")
    for number, row in enumerate(check_rows(path, content), 1):
        place = f"{path} entry {number}"
        if not isinstance(row, dict):
            raise UserError(f"{place}: expected an object, found {str(row)[:60]!r}. Download the file again.")
        for name in required:
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise UserError(
                    f"{place}: {name} is {row.get(name)!r}, expected text; its keys are {', '.join(map(str, row))}. "
                    "Check that this is the data set's own file."
                )
        if not row["id"].isdigit():
            raise UserError(f"{place}: id is {row['id'][:60]!r}, expected digits.")
        yield f"{place} (id {row['id']})", row["id"], row


def _clip(where, video, template, split, videos, label_file, labels) -> Clip:
    label = template.replace("[", "").replace("]", "").strip()
    if label not in labels:
        raise UserError(
            f"{where}: the template {template!r} is, without brackets, none of the {len(labels)} labels in "
            f"{label_file}, such as {next(iter(labels))!r}. Use files of one version."
        )
    path = videos / f"{video}.webm"
    return Clip(name=video, label=label, split=split, group=f"ssv2-{video}", path=path, where=where)


def _test_clips(path, answer_file, videos, label_file, labels) -> list[Clip]:
    answers = {}
    for number, line in read_lines(answer_file):
        video, separator, template = line.partition(";")
        where = f"{answer_file} line {number}"
        if not separator or not video.strip().isdigit():
            raise UserError(f"{where}: found {line[:60]!r}, expected `ID;TEMPLATE`.")
        if answers.setdefault(video.strip(), (where, template))[0] != where:
            raise UserError(f"{where}: the id {video} occurs twice. Remove one line.")
    clips = []
    for place, video, _ in _entries(path, ("id",)):
        if video not in answers:
            raise UserError(f"{place}: {answer_file} has no answer for it. Use files of one version.")
        where, template = answers[video]
        clips.append(_clip(where, video, template, "test", videos, label_file, labels))
    unknown = sorted(answers.keys() - {clip.name for clip in clips})
    if unknown:
        raise UserError(f"{answers[unknown[0]][0]}: the id {unknown[0]} is not in {path}. Use files of one version.")
    return clips
