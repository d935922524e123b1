"""Source `actions`: folders as published, from annotations to scores, and what is wrong in them."""

import io
import json
import tarfile
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pytest
from PIL import Image
from pydantic import ValidationError

from pipeline_steps.backbones.tokenizer import save_tokenizer, train_tokenizer
from pipeline_steps.common import modes, params
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.schemas import SPLITS, read_samples
from pipeline_steps.evaluation import __main__ as evaluation
from pipeline_steps.evaluation import multiple_choice, scoring
from pipeline_steps.shards.__main__ import build as build_shards
from pipeline_steps.sources.__main__ import collect
from pipeline_steps.sources.actions.layouts import NAMES
from pipeline_steps.streaming.collate import Collator
from pipeline_steps.streaming.dataset import TokenizedShards
from pipeline_steps.tokens.__main__ import build as build_tokens
from pipeline_steps.tokens.chat import load_tokenizer
from tests import checkpoints
from tests.pipeline_steps import action_folders as folders
from tests.pipeline_steps.action_folders import WRITERS, clip, entry, section, write_lines
from tests.pipeline_steps.clips import index_of

PREFETCH = {"num_workers": 0, "limit": 1, "size_of": lambda job: 1}


def collected(values, output):
    """(samples by key, [(file name, reason)] of the quarantined ones, summary) of one entry, through the stage."""
    summary = collect(section(values), output)
    rows = [json.loads(line) for line in (output / "quarantined.jsonl").read_text().splitlines()]
    samples = {sample.key: sample for sample in read_samples(output / "index.jsonl")}
    return samples, [(row["path"].rsplit("/", 1)[1], row["reason"]) for row in rows], summary["sources"][values["name"]]


def answers(samples):
    return {sample.key: sample.items[0].assistant for sample in samples.values()}


def splits(samples):
    return {split: {key for key, sample in samples.items() if sample.split == split} for split in SPLITS}


# ---------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Root with raw/, shards/, tokens/ and language_model/ of all four data sets."""
    root = tmp_path_factory.mktemp("actions")
    entries = [entry(writer(root / writer.__name__), num_options=2) for writer in WRITERS]
    collect(section(*entries), root / "raw")
    sections = params.read(params.ROOT / "params.yaml", "shards", "tokens")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("RUN_SCRATCH", str(root / "scratch"))
        build_shards(sections.shards, root / "raw", root / "shards", num_processes=1)
    save_tokenizer(train_tokenizer(checkpoints.VOCABULARY, checkpoints.MAX_POSITIONS), root / "language_model")
    build_tokens(sections.tokens, root / "shards", root / "language_model", root / "tokens")
    return root


def packed(root):
    """{key: (JSON of the packed sample, its frames)} of all shards."""
    found = {}
    for path in sorted((root / "shards").glob("*/*.tar")):
        with tarfile.open(path) as tar:
            members = {name: tar.extractfile(name).read() for name in tar.getnames()}
        for name, content in members.items():
            if name.endswith(".json"):
                key = name.removesuffix(".json")
                frames = [io.BytesIO(members[n]) for n in sorted(members) if n.startswith(f"{key}.") and n != name]
                found[key] = json.loads(content), [Image.open(frame) for frame in frames]
    return found


def test_every_layout_has_a_test_folder():
    assert {writer.__name__ for writer in WRITERS} == set(NAMES)


def test_all_data_sets_pass_the_data_stages(data):
    samples = packed(data)
    assert Counter((row["source"], row["split"]) for row, _ in samples.values()) == {
        ("ucf101", "train"): 6, ("ucf101", "validation"): 3, ("ucf101", "test"): 3,
        ("ssv2", "train"): 3, ("ssv2", "validation"): 2, ("ssv2", "test"): 2,
        ("kinetics400", "train"): 3, ("kinetics400", "validation"): 1, ("kinetics400", "test"): 2,
        ("epic_kitchens", "train"): 2, ("epic_kitchens", "validation"): 1, ("epic_kitchens", "test"): 2,
    }  # fmt: skip
    assert all(len(frames) == row["frame_count"] == 2 for row, frames in samples.values() if row["segment"] is None)
    counts = json.loads((data / "tokens/manifest.json").read_text())
    assert counts["tasks"] == {"action": 30, "action_choice": 30}
    assert counts["dropped"] == []


