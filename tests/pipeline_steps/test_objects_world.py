"""The world of objects: what is drawn is what the ground truth says, and held-out things are held out."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline_steps.common.errors import UserError
from pipeline_steps.world import object_scene
from pipeline_steps.world import objects as world
from pipeline_steps.world.cutouts import COLOURS, PATTERNS, SPLITS, Backgrounds, divide, head_noun
from pipeline_steps.world.objects import GAZE_KINDS, KINDS, NEW_KINDS
from tests import drawings

T = 12  # frames


@pytest.fixture(scope="module")
def backgrounds():
    return Backgrounds(None, 0.2, seed=1)


def scenes(cutouts, backgrounds, kind, count=12, split="train", num_frames=T, is_new=False, motion=None):
    rngs = (np.random.default_rng((seed, KINDS.index(kind))) for seed in range(count))
    return [world.sample_scene(rng, kind, split, cutouts, backgrounds, num_frames, is_new, motion) for rng in rngs]


def names(cutouts, track):
    return [cutouts.pictures[picture].name for picture in track.pictures]


# ---------------------------------------------------------------- scenes and questions


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "still"])
def test_objects_move_as_the_motion_says(cutouts, backgrounds, kind):
    moved = {}
    for motion in ("smooth", "abrupt"):
        tracks = [
            t for s in scenes(cutouts, backgrounds, kind, count=4, num_frames=16, motion=motion) for t in s.tracks
        ]
        steps = np.linalg.norm(np.diff([track.centres for track in tracks], axis=1), axis=2)  # [tracks, 15]
        moved[motion] = (steps > 1e-3).mean()
        if motion == "abrupt":  # at most five points, so at most four jumps
            assert ((steps > 1e-3).sum(1) <= 4).all()
    assert moved["smooth"] > 0.6


def test_the_marked_object_becomes_the_answer(cutouts, backgrounds):
    for scene in scenes(cutouts, backgrounds, "become"):
        item = world.scene_items(scene, cutouts)[0]
        shown = [names(cutouts, track) for track in scene.tracks]
        assert item["task"] == "become"
        assert item["assistant"] == shown[item["target"]][-1] != shown[item["target"]][0]
        assert len({own[-1] for own in shown}) == len({own[0] for own in shown}) == 4  # four candidates
        assert all(len(set(own)) == 2 for own in shown)  # the others change as well
        frames, _ = object_scene.render(scene, cutouts, backgrounds, 112)
        white = (frames > 250).all(-1).sum((1, 2))
        plain = object_scene.render(replace(scene, kind="small"), cutouts, backgrounds, 112)[0]
        assert white[0] > (plain[0] > 250).all(-1).sum() + 50  # the mark, in the first frame only
        assert (frames[1:] == plain[1:]).all()


def test_what_is_at_a_place_over_time(cutouts, backgrounds):
    for scene in scenes(cutouts, backgrounds, "place"):
        items = world.scene_items(scene, cutouts, np.random.default_rng(0), 3)
        assert len({item["user"] for item in items}) == 4
        for item in items:
            track = scene.tracks[item["target"]]
            assert item["user"] == f"What is at the {track.place} over time?"
            told = item["assistant"].split(", ")
            shown = names(cutouts, track)
            assert told == [name for t, name in enumerate(shown) if t == 0 or name != shown[t - 1]]
            assert 2 <= len(told) <= 3
            x, y = np.array(track.centres).T
            vertical, horizontal = track.place.split()
            assert ((y < 0.5) == (vertical == "top")).all()
            assert ((x < 0.5) == (horizontal == "left")).all()


def test_what_the_named_object_meets(cutouts, backgrounds):
    for scene in scenes(cutouts, backgrounds, "meet"):
        items = world.scene_items(scene, cutouts, np.random.default_rng(0), 3)
        assert len(items) == 2
        shown = [names(cutouts, track)[0] for track in scene.tracks]
        assert len(set(shown)) == 4
        paths = np.array([track.centres for track in scene.tracks])  # [4, T, 2]
        for item in items:
            me = item["target"]
            assert item["user"] == f"What does the {shown[me]} meet?"
            other = shown.index(item["assistant"])
            distances = np.linalg.norm(paths - paths[me], axis=-1)[:, T // 2]
            waiting = [index for index, visited in enumerate(scene.others) if visited < 0]
            assert min(waiting, key=lambda index: distances[index]) == other == scene.others[me]
            sizes = np.array([track.size for track in scene.tracks])
            reach = (sizes + sizes[me])[:, None] / 2
            near = (np.linalg.norm(paths - paths[me], axis=-1) <= reach).sum(1)  # frames
            assert near[other] >= 2 * max(near[index] for index in range(4) if index not in (me, other))


def test_the_small_object_is_the_smallest_and_on_top(cutouts, backgrounds):
    for scene in scenes(cutouts, backgrounds, "small"):
        item = world.scene_items(scene, cutouts)[0]
        sizes = [track.size for track in scene.tracks]
        assert item["target"] == len(sizes) - 1
        assert 1.5 * sizes[-1] < min(sizes[:-1])
        assert item["assistant"] == names(cutouts, scene.tracks[-1])[0]
        _, boxes = object_scene.render(scene, cutouts, backgrounds, 112)
        assert (boxes[-1, :, 2] > boxes[-1, :, 0]).all()


@pytest.mark.parametrize("kind", ["caption", "background", "still"])
def test_questions_about_the_whole_frame(cutouts, backgrounds, kind):
    for scene in scenes(cutouts, backgrounds, kind):
        assert scene.num_frames == (1 if kind == "still" else T)
        items = {item["task"]: item for item in world.scene_items(scene, cutouts, np.random.default_rng(0), 3)}
        assert all(item["target"] is None for item in items.values())
        assert items["background"]["assistant"] == scene.background.name
        told = next(item for task, item in items.items() if task != "background")
        assert (told["user"] is None) == (kind != "still")
        by_place = sorted(scene.tracks, key=lambda track: np.mean(track.centres, axis=0)[0])
        assert told["assistant"] == ", ".join(names(cutouts, track)[0] for track in by_place)


def test_objects_pass_behind_each_other_enter_and_leave(cutouts, backgrounds):
    made = [scene for kind in ("become", "caption") for scene in scenes(cutouts, backgrounds, kind, 30)]
    visible = [object_scene.visibility(scene, cutouts, 56) for scene in made]
    assert any((values[:, 1:-1] < 0.6).any() for values in visible[:30])  # behind another one
    assert any((values[:, 0] == 0).any() for values in visible[30:])  # not there yet
    assert any((values[:, -1] == 0).any() for values in visible[30:])  # gone


def test_a_scene_whose_target_is_hidden_is_not_clear(cutouts, backgrounds):
    scene = scenes(cutouts, backgrounds, "become", 1)[0]
    assert world._is_clear(scene, cutouts)
    target = scene.tracks[scene.target]
    ball = cutouts.of["ball"][0]
    cover = replace(target, pictures=(ball,) * T, size=0.9)
    assert not world._is_clear(replace(scene, tracks=(*scene.tracks, cover)), cutouts)


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_enclose_what_is_seen(cutouts, backgrounds, kind):
    """Without a track, exactly the pixels in and around its box change."""
    for scene in scenes(cutouts, backgrounds, kind, 3):
        scene = replace(scene, kind="small")  # no mark
        frames, boxes = object_scene.render(scene, cutouts, backgrounds, 112)
        assert frames.shape == (scene.num_frames, 112, 112, 3)
        assert boxes.min() >= 0
        assert boxes.max() <= 1
        for index, _ in enumerate(scene.tracks):
            away = replace(scene.tracks[index], centres=((-9.0, -9.0),) * scene.num_frames)
            others = (*scene.tracks[:index], away, *scene.tracks[index + 1 :])
            without, _ = object_scene.render(replace(scene, tracks=others), cutouts, backgrounds, 112)
            for t in range(scene.num_frames):
                differs = np.abs(frames[t].astype(int) - without[t]).max(-1) > 60  # [H, W]
                x0, y0, x1, y1 = np.round(112 * boxes[index, t]).astype(int)
                if x1 == x0:
                    continue
                outside = differs.copy()
                outside[max(0, y0 - 1) : y1 + 1, max(0, x0 - 1) : x1 + 1] = False
                assert not outside.any()
                assert differs[y0:y1, x0:x1].any()


def test_rendering_repeats(cutouts, backgrounds):
    scene = scenes(cutouts, backgrounds, "meet", 1)[0]
    for first, second in zip(*(object_scene.render(scene, cutouts, backgrounds, 56) for _ in range(2)), strict=True):
        assert (first == second).all()


# ---------------------------------------------------------------- what is held out


def test_names_are_divided_by_their_last_word():
    given = ["red apple", "green apple", "fox", "red fox", *(f"thing{n}" for n in range(18))]
    split = divide(given, 0.1, seed=3)
    assert sorted(name for part in split.values() for name in part) == sorted(given)
    nouns = [{head_noun(name) for name in part} for part in split.values()]
    assert sum(map(len, nouns)) == len(set.union(*nouns))
    assert len(nouns[SPLITS.index("test")]) == len(nouns[SPLITS.index("validation")]) == 2
    assert divide(given, 0.1, seed=4) != split


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("kind", NEW_KINDS)
def test_new_tasks_ask_for_held_out_names_and_the_others_never_show_them(cutouts, backgrounds, kind, split):
    held_out = set(cutouts.names[split])
    never = set(cutouts.names["test" if split == "validation" else "validation"])
    for scene in scenes(cutouts, backgrounds, kind, 5, split, is_new=True):
        item = world.scene_items(scene, cutouts)[0]
        assert item["task"] == f"{kind}_new"
        told = item["assistant"].split(", ")
        assert told[0] in held_out if kind in GAZE_KINDS else len(set(told) & held_out) == 2
        shown = {name for track in scene.tracks for name in names(cutouts, track)}
        assert not shown & never
        assert scene.background in backgrounds.by_split[split]
    for scene in scenes(cutouts, backgrounds, kind, 5, split):
        shown = {name for track in scene.tracks for name in names(cutouts, track)}
        assert shown <= set(cutouts.names["train"])
        assert scene.background in backgrounds.by_split[split]


def test_textures_are_held_out_as_combinations(backgrounds):
    parts = {split: {own.name for own in backgrounds.by_split[split]} for split in SPLITS}
    assert sum(map(len, parts.values())) == len(PATTERNS) * len(COLOURS) == len(set.union(*parts.values()))
    known = {word for name in parts["train"] for word in name.split()}
    assert known == set(PATTERNS) | set(COLOURS)


def test_objects_stand_out_from_the_background(cutouts, backgrounds):
    for kind in KINDS:
        for scene in scenes(cutouts, backgrounds, kind, 5):
            ground = backgrounds.colour(scene.background)
            for picture in {picture for track in scene.tracks for picture in track.pictures}:
                assert np.linalg.norm(cutouts.colour(picture) - ground) > 30


def test_photographs_as_backgrounds(tmp_path, cutouts):
    drawings.write_meadows(tmp_path, range(6), (300, 200), "jpg")
    photographs = Backgrounds(tmp_path, 0.2, seed=1)
    parts = [{own.name for own in photographs.by_split[split]} for split in SPLITS]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 6
    assert all(parts)
    scene = scenes(cutouts, photographs, "background", 1, "test")[0]
    frames, _ = object_scene.render(scene, cutouts, photographs, 56)
    number = int(scene.background.name.split()[1])
    corner = np.median(frames[:, :6].reshape(-1, 3), 0)
    assert np.abs(corner - (40 * number, 90, 30)).max() < 4
    drawings.write_meadows(tmp_path, range(2), (300, 200), "jpg")
    with pytest.raises(UserError, match="holds 2 different pictures, expected at least 3"):
        Backgrounds(tmp_path, 0.2, seed=1)
