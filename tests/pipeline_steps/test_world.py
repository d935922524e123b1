"""The procedural world in memory: what is drawn is what the ground truth says."""

import dataclasses

import numpy as np
import pytest

from pipeline_steps.world import digits as world
from pipeline_steps.world.digits import COLOUR_NAMES, COLOURS, KINDS, PLACES, render, sample_scene, scene_items


@pytest.fixture(scope="module")
def digits():
    return world.Digits()


def scenes(digits, kind, count=20, split="train", **chosen):
    return [sample_scene(np.random.default_rng(seed), kind, split, digits, **chosen) for seed in range(count)]


def test_digit_splits_are_disjoint_and_complete(digits):
    splits = {split: set(indices.tolist()) for split, indices in digits.splits.items()}
    assert {split: len(indices) for split, indices in splits.items()} == {"train": 1397, "validation": 200, "test": 200}
    assert set.union(*splits.values()) == set(range(1797))  # 1397 + 200 + 200: complete means disjoint
    for split, pools in digits.pools.items():
        assert set(np.concatenate(pools).tolist()) == splits[split]
        assert all((digits.values[pool] == value).all() and len(pool) for value, pool in enumerate(pools))


@pytest.mark.parametrize("kind", KINDS)
def test_scenes_follow_the_rules_of_the_world(digits, kind):
    for scene in scenes(digits, kind, split="test"):
        places = [PLACES.index(thing.place) for thing in scene.objects]
        assert places == sorted(set(places))
        assert len({thing.colour for thing in scene.objects}) == len(scene.objects)
        assert len(scene.objects) == 4 or kind == "gist"
        assert 0 <= scene.target < len(scene.objects)
        for thing, place in zip(scene.objects, places, strict=True):
            assert [digits.values[image] for image in thing.digit_images] == list(thing.digits)
            assert set(thing.digit_images) <= set(digits.splits["test"].tolist())
            for (x, y), patch in zip(thing.corners, thing.patches, strict=True):
                assert x // 14 == (x + 11) // 14  # inside one patch
                assert y // 14 == (y + 11) // 14
                assert 2 * (y // 28) + x // 28 == place  # in its lane
                assert patch == 4 * (y // 14) + x // 14
            assert all(a != b for a, b in zip(thing.patches, thing.patches[1:], strict=False))
            values_change = [a != b for a, b in zip(thing.digits, thing.digits[1:], strict=False)]
            assert all(values_change) if kind in world.HOPPING_KINDS else not any(values_change)


@pytest.mark.parametrize("kind", ["card", "gist", "image"])
def test_smooth_digits_go_around_their_lane_and_all_else_stays(digits, kind):
    num_frames = 1 if kind == "image" else 6
    steps, directions = set(), set()
    pairs = zip(
        scenes(digits, kind, num_frames=num_frames, motion="smooth"),
        scenes(digits, kind, num_frames=num_frames),
        strict=True,
    )
    for smooth, abrupt in pairs:
        for one, other in zip(smooth.objects, abrupt.objects, strict=True):
            assert dataclasses.replace(one, corners=other.corners) == other
            assert one.corners[0] == other.corners[0]
            x, y = np.array(one.corners).T // 14
            steps |= set((abs(np.diff(x)) + abs(np.diff(y))).tolist())
            for corners in zip(one.corners, one.corners[4:], strict=False):
                assert corners[0] == corners[1]  # back after four steps, at the same place of the patch
            if num_frames > 2:
                around = [[0, 1, 3, 2].index(2 * (b % 2) + a % 2) for a, b in zip(x, y, strict=True)]
                turns = set(np.diff(around) % 4)
                assert len(turns) == 1
                directions |= turns
        assert smooth.noise_seed == abrupt.noise_seed
    assert steps == ({1} if num_frames > 1 else set())
    assert directions == ({1, 3} if num_frames > 1 else set())


def test_abrupt_is_the_motion_of_digits(digits):
    assert [scene.objects for scene in scenes(digits, "card", motion="abrupt")] == [
        scene.objects for scene in scenes(digits, "card")
    ]


def test_requested_answers_and_numbers_of_objects_are_sampled(digits):
    for scene in scenes(digits, "card", colour=3, place=2):
        target = scene.objects[scene.target]
        assert (target.colour, target.place) == (COLOUR_NAMES[3], PLACES[2])
    for scene in scenes(digits, "gist", background=1, num_objects=3):
        assert (scene.background, len(scene.objects)) == (world.BACKGROUND_NAMES[1], 3)
    assert {len(scene.objects) for kind in KINDS if kind != "gist" for scene in scenes(digits, kind)} == {4}


def test_questions_and_answers_of_every_kind(digits):
    corners = ((0, 0), (14, 0), (0, 14))
    red = world.SceneObject("red", "top left", (3, 1, 4), (0, 0, 0), corners)
    cyan = world.SceneObject("cyan", "bottom right", (2, 7, 1), (0, 0, 0), corners)
    base = world.Scene("card", "test", "teal", (red, cyan), 1, np.zeros((0, 6), int), (0.0, 0.0), 0)

    def first(kind):
        return scene_items(dataclasses.replace(base, kind=kind))[0]

    assert first("card") == {
        "user": "Which digits does the card's colour show?",
        "assistant": "cyan: 71",
        "task": "card",
        "cue": "cyan:",
        "target": 1,
    }
    expected = {
        "follow": ("Which digits show where the box was?", "bottom right: 71"),
        "ask_colour": ("Which digits does cyan show?", "cyan: 71"),
        "ask_place": ("Which digits show at the bottom right?", "bottom right: 71"),
        "caption": (None, "red 3, cyan 2"),
        "image": ("What is in the picture?", "red 3, cyan 2"),
        "gist": ("What is the background and how many digits are there?", "teal, 2"),
    }
    for kind, texts in expected.items():
        item = first(kind)
        assert (item["user"], item["assistant"], item["task"]) == (*texts, kind)
        assert (item["target"] is None) == (item["cue"] == "") == (kind in ("caption", "image", "gist"))


def test_additional_items_ask_different_questions(digits):
    for kind in KINDS:
        for scene in scenes(digits, kind):
            items = scene_items(scene, np.random.default_rng(0), num_ask_items=5)
            assert len({item["user"] for item in items}) == len(items)
            assert len(items) == (6 if kind in world.HOPPING_KINDS else 2 if kind == "gist" else 1)
    lone = scenes(digits, "card", 1, num_objects=1)[0]
    assert len(scene_items(lone, np.random.default_rng(0), num_ask_items=5)) == 3  # one object: two other questions


def test_small_frames_equal_averaged_large_frames(digits):
    for scene in scenes(digits, "card", 5):
        large, small = (render(scene, digits, size, noise=0).astype(float) for size in (112, 56))
        assert np.abs(large.reshape(6, 56, 2, 56, 2, 3).mean((2, 4)) - small).max() <= 1
        large, small = (render(scene, digits, size).astype(float) for size in (112, 56))
        assert np.abs(large.reshape(6, 56, 2, 56, 2, 3).mean((2, 4)) - small).mean() < 0.5


def test_every_object_is_drawn_in_its_box_and_nowhere_else(digits):
    for scene in scenes(digits, "ask_colour", 10):
        frames = render(scene, digits, 112, noise=0)
        for thing in scene.objects:
            colour_pixels = (np.abs(frames - np.array(COLOURS[thing.colour], float)).max(-1)) < 40  # [T, H, W]
            for t, (x0, y0, x1, y1) in enumerate(np.round(112 * np.array(thing.boxes)).astype(int)):
                inside = colour_pixels[t, y0:y1, x0:x1].sum()
                assert inside > 20
                assert colour_pixels[t].sum() == inside


def test_cue_is_drawn_in_the_first_frame_only(digits):
    for scene in scenes(digits, "card", 3):
        border = render(scene, digits, 112, noise=0)[:, 0].astype(int)  # top row of pixels, [T, W, 3]
        colour = np.array(COLOURS[scene.objects[scene.target].colour])
        matches = (np.abs(border - colour).max(-1) < 3).mean(1)
        assert matches[0] > 0.5  # digits may cover a part
        assert (matches[1:] < 0.3).all()
    for scene in scenes(digits, "follow", 3):
        white = (render(scene, digits, 56, noise=0) == 250).all(-1)  # [T, H, W]
        lanes = white.reshape(6, 2, 28, 2, 28).sum((2, 4)).reshape(6, 4)
        assert lanes[0].argmax() == PLACES.index(scene.objects[scene.target].place)
        assert (lanes[0] > 0).sum() == 1
        assert not white[1:].any()


def test_rendering_is_deterministic_with_the_given_noise(digits):
    scene = scenes(digits, "caption", 1)[0]
    assert (render(scene, digits) == render(scene, digits)).all()
    grain = render(scene, digits, 56, noise=0.06).astype(float) - render(scene, digits, 56, noise=0)
    assert grain.std() == pytest.approx(0.06 * 255, rel=0.1)
    with pytest.raises(ValueError, match="100"):
        render(scene, digits, 100)


def test_batch_labels_match_the_pixels(digits):
    batch = world.render_batch(np.random.default_rng(0), digits, 40, noise=0)
    assert batch.frames.shape == (40, 56, 56, 3)
    palette = np.array(list(COLOURS.values()), float)
    patches = batch.frames.reshape(40, 4, 14, 4, 14, 3).swapaxes(2, 3).reshape(40, 16, 14, 14, 3)
    patches = patches[:, :, 2:-2, 2:-2].reshape(40, 16, 100, 1, 3)  # without the cue's border and box
    nearest = np.abs(patches - palette).max(-1).min(2)  # [B, N, colours]
    has_digit = batch.patch_digit != world.NO_DIGIT
    assert (nearest.argmin(-1)[has_digit] == batch.patch_colour[has_digit]).mean() > 0.99
    assert (nearest.min(-1)[~has_digit] > 60).all()
    assert ((batch.patch_colour != world.NO_COLOUR) == has_digit).all()
    assert ((batch.colour_digit != world.NO_DIGIT).sum(1) == has_digit.sum(1)).all()
    assert (np.sort(batch.colour_digit, 1)[:, :4] == np.sort(batch.place_digit, 1)).all()
    bordered, boxed = batch.border_colour != world.NO_COLOUR, batch.box_place != world.NO_PLACE
    assert bordered.any()
    assert boxed.any()
    assert not (bordered & boxed).any()