def test_answers_are_words_and_choices_hold_the_answer(data):
    dataset = TokenizedShards(data / "shards", data / "tokens", "test")
    shown = set()
    for number in range(len(dataset)):
        row, sample = dataset.rows[number], dataset.sample(number)
        choice = sample.items[1]
        assert sample.items[0].assistant == choice.options[choice.correct_option]
        assert len(set(choice.options)) == 2
        if row["task"] == "action":
            shown.add(row["answer"])
        else:
            assert row["answer"] == "AB"[choice.correct_option]
    assert shown == {
        "apply eye makeup", "archery", "handstand pushups", "Holding something next to something",
        "Pushing something from left to right", "abseiling", "air drumming", "turn on tap", "take chopping board",
    }  # fmt: skip


def test_frames_of_a_segment_come_from_its_seconds(data):
    row, frames = packed(data)["epic_kitchens-P02_03_1"]
    assert row["segment"] == [2.0, 3.0]
    assert row["duration"] == 1.0
    shown = [index_of(frame, 5 * folders.FPS) for frame in frames]
    assert shown == [9, 11]  # at 2.25 and 2.75 s of four frames per second


def test_actions_are_evaluated_like_every_task(data):
    training, dataset = (TokenizedShards(data / "shards", data / "tokens", split) for split in ("train", "test"))
    model = checkpoints.make_lively_model()
    collate = Collator.for_model(model.config, loss="answer_only", image_replication=checkpoints.STILL_FRAMES)
    chosen = scoring.choose_items(dataset, 100, seed=1)
    assert {task: len(numbers) for task, numbers in chosen.items()} == {"action": 9, "action_choice": 9}
    chance = evaluation.chance(training, dataset, chosen)
    assert 0 < chance["action"] < 1
    assert 0 <= chance["action_choice"] <= 1
    progress = SimpleNamespace(update=lambda number: None)
    table = scoring.score_items(
        model, collate, dataset, chosen, batch_size=9, seed=1, prefetch=PREFETCH, progress=progress
    )
    assert "blind" in modes.SCORED_MODES
    assert {*zip(table["task"], table["mode"], strict=True)} == {
        (task, mode) for task in chosen for mode in modes.SCORED_MODES
    }
    settings = SimpleNamespace(batch_size=9, max_answer_tokens=8, seed=1)
    tokenizer = load_tokenizer(data / "language_model")
    choices = multiple_choice.measure(model, tokenizer, collate, dataset, chosen, settings, PREFETCH)
    found = multiple_choice.summarise(choices, 20, 1)
    names = ("ucf101", "ssv2", "kinetics400", "epic_kitchens")
    assert set(found) == {"all", *(f"{name}/action_choice" for name in names)}
    assert found["all"].chance == 0.5
    assert found["all"].num_items == 9


# ---------------------------------------------------------------- what each layout becomes


def test_ucf101_keeps_groups_together(tmp_path):
    values = entry(folders.ucf101(tmp_path / "ucf"))
    clip(tmp_path / "ucf/UCF-101/Archery/v_Archery_g25_c07.avi", 99, codec="mpeg4")
    samples, quarantined, summary = collected(values, tmp_path / "raw")
    assert quarantined == []
    assert summary["unreferenced"]["first"] == ["UCF-101/Archery/v_Archery_g25_c07.avi"]
    assert splits(samples)["test"] == {
        f"ucf101-v_{name}_g01_c01" for name in ("ApplyEyeMakeup", "Archery", "HandStandPushups")
    }
    groups = {}
    for sample in samples.values():
        groups.setdefault(sample.video_id, set()).add(sample.split)
    assert len(groups) == 9
    assert all(len(found) == 1 for found in groups.values())
    assert sum(found == {"validation"} for found in groups.values()) == 2  # a quarter of six
    assert samples["ucf101-v_HandStandPushups_g09_c01"].video_id == "ucf101-HandstandPushups_g09"
    assert answers(samples)["ucf101-v_ApplyEyeMakeup_g08_c02"] == "apply eye makeup"


