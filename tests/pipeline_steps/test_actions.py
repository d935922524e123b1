"""Source `actions`: folders as published, from annotations to scores."""

import io
import json
import tarfile
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pytest
from PIL import Image

from pipeline_steps.backbones.tokenizer import save_tokenizer, train_tokenizer
from pipeline_steps.common import modes, params
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.schemas import SPLITS
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
from tests.pipeline_steps.action_folders import WRITERS, clip, collected, entry, section, write_lines
from tests.pipeline_steps.clips import index_of

PREFETCH = {"num_workers": 0, "limit": 1, "size_of": lambda job: 1}


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


def test_example_config_group_is_valid():
    content = params.parse("conf/", params.compose(["data=actions"]))
    found = params.check("conf/", content).sources
    assert found.collect == ["actions", "chat"]
    assert {one.layout for one in found.actions} == set(NAMES)
