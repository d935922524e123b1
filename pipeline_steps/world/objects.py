"""The world of objects: cut-outs of several sizes that move over a background, rendered in memory.

Shapes: T frames. Places and sizes are in 0..1 of the frame. object_scene.py explains tracks and ground truth.

    cutouts, backgrounds = Cutouts(folder, 0.15, seed=1), Backgrounds(None, 0.15, seed=1)
    scene = sample_scene(np.random.default_rng(0), "become", "train", cutouts, backgrounds, num_frames=12)
    frames, boxes = object_scene.render(scene, cutouts, backgrounds, size=224)  # uint8 [T, 224, 224, 3], [tracks, T, 4]
    items = scene_items(scene, cutouts)
"""

from dataclasses import replace

import numpy as np

from pipeline_steps.common.names import NEW
from pipeline_steps.world.cutouts import Background, Backgrounds, Cutouts, head_noun
from pipeline_steps.world.object_scene import Scene, Track, visibility

# The first four need the gaze: the answer is about one of several similar things, known by a mark, a place, a name or
# its size. The others are about the whole frame.
GAZE_KINDS = ("become", "place", "meet", "small")
KINDS = (*GAZE_KINDS, "caption", "background", "still")
NEW_KINDS = tuple(kind for kind in KINDS if kind != "background")
PLACES = ("top left", "top right", "bottom left", "bottom right")
CENTRES = ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75))  # of PLACES
MIN_FRAMES = 6  # a clip needs them for changes and meetings
CLEAR = 0.6  # share of the target's pixels that is visible where the answer is decided
TRIES = 30
MIN_CONTRAST = 60  # distance of two mean colours, RGB 0..255, from which on an object stands out


def sample_scene(
    rng: np.random.Generator,
    kind: str,
    split: str,
    cutouts: Cutouts,
    backgrounds: Backgrounds,
    num_frames: int,
    is_new: bool = False,
    motion: str | None = None,
) -> Scene:
    """Sample a scene whose target can be seen where the answer is decided.

    split: of the background, and of the held-out names if `is_new`; all other names are training names. Kind `still`
    has one frame, whatever `num_frames` says. motion: smooth (objects glide), abrupt (they jump) or None (some of
    both).
    """
    if kind not in KINDS or (kind != "still" and num_frames < MIN_FRAMES):
        raise ValueError(f"kind is {kind!r} with {num_frames} frames, expected one of {KINDS}, {MIN_FRAMES} or more")
    names = Names(rng, cutouts, split if is_new else None)
    base = Scene(
        kind=kind,
        split=split,
        is_new=is_new,
        background=backgrounds.by_split[split][0],
        tracks=(),
        target=None,
        motion=motion,
        drift=tuple(rng.uniform(-1, 1, 2).tolist()),
        seed=int(rng.integers(0, 2**63)),
    )
    build = {"become": _become, "place": _place, "meet": _meet, "small": _small}.get(kind, _row)
    for _ in range(TRIES):
        scene = build(rng, base, names, num_frames)
        if _is_clear(scene, cutouts):
            break
    return replace(scene, background=_contrasting(rng, scene, cutouts, backgrounds))


def _contrasting(rng: np.random.Generator, scene: Scene, cutouts: Cutouts, backgrounds: Backgrounds) -> Background:
    """A random background of the split before which every object stands out; of those, if there is none, the best."""
    choices = backgrounds.by_split[scene.split]
    colours = np.stack([cutouts.colour(picture) for own in scene.tracks for picture in sorted(set(own.pictures))])
    order = rng.permutation(len(choices))
    contrasts = [np.linalg.norm(colours - backgrounds.colour(choices[i]), axis=1).min() for i in order]
    enough = [i for i, contrast in zip(order, contrasts, strict=True) if contrast >= MIN_CONTRAST]
    return choices[enough[0] if enough else order[int(np.argmax(contrasts))]]