def test_validation_groups_depend_on_the_seed_alone(tmp_path):
    values = folders.ucf101(tmp_path / "ucf")
    chosen = [
        frozenset(splits(collected(entry(values, seed=seed), tmp_path / f"raw{run}")[0])["validation"])
        for run, seed in enumerate((1, 1, 2, 3, 4))
    ]
    assert chosen[0] == chosen[1]
    assert len(set(chosen)) > 1
    samples, _, _ = collected(entry(values, validation_share=0.0), tmp_path / "none")
    assert {split: len(keys) for split, keys in splits(samples).items()} == {"train": 9, "validation": 0, "test": 3}


def test_something_something_without_answers_tests_on_validation(tmp_path, capsys):
    values = entry(folders.something_something_v2(tmp_path / "ssv2"))
    samples, _, _ = collected(values, tmp_path / "a")
    assert splits(samples) == {
        "train": {"ssv2-1", "ssv2-2", "ssv2-3"}, "validation": {"ssv2-4", "ssv2-5"}, "test": {"ssv2-6", "ssv2-7"}
    }  # fmt: skip
    assert answers(samples)["ssv2-1"] == "Pushing something from left to right"
    assert answers(samples)["ssv2-6"] == "Holding something next to something"
    assert samples["ssv2-4"].video_id == "ssv2-4"
    (tmp_path / "ssv2/labels/test-answers.csv").unlink()
    samples, _, summary = collected(values, tmp_path / "b")
    assert splits(samples)["test"] == {"ssv2-4", "ssv2-5"}
    assert len(splits(samples)["validation"]) == 1  # of three training videos
    assert summary["unreferenced"]["reasons"] == {"in no list with labels": 2}
    assert capsys.readouterr().out.count("ssv2: no labelled test list, so its validation list is the split test") == 1


def test_something_something_of_the_first_release(tmp_path):
    values = folders.something_something_v2(tmp_path / "ssv2")
    for path in (tmp_path / "ssv2/labels").iterdir():
        if path.suffix == ".json":
            path.rename(tmp_path / f"ssv2/something-something-v2-{path.name}")
    assert len(collected(entry(values), tmp_path / "raw")[0]) == 7


def test_kinetics_finds_clips_in_all_arrangements(tmp_path):
    values = entry(folders.kinetics(tmp_path / "k400"))
    samples, quarantined, _ = collected(values, tmp_path / "raw")
    assert quarantined == []
    assert len(samples) == 6
    assert samples["kinetics400-AAAAAAAAA1_000010_000020"].video_id == "-AAAAAAAAA1"
    assert answers(samples)["kinetics400-AAAAAAAAAA3_000007_000017"] == "passing American football (in game)"
    assert samples["kinetics400-AAAAAAAAAA4_000005_000015"].path.endswith("AAAAAAAAAA4_5_15.mp4")
    assert samples["kinetics400-AAAAAAAAAA5_000059_000069"].split == "test"
    assert samples["kinetics400-AAAAAAAAAA5_000059_000069"].video_id == "AAAAAAAAAA5"
    flat = tmp_path / "flat"
    folders.kinetics(flat, media=False)
    for number, path in enumerate(sorted((tmp_path / "k400").rglob("*.mp4"))):
        clip(flat / path.name, number)
    assert answers(collected(entry(values, path=str(flat)), tmp_path / "raw2")[0]) == answers(samples)


def test_kinetics_prefers_the_copy_in_its_own_folder(tmp_path):
    values = entry(folders.kinetics(tmp_path / "k400"), max_quarantined=1.0)
    name = "-AAAAAAAAA1_000010_000020.mp4"
    clip(tmp_path / "k400/val/abseiling" / name, 1)
    samples, quarantined, _ = collected(values, tmp_path / "raw")
    assert quarantined == []
    assert any(sample.path.endswith(f"train/abseiling/{name}") for sample in samples.values())
    clip(tmp_path / "k400/train/copies/abseiling" / name, 2)
    _, quarantined, _ = collected(values, tmp_path / "raw2")
    ((path, reason),) = quarantined
    assert path == name
    assert "train/copies/abseiling" in reason
    assert reason.endswith("have the same name")


