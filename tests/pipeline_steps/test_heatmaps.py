"""Pictures of maps with a known peak."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pipeline_steps.common.errors import UserError
from pipeline_steps.heatmaps import __main__ as heatmaps
from pipeline_steps.heatmaps import over_frames, sheet
from pipeline_steps.inference import drawing

NUM_FRAMES, SIDE = 3, 96


def make_clip(boxes=True, num_frames=NUM_FRAMES, modes=("coarse", "fine", "autoregressive")):
    maps = {}
    for number, mode in enumerate(modes):
        maps[mode] = np.full((num_frames, 16), 0.02)
        maps[mode][:, 5 * number] = 0.7  # patches 0, 5, 10
    return drawing.Clip(
        frames=np.full((num_frames, 56, 56, 3), 90, np.uint8),
        maps=maps,
        boxes=np.tile([0.5, 0.5, 0.74, 0.74], (num_frames, 1)) if boxes else None,
        title="card · k",
        question="Which?",
        answer="red: 1",
        prediction="red: 1",
    )


def brightest(picture):
    values = np.asarray(picture.convert("L"), int)
    return np.unravel_index(values.argmax(), values.shape)


def test_heat_is_where_the_attention_is():
    clip = make_clip()
    tile = drawing.heat_picture(clip.maps["fine"][0], clip.scale, SIDE)
    y, x = brightest(tile)
    assert (y * 4 // SIDE, x * 4 // SIDE) == (1, 1)


def test_sheet_geometry_finds_every_tile():
    clip = make_clip()
    sheet, geometry = drawing.contact_sheet(clip, SIDE)
    kinds = ["frame", "coarse", "fine", "autoregressive", "autoregressive, over the frame"]
    assert geometry["rows"] == [*kinds, "autoregressive minus coarse"]
    for row, patch in ((1, 0), (2, 5), (3, 10)):
        left, top = geometry["left"] + geometry["step"], geometry["top"] + row * geometry["step"]
        tile = np.asarray(sheet.crop((left, top, left + SIDE, top + SIDE)), int)
        cells = tile.reshape(4, SIDE // 4, 4, SIDE // 4, 3).mean(axis=(1, 3, 4))
        assert cells.argmax() == patch
    plain, _ = drawing.contact_sheet(make_clip(boxes=False), SIDE)
    assert plain.size == sheet.size
    assert plain.tobytes() != sheet.tobytes()  # the box is drawn


def test_the_difference_is_orange_where_attention_is_higher_and_blue_where_lower():
    clip = make_clip(boxes=False)
    expected = np.zeros((NUM_FRAMES, 16))
    expected[:, 0], expected[:, 10] = -0.68, 0.68
    assert clip.difference == pytest.approx(expected)
    tiles = drawing.difference_tiles(clip, SIDE)
    assert len(tiles) == NUM_FRAMES
    colours = np.asarray(tiles[0], int).reshape(4, SIDE // 4, 4, SIDE // 4, 3).mean(axis=(1, 3)).reshape(16, 3)
    warmth = colours[:, 0] - colours[:, 2]
    assert (warmth.argmin(), warmth.argmax()) == (0, 10)
    assert colours[3] == pytest.approx([90, 90, 90], abs=1)  # where both look alike the frame stays as it is


def test_clips_seen_in_one_mode_have_no_difference():
    clip = make_clip(modes=("coarse",))
    assert clip.difference is None
    assert drawing.strip(clip, SIDE)[1]["kinds"] == ["frame", "coarse"]
    assert drawing.contact_sheet(clip, SIDE)[1]["rows"][-1] == "coarse, over the frame"


def test_an_even_spread_is_not_drawn_bright():
    clip = make_clip()
    clip.maps = {"coarse": np.full((NUM_FRAMES, 16), 1 / 16)}
    assert clip.scale == pytest.approx(0.25)


def test_the_strip_holds_every_frame_and_mode_and_fits_into_a_webp_file():
    picture, geometry = drawing.strip(make_clip(), SIDE)
    assert geometry["kinds"] == ["frame", "coarse", "fine", "autoregressive", "difference"]
    step = geometry["step"]
    assert picture.size == (5 * step - drawing.GAP, NUM_FRAMES * step - drawing.GAP)
    for column, patch in ((1, 0), (2, 5), (3, 10)):
        for t in range(NUM_FRAMES):
            tile = picture.crop((column * step, t * step, column * step + SIDE, t * step + SIDE))
            cells = np.asarray(tile, int).reshape(4, SIDE // 4, 4, SIDE // 4, 3).mean(axis=(1, 3, 4))
            assert cells.argmax() == patch
    high, geometry = drawing.strip(make_clip(num_frames=64), 1024)
    assert high.height < 16_383
    assert geometry["side"] == 16_000 // 64 - drawing.GAP


def test_long_clips_are_thinned_in_the_sheet_and_whole_in_the_animation():
    clip = make_clip(num_frames=20)
    _, geometry = drawing.contact_sheet(clip, SIDE)
    assert len(geometry["frames"]) == drawing.MAX_COLUMNS
    assert geometry["frames"][0] == 0
    assert geometry["frames"][-1] == 19
    assert len(drawing.animation(clip, SIDE)) == 20


@pytest.mark.parametrize("modes", [("coarse",), ("coarse", "fine", "autoregressive")])
def test_files_are_written_and_the_animation_moves(tmp_path, modes):
    settings = type("S", (), {"tile_pixels": SIDE, "frame_milliseconds": 300})
    clip = make_clip(modes=modes)
    clip.frames[1] = 200
    entry = heatmaps.draw(clip, tmp_path, "k-0", settings)
    json.dumps(entry)
    with Image.open(tmp_path / entry["frames"]) as picture:
        assert picture.width == (1 + len(modes) + (len(modes) > 1)) * entry["frames_geometry"]["step"] - drawing.GAP
    with Image.open(tmp_path / entry["animation"]) as picture:
        assert (picture.n_frames, picture.info["duration"], picture.info["loop"]) == (NUM_FRAMES, 300, 0)
    drawing.overview(clip, 64).save(tmp_path / "overview.png")


@pytest.mark.parametrize(
    ("shares", "gain"),
    [
        ({"coarse": 0.2, "fine": 0.9, "autoregressive": 0.8}, 0.6),
        ({"coarse": 1.0, "fine": 0.0, "autoregressive": 0.4}, -0.6),
        ({"coarse": 0.7}, 0.0),
        ({"coarse": None, "fine": None, "autoregressive": None}, 0.0),
        (None, 0.0),
    ],
)
def test_the_gain_of_planned_queries_over_the_static_one(shares, gain):
    assert heatmaps.gain({"peak_on_target": shares}) == pytest.approx(gain)


class Data:
    tokens_dir, split = "data/tokens", "test"

    def __init__(self, rows, targets):
        self.rows = [{"key": key, "item": 0, "task": task, "kind": kind} for key, task, kind in rows]
        self.targets = targets

    def sample(self, number):
        item = type("I", (), {"target": self.targets.get(self.rows[number]["key"])})
        return type("S", (), {"objects": ["object"], "items": [item]})


ROWS = [("c", "card", "video"), ("a", "card", "video"), ("b", "gist", "video"), ("t", "text", "text")]


def test_random_clips_of_tasks_with_a_target():
    data = Data(ROWS, {"a": 0, "c": 1})
    found = [heatmaps.choose_clips(data, 1, seed) for seed in range(20)]
    assert sorted(map(tuple, found))[0] == (0,)
    assert sorted(map(tuple, found))[-1] == (1,)
    assert heatmaps.choose_clips(data, 1, 3) == found[3]
    assert heatmaps.choose_clips(data, 5, 0) == [1, 0]


def test_all_tasks_where_no_target_is_known():
    assert heatmaps.choose_clips(Data(ROWS, {}), 2, 0) == [1, 0, 2]


def test_no_frames_is_a_user_error():
    with pytest.raises(UserError, match="nothing to draw"):
        heatmaps.choose_clips(Data(ROWS[3:], {}), 1, 0)


def losses(values):
    """The table of `sheet.read_losses` for {(key, item): loss}."""
    rows = [(key, item, "card", loss, loss < 1) for (key, item), loss in values.items()]
    return pd.DataFrame(rows, columns=sheet.COLUMNS)


def names(chosen):
    return {part: list(zip(rows["key"], rows["item"], strict=True)) for part, rows in chosen.items()}


def test_best_worst_and_random_clips_in_equal_parts():
    table = losses({(f"k{n}", 0): float(n) for n in range(12)})
    chosen = names(sheet.choose(table, 7, seed=1))
    assert chosen["best"] == [("k0", 0), ("k1", 0), ("k2", 0)]
    assert chosen["worst"] == [("k11", 0), ("k10", 0)]
    assert len(chosen["random"]) == 2
    assert set(chosen["random"]) < {(f"k{n}", 0) for n in range(3, 10)}
    assert names(sheet.choose(table.sample(frac=1, random_state=3), 7, seed=1)) == chosen  # rows in any order
    drawn = {tuple(names(sheet.choose(table, 7, seed=seed))["random"]) for seed in range(20)}
    assert len(drawn) > 3


def test_a_clip_with_several_items_is_shown_once_and_few_clips_are_all_shown():
    table = losses({("a", 0): 0.1, ("a", 1): 9.0, ("b", 0): 2.0, ("b", 1): 2.0, ("c", 1): 1.0})
    chosen = names(sheet.choose(table, 64, seed=1))
    assert chosen == {"best": [("a", 0)], "worst": [("b", 1)], "random": [("c", 1)]}
    assert "the 1 lowest (best), the 1 highest (worst), and 1 of the rest" in sheet.rule(sheet.choose(table, 64, 1), 1)


def test_losses_are_per_scored_token_of_items_with_frames(tmp_path):
    rows = [
        ("a", 0, "card", "autoregressive", 4, 2.0, 4, 6),
        ("a", 0, "card", "coarse", 4, 8.0, 0, 6),
        ("b", 0, "card", "autoregressive", 5, 5.0, 4, 6),
        ("t", 0, "text", "text", 5, 5.0, 4, 0),
    ]
    columns = ["key", "item", "task", "mode", "num_tokens", "loss_sum", "num_correct", "num_frames"]
    pd.DataFrame(rows, columns=columns).to_parquet(tmp_path / "items.parquet")
    read = sheet.read_losses(tmp_path / "items.parquet").to_dict("records")
    assert [(row["key"], row["loss"], row["correct"]) for row in read] == [("a", 0.5, True), ("b", 1.0, False)]
    with pytest.raises(UserError, match=r"absent\.parquet does not exist: run `dvc repro evaluation`"):
        sheet.read_losses(tmp_path / "absent.parquet")
    pd.DataFrame({"key": ["a"]}).to_parquet(tmp_path / "old.parquet")
    with pytest.raises(UserError, match=r"old\.parquet: .*Regenerate it"):
        sheet.read_losses(tmp_path / "old.parquet")


def test_scored_items_of_another_split_are_a_user_error():
    entries = [{"key": "b", "item": 0}, {"key": "z", "item": 0}]
    assert heatmaps.sheet_rows(Data(ROWS, {}), entries[:1], "items.parquet") == [2]
    with pytest.raises(UserError, match=r"'z'.*split 'test'.*1 of 2"):
        heatmaps.sheet_rows(Data(ROWS, {}), entries, "items.parquet")


def test_the_sheet_shows_every_tile_and_its_attention():
    clip = make_clip(boxes=False, modes=("autoregressive",))  # bright at patch 0
    tiles = [sheet.Tile(clip, part, "card", f"{part} / 0", 0.5, part == "best") for part in ("best", "worst")]
    picture = sheet.picture(tiles)
    single = sheet.picture(tiles[:1])
    assert picture.width == single.width
    height = 2 * sheet.LINE + sheet.SIDE + 3 * drawing.GAP
    assert picture.height - single.height == sheet.BAND + height
    for number in range(2):
        top = drawing.MARGIN + sheet.BAND + 2 * sheet.LINE + drawing.GAP + number * (sheet.BAND + height)
        for t in range(NUM_FRAMES):
            left = drawing.MARGIN + t * (sheet.SIDE + sheet.FRAME_GAP)
            tile = np.asarray(picture.crop((left, top, left + sheet.SIDE, top + sheet.SIDE)), int)
            assert tile.reshape(4, 16, 4, 16, 3).mean(axis=(1, 3, 4)).argmax() == 0
    face = drawing.font(12)
    assert sheet.shortened("a" * 200 + "-7", face, 100).endswith("-7")
    assert face.getlength(sheet.shortened("a" * 200 + "-7", face, 100)) <= 100


def test_entropy_and_peak_over_the_frames():
    even, single = np.full(16, 1 / 16), np.eye(16)[3]
    half = np.zeros(16)
    half[:4] = 0.25  # two of four bits
    found = over_frames.mean_curves([{"fine": np.array([even, single, half])}, {"fine": np.array([single, single])}])
    assert found["fine"]["entropy"] == pytest.approx([0.5, 0, 0.5])
    assert found["fine"]["peak"] == pytest.approx([(1 / 16 + 1) / 2, 1, 0.25], abs=1e-6)
    assert found["fine"]["num_clips"] == [2, 2, 1]
    unseen = over_frames.mean_curves([{"fine": np.array([even, single])}, {"fine": np.array([0 * even, single])}])
    assert unseen["fine"] == {"entropy": [1, 0], "peak": [1 / 16, 1], "num_clips": [1, 2]}


def test_a_map_without_attention_has_no_peak():
    picture, zeros = Image.new("RGB", (SIDE, SIDE)), np.zeros(16)
    assert drawing.mark_peak(picture.copy(), zeros).tobytes() == picture.tobytes()
    assert drawing.mark_peak(picture.copy(), zeros + np.eye(16)[0]).tobytes() != picture.tobytes()
