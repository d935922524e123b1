"""No backbone brings code into a run, and a published checkpoint names only the code that it carries."""

import json
import shutil

from transformers import Dinov2Model, PreTrainedTokenizerFast

from model import FoveatedVLMForConditionalGeneration
from pipeline_steps.backbones.local import copy_backbones
from pipeline_steps.backbones.schema import Local
from pipeline_steps.common.checkpoint import load_checkpoint, save_checkpoint
from pipeline_steps.common.code_keys import OWN, strip_code, without_code
from tests import checkpoints

FOREIGN = {
    "auto_map": {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "other/repo--evil.Config"},
    "custom_pipelines": {"text": {"impl": "evil.Pipeline"}},
    "trust_remote_code": True,
    "attn_implementation": "other/kernels",
}


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values) if path.exists() else json.dumps(values))


def text_of(folder):
    return "".join(file.read_text() for file in folder.glob("*config.json"))


def save_backbones(made, folder):
    """Folders of both backbones whose configurations name code."""
    model = checkpoints.make_model()
    model.language_model.save_pretrained(folder / "language")
    shutil.copytree(made.tokenizer, folder / "language", dirs_exist_ok=True)
    Dinov2Model(model.config.vision_config).save_pretrained(folder / "vision")
    for name in ("language/config.json", "vision/config.json", "language/tokenizer_config.json"):
        edit(folder / name, **FOREIGN)
    edit(folder / "language/generation_config.json", custom_generate="other/repo")
    return Local(vision_path=str(folder / "vision"), language_path=str(folder / "language"))


def test_keys_that_name_code_are_removed_at_any_depth():
    value = {
        "a": [{"auto_map": 1, "b": 2}],
        "text_config": {"auto_map": dict(OWN), "attn_implementation": "sdpa"},
        **FOREIGN,
    }
    cleaned, removed = without_code(value, keep_own=True)
    assert cleaned == {"a": [{"b": 2}], "text_config": {"attn_implementation": "sdpa"}, "auto_map": {}}
    assert len(removed) == 7
    assert without_code({"auto_map": dict(OWN)}, keep_own=True) == ({"auto_map": OWN}, [])
    assert without_code({"auto_map": dict(OWN)}, keep_own=False)[0] == {}


def test_files_that_name_no_code_keep_their_bytes(made, tmp_path):
    shutil.copytree(made.checkpoint, tmp_path / "copy")
    assert strip_code(tmp_path / "copy", keep_own=True) == []
    for file in made.checkpoint.iterdir():
        assert (tmp_path / "copy" / file.name).read_bytes() == file.read_bytes()
    config = json.loads((made.checkpoint / "config.json").read_text())
    assert config["auto_map"] == {name: OWN[name] for name in config["auto_map"]}
    assert len(config["auto_map"]) == 2


def test_copied_backbones_name_no_code(made, tmp_path, capsys):
    local = save_backbones(made, tmp_path)
    metrics = copy_backbones(local, tmp_path / "copied")
    for role in ("vision_encoder", "language_model"):
        text = text_of(tmp_path / "copied" / role)
        assert not [word for word in ("auto_map", "custom_", "remote_code", "evil", "other/") if word in text]
        for name, entry in metrics[role].items():
            assert entry["size"] == (tmp_path / "copied" / role / name).stat().st_size
    assert "language_model" in metrics
    assert "removed what names code (config.json: auto_map" in capsys.readouterr().err


def test_a_checkpoint_of_backbones_that_name_code_names_its_own_only(made, tmp_path):
    local = save_backbones(made, tmp_path)
    for name in ("language", "vision"):  # transformers would download the kernels; copied backbones do not name them
        config = json.loads((tmp_path / name / "config.json").read_text())
        config.pop("attn_implementation")
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    model = FoveatedVLMForConditionalGeneration.from_backbones(local.vision_path, local.language_path, query_dim=24)
    model.config.text_config.custom_pipelines = FOREIGN["custom_pipelines"]
    checkpoints.save(model, made, tmp_path / "saved", "")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(local.language_path)
    options = checkpoints.FRAMES.model_dump() | {"image_replication": 1, "system": ""}
    save_checkpoint(tmp_path / "other", model, tmp_path / "language", **options)
    for folder in (tmp_path / "saved", tmp_path / "other"):
        assert not [word for word in ("evil", "other/", "custom_pipelines") if word in text_of(folder)]
        assert json.loads((folder / "config.json").read_text())["auto_map"]["AutoConfig"] == OWN["AutoConfig"]
        load_checkpoint(folder)
    assert len(tokenizer) > 0
