"""Small local copies of the published data sets of source `hub`, in their own schemas, each with something damaged.

`write(name, folder)` writes one and returns the fields of its entry in sources.hub that are not the default ones.
"""

import csv
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from pipeline_steps.common import params
from pipeline_steps.common.params import ROOT
from pipeline_steps.common.schemas import read_samples
from pipeline_steps.sources import schema
from pipeline_steps.sources.__main__ import collect
from pipeline_steps.sources.hub import reader
from tests.pipeline_steps.clips import grey_frames, write_clip, write_image

NOTHING = "missing media"  # the reason of a row without its file


def png(grey, size=8):
    """A grey picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    PILImage.fromarray(np.full((size, size, 3), grey, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def embedded(grey):
    return {"bytes": png(grey), "path": f"{grey}.png"}


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_table(path, columns, features):
    """A parquet file as `datasets` publishes it: features in its metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(columns, features=Features(features)).to_parquet(path)


def clip(path):
    write_clip(path, grey_frames(4))


# ---------------------------------------------------------------- one function per data set


def openvid(folder):
    names = ("IIvwqskxtdE_0.mp4", "IIvwqskxtdE_1.mp4", "-_QcJGaOEhI_12_0to143.mp4", "gone_0.mp4", "blank_0.mp4")
    (folder / "data/train").mkdir(parents=True)
    with open(folder / "data/train/OpenVid-1M.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "caption", "aesthetic score", "motion score", "temporal consistency score"])
        writer.writerow([names[0], 'A "quoted", long caption\nof two lines.', 5.1, 2.5, 0.99])
        writer.writerow([names[1], "A second clip of the same video.", 4.9, 1.5, 0.98])
        writer.writerow([names[2], "A dog runs.", 4.5, 3.5, 0.97])
        writer.writerow([names[3], "A clip that was not downloaded.", 4.4, 3.0, 0.96])
        writer.writerow([names[4], "", 4.4, 3.0, 0.96])
    clip(folder / "clips/OpenVid_part0" / names[0])
    clip(folder / "clips/OpenVid_part0" / names[1])
    clip(folder / "clips" / names[2])
    return {"media_dir": str(folder / "clips")}


def webvid(folder):
    (folder / "media").mkdir(parents=True)
    with open(folder / "results_2M_train.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["videoid", "contentUrl", "duration", "page_dir", "name"])
        for number in (1001, 1002, 1003):
            url = f"https://videos.example/{number}.mp4"
            writer.writerow([number, url, "PT00H00M05S", "000001_000050", f"Footage {number}"])
    clip(folder / "media/000001_000050/1001.mp4")
    clip(folder / "media/1002.mp4")
    return {"path": str(folder / "results_2M_train.csv"), "media_dir": str(folder / "media")}


def cauldron(folder):
    turn = {"user": Value("string"), "assistant": Value("string"), "source": Value("string")}
    features = {"images": List(Image()), "texts": List(turn)}

    def texts(*pairs):
        return [{"user": user, "assistant": assistant, "source": "x"} for user, assistant in pairs]

    columns = {
        "images": [[embedded(10), embedded(20), embedded(30)], [embedded(40)], [embedded(10)], []],
        "texts": [
            texts(("How many?", "Three."), ("Which is dark?", "The first.")),
            texts(("What is it?", "Grey.")),
            texts(("What is it?", "")),
            texts(("What is it?", "Nothing.")),
        ],
    }
    write_table(folder / "nlvr2/train-00000-of-00001-abc.parquet", columns, features)
    repeated = {"images": [[embedded(40)], [embedded(40)]], "texts": [texts(("Two?", "Two."))] * 2}
    write_table(folder / "ai2d/train-00000-of-00001-def.parquet", repeated, features)
    return {"subsets": ["ai2d", "nlvr2"]}


def smoltalk(folder, count=70):
    features = {"messages": List({"content": Value("string"), "role": Value("string")}), "source": Value("string")}

    def message(role, content):
        return {"role": role, "content": content}

    chats = [[message("user", f"Say {i}."), message("assistant", f"{i}!")] for i in range(count)]
    chats.append([message("system", "Be brief."), *chats[0], message("user", "More."), message("assistant", "No.")])
    chats.append([message("user", "Never answered.")])
    columns = {"messages": chats, "source": ["smol-magpie-ultra"] * len(chats)}
    write_table(folder / "data/all/train-00000-of-00001.parquet", columns, features)
    return {}


def llava_video(folder):
    human, gpt = "<image>\nWhat does the man do?\n", "He runs."
    row = {"id": "RW587", "data_source": "0_30_s_academic_v0_1", "video": "academic_source/Charades/RW587.mp4"}
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
    more = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "Outside."}]
    place = folder / "0_30_s_academic_v0_1"
    write_json(place / "0_30_s_academic_oe_v0_1_qa_processed.json", [
        {**row, "conversations": turns + more},
        {**row, "id": "bad", "conversations": turns[:1]},
    ])  # fmt: skip
    caption = [{"from": "human", "value": "<video>Describe."}, {"from": "gpt", "value": "A man runs."}]
    write_json(place / "0_30_s_academic_v0_1_cap_processed.json", [{**row, "conversations": caption}])
    missing = {**row, "id": "other", "video": "academic_source/activitynet/v_y1IjkACdnfs.mp4"}
    write_json(place / "0_30_s_academic_mc_v0_1_qa_processed.json", [{**missing, "conversations": turns}])
    clip(place / row["video"])
    return {"subsets": ["0_30_s_academic_v0_1"], "media_dir": str(folder)}