class Names:
    """Draws pictures for one clip: known names, and the names that are asked for, which may be held out."""

    def __init__(self, rng: np.random.Generator, cutouts: Cutouts, held_out_split: str | None):
        self.rng, self.cutouts = rng, cutouts
        self.known = cutouts.names["train"]
        self.asked = self.known if held_out_split is None else cutouts.names[held_out_split]

    def draw(self, count: int, asked: int = 0, before=(), earlier=()) -> list[int]:
        """`count` pictures of different names, the first `asked` of them of names to ask for, as far as these go.

        No two names share their last word. before: the pictures that these follow, one by one, and whose names they do
        not share; they share none with all of `before` and `earlier` as long as there are enough others.
        """
        used, pictures = {self.noun(picture) for picture in (*before, *earlier)}, []
        for number in range(count):
            near = {self.noun(picture) for picture in (*pictures, *before[number : number + 1])}
            pools = [self.asked, self.known] if number < asked else [self.known]
            free = [[name for name in pool if head_noun(name) not in taken] for pool in pools for taken in (used, near)]
            name = next(names[int(self.rng.integers(len(names)))] for names in free if names)
            used.add(head_noun(name))
            of_name = self.cutouts.of[name]
            pictures.append(of_name[int(self.rng.integers(len(of_name)))])
        return pictures

    def noun(self, picture: int) -> str:
        return head_noun(self.cutouts.pictures[picture].name)


# ---------------------------------------------------------------- paths


def glide(points: np.ndarray, num_frames: int) -> np.ndarray:
    """Smooth path through points [P, 2] at equal distances in time: [T, 2]."""
    at = np.linspace(0, len(points) - 1, num_frames)
    left = np.minimum(at.astype(int), len(points) - 2)
    share = at - left
    share = (share * share * (3 - 2 * share))[:, None]
    return points[left] * (1 - share) + points[left + 1] * share