def test_kinetics_validation_list_alone_is_a_test_set(tmp_path):
    values = entry(folders.kinetics(tmp_path / "k400"))
    (tmp_path / "k400/annotations/train.csv").unlink()
    samples, _, _ = collected(values, tmp_path / "raw")
    assert {split: len(keys) for split, keys in splits(samples).items()} == {"train": 0, "validation": 0, "test": 2}


def test_epic_kitchens_cuts_recordings(tmp_path):
    values = entry(folders.epic_kitchens(tmp_path / "epic"))
    samples, quarantined, _ = collected(values, tmp_path / "raw")
    assert quarantined == []
    assert {key: sample.segment for key, sample in samples.items()} == {
        "epic_kitchens-P01_01_0": (0.5, 1.5), "epic_kitchens-P01_01_1": (3.0, 4.25),
        "epic_kitchens-P02_01_0": (1.0, 2.0), "epic_kitchens-P02_03_0": (0.0, 1.0),
        "epic_kitchens-P02_03_1": (2.0, 3.0),
    }  # fmt: skip
    assert answers(samples)["epic_kitchens-P01_01_0"] == "take chopping board"
    assert {sample.video_id for sample in samples.values() if sample.split == "test"} == {"epic_kitchens-P02_03"}


def test_a_segment_that_ends_before_it_begins_is_quarantined(tmp_path):
    values = entry(folders.epic_kitchens(tmp_path / "epic"), max_quarantined=0.2)
    path = tmp_path / "epic/epic-kitchens-100-annotations/EPIC_100_train.csv"
    rows = path.read_text().splitlines()
    write_lines(path, *rows[:-1], folders.epic_row(0, "P02_01", 2, 1, 0, 0))
    _, ((name, reason),), _ = collected(values, tmp_path / "raw")
    assert name == "P02_01.MP4"
    assert "EPIC_100_train.csv line 4" in reason
    assert "(2.0, 1.0)" in reason


# ---------------------------------------------------------------- subsets and options


def test_max_samples_is_nested_by_split(tmp_path):
    values = folders.ucf101(tmp_path / "ucf")
    keys = []
    for number in (1, 2, 4, 9):
        limits = {"train": number, "validation": None, "test": 2}
        samples, _, _ = collected(entry(values, max_samples=limits, validation_share=0.0), tmp_path / f"raw{number}")
        keys.append(splits(samples))
    assert [len(found["train"]) for found in keys] == [1, 2, 4, 9]
    assert all(small["train"] < large["train"] for small, large in pairwise(keys))
    assert all(found["test"] == keys[0]["test"] and len(found["test"]) == 2 for found in keys)


def test_options_are_actions_of_the_data_set_in_every_position(tmp_path):
    values = entry(folders.ucf101(tmp_path / "ucf"), num_options=3)
    samples, _, _ = collected(values, tmp_path / "raw")
    choices = [sample.items[1] for sample in samples.values()]
    assert {frozenset(choice.options) for choice in choices} == {
        frozenset({"apply eye makeup", "archery", "handstand pushups"})
    }
    assert len({choice.correct_option for choice in choices}) > 1
    with pytest.raises(UserError, match=r"num_options is 4, but the data set has 3 actions. Lower it"):
        collect(section(values | {"num_options": 4}), tmp_path / "raw2")


# ---------------------------------------------------------------- missing and damaged files, wrong annotations


def test_missing_files_are_named_and_limited(tmp_path):
    values = folders.ucf101(tmp_path / "ucf")
    (tmp_path / "ucf/UCF-101/Archery/v_Archery_g09_c01.avi").unlink()
    samples, quarantined, summary = collected(entry(values, max_quarantined=0.1), tmp_path / "raw")
    ((name, reason),) = quarantined
    assert name == "v_Archery_g09_c01.avi"
    assert reason.startswith("missing media, named in")
    assert reason.endswith("trainlist01.txt line 6")
    assert (len(samples), summary["seen"], summary["taken"]) == (11, 12, 11)
    with pytest.raises(UserError, match=r"1 of 12 samples of the source 'ucf101' .*\(8.3%\).*\(5.0%\)"):
        collect(section(entry(values, max_quarantined=0.05)), tmp_path / "raw2")


