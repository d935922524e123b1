"""Pictures for the world of objects, in folders or from a package, the source's files, and the contact sheet."""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline_steps.backbones import pretrained
from pipeline_steps.common import params
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.schemas import read_samples
from pipeline_steps.sources import schema
from pipeline_steps.sources.__main__ import collect
from pipeline_steps.sources.object_clips import Pictures
from pipeline_steps.world import contact_sheet, tuxpaint
from pipeline_steps.world.cutouts import SPLITS, Backgrounds, Cutouts, read_folder
from pipeline_steps.world.objects import GAZE_KINDS, KINDS, NEW_KINDS
from tests import drawings

# ---------------------------------------------------------------- folders of pictures


def write_rows(folder, *rows):
    folder.mkdir(exist_ok=True)
    Image.new("RGBA", (8, 8), (255, 0, 0, 255)).save(folder / "a.png")
    text = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / "metadata.jsonl").write_text("".join(f"{line}\n" for line in text))
    return folder


@pytest.mark.parametrize(("rows", "message"), [
    (["{"], r"metadata\.jsonl line 1: expected"),
    ([{"file_name": "a.png"}], r"metadata\.jsonl line 1: expected .*'name'"),
    ([{"file_name": "a.png", "name": "x"}, {"file_name": "b.png", "name": "y"}], r"line 2: .*b\.png cannot be read"),
    ([{"file_name": "3\0.png", "name": "x"}], r"line 1: .*cannot be read \(.*null byte"),
    (["[" * 99_999], r"metadata\.jsonl line 1: expected .*recursion"),
    ([{"file_name": "a.png", "name": " "}], r"line 1: name is ' '"),
    ([{"file_name": "a.png", "name": "cat, dog"}], r"line 1: name is 'cat, dog'"),
    ([{"file_name": "../a.png", "name": "x"}], r"line 1: file_name is '\.\./a\.png'"),
    ([{"file_name": "a.png", "name": "x"}] * 2, r"a\.png is in line 1 and in line 2"),
    ([], r"metadata\.jsonl: has no rows"),
    ([{"file_name": "a.png", "name": "x"}], r"leaves 1 different names to train on, at least 6"),
])  # fmt: skip
def test_a_folder_that_does_not_do_is_refused_with_file_and_row(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        Cutouts(write_rows(tmp_path / "cutouts", *rows), 0.0, seed=1)


def test_rows_may_have_a_byte_order_mark_line_separators_and_blank_lines(tmp_path):
    text = '\ufeff{"file_name": "a.png", "name": "x", "note": "one\u2028two"}\r\n  \n'
    write_rows(tmp_path)
    (tmp_path / "metadata.jsonl").write_text(text, encoding="utf-8", newline="")
    (picture,) = read_folder(tmp_path, "key")
    assert (picture.file_name, picture.name, picture.line) == ("a.png", "x", 1)


def test_pictures_of_equal_names_in_several_folders_are_all_recorded(tmp_path):
    drawings.write(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        (tmp_path / row["name"]).mkdir()
        (tmp_path / row["file_name"]).rename(tmp_path / row["name"] / "1.png")
    text = "".join(json.dumps({"file_name": f"{row['name']}/1.png", "name": row["name"]}) + "\n" for row in rows)
    (tmp_path / "metadata.jsonl").write_text(text)
    found = Pictures(section(tmp_path).procedural).to_dict()
    assert set(found["sha256"]["cutouts"]) == {f"{row['name']}/1.png" for row in rows}


def test_a_picture_that_cannot_be_used_is_named(tmp_path):
    for content, message in ((None, "has no visible pixel"), (b"no picture", "is no picture")):
        place = tmp_path / message
        drawings.write(place)
        Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(place / "fish.png")
        if content:
            (place / "fish.png").write_bytes(content)
        with pytest.raises(UserError, match=rf"fish\.png \(row 4 of its metadata\.jsonl\) {message}"):
            Cutouts(place, 0.0, seed=1).check()


def test_opaque_cutouts_are_listed(tmp_path, capsys):
    drawings.write(tmp_path)
    Cutouts(tmp_path, 0.0, seed=1).check()
    assert capsys.readouterr().err == ""
    for name in ("fish", "cup"):
        Image.new("RGB", (8, 8), (9, 9, len(name))).save(tmp_path / f"{name}.png")
    Cutouts(tmp_path, 0.0, seed=1).check()
    told = capsys.readouterr().err
    assert "2 of 10 cut-outs are not transparent anywhere, so clips show them as rectangles: fish.png, cup.png." in told


def test_a_folder_that_is_not_given_or_not_there():
    with pytest.raises(
        UserError, match=r"objects\.cutouts is null.*`python -m pipeline_steps\.world\.tuxpaint --output"
    ):
        Cutouts(None, 0.1, seed=1)
    with pytest.raises(UserError, match=r"key: /none: no such folder\. Expected pictures .*\(file_name and name\)\.$"):
        read_folder("/none", "key")


def test_damaged_photographs_stop_before_anything_is_rendered(tmp_path, drawn):
    drawings.write_meadows(tmp_path, range(3))
    (tmp_path / "1.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"1\.png \(row 2 of its metadata\.jsonl\) is no picture"):
        Pictures(section(drawn, backgrounds=str(tmp_path)).procedural)


def test_photographs_with_equal_bytes_are_of_one_split(tmp_path):
    rows = drawings.write_meadows(tmp_path, [number // 2 for number in range(12)])
    photographs = Backgrounds(tmp_path, 0.3, seed=1)
    shown = [photographs.pictures[own.picture].sha256 for split in SPLITS for own in photographs.by_split[split]]
    assert len(shown) == len(set(shown)) == 6
    rows[7]["name"] = "lake"
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = r"6\.png \(line 7, meadow 3\) and 7\.png \(line 8, lake\) are equal files\. Remove one"
    with pytest.raises(UserError, match=message):
        Backgrounds(tmp_path, 0.3, seed=1)


def test_cutouts_with_equal_bytes_have_one_name(tmp_path):
    drawings.write(tmp_path)
    shutil.copy(tmp_path / "ball.png", tmp_path / "key.png")
    with pytest.raises(UserError, match=r"ball\.png \(line 1, ball\) and key\.png \(line 9, key\) are equal files"):
        Cutouts(tmp_path, 0.2, seed=1)


@pytest.mark.parametrize(("caption", "name"), [
    ("A red fox.", "red fox"),
    ("An albino peahen (a female peafowl, or peacock).", "albino peahen"),
    ("A pair of closed scissors.", "closed scissors"),
    ("A \u201cFuji\u201d apple.", "fuji apple"),
    ("A very small pumpkin.", "small pumpkin"),
    ("Eat your broccoli!", None),
    ("A candy cane is a traditional Christmas treat in the United States.", None),
    ("A chick inside an egg.", None),
])  # fmt: skip
def test_names_from_captions(caption, name):
    assert tuxpaint.name_of(caption) == name


def test_drawings_are_told_from_photographs(cutouts):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    photograph = Image.fromarray(np.dstack([noise, np.full((64, 64), 255, np.uint8)]), "RGBA")
    assert tuxpaint.flatness(photograph) < 0.1
    for index in range(10):
        assert tuxpaint.flatness(cutouts.image(index)) > tuxpaint.MAX_FLAT


def test_a_package_with_photographs_and_drawings(tmp_path, monkeypatch):
    """The recipe on a made-up package: what suits becomes a row, the rest is counted by its reason."""
    noise = np.random.default_rng(0).integers(0, 256, (90, 70, 4), dtype=np.uint8)
    noise[:10, :, 3], noise[10:, :, 3] = 0, 255
    captions = {
        "animals/fox.png": "A red fox.\nde.utf8=Ein Fuchs.",
        "animals/cartoon/cat.png": "A cat.",
        "food/corn.png": "Eat your corn!",
        "food/tiny.png": "A nut.",
        "food/nothing.png": None,
    }

    def unpack(command, folder=None):
        assert command[:2] == ["dpkg", "-x"]
        stamps = Path(command[3]) / tuxpaint.STAMPS
        for name, caption in captions.items():
            (stamps / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise[:, :20] if "tiny" in name else noise, "RGBA").resize(
                (30, 30) if "tiny" in name else (70, 90)
            ).save(stamps / name)
            if caption:
                (stamps / name).with_suffix(".txt").write_text(caption)
        (Path(command[3]) / tuxpaint.COPYRIGHT).parent.mkdir(parents=True)
        (Path(command[3]) / tuxpaint.COPYRIGHT).write_text("GPL-2")

    monkeypatch.setattr(tuxpaint, "run", unpack)
    tuxpaint.build(tmp_path / "out", tmp_path / "package.deb")  # its own folder is written again
    counts = tuxpaint.build(tmp_path / "out", tmp_path / "package.deb")
    assert counts == {
        "taken": 1,
        "a drawing, symbol, flag or sign": 1,
        "its caption is not one thing's name": 1,
        "smaller than 64 px": 1,
        "no caption": 1,
    }
    (picture,) = read_folder(tmp_path / "out", "key")
    assert (picture.path.name, picture.name) == ("animals-fox.png", "red fox")
    assert Image.open(picture.path).size == (70, 80)  # cropped to what is visible
    assert (tmp_path / "out/copyright").read_text() == "GPL-2"


def test_another_folder_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    for build, mark in ((tuxpaint.build, "copyright"), (pretrained.build, r"origin\.json")):
        with pytest.raises(UserError, match=rf"{tmp_path} has files, but no {mark}.* Name another folder"):
            build(tmp_path, tmp_path / "none")
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_a_machine_without_the_packages_tools(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"no (dpkg|apt-get) here: run this on Debian"):
        tuxpaint.build(tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("words", "message"), [
    (("--output", "new/sheet.foo"), r"--output new/sheet\.foo: expected a file name that ends in \.jpg, "),
    (("--seed", "-1"), "--seed is -1, expected a whole number"),
    (("--cutouts", "none"), r"--cutouts: none: no such folder\. Expected pictures with a metadata"),
    (("--backgrounds", "none"), r"--backgrounds: none: no such folder\. Expected"),
])  # fmt: skip
def test_wrong_arguments_of_the_contact_sheet_make_nothing(words, message, drawn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["contact_sheet", "--cutouts", str(drawn), "--output", "new/sheet.jpg", *words])
    with pytest.raises(UserError, match=message):
        contact_sheet.main()
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------- the source


def section(folder, **changes):
    values = params.load(params.ROOT / "params.yaml")["sources"]
    few = {"num_train_clips": 14, "num_validation_clips": 1, "num_test_clips": 1, "num_new_clips": 1}
    few |= {"cutouts": str(folder), "held_out_share": 0.2, "frame_size": 56, "num_frames": [6, 8]}
    values["procedural"] |= {"world": "objects", "objects": values["procedural"]["objects"] | few | changes}
    return schema.Section.model_validate(values | {"collect": ["procedural"]}, strict=False)


@pytest.fixture(scope="module")
def raw(tmp_path_factory, drawn):
    output = tmp_path_factory.mktemp("raw") / "raw"
    collect(section(drawn), output, num_processes=1)
    return output


@pytest.mark.parametrize("motion", ["smooth", "abrupt"])
def test_motion_and_number_of_frames_reach_the_clips(drawn, tmp_path, motion):
    given = section(drawn, num_frames=[16, 16])
    given = given.model_copy(update={"procedural": given.procedural.model_copy(update={"motion": motion})})
    collect(given, tmp_path / "raw", num_processes=1)
    steps = {}
    for sample in read_samples(tmp_path / "raw/index.jsonl"):
        boxes = np.array([thing.boxes for thing in sample.objects])
        assert boxes.shape[1:] == (1 if sample.kind == "image" else 16, 4)
        seen = (boxes[..., 2:] > boxes[..., :2]).all(2)
        length = np.linalg.norm(np.diff((boxes[..., :2] + boxes[..., 2:]) / 2, axis=1), axis=2)
        steps.setdefault(sample.items[0].task, []).extend(length[seen[:, 1:] & seen[:, :-1]])
    for task in ("background", "become", "caption"):  # whose objects travel
        share, longest = (np.array(steps[task]) > 0.01).mean(), max(steps[task])
        if motion == "smooth":
            assert share > 0.6
            assert longest < 0.2
        else:  # at most five points, so at most four jumps
            assert share < 0.25
            assert longest > 0.2


def test_the_source_writes_what_the_digits_write(raw):
    samples = read_samples(raw / "index.jsonl")
    counts = Counter((sample.split, item.task) for sample in samples for item in sample.items[:1])
    held_out = [*KINDS, *(f"{kind}_new" for kind in NEW_KINDS)]
    for split in ("validation", "test"):
        assert {task: n for (own, task), n in counts.items() if own == split} == dict.fromkeys(held_out, 1)
    assert sum(n for (split, _), n in counts.items() if split == "train") == 14
    for sample in samples:
        assert sample.kind == ("image" if "still" in sample.items[0].task else "video")
        assert len(sample.items) == 1 or sample.split == "train"
        for own in sample.objects:
            assert len(own.boxes) == sample.num_source_frames
        for item in sample.items:
            assert (item.target is not None) == (item.task.removesuffix("_new") in GAZE_KINDS)
    rows = [json.loads(line) for line in (raw / "procedural/metadata.jsonl").read_text().splitlines()]
    shown = {split: {row["background"] for row in rows if row.get("split") == split} for split in SPLITS}
    assert all(shown.values())
    assert sum(map(len, shown.values())) == len(set.union(*shown.values())), "a held-out background was trained on"
    pictures = json.loads((raw / "procedural/pictures.json").read_text())
    assert {kind: len(own) for kind, own in pictures["sha256"].items()} == {"cutouts": 10, "backgrounds": 0}
    assert {split: len(own) for split, own in pictures["names"].items()} == {"train": 6, "validation": 2, "test": 2}


def test_bytes_do_not_depend_on_the_processes_nor_on_the_number_of_clips(raw, drawn, tmp_path):
    def content(place):
        return {path.relative_to(place): path.read_bytes() for path in place.rglob("*") if path.is_file()}

    collect(section(drawn), tmp_path / "two", num_processes=2)
    assert content(tmp_path / "two") == content(raw)
    collect(section(drawn, num_train_clips=16), tmp_path / "more", num_processes=1)
    media = {name: data for name, data in content(raw).items() if name.suffix in (".mp4", ".jpg")}
    assert media.items() <= content(tmp_path / "more").items()


def test_too_few_names_for_the_tasks_about_new_ones(drawn, tmp_path):
    with pytest.raises(UserError, match=r"held_out_share 0\.1 leaves 1 names .* set num_new_clips to 0"):
        collect(section(drawn, held_out_share=0.1), tmp_path / "raw")
    collect(section(drawn, held_out_share=0.0, num_new_clips=0), tmp_path / "raw")


def test_the_contact_sheet_shows_every_kind_stills_and_held_out_names(drawn, monkeypatch):
    shown = []
    sample = contact_sheet._sample

    def recorded(*arguments):
        frames, boxes, item = sample(*arguments)
        shown.append((item["task"], len(frames), boxes is not None))
        return frames, boxes, item

    monkeypatch.setattr(contact_sheet, "_sample", recorded)
    page = contact_sheet.sheet(Cutouts(drawn, 0.2, 1), Backgrounds(None, 0.2, 1), 1)
    assert {task for task, *_ in shown} == {*KINDS, "become_new", "meet_new", "still_new"}
    assert [task for task, num_frames, _ in shown if num_frames == 1] == ["still"] * 3 + ["still_new"] * 3
    assert {task.removesuffix("_new") for task, _, has_box in shown if has_box} == set(GAZE_KINDS)
    rows = len(KINDS) - 1 + len(contact_sheet.NEW_SHOWN) + 1
    assert page.width == 6 * contact_sheet.TILE + 5 * contact_sheet.GAP
    assert rows * contact_sheet.TILE < page.height < rows * (contact_sheet.TILE + 2 * contact_sheet.TEXT)
    assert contact_sheet.NEW_COLOUR in {colour for _, colour in page.getcolors(page.width * page.height)}


def test_long_answers_on_the_contact_sheet_go_on_in_the_next_line(tmp_path):
    drawings.write(tmp_path)
    text = (tmp_path / "metadata.jsonl").read_text().replace('"name": "', '"name": "very carefully painted ')
    (tmp_path / "metadata.jsonl").write_text(text)
    strip = contact_sheet._stills(Cutouts(tmp_path, 0.2, 1), Backgrounds(None, 0.2, 1), (1,))
    num_lines = (strip.height - contact_sheet.TILE) // contact_sheet.TEXT
    assert num_lines >= 4
    lines = np.asarray(strip)[: -contact_sheet.TILE].reshape(num_lines, contact_sheet.TEXT, strip.width, 3)
    assert (lines < 128).any((1, 2, 3)).all()
    assert (lines[:, :, -1] == 255).all()
