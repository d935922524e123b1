"""Source `actions`: missing and damaged files, wrong annotations and entries."""

import pytest
from pydantic import ValidationError

from pipeline_steps.common import params
from pipeline_steps.common.errors import UserError
from pipeline_steps.shards.__main__ import build as build_shards
from pipeline_steps.sources.__main__ import collect
from tests.pipeline_steps import action_folders as folders
from tests.pipeline_steps.action_folders import WRITERS, collected, entry, section, write_lines


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