def vript(folder):
    def row(video, number, **caption):
        caption = {"shot_type": "Close-up", "camera_movement": "Static", "content": "A hand.", **caption}
        clip_id = f"{video}-Scene-{number:03d}"
        return {"meta": {"video_id": video, "num_clips": 2}, "clip_id": clip_id, "caption": caption, "voiceover": [""]}

    rows = [row("007EvOaWFOA", 1, scene_title="Hands"), row("007EvOaWFOA", 2, shot_type=""), row("gone_video_", 1)]
    rows.append(row("007EvOaWFOA", 3, content=None))
    write_lines(folder / "vript_captions/vript_long_videos_captions.jsonl", rows)
    write_lines(folder / "vript_captions/vript_short_videos_captions.jsonl", [row("02toZL7p4_0", 1)])
    clip(folder / "clips/clips_1_of_1095/007EvOaWFOA/007EvOaWFOA-Scene-001.mp4")
    clip(folder / "clips/007EvOaWFOA/007EvOaWFOA-Scene-002.mp4")
    clip(folder / "clips/02toZL7p4_0/02toZL7p4_0-Scene-001.mp4")
    return {"media_dir": str(folder / "clips")}


def sharegpt4video(folder):
    def row(video, *captions):
        captions = [{"idx": idx, "content": content} for idx, content in captions]
        path = f"panda/{video}.mp4"
        return {"video_id": video, "video_path": path, "timestamp": [0.0, 2.0], "keyframe": [0, 48],
                "captions": captions, "zip_folder": "panda_videos_1.zip"}  # fmt: skip

    whole = ("-1", "A car turns and stops.")
    rows = [row("j5JqNXjGufw", ("1", "It stops."), ("0", "A car turns."), whole), row("abcdefghijk", ("0", "A."))]
    rows.append(row("gonegonegon", whole))
    write_lines(folder / "sharegpt4video_40k.jsonl", rows)
    clip(folder / "videos/panda/j5JqNXjGufw.mp4")
    return {"media_dir": str(folder / "videos")}


def rlaif_v(folder):
    string = Value("string")
    features = {"ds_name": string, "image": Image(), "question": string, "chosen": string, "rejected": string,
                "origin_dataset": string, "origin_split": string, "idx": Value("int64"),
                "image_path": string}  # fmt: skip
    columns = {
        "ds_name": ["RLAIF-V"] * 4,
        "image": [embedded(50), embedded(50), embedded(60), embedded(70)],
        "question": ["What is it?", "Is it dark?", "What is it?", "What is it?"],
        "chosen": ["Grey.", "Yes.", "Same.", None],
        "rejected": ["A cat.", "No.", "Same.", "A dog."],
        "origin_dataset": ["VQAv2"] * 4,
        "origin_split": ["{}"] * 4,
        "idx": [0, 1, 2, 3],
        "image_path": ["a.jpg"] * 4,
    }
    write_table(folder / "RLAIF-V-Dataset_000.parquet", columns, features)
    return {}


def mvbench(folder):
    row = {"question": "What happened?", "candidates": ["Sat down.", "Stood up.", "Left."], "answer": "Stood up."}
    timed = {**row, "start": 0.5, "end": 1.5, "accurate_start": 0.6, "accurate_end": 1.4}
    write_json(folder / "json/action_sequence.json", [
        {"video": "RW587.mp4", "question_id": "Interaction_T1_13", **timed},
        {"video": "GONE1.mp4", "question_id": "Interaction_T1_14", **timed},
    ])  # fmt: skip
    write_json(folder / "json/episodic_reasoning.json", [{"video": "castle_s07e20_seg02_clip_14", "fps": 3, **timed}])
    write_json(folder / "json/object_shuffle.json", [
        {"video": "video_12.mp4", **row},
        {"video": "video_12.mp4", **row, "answer": "Flew."},
    ])  # fmt: skip
    clip(folder / "video/star/Charades_v1_480/RW587.mp4")
    clip(folder / "video/perception/videos/video_12.mp4")
    for i in range(1, 7):
        write_image(
            folder / f"video/tvqa/frames_fps3_hq/castle_s07e20_seg02_clip_14/{i:05d}.jpg",
            np.full((8, 8, 3), 30 * i, np.uint8),
        )
    return {
        "subsets": ["action_sequence", "episodic_reasoning", "object_shuffle"],
        "media_dir": str(folder / "video"),
    }


