"""A checkpoint folder is all that is needed: it loads by the library's auto classes where this repository is not."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, Dinov2Model

from model import FoveatedVLMForConditionalGeneration, FoveatedVLMProcessor, loading
from pipeline_steps.common.checkpoint import load_checkpoint, load_model
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.hashing import sha256_file
from pipeline_steps.common.integrity import write_checksums
from pipeline_steps.common.params import ROOT
from tests import checkpoints
from tests.model.tiny import make_batch, make_model

QUESTION = "Which digits does red show?"
ELSEWHERE = """
import importlib.util, json, sys
from pathlib import Path
# without the finder of `pip install -e`
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
assert not any(importlib.util.find_spec(name) for name in ("model", "pipeline_steps"))
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
folder, video, question, again = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(text=question, videos=video)
answers = {
    mode: processor.batch_decode(model.generate(**inputs, mode=mode, max_new_tokens=8, do_sample=False))
    for mode in ("coarse", "fine", "autoregressive")
}
logits = model(**inputs, options={"return_logits": True}).logits
model.save_pretrained(again)
processor.save_pretrained(again)
print(json.dumps({
    "classes": [type(thing).__name__ for thing in (config, model, processor)],
    "module": type(model).__module__.split(".")[0],
    "answers": answers,
    "logits": logits[0, -1, :5].tolist(),
}))
"""


def test_loads_where_the_repository_is_not(made, tmp_path):
    """The folder alone, copied elsewhere, offline, in an isolated interpreter: the same answers as here."""
    folder, again = tmp_path / "copy", tmp_path / "again"
    shutil.copytree(made.checkpoint, folder)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", ELSEWHERE, folder, made.video, QUESTION, again]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    model, processor = load_checkpoint(made.checkpoint)
    assert found["module"] == "transformers_modules"
    assert found["classes"] == [type(thing).__name__ for thing in (model.config, model, processor)]
    inputs = processor(text=QUESTION, videos=made.video)
    for mode, answer in found["answers"].items():
        assert answer == processor.batch_decode(model.generate(**inputs, mode=mode, max_new_tokens=8, do_sample=False))
    with torch.no_grad():
        assert found["logits"] == pytest.approx(
            model(**inputs, options={"return_logits": True}).logits[0, -1, :5].tolist(), abs=1e-5
        )
    for file in made.checkpoint.iterdir():  # saved there, it is a whole checkpoint again
        rewritten = file.name in ("config.json", "tokenizer_config.json")  # the library notes how it has loaded them
        assert rewritten or (again / file.name).read_bytes() == file.read_bytes(), file.name
    assert json.loads((again / "config.json").read_text())["auto_map"] == model.config.auto_map


def test_a_checkpoint_is_the_same_bytes_wherever_it_was_made(made, tmp_path):
    """No dates and no paths: read from one place and written to another."""
    for place in ("a", "b/c"):
        shutil.copytree(made.checkpoint, tmp_path / place / "read")
        model, processor = load_checkpoint(tmp_path / place / "read")
        model.save_pretrained(tmp_path / place / "written")
        processor.save_pretrained(tmp_path / place / "written")
    names = {file.name for file in made.checkpoint.iterdir()}
    for name in names:
        content = (tmp_path / "a/written" / name).read_bytes()
        assert content == (tmp_path / "b/c/written" / name).read_bytes(), name
        assert str(tmp_path).encode() not in content, name
        assert str(made.root).encode() not in (made.checkpoint / name).read_bytes(), name
    code = {file.name for file in (ROOT / "model").glob("*.py")} - {"__init__.py", "registration.py"}
    assert {name for name in names if name.endswith(".py")} == code


def test_backbones_leave_no_path_in_the_configuration(tmp_path):
    tiny = make_model()
    tiny.language_model.save_pretrained(tmp_path / "language")
    Dinov2Model(tiny.config.vision_config).save_pretrained(tmp_path / "vision")
    new = FoveatedVLMForConditionalGeneration.from_backbones(tmp_path / "vision", tmp_path / "language", query_dim=24)
    new.save_pretrained(tmp_path / "whole")
    assert str(tmp_path) not in (tmp_path / "whole/config.json").read_text()


def test_sharded_weights_load_again(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert not (tmp_path / "model.safetensors").exists()
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(again, FoveatedVLMForConditionalGeneration)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    with torch.no_grad():
        assert torch.equal(model(**make_batch()).loss, again(**make_batch()).loss)


@pytest.fixture
def broken(made, tmp_path):
    """A copy of the checkpoint and a function that changes its weights."""
    folder = tmp_path / "broken"
    shutil.copytree(made.checkpoint, folder)

    def change(edit):
        weights = load_file(folder / "model.safetensors")
        edit(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return change


@pytest.mark.parametrize("load", [AutoModelForImageTextToText.from_pretrained, load_model])
def test_missing_and_unexpected_weights_are_an_error(broken, load):
    def edit(weights):
        del weights["planner.weight"], weights["planner.bias"]
        weights["stranger.weight"] = torch.zeros(2)

    with pytest.raises((ValueError, UserError), match=r"2 missing.*1 unexpected.*0 of another shape") as caught:
        load(broken(edit))
    for words in ("planner.bias, planner.weight, stranger.weight", "broken", "Save weights and configuration"):
        assert words in str(caught.value)


def test_weights_of_another_size_are_a_user_error(broken):
    folder = broken(lambda weights: weights.update({"connector.bias": torch.zeros(7)}))
    with pytest.raises(UserError, match=r"1 of another shape \(connector\.bias \[7\] for \[48\]\)"):
        load_model(folder)


def test_loading_report_is_still_to_be_had(made):
    model, report = FoveatedVLMForConditionalGeneration.from_pretrained(made.checkpoint, output_loading_info=True)
    assert isinstance(model, FoveatedVLMForConditionalGeneration)
    assert not report["missing_keys"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "config.json: missing, so .* has no model"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not a valid model configuration"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'),
            "'llama', expected 'foveated_vlm'",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "broken cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"cut"), "broken cannot be loaded"),
        (lambda folder: (folder / "processor_config.json").unlink(), "has a model but no processor_config.json"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_a_user_error(broken, spoil, message):
    folder = broken(lambda weights: None)
    spoil(folder)
    with pytest.raises(UserError, match=message):
        load_checkpoint(folder)


LOADERS = [
    FoveatedVLMForConditionalGeneration.from_pretrained,
    partial(AutoModelForImageTextToText.from_pretrained, trust_remote_code=True),
    load_model,
]


@pytest.mark.parametrize("load", LOADERS, ids=["class", "auto class", "pipeline"])
def test_code_that_was_changed_after_it_was_recorded_is_refused_before_it_runs(made, tmp_path, load):
    folder, witness = tmp_path / "checkpoint", tmp_path / "ran"
    shutil.copytree(made.checkpoint, folder)
    write_checksums(folder)
    load(folder)
    for name in ("configuration_foveated_vlm.py", "modeling_foveated_vlm.py", "video.py"):
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(kept + f"\nopen({str(witness)!r}, 'w')\n".encode())
        with pytest.raises((ValueError, UserError)) as caught:
            load(folder)
        for words in (f"{folder / name}: ", sha256_file(folder / name)[:12], hashlib.sha256(kept).hexdigest()[:12]):
            assert words in str(caught.value)
        (folder / name).write_bytes(kept)
    load(folder)
    assert not witness.exists()


def test_a_folder_in_a_folder_is_checked_too(made, tmp_path):
    shutil.copytree(made.checkpoint, tmp_path / "whole/inner")
    write_checksums(tmp_path / "whole/inner")
    (tmp_path / "whole/inner/video.py").write_text("")
    with pytest.raises(ValueError, match=r"inner/video.py: the code was changed"):
        FoveatedVLMForConditionalGeneration.from_pretrained(tmp_path / "whole", subfolder="inner")


def test_unreadable_checksums_are_refused(made, tmp_path):
    shutil.copytree(made.checkpoint, tmp_path / "folder")
    (tmp_path / "folder/checksums.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"checksums\.json: not valid JSON"):
        FoveatedVLMForConditionalGeneration.from_pretrained(tmp_path / "folder")


def test_a_folder_with_another_version_of_the_code_says_so_and_runs_this_one(made, tmp_path, monkeypatch):
    said, folder = [], tmp_path / "older"
    monkeypatch.setattr(loading.logger, "warning_once", said.append)
    FoveatedVLMForConditionalGeneration.from_pretrained(made.checkpoint)
    assert said == []
    shutil.copytree(made.checkpoint, folder)
    (folder / "queries.py").write_text("raise SystemExit\n")
    write_checksums(folder)  # as it was published
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    assert type(model) is FoveatedVLMForConditionalGeneration
    assert len(said) == 1
    assert f"{folder} was saved with another version of the code" in said[0]
    assert "queries.py differ" in said[0]


def test_vision_first_checkpoint_keeps_its_layout(made, tmp_path):
    checkpoints.save(checkpoints.make_model(layout="vision_first"), made, tmp_path, "")
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, FoveatedVLMProcessor)
    ids = processor(text=QUESTION, videos=made.video)["input_ids"][0].tolist()
    assert ids[:6] == [1, 400, 400, 400, 400, 1]
