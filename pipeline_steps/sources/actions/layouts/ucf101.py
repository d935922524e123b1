"""UCF-101: 13,320 clips of 101 actions, in 25 groups per action; the clips of a group come from one recording.

UCF-101/{Class}/v_{Class}_g{group}_c{clip}.avi
ucfTrainTestlist/classInd.txt       `{number} {Class}`
ucfTrainTestlist/trainlist0{n}.txt  `{Class}/{file} {number}`; n is the entry's `fold`
ucfTrainTestlist/testlist0{n}.txt   `{Class}/{file}`
"""

import re
from pathlib import Path

from pipeline_steps.common.errors import UserError
from pipeline_steps.sources.actions.listing import Clip, Listing, find_file, find_folder, read_lines, video_files

FILE = re.compile(r"v_(?P<action>[A-Za-z]+)_(?P<group>g\d+)_c\d+\.avi")


def read(root, entry):
    where = f"sources.actions '{entry.name}'"
    videos = find_folder(root, "UCF-101", where)
    class_list = find_file(root, ("classInd.txt",), where)
    numbers = _class_numbers(class_list)
    clips = []
    for split, name in (("train", f"trainlist{entry.fold:02d}.txt"), ("test", f"testlist{entry.fold:02d}.txt")):
        path = find_file(root, (name,), where)
        clips += [_clip(f"{path} line {n}", line, split, videos, class_list, numbers) for n, line in read_lines(path)]
    return Listing(clips, tuple(sorted(map(_words, numbers))), set(video_files(videos)))


def _class_numbers(path: Path) -> dict[str, int]:
    """Return {class: number} of classInd.txt."""
    found = {}
    for number, line in read_lines(path):
        match = re.fullmatch(r"(\d+)\s+([A-Za-z]+)", line)
        if match is None:
            raise UserError(f"{path} line {number}: found {line[:60]!r}, expected `NUMBER CLASS`, such as `1 Archery`.")
        if match[2] in found:
            raise UserError(f"{path} line {number}: the class {match[2]} occurs twice. Remove one line.")
        found[match[2]] = int(match[1])
    return found


def _clip(where, line, split, videos, class_list, numbers) -> Clip:
    name, _, number = line.partition(" ")
    folder, _, file = name.partition("/")
    match = FILE.fullmatch(file)
    if match is None:
        raise UserError(f"{where}: found {line[:80]!r}, expected `CLASS/v_CLASS_gNN_cNN.avi`.")
    if folder not in numbers:
        raise UserError(f"{where}: the class {folder} is not in {class_list}. Use lists of one version.")
    if match["action"].lower() != folder.lower():  # the published HandstandPushups/v_HandStandPushups_g01_c01.avi
        raise UserError(f"{where}: the folder is {folder}, but the file is one of {match['action']}. Correct the line.")
    if number.strip() and number.strip() != str(numbers[folder]):
        raise UserError(
            f"{where}: the number of {folder} is {number.strip()}, but {numbers[folder]} in {class_list}. Use lists of "
            "one version."
        )
    return Clip(
        name=file.removesuffix(".avi"),
        label=_words(folder),
        split=split,
        group=f"ucf101-{folder}_{match['group']}",
        path=videos / folder / file,
        where=where,
    )


def _words(name: str) -> str:
    """ApplyEyeMakeup -> apply eye makeup."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
