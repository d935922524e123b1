"""What the stage `parameters` refuses before any other stage runs: options and objectives that contradict."""

import re
import subprocess
import sys

import pytest
import yaml

from pipeline_steps.common import params
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.params import ROOT
from pipeline_steps.parameters.__main__ import check_network, check_objectives


def check_stage(folder):
    """The stage `parameters` on the params.yaml in `folder`: its standard error."""
    command = [sys.executable, "-m", "pipeline_steps.parameters", "--params", folder / "params.yaml"]
    command += ["--out", folder / "parameters.json"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60).stderr


def test_the_name_of_an_ablation_needs_its_values(tmp_path):
    text = params.compose(["ablation=T1", "seed=2"])
    (tmp_path / "params.yaml").write_text(text)
    assert check_stage(tmp_path) == ""
    plain = params.compose([]).replace("ablation: none", "ablation: T1", 1)
    (tmp_path / "params.yaml").write_text(plain)
    errors = check_stage(tmp_path)
    assert "ablation is 'T1', but 3 parameter(s) differ from conf/ablation/T1.yaml:" in errors
    assert "training.stage2.text_share: 0.14, the ablation has 0.0" in errors
    assert "dvc exp run -S ablation=T1" in errors
    (tmp_path / "params.yaml").write_text(plain.replace("ablation: T1", "ablation: T11", 1))
    assert "there is no conf/ablation/T11.yaml. Did you mean 'T1'?" in check_stage(tmp_path)


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        (("model.fovea_size", 4), "model.fovea_size=4 with frame_downsampling=1: "),
        (
            ("model.architecture", "multi_token", "model.num_visual_tokens_per_frame", 5),
            "model.num_visual_tokens_per_frame=5 must be a square number",
        ),
        (
            ("model.hard_attention", "top_k", "model.attention_top_k", 500),
            r"model.attention_top_k=500 .* 17 positions.* at most 16",
        ),
        (("model.frame_downsampling", 3), "model.frame_downsampling 3 needs a multiple of 42 px"),
        (("shards.image_size", 50), "the frames have 50 px, not a multiple .* of 14 px. Set shards.image_size to 42"),
    ],
    ids=str,
)
def test_the_stage_refuses_options_of_the_network_that_do_not_fit(edited, edits, expected):
    path = edited(*edits)
    found = check_stage(path.parent)
    assert re.match(f"error: {path}: .*{expected}", found), found
    assert not (path.parent / "parameters.json").exists()


@pytest.mark.parametrize("edits", [("backbones.kind", "hub"), ("training.init_from", "/another/checkpoint")], ids=str)
def test_the_frames_of_a_vision_encoder_that_is_not_known_yet_are_accepted(edited, edits):
    path = edited(*edits, "model.hard_attention", "top_k", "model.attention_top_k", 500)
    check_network(path, params.read(path, *params.RESULT_KEYS))
    path = edited(*edits, "model.fovea_size", 4)
    with pytest.raises(UserError, match=r"model\.fovea_size=4 with frame_downsampling=1"):
        check_network(path, params.read(path, *params.RESULT_KEYS))


OBJECTIVE = "training.stage2.objective"
PREDICTS = (f"{OBJECTIVE}.next_frame.weight", 1.0)
STEPS = ("backbones.embedded.autoencoder_steps", 10)
CONTINUES = ("training.stage3.objective.initial_modules", "previous")
CONTRADICTIONS = [
    ((f"{OBJECTIVE}.text.weight", 0.0), r"training\.stage2\.objective\.text\.weight is 0, .* nothing to train"),
    (
        (f"{OBJECTIVE}.entropy.weight", 0.1, "model.coarse_only", True),
        r"entropy\.weight is 0\.1, but model\.coarse_only",
    ),
    ((*PREDICTS, *STEPS, f"{OBJECTIVE}.next_frame.separate_heads", True, "model.coarse_only", True), "a single pass"),
    (
        (*PREDICTS, *STEPS, *CONTINUES),
        r"stage3\.objective\.initial_modules is previous, .*: none, .* before: next_frame",
    ),
    (
        (*PREDICTS, *STEPS, f"{OBJECTIVE}.initial_modules", "previous"),
        "stage2 with a head are: next_frame, .*: none. Set",
    ),
    (
        ("training.stage1.objective.initial_modules", "previous"),
        "stage1 with a head are: none, those of the stage befo",
    ),
    (
        ("training.init_from", "/a/checkpoint", "training.stage1.objective.initial_modules", "previous"),
        "stage1 with a head are: none. Set it to new",
    ),
    (
        PREDICTS,
        r"autoencoder is data/backbones/autoencoder, but backbones\.embedded\.autoencoder_steps is 0, .* to 1000",
    ),
    (
        (*PREDICTS, "backbones.kind", "hub"),
        "autoencoder is data/backbones/autoencoder, but backbones.kind is hub, .* Name",
    ),
]


@pytest.mark.parametrize(("edits", "expected"), CONTRADICTIONS, ids=str)
def test_objectives_that_cannot_be_trained_are_refused_before_any_stage(edited, edits, expected):
    path = edited(*edits)
    with pytest.raises(UserError, match=f"^{path}: .*{expected}"):
        check_objectives(path, params.read(path, *params.RESULT_KEYS))


def test_the_stage_refuses_objectives(edited):
    assert "nothing to train" in check_stage(edited(f"{OBJECTIVE}.text.weight", 0.0).parent)


@pytest.mark.parametrize(
    "edits",
    [
        (*PREDICTS, *STEPS, "training.stage3.objective.next_frame.weight", 1.0, *CONTINUES),
        (*PREDICTS, f"{OBJECTIVE}.next_frame.autoencoder", "/an/autoencoder", "backbones.kind", "hub"),
        (
            *("training.init_from", "/a/checkpoint", "training.stage1.objective.next_frame.weight", 1.0, *STEPS),
            *("training.stage1.objective.initial_modules", "previous"),
        ),
    ],
    ids=str,
)
def test_objectives_that_may_be_trained_are_accepted(edited, edits):
    path = edited(*edits)
    check_objectives(path, params.read(path, *params.RESULT_KEYS))


STUDIES = [path for path in sorted((ROOT / "conf/study").glob("*.yaml")) if "objective." in path.read_text()]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_objectives_of_every_study_can_be_trained(path):
    study = yaml.safe_load(path.read_text())
    choices = {(*study.get("base", []), *(arm or {}).get("overrides", [])) for arm in study["arms"].values()}
    for overrides in (own for own in choices if any("objective" in word for word in own)):
        text = params.compose(overrides)
        check_objectives(path.stem, params.check(path.stem, params.parse(path.stem, text)))