def video_mme(folder):
    rows = {
        "video_id": ["001", "001", "002"],
        "duration": ["short"] * 3,
        "domain": ["Knowledge"] * 3,
        "sub_category": ["Humanity & History"] * 3,
        "url": ["https://www.youtube.com/watch?v=fFjv93ACGo8"] * 3,
        "videoID": ["fFjv93ACGo8", "fFjv93ACGo8", "N1cdUjctpG8"],
        "question_id": ["001-1", "001-2", "002-1"],
        "task_type": ["Counting Problem", "OCR Problems", "Counting Problem"],
        "question": ["How many?", "What is written?", "How many?"],
        "options": [
            ["A. Apples.", "B. A. Candles.", "C. Berries."],
            ["A. One", "C. Two", "B. Three"],
            ["A. 1", "B. 2"],
        ],
        "answer": ["B", "A", "B"],
    }
    (folder / "videomme").mkdir(parents=True)
    pq.write_table(pa.table(rows), folder / "videomme/test-00000-of-00001.parquet")
    clip(folder / "data/fFjv93ACGo8.mp4")
    return {"media_dir": str(folder)}


def mlvu(folder):
    row = {"video": "movie101_66.mp4", "duration": 246, "question": "What colour is the main character?"}
    row |= {"candidates": ["Yellow", "Red", "Green", "Blue"], "answer": "Yellow", "question_type": "plotQA"}
    rows = [row, {**row, "answer": "Pink"}, {**row, "video": "gone.mp4"}]
    write_json(folder / "MLVU/json/1_plotQA.json", rows)
    clip(folder / "MLVU/video/1_plotQA/movie101_66.mp4")
    return {"subsets": ["1_plotQA"], "media_dir": str(folder)}


def scienceqa(folder):
    string = Value("string")
    features = {"image": Image(), "question": string, "choices": List(string), "answer": Value("int8"),
                "hint": string, "task": string, "grade": string, "subject": string, "topic": string,
                "category": string, "skill": string, "lecture": string, "solution": string}  # fmt: skip
    columns = {
        "image": [embedded(80), None, embedded(90)],
        "question": ["Which is north?", "Which word?", "Which is south?"],
        "choices": [["Maine", "Ohio"], ["a", "b"], ["Utah", "Iowa"]],
        "answer": [1, 0, 2],
        "hint": ["Look at the map.", "", ""],
        "subject": ["social science", "language science", "natural science"],
        **{name: [""] * 3 for name in ("task", "grade", "topic", "category", "skill", "lecture", "solution")},
    }
    write_table(folder / "data/test-00000-of-00001-f0e7.parquet", columns, features)
    return {}


def pope(folder):
    string = Value("string")
    features = {"id": string, "question_id": string, "question": string, "answer": string, "image_source": string,
                "image": Image(), "category": string}  # fmt: skip
    columns = {
        "id": ["0", "1", "2"],
        "question_id": ["1", "2", "1"],
        "question": ["Is there a snowboard in the image?", "Is there a dog in the image?", "Is there a cat?"],
        "answer": ["yes", "no", "maybe"],
        "image_source": ["COCO_val2014_000000310196"] * 3,
        "image": [embedded(100)] * 3,
        "category": ["adversarial", "adversarial", "random"],
    }
    write_table(folder / "data/test-00000-of-00001.parquet", columns, features)
    return {}


TRAINING = (openvid, webvid, cauldron, smoltalk, llava_video, vript, sharegpt4video, rlaif_v)
EVALUATION = (mvbench, video_mme, mlvu, scienceqa, pope)
WRITERS = {writer.__name__: writer for writer in (*TRAINING, *EVALUATION)}


def write(name, folder):
    """The entry of sources.hub (a dict of all its keys) for the data set `name`, written to `folder`."""
    return values_of(name, path=str(folder)) | WRITERS[name](folder)


def values_of(name, path=None):
    """All keys of an entry of sources.hub for the data set `name`."""
    entry = {"dataset": name, "path": path, "revision": None, "subsets": None, "media_dir": None}
    return entry | {"max_samples": None, "max_missing": 0.5}


# ---------------------------------------------------------------- through the stage


def entry(values, **changes):
    return schema.HubEntry.model_validate_json(json.dumps(values | changes))


def section(*entries):
    values = params.parse("params.yaml", (ROOT / "params.yaml").read_text())["sources"]
    values |= {"collect": ["hub"], "hub": list(entries)}
    return schema.Section.model_validate_json(json.dumps(values))


def collected(tmp_path, name, **changes):
    """(samples, [(path, reason)] of the quarantined ones) of a data set's local copy, through the stage."""
    values = write(name, tmp_path / name) | changes
    collect(section(values), tmp_path / "raw")
    rows = [json.loads(line) for line in (tmp_path / "raw" / "quarantined.jsonl").read_text().splitlines()]
    return read_samples(tmp_path / "raw/index.jsonl"), [(row["path"], row["reason"]) for row in rows]


def all_of(values, output, **changes):
    quarantined = []
    return list(reader.read(entry(values, **changes), output, quarantined)), quarantined