def jump(points: np.ndarray, num_frames: int) -> np.ndarray:
    """Path that stays at each of the points [P, 2] for the same time and then jumps to the next one: [T, 2]."""
    return points[np.arange(num_frames) * len(points) // num_frames]


PATHS = {"smooth": glide, "abrupt": jump}


def path_of(rng: np.random.Generator, motion: str | None, smooth_share: float):
    """`glide` or `jump`, as `motion` says; None: drawn, `glide` with probability `smooth_share`."""
    drawn = glide if rng.random() < smooth_share else jump  # drawn in any case, so that all else stays as it is
    return PATHS.get(motion, drawn)


def drift(
    rng: np.random.Generator, motion: str | None, centre: tuple[float, float], num_frames: int, reach: float
) -> np.ndarray:
    """Small movement around a centre: [T, 2]."""
    points = np.asarray(centre) + rng.uniform(-reach, reach, (int(rng.integers(2, 4)), 2))
    return path_of(rng, motion, 0.5)(points, num_frames)


def track(rng: np.random.Generator, pictures, path: np.ndarray, size: float, place: str = "") -> Track:
    """A Track with a random flip and angle. pictures: one index, or one per frame."""
    shown = [pictures] * len(path) if isinstance(pictures, int) else list(pictures)
    centres = tuple((float(x), float(y)) for x, y in np.round(path, 4))
    flip, angle = bool(rng.random() < 0.5), float(rng.uniform(-12, 12))
    return Track(tuple(shown), centres, float(size), flip, angle, place)


# ---------------------------------------------------------------- kinds


def _become(rng: np.random.Generator, base: Scene, names: Names, num_frames: int) -> Scene:
    """Four objects trade places and each one changes once; one of them is marked in the first frame."""
    legs = int(rng.integers(2, 4))
    path = path_of(rng, base.motion, 0.6)
    order = np.stack([rng.permutation(4) for _ in range(legs)])  # [points, objects] -> quadrant
    points = np.array(CENTRES)[order] + rng.uniform(-0.05, 0.05, (legs, 4, 2))
    before = names.draw(4)
    after = names.draw(4, asked=4, before=before)
    quiet = [t for t in range(num_frames // 3, 2 * num_frames // 3 + 1) if t * legs % num_frames >= legs]
    times = rng.permutation(quiet)[:4] if len(quiet) >= 4 else rng.choice(quiet, 4)  # never in the frame of a jump
    tracks = []
    for index in range(4):
        shown = [before[index] if t < times[index] else after[index] for t in range(num_frames)]
        tracks.append(track(rng, shown, path(points[:, index], num_frames), rng.uniform(0.26, 0.4)))
    return _shuffled(rng, base, tracks, target=0)


def _place(rng: np.random.Generator, base: Scene, names: Names, num_frames: int) -> Scene:
    """Four places, at each of which one object follows another at its own times."""
    count = 2 if num_frames < 9 else int(rng.integers(2, 4))
    shown = [names.draw(4, asked=4)]
    for _ in range(count - 1):
        shown.append(names.draw(4, asked=4, before=shown[-1], earlier=shown[0]))
    places = rng.permutation(4)
    tracks = []
    for index, place in enumerate(places):
        times = [round(num_frames * (number + rng.uniform(0.75, 1.25)) / count) for number in range(count - 1)]
        pictures = [shown[sum(t >= time for time in times)][index] for t in range(num_frames)]
        path = drift(rng, base.motion, CENTRES[place], num_frames, 0.04)
        tracks.append(track(rng, pictures, path, rng.uniform(0.28, 0.37), PLACES[place]))
    return _shuffled(rng, base, tracks, target=0)


def _meet(rng: np.random.Generator, base: Scene, names: Names, num_frames: int) -> Scene:
    """Two objects wait, two others stay beside one each for half of the clip; their paths may cross."""
    pictures = names.draw(4, asked=4)  # two that wait, then their visitors
    waiting = np.array([[0.24, 0.26], [0.76, 0.26]]) + rng.uniform(-0.04, 0.04, (2, 2))
    homes = np.array([[0.2, 0.8], [0.8, 0.8]])[rng.permutation(2)] + rng.uniform(-0.05, 0.05, (2, 2))
    sizes = rng.uniform(0.26, 0.36, 4)
    gap = 0.45 * (sizes[:2] + sizes[2:])
    beside = waiting + np.stack([0.15 * gap * np.where(waiting[:, 0] < 0.5, -1, 1), 0.85 * gap], 1)
    leave = homes[::-1] + rng.uniform(-0.05, 0.05, (2, 2)) if rng.random() < 0.5 else homes
    turn = int(rng.integers(4))
    paths = []
    for index in range(2):
        paths.append(drift(rng, base.motion, waiting[index], num_frames, 0.015))
    for index in range(2):
        points = np.stack([homes[index], beside[index], beside[index], leave[index]])
        paths.append(PATHS.get(base.motion, glide)(points, num_frames))
    tracks = [track(rng, pictures[index], _turned(path, turn), sizes[index]) for index, path in enumerate(paths)]
    scene = replace(base, others=(-1, -1, 0, 1))
    return _shuffled(rng, scene, tracks, target=2)


def _small(rng: np.random.Generator, base: Scene, names: Names, num_frames: int) -> Scene:
    """One small object in front of four large ones."""
    pictures = names.draw(5, asked=5)
    tracks = []
    for index, centre in enumerate(CENTRES):
        path = drift(rng, base.motion, centre, num_frames, 0.04)
        tracks.append(track(rng, pictures[index + 1], path, rng.uniform(0.36, 0.42)))
    tracks = [tracks[index] for index in rng.permutation(4)]
    points = rng.uniform(0.12, 0.88, (int(rng.integers(3, 6)), 2))
    path = path_of(rng, base.motion, 0.5)(points, num_frames)
    small = track(rng, pictures[0], path, rng.uniform(0.16, 0.2))
    return replace(base, tracks=(*tracks, small), target=4)


def _row(rng: np.random.Generator, base: Scene, names: Names, num_frames: int) -> Scene:
    """One to four objects side by side; in clips they move up and down, and one may enter or leave."""
    frames = 1 if base.kind == "still" else num_frames
    count = int(rng.integers(1 if base.kind == "background" else 2, 5))
    pictures = names.draw(count, asked=count)
    tracks = []
    for index in rng.permutation(count):
        largest = min(0.42, 0.95 / count)
        size = rng.uniform(0.7 * largest, 1.1 * largest)
        x = np.clip((index + 0.5) / count, 0.58 * size, 1 - 0.58 * size)
        reach = min(0.5 - 0.58 * size, 0.26)
        points = np.stack([np.full(3, x), 0.5 + rng.uniform(-reach, reach, 3)], 1)
        points[:, 0] += rng.uniform(-0.04, 0.04, 3) / count
        if frames > 1 and index == 0 and count > 1 and rng.random() < 0.5:
            points[0 if rng.random() < 0.5 else -1, 1] = rng.choice([-0.3, 1.3])  # enters, or leaves
        path = points[:1] if frames == 1 else path_of(rng, base.motion, 0.7)(points, frames)
        tracks.append(track(rng, pictures[index], path, size))
    return replace(base, tracks=tuple(tracks))


def _turned(path: np.ndarray, quarters: int) -> np.ndarray:
    """The path, turned by quarters of a circle around the centre of the frame."""
    for _ in range(quarters):
        path = np.stack([1 - path[:, 1], path[:, 0]], 1)
    return path


def _shuffled(rng: np.random.Generator, scene: Scene, tracks: list[Track], target: int) -> Scene:
    """The scene with its tracks in a random drawing order."""
    order = rng.permutation(len(tracks)).tolist()
    where = {old: new for new, old in enumerate(order)}
    others = tuple(where.get(scene.others[old], -1) for old in order) if scene.others else ()
    return replace(scene, tracks=tuple(tracks[old] for old in order), target=where[target], others=others)


# ---------------------------------------------------------------- what can be seen

COARSE = 56  # px of the frames on which a scene is checked


def _is_clear(scene: Scene, cutouts: Cutouts) -> bool:
    """Whether the target, and what it meets, is seen in every frame in which the answer is decided, and everything
    else in half of the frames."""
    visible = visibility(scene, cutouts, COARSE)
    last = scene.num_frames - 1
    if (np.mean(visible >= CLEAR, axis=1) < 0.5).any():
        return False
    if scene.target is None:
        return True
    needed = {0, last}
    if scene.kind in ("place", "small"):
        needed |= set(range(scene.num_frames))
    if scene.kind == "become":
        needed |= set(range(last - 1, last + 1))
    clear = all(visible[scene.target, t] >= CLEAR for t in needed)
    if scene.kind == "meet":
        middle = range(scene.num_frames // 3, 2 * scene.num_frames // 3 + 1)
        clear &= all(visible[i, t] >= CLEAR for i in (scene.target, scene.others[scene.target]) for t in middle)
    return clear


# ---------------------------------------------------------------- questions


def scene_items(
    scene: Scene, cutouts: Cutouts, rng: np.random.Generator | None = None, num_extra: int = 0
) -> list[dict]:
    """The scene's items: {"user", "assistant", "task", "cue", "target"}. The first is the question of its kind.

    It is followed by up to `num_extra` others about the same clip, drawn with `rng`: other places, other meetings, the
    background. `user` is None for captions: the tokens stage inserts the default prompt.
    """
    first = _item(scene, cutouts, scene.kind, scene.target)
    others = []
    if scene.kind == "place":
        others = [("place", index) for index in range(len(scene.tracks)) if index != scene.target]
    elif scene.kind == "meet":
        others = [("meet", i) for i, other in enumerate(scene.others) if other >= 0 and i != scene.target]
    elif scene.kind in ("caption", "still"):
        others = [("background", None)]
    elif scene.kind == "background":
        others = [("caption", None)]
    chosen = rng.permutation(len(others))[:num_extra] if others and num_extra else ()
    return [first, *(_item(scene, cutouts, *others[index]) for index in chosen)]


def _item(scene: Scene, cutouts: Cutouts, task: str, target: int | None) -> dict:
    shown = [[cutouts.pictures[picture].name for picture in own.pictures] for own in scene.tracks]
    if task == "become":
        user, answer = "What does the marked object become?", shown[target][-1]
    elif task == "place":
        changes = [name for t, name in enumerate(shown[target]) if t == 0 or name != shown[target][t - 1]]
        user, answer = f"What is at the {scene.tracks[target].place} over time?", ", ".join(changes)
    elif task == "meet":
        user, answer = f"What does the {shown[target][0]} meet?", shown[scene.others[target]][0]
    elif task == "small":
        user, answer = "What is the small object?", shown[target][0]
    elif task == "background":
        user, answer = "What is the background?", scene.background.name
    else:
        user = "What is in the picture?" if task == "still" else None
        order = sorted(range(len(shown)), key=lambda index: np.mean(scene.tracks[index].centres, axis=0)[0])
        answer = ", ".join(shown[index][0] for index in order)
    name = task + NEW if scene.is_new and task in NEW_KINDS else task
    return {"user": user, "assistant": answer, "task": name, "cue": "", "target": target}