def test_damaged_video_is_quarantined_by_the_shards_stage(tmp_path, monkeypatch):
    monkeypatch.setenv("RUN_SCRATCH", str(tmp_path / "scratch"))
    values = entry(folders.something_something_v2(tmp_path / "ssv2"))
    (tmp_path / "ssv2/20bn-something-something-v2/2.webm").write_bytes(b"no video")
    collect(section(values), tmp_path / "raw")
    section_ = params.read(params.ROOT / "params.yaml", "shards").shards.model_copy(update={"max_quarantined": 0.2})
    manifest = build_shards(section_, tmp_path / "raw", tmp_path / "shards", num_processes=1)
    assert [row.key for row in manifest.quarantined] == ["ssv2-2"]
    assert manifest.packed == 6


def test_a_clip_in_two_lists_stays_in_the_held_out_one(tmp_path):
    values = entry(folders.ucf101(tmp_path / "ucf"), max_quarantined=0.2, validation_share=0.0)
    path = tmp_path / "ucf/ucfTrainTestlist/trainlist01.txt"
    write_lines(path, *path.read_text().split("\n")[:9], "Archery/v_Archery_g01_c01.avi 2")
    samples, quarantined, _ = collected(values, tmp_path / "raw")
    assert samples["ucf101-v_Archery_g01_c01"].split == "test"
    assert len(samples) == 12
    ((_, reason),) = quarantined
    assert "trainlist01.txt line 10, but" in reason
    assert "testlist01.txt line 2 holds out the same video" in reason
    write_lines(path, *path.read_text().split("\n")[:9], "Archery/v_Archery_g08_c01.avi 2")
    _, quarantined, _ = collected(values, tmp_path / "raw2")
    assert [reason.startswith("listed twice: ") for _, reason in quarantined] == [True]
    held_out = tmp_path / "ucf/ucfTrainTestlist/testlist01.txt"
    write_lines(path, *path.read_text().split("\n")[:9], "Archery/v_Archery_g01_c01.avi 2")
    write_lines(held_out, *held_out.read_text().split("\n")[:-1], "Archery/v_Archery_g01_c01.avi")
    samples, quarantined, _ = collected(values, tmp_path / "raw3")
    assert samples["ucf101-v_Archery_g01_c01"].split == "test"
    assert sorted(reason.split(":")[0].split(" ")[0] for _, reason in quarantined) == ["in", "listed"]


def replaced(name, old, new):
    """A change of the file `name`, which must contain `old`."""

    def change(root):
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new, 1))

    return change


def emptied(name, kept=""):
    """A change of the file `name`, of which only `kept` is left, as if its download had stopped."""
    return lambda root: (root / name).write_text(kept)


def removed(name):
    return lambda root: (root / name).unlink()


