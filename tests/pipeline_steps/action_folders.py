"""Small folders in the published structure of action recognition data sets, for the source `actions`.

Each function writes one and returns the fields of its entry in sources.actions that differ from ENTRY.
"""

import json

import numpy as np

from pipeline_steps.common.params import ROOT, parse
from pipeline_steps.common.schemas import read_samples
from pipeline_steps.sources import schema
from pipeline_steps.sources.__main__ import collect
from tests.pipeline_steps.clips import grey_frames, write_clip

FPS = 4
ENTRY = {"fold": None, "validation_share": 0.25, "num_options": None, "seed": 1, "max_quarantined": 0.0}
ENTRY |= {"max_samples": {"train": None, "validation": None, "test": None}}


def clip(path, seed, codec="libx264"):
    """One second of a moving random pattern that differs by seed."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 255, (FPS, 4, 4, 3)).astype(np.uint8)
    write_clip(path, list(coarse.repeat(16, 1).repeat(16, 2)), fps=FPS, codec=codec)


def write_lines(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def section(*entries):
    values = parse("params.yaml", (ROOT / "params.yaml").read_text())["sources"]
    values |= {"collect": ["actions"], "actions": list(entries)}
    return schema.Section.model_validate_json(json.dumps(values))


def entry(values, **changes):
    return ENTRY | values | changes


def collected(values, output):
    """(samples by key, [(file name, reason)] of the quarantined ones, summary) of one entry, through the stage."""
    summary = collect(section(values), output)
    rows = [json.loads(line) for line in (output / "quarantined.jsonl").read_text().splitlines()]
    samples = {sample.key: sample for sample in read_samples(output / "index.jsonl")}
    return samples, [(row["path"].rsplit("/", 1)[1], row["reason"]) for row in rows], summary["sources"][values["name"]]


def ucf101(root, media=True):
    """Three classes; in training groups 8 (two clips) and 9, in testing group 1. The last line ends as on Windows."""
    classes = {"ApplyEyeMakeup": 1, "Archery": 2, "HandstandPushups": 3}
    train, test = [], []
    for name, number in classes.items():
        stem = f"{name}/v_{'HandStandPushups' if number == 3 else name}"  # as published
        train += [f"{stem}_{clip}.avi {number}" for clip in ("g08_c01", "g08_c02", "g09_c01")]
        test.append(f"{stem}_g01_c01.avi")
    lists = root / "ucfTrainTestlist"
    write_lines(lists / "classInd.txt", *(f"{number} {name}" for name, number in classes.items()))
    write_lines(lists / "trainlist01.txt", *train[:-1], f"{train[-1]}\r")
    write_lines(lists / "testlist01.txt", *test)
    if media:
        for number, line in enumerate(train + test):
            clip(root / "UCF-101" / line.split()[0], number, codec="mpeg4")
    return {"layout": "ucf101", "path": str(root), "name": "ucf101", "fold": 1}


SSV2 = {
    "Holding something next to something": "0",
    "Pushing something from left to right": "1",
    "Putting something onto something": "2",
}
TEST_ANSWERS = {"Holding something next to something": 0, "Pushing something from left to right": 1}
SSV2_TEMPLATES = [
    "Holding [something] next to [something]",
    "Pushing [something] from left to right",
    "Putting [something] onto [something]",
]


def something_something_v2(root, media=True):
    """Videos 1 to 3 in training, 4 and 5 in validation, 6 and 7 in testing, with answers."""
    rows = [
        {"id": str(n), "label": f"thing {n}", "template": SSV2_TEMPLATES[n % 3], "placeholders": ["a cup"]}
        for n in range(1, 6)
    ]
    labels = root / "labels"
    labels.mkdir(parents=True, exist_ok=True)
    (labels / "labels.json").write_text(json.dumps(SSV2))
    (labels / "train.json").write_text(json.dumps(rows[:3]))
    (labels / "validation.json").write_text(json.dumps(rows[3:]))
    (labels / "test.json").write_text(json.dumps([{"id": "6"}, {"id": "7"}]))
    write_lines(labels / "test-answers.csv", *(f"{6 + number};{label}" for label, number in TEST_ANSWERS.items()))
    if media:
        for number in range(1, 8):
            clip(root / f"20bn-something-something-v2/{number}.webm", 100 + number, codec="libvpx-vp9")
    return {"layout": "something_something_v2", "path": str(root), "name": "ssv2"}


KINETICS_HEAD = "label,youtube_id,time_start,time_end,split,is_cc"


def kinetics(root, media=True):
    """Four training clips in folders of their labels, two validation clips without; a test list without labels."""
    train = ["abseiling,-AAAAAAAAA1,10,20,train,0", "air drumming,AAAAAAAAA_2,0,10,train,0"]
    train += ['"passing American football (in game)",AAAAAAAAAA3,7,17,train,0', "air drumming,AAAAAAAAAA4,5,15,train,0"]
    validation = ["abseiling,AAAAAAAAAA5,59,69,val,0", "air drumming,AAAAAAAAAA6,1,11,val,0"]
    write_lines(root / "annotations/train.csv", KINETICS_HEAD, *train)
    write_lines(root / "annotations/val.csv", KINETICS_HEAD, *validation)
    write_lines(root / "annotations/test.csv", "youtube_id,time_start,time_end,split", "AAAAAAAAAA7,0,10,test")
    if media:
        names = ["train/abseiling/-AAAAAAAAA1_000010_000020", "train/air_drumming/AAAAAAAAA_2_000000_000010"]
        names += ["train/passing American football (in game)/AAAAAAAAAA3_000007_000017"]
        names += ["train/air drumming/AAAAAAAAAA4_5_15", "val/AAAAAAAAAA5_000059_000069"]
        names += ["val/AAAAAAAAAA6_000001_000011"]
        for number, name in enumerate(names):
            clip(root / f"{name}.mp4", 200 + number)
    return {"layout": "kinetics", "path": str(root), "name": "kinetics400"}


EPIC_HEAD = (
    "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,stop_frame,"
    "narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes"
)


def epic_row(number, video, start, stop, verb, noun):
    """One row of an annotation file; start and stop in seconds."""
    times = f"00:00:{start:05.2f},00:00:{start:05.2f},00:00:{stop:05.2f},{int(start * 60)},{int(stop * 60)}"
    names = f"do it,do,{verb},it,{noun},\"['it', 'board']\",\"[{noun}, 1]\""
    return f"{video}_{number},{video[:3]},{video},{times},{names}"


def epic_kitchens(root, media=True):
    """Recordings P01_01 (two segments) and P02_01 (one) in training, P02_03 (two) in validation, each of five seconds;
    frame i is as bright as `clips.index_of` tells."""
    notes = root / "epic-kitchens-100-annotations"
    write_lines(notes / "EPIC_100_verb_classes.csv", "id,key,instances,category", "0,take,\"['take']\",retrieve",
                "1,turn-on,\"['turn-on']\",switch")  # fmt: skip
    write_lines(notes / "EPIC_100_noun_classes.csv", "id,key,instances,category", "0,tap,\"['tap']\",appliances",
                "1,board:chopping,\"['board:chopping']\",crockery")  # fmt: skip
    write_lines(notes / "EPIC_100_train.csv", EPIC_HEAD, epic_row(0, "P01_01", 0.5, 1.5, 0, 1),
                epic_row(1, "P01_01", 3, 4.25, 1, 0), epic_row(0, "P02_01", 1, 2, 0, 0))  # fmt: skip
    write_lines(notes / "EPIC_100_validation.csv", EPIC_HEAD, epic_row(0, "P02_03", 0, 1, 1, 0),
                epic_row(1, "P02_03", 2, 3, 0, 1))  # fmt: skip
    if media:
        for number, video in enumerate(("P01_01", "P02_01", "P02_03")):
            path = root / f"EPIC-KITCHENS/{video[:3]}/videos/{video}.MP4"
            write_clip(path, grey_frames(5 * FPS, width=32 + 2 * number), fps=FPS)
    return {"layout": "epic_kitchens", "path": str(root), "name": "epic_kitchens"}


WRITERS = (ucf101, something_something_v2, kinetics, epic_kitchens)