UCF, SSV2, EPIC = "ucfTrainTestlist", "labels", "epic-kitchens-100-annotations"
WRONG = {
    "ucf101": [
        (removed(f"{UCF}/classInd.txt"), r"no classInd.txt in .* which holds UCF-101, ucfTrainTestlist\. Add the file"),
        (removed(f"{UCF}/testlist01.txt"), "no testlist01.txt in"),
        (replaced(f"{UCF}/classInd.txt", "2 Archery", "2 Fencing"),
         r"trainlist01.txt line 4: the class Archery is not in .*classInd.txt"),
        (replaced(f"{UCF}/trainlist01.txt", "Archery_g08_c01.avi 2", "Archery_g08_c01.avi 3"),
         r"trainlist01.txt line 4: the number of Archery is 3, but 2 in .*classInd.txt"),
        (replaced(f"{UCF}/trainlist01.txt", "v_Archery_g08_c01", "v_Fencing_g08_c01"),
         "line 4: the folder is Archery, but the file is one of Fencing"),
        (replaced(f"{UCF}/testlist01.txt", "v_Archery_g01_c01.avi", "archery.mp4"),
         "testlist01.txt line 2: found 'Archery/archery.mp4', expected `CLASS/v_CLASS_gNN_cNN.avi`"),
        (replaced(f"{UCF}/classInd.txt", "2 Archery", "Archery"), "classInd.txt line 2: found 'Archery', expected"),
        (emptied(f"{UCF}/classInd.txt"), "classInd.txt: lists nothing. Download the file again"),
        (emptied(f"{UCF}/trainlist01.txt", "\n"), "trainlist01.txt: lists nothing"),
    ],
    "something_something_v2": [
        (replaced(f"{SSV2}/train.json", "Putting [something] onto [something]", "Dropping [something]"),
         r"train.json entry 2 \(id 2\): the template 'Dropping \[something\]' is, without brackets, none of the 3 "
         r"labels in .*labels.json, such as 'Holding"),
        (replaced(f"{SSV2}/train.json", '"template"', '"text"'), "entry 1: template is None, expected text; its keys"),
        (replaced(f"{SSV2}/test-answers.csv", "7;Pushing", "7;Pulling"), "test-answers.csv line 2: the template 'Pull"),
        (replaced(f"{SSV2}/test-answers.csv", "7;", "8;"), r"test.json entry 2 \(id 7\): .*test-answers.csv has no"),
        (replaced(f"{SSV2}/test.json", '{"id": "6"}, ', ""), r"test-answers.csv line 1: the id 6 is not in .*test"),
        (replaced(f"{SSV2}/validation.json", "[{", "{"), "validation.json line 1: not valid JSON"),
        (replaced(f"{SSV2}/validation.json", "[{", "[" + "9" * 5000 + ", {"), "validation.json: cannot be read .*4300"),
        (replaced(f"{SSV2}/validation.json", "[{", "[" * 100_000 + "{"), "validation.json: cannot be read .*recursion"),
        (emptied(f"{SSV2}/train.json", "[]"), "train.json: lists nothing"),
        (emptied(f"{SSV2}/test-answers.csv"), "test-answers.csv: lists nothing"),
        (removed(f"{SSV2}/labels.json"), "no labels.json or something-something-v2-labels.json in"),
    ],
    "kinetics": [
        (replaced("annotations/train.csv", "youtube_id", "video"),
         "train.csv line 1: no column youtube_id; the columns are label, video, time_start"),
        (replaced("annotations/val.csv", "abseiling", "climbing"),
         r"val.csv line 2: the label 'climbing' is none of the 3 labels in .*train.csv"),
        (replaced("annotations/train.csv", "AAAAAAAAA_2,0,10,train", "AAAAAAAAA_2,0,10,val"),
         "train.csv line 3: split is 'val', but this is the list of train clips"),
        (replaced("annotations/train.csv", "10,20,train", "ten,20,train"), "line 2: time_start is 'ten', expected"),
        (replaced("annotations/train.csv", "air drumming,AAAAAAAAAA4", "abseiling,AAAAAAAAAA4"),
         r"train.csv line 5: the label is 'abseiling', but .*AAAAAAAAAA4_5_15.mp4 is in the folder of 'air drumming'"),
        (emptied("annotations/train.csv", folders.KINETICS_HEAD), "train.csv: lists nothing"),
        (replaced("annotations/train.csv", "is_cc", "label"), "train.csv line 1: the column 'label' occurs twice"),
        (replaced("annotations/train.csv", ",train,0", ",train"), "line 2: 5 cells, but the header has 6"),
        (lambda root: write_lines(root / "validate.csv", folders.KINETICS_HEAD),
         r"validate.csv and .*annotations/val.csv are both lists of validation clips"),
    ],
    "epic_kitchens": [
        (replaced(f"{EPIC}/EPIC_100_train.csv", ",verb_class,", ",class,"), "train.csv line 1: no column verb_class"),
        (replaced(f"{EPIC}/EPIC_100_noun_classes.csv", "1,board", "7,board"),
         r"EPIC_100_train.csv line 2: noun_class is 1, but .*EPIC_100_noun_classes.csv has no such id"),
        (replaced(f"{EPIC}/EPIC_100_validation.csv", "P02,P02_03,", "P01,P02_03,"),
         "EPIC_100_validation.csv line 2: participant_id is 'P01', but video_id is 'P02_03'"),
        (replaced(f"{EPIC}/EPIC_100_train.csv", "00:00:01.50", "1.5 s"),
         "line 2: stop_timestamp is '1.5 s', expected hours:minutes:seconds"),
        (emptied(f"{EPIC}/EPIC_100_validation.csv", folders.EPIC_HEAD), "EPIC_100_validation.csv: lists nothing"),
        (removed(f"{EPIC}/EPIC_100_verb_classes.csv"), "no EPIC_100_verb_classes.csv in"),
        (replaced(f"{EPIC}/EPIC_100_verb_classes.csv", "1,turn-on", "0,turn-on"), "line 3: the id 0 occurs twice"),
    ],
}  # fmt: skip
MEDIA_FOLDERS = {"ucf101": "UCF-101", "something_something_v2": "20bn-something-something-v2"}
CASES = [(name, number) for name, cases in WRONG.items() for number in range(len(cases))]


@pytest.fixture(scope="module")
def kinetics_media(tmp_path_factory):
    root = tmp_path_factory.mktemp("kinetics")
    folders.kinetics(root)
    return root


@pytest.mark.parametrize(("name", "number"), CASES)
def test_wrong_annotations_are_named_with_file_and_line(name, number, tmp_path, kinetics_media):
    (writer,) = (writer for writer in WRITERS if writer.__name__ == name)
    values = writer(tmp_path / "set", media=False)
    if name in MEDIA_FOLDERS:
        (tmp_path / "set" / MEDIA_FOLDERS[name]).mkdir()
    if name == "kinetics":
        (tmp_path / "set/train").symlink_to(kinetics_media / "train")
    change, message = WRONG[name][number]
    change(tmp_path / "set")
    with pytest.raises(UserError, match=message):
        collect(section(entry(values)), tmp_path / "raw")
    assert not (tmp_path / "raw").exists()


def test_two_labels_of_one_clip_are_an_error(tmp_path):
    values = folders.kinetics(tmp_path / "set", media=False)
    path = tmp_path / "set/annotations/train.csv"
    write_lines(path, *path.read_text().splitlines(), "abseiling,AAAAAAAAA_2,0,10,train,0")
    message = (
        r"train.csv line 6: AAAAAAAAA_2_000000_000010 is 'abseiling', but 'air drumming' in .*train.csv line 3\. Corr"
    )
    with pytest.raises(UserError, match=message):
        collect(section(entry(values)), tmp_path / "raw")


def test_wrong_entries_are_refused(tmp_path):
    values = entry(folders.ucf101(tmp_path / "set", media=False))
    with pytest.raises(UserError, match=r"no folder UCF-101 in .* which holds ucfTrainTestlist"):
        collect(section(values), tmp_path / "raw")
    with pytest.raises(UserError, match=r"path .*/nowhere does not exist. Set it to the data set's folder"):
        collect(section(values | {"path": str(tmp_path / "nowhere")}), tmp_path / "raw")
    with pytest.raises(UserError, match=r"no train.csv, val.csv or test.csv with labels in"):
        collect(section(values | {"layout": "kinetics", "fold": None}), tmp_path / "raw")
    with pytest.raises(UserError, match=r"sources.actions is empty"):
        collect(section(), tmp_path / "raw")
    with pytest.raises(ValidationError, match="fold is null, expected 1, 2 or 3"):
        section(values | {"fold": None})
    with pytest.raises(ValidationError, match="fold is 1, expected null: only ucf101 has folds"):
        section(values | {"layout": "kinetics"})
    with pytest.raises(ValidationError, match="two sources have the name 'ucf101'"):
        section(values, values)


def test_example_config_group_is_valid():
    content = params.parse("conf/", params.compose(["data=actions"]))
    found = params.check("conf/", content).sources
    assert found.collect == ["actions", "chat"]
    assert {one.layout for one in found.actions} == set(NAMES)
