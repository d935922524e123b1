"""The backbones stage: file formats, the tokenizer, the language model's warm-up, local folders and the Hub."""

import fnmatch
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Model

from model.foveated_encoder import FoveatedEncoder
from pipeline_steps.backbones import __main__ as stage
from pipeline_steps.backbones import hub, language_model
from pipeline_steps.backbones.frames import Frames, pixel_values
from pipeline_steps.backbones.schema import Local
from pipeline_steps.backbones.tokenizer import train_tokenizer
from pipeline_steps.common import params
from pipeline_steps.common.errors import UserError, run_main
from pipeline_steps.sources.chat import KINDS, make_question
from pipeline_steps.world import digits as world
from tests.pipeline_steps.tiny_backbones import TINY, small_held_out_sets_and_torch_as_it_was  # noqa: F401 - a fixture


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One short run: (folder with both backbones, metrics)."""
    folder = tmp_path_factory.mktemp("backbones")
    return folder, stage.train_backbones(TINY, folder, 1)


@pytest.fixture(scope="module")
def tokenizer(trained):
    return AutoTokenizer.from_pretrained(trained[0] / "language_model")


# ---- file formats ----


def test_vision_weights_have_the_published_dinov2_names(trained):
    with safe_open(trained[0] / "vision_encoder" / "model.safetensors", framework="pt") as weights:
        names = set(weights.keys())
    layer = {
        f"encoder.layer.{index}.{name}"
        for index in range(TINY.vision_layers)
        for name in (
            *(f"attention.attention.{p}.{kind}" for p in ("query", "key", "value") for kind in ("weight", "bias")),
            *(f"{p}.{kind}" for p in ("attention.output.dense", "mlp.fc1", "mlp.fc2") for kind in ("weight", "bias")),
            *(f"{p}.{kind}" for p in ("norm1", "norm2") for kind in ("weight", "bias")),
            "layer_scale1.lambda1",
            "layer_scale2.lambda1",
        )
    }
    embeddings = {"cls_token", "mask_token", "position_embeddings"} | {
        f"patch_embeddings.projection.{kind}" for kind in ("weight", "bias")
    }
    assert names == layer | {f"embeddings.{name}" for name in embeddings} | {"layernorm.weight", "layernorm.bias"}


def test_transformers_dinov2_gives_the_features_of_our_encoder(trained):
    folder = trained[0] / "vision_encoder"
    library, report = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ours = FoveatedEncoder(library.config)
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        ours.load_state_dict({name: weights.get_tensor(name) for name in weights.keys()})  # noqa: SIM118
    frames = pixel_values(Frames("validation", 1, 3, seed=0)[0]["frames"])
    with torch.no_grad():
        expected = library.eval()(frames).last_hidden_state
        found = ours.encode(frames, need_patch_features=True).patch_features
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_language_model_loads_with_tied_embeddings_and_grouped_queries(trained, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(trained[0] / "language_model")
    assert model.config.model_type == "llama"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.num_key_value_heads == TINY.language_kv_heads < TINY.language_heads
    assert model.config.vocab_size == len(tokenizer)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (1, 2)


# ---- tokenizer ----


@pytest.mark.parametrize(
    "text", ["", "red: 31415", "héllo 世界 🦊 \x00\x7f", " \n\t  a  1２½ ", "𝔘𝔫𝔦 \u202eאב\r\n", "<|im_x|>"]
)
def test_tokenizer_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_random_unicode_round_trips(tokenizer):
    rng = np.random.default_rng(0)
    codes = rng.integers(1, 0x110000, 3000)
    text = "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_digit_is_one_token(tokenizer):
    for digit in "0123456789":
        assert len(tokenizer.encode(digit)) == 1
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("red: 31415")) == ["red", ":", "Ġ", *"31415"]
    assert not [token for token in tokenizer.get_vocab() if len(token) > 1 and any(c.isdigit() for c in token)]


def test_every_word_of_the_world_is_one_token(tokenizer):
    digits, rng = world.Digits(), np.random.default_rng(0)
    scenes = [world.sample_scene(rng, kind, "train", digits) for kind in world.KINDS for _ in range(50)]
    items = [item for scene in scenes for item in world.scene_items(scene, rng, 4)]
    questions = {"user\n" + make_question(rng, kind)[0] for kind in KINDS}
    texts = (
        questions | {f"user\n{item['user']}" for item in items if item["user"]} | {item["assistant"] for item in items}
    )
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    assert len(texts) > 100
    for text in texts:
        assert tokenizer.convert_ids_to_tokens(tokenizer.encode(text)) == [word for word, _ in split(text)]


def test_special_tokens_have_the_ids_and_roles_of_smollm2(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (2, 0)
    assert tokenizer.encode("a<|im_end|>b")[1] == 2
    assert tokenizer.encode("a")[0] > 2  # nothing is put in front


def test_chat_template_is_smollm2s(tokenizer):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    turns = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
    default = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    assert tokenizer.apply_chat_template(chat, tokenize=False) == default + turns
    system = [{"role": "system", "content": "You watch videos."}]
    assert tokenizer.apply_chat_template(system + chat, tokenize=False) == (
        "<|im_start|>system\nYou watch videos.<|im_end|>\n" + turns
    )
    asked = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert asked.endswith("Hi<|im_end|>\n<|im_start|>assistant\n")


def test_vocabulary_size_is_not_exceeded():
    assert len(train_tokenizer(300, 64)) == 300


# ---- warm-ups ----


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_backbones_are_deterministic_and_depend_on_the_seed(trained, tmp_path):
    folder, metrics = trained
    assert stage.train_backbones(TINY, tmp_path / "again", 1) == metrics
    assert contents(tmp_path / "again") == contents(folder)
    stage.train_backbones(TINY.model_copy(update={"seed": 4}), tmp_path / "other", 1)
    other = contents(tmp_path / "other")
    assert other["vision_encoder/model.safetensors"] != contents(folder)["vision_encoder/model.safetensors"]
    assert other["language_model/model.safetensors"] != contents(folder)["language_model/model.safetensors"]


def test_language_warm_up_learns(tokenizer):
    options = TINY.model_copy(update={"language_steps": 100, "language_batch_size": 16, "language_learning_rate": 5e-3})
    torch.manual_seed(0)
    metrics = language_model.warm_up_language_model(
        language_model.build_language_model(options, tokenizer), tokenizer, options
    )
    assert metrics["loss"] < 5.3  # ln(512) = 6.2 untrained
    assert metrics["copy_accuracy"] > 0.15  # 0.002 by chance


def test_non_finite_loss_fails_the_stage(tokenizer):
    options = TINY.model_copy(update={"language_steps": 30, "language_learning_rate": 1e30})
    with pytest.raises(UserError, match=r"the loss is nan at step \d+ of 30.*1e\+30"):
        language_model.warm_up_language_model(
            language_model.build_language_model(options, tokenizer), tokenizer, options
        )


@pytest.mark.parametrize("key", ["vision_path", "language_path"])
def test_a_local_path_that_no_stage_would_read_is_refused(key):
    content = params.load(params.ROOT / "params.yaml")
    content["backbones"]["local"][key] = "/backbones/mine"
    with pytest.raises(UserError, match=f"local.{key} is set, but kind is embedded, .*: set kind to local"):
        params.check("params.yaml", content)


# ---- local folders and the entry point ----


def run_stage(monkeypatch, tmp_path, **changes):
    """Run the entry point with changed backbones parameters, into tmp_path/out and tmp_path/metrics/backbones.json."""
    document = yaml.safe_load((params.ROOT / "params.yaml").read_text())
    document["backbones"] |= changes
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(document))
    arguments = [
        "backbones",
        "--params",
        path,
        "--out",
        tmp_path / "out",
        "--metrics",
        tmp_path / "metrics/backbones.json",
    ]
    monkeypatch.setattr("sys.argv", list(map(str, arguments)))
    stage.main()


def test_embedded_stage_replaces_an_older_result(monkeypatch, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    run_stage(monkeypatch, tmp_path, kind="embedded", embedded=TINY.model_dump())
    assert sorted(os.listdir(tmp_path / "out")) == ["language_model", "vision_encoder"]
    assert sorted(os.listdir(tmp_path)) == ["metrics", "out", "params.yaml"]
    metrics = json.loads((tmp_path / "metrics/backbones.json").read_text())
    assert 0 <= metrics["vision_encoder"]["query_digit_accuracy"] <= 1
    assert 0 <= metrics["language_model"]["copy_accuracy"] <= 1


def test_local_folders_are_copied(monkeypatch, tmp_path, trained):
    folder = trained[0]
    local = Local(vision_path=str(folder / "vision_encoder"), language_path=str(folder / "language_model"))
    run_stage(monkeypatch, tmp_path, kind="local", local=local.model_dump())
    assert contents(tmp_path / "out") == contents(folder)
    monkeypatch.setenv("HOME", str(folder))
    home = {"vision_path": "~/vision_encoder", "language_path": "~/language_model"}
    run_stage(monkeypatch, tmp_path, kind="local", local=home)
    assert contents(tmp_path / "out") == contents(folder)
    metrics = json.loads((tmp_path / "metrics/backbones.json").read_text())
    assert metrics["kind"] == "local"
    assert len(metrics["vision_encoder"]["model.safetensors"]["sha256"]) == 64


def edit(file, **changes):
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | changes))


BROKEN = {
    "no folder": (lambda v, t: shutil.rmtree(v), "vision.*no such folder, expected a dinov2 model"),
    "empty": (lambda v, t: [f.unlink() for f in v.iterdir()], "vision.*config.json missing, found nothing"),
    "another vision model": (
        lambda v, t: edit(v / "config.json", model_type="vit"),
        "model_type is 'vit', expected 'dinov2'",
    ),
    "another language model": (
        lambda v, t: edit(t / "config.json", model_type="gpt2"),
        "model_type is 'gpt2', expected 'llama'",
    ),
    "config is a list": (
        lambda v, t: (v / "config.json").write_text("[]"),
        r"config\.json: expected a JSON object, found list",
    ),
    "no weight map": (
        lambda v, t: (v / "model.safetensors.index.json").write_text("{}"),
        r"index\.json: not a JSON object with a weight_map of weights and file names",
    ),
    "config is no JSON": (lambda v, t: (v / "config.json").write_text("{"), "config.json: not valid JSON"),
    "no vision weights": (lambda v, t: (v / "model.safetensors").unlink(), "vision.* has no model.safetensors"),
    "no language weights": (lambda v, t: (t / "model.safetensors").unlink(), "language.* has no model.safetensors"),
    "truncated weights": (
        lambda v, t: os.truncate(v / "model.safetensors", 5000),
        "not a whole safetensors file",
    ),
    "another model's weights": (
        lambda v, t: shutil.copy(t / "model.safetensors", v / "model.safetensors"),
        "expected a weight 'embeddings.patch_embeddings.projection.weight', found",
    ),
    "no tokenizer": (lambda v, t: (t / "tokenizer.json").unlink(), "tokenizer.json missing, found .*config.json"),
    "no chat template": (lambda v, t: (t / "chat_template.jinja").unlink(), "no chat template, expected"),
    "no special tokens": (
        lambda v, t: edit(t / "tokenizer.json", added_tokens=[]),
        r"lacks <\|im_start\|>, <\|im_end\|> among its added tokens, found none",
    ),
}


@pytest.mark.parametrize(("breaking", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_unusable_local_folder_is_named_and_nothing_is_written(monkeypatch, tmp_path, trained, breaking, message):
    pair = tmp_path / "pair"
    shutil.copytree(trained[0], pair)
    (pair / "vision_encoder").rename(pair / "vision")
    (pair / "language_model").rename(pair / "language")
    breaking(pair / "vision", pair / "language")
    local = {"vision_path": str(pair / "vision"), "language_path": str(pair / "language")}
    with pytest.raises(UserError, match=message) as error:
        run_stage(monkeypatch, tmp_path, kind="local", local=local)
    assert str(pair) in str(error.value)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))
    assert not list((tmp_path / "metrics").iterdir())


@pytest.mark.parametrize("key", ["vision_path", "language_path"])
def test_missing_local_path_is_rejected(monkeypatch, tmp_path, trained, key):
    folder = trained[0]
    local = {"vision_path": str(folder / "vision_encoder"), "language_path": str(folder / "language_model"), key: None}
    with pytest.raises(UserError, match=f"backbones.local.{key} is null"):
        run_stage(monkeypatch, tmp_path, kind="local", local=local)


HUB = {
    role: {"repository": f"owner/{role}", "revision": revision * 40}
    for role, revision in (("vision", "a"), ("language", "b"))
}


def test_hub_repositories_are_downloaded_at_pinned_revisions(monkeypatch, tmp_path, trained):
    asked = []

    def fake(repository, revision, allow_patterns):
        asked.append((repository, revision))
        name = {"vision": "vision_encoder", "language": "language_model"}[repository.partition("/")[2]]
        files = os.listdir(trained[0] / name)
        assert all(any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns) for file in files)
        assert not any(fnmatch.fnmatch("onnx/model.safetensors", pattern) for pattern in allow_patterns)
        return str(trained[0] / name)

    monkeypatch.setattr(hub, "snapshot_download", fake)
    run_stage(monkeypatch, tmp_path, kind="hub", hub=HUB)
    assert asked == [("owner/vision", "a" * 40), ("owner/language", "b" * 40)]
    assert contents(tmp_path / "out") == contents(trained[0])
    metrics = json.loads((tmp_path / "metrics/backbones.json").read_text())
    assert (metrics["kind"], metrics["repositories"]) == ("hub", HUB)
    assert len(metrics["language_model"]["model.safetensors"]["sha256"]) == 64


def test_unusable_downloaded_model_is_named(monkeypatch, tmp_path, trained):
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(trained[0] / "language_model"))
    with pytest.raises(UserError, match="model_type is 'llama', expected 'dinov2'"):
        run_stage(monkeypatch, tmp_path, kind="hub", hub=HUB)
    assert not (tmp_path / "out").exists()


def test_offline_error_says_how_to_use_local_backbones(tmp_path):
    """The library itself, which finds nothing in an empty cache."""
    params_file, environment = tmp_path / "params.yaml", os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    params_file.write_text(params.compose(["backbones.kind=hub"]))
    command = [sys.executable, "-m", "pipeline_steps.backbones", "--params", params_file, "--out", tmp_path / "out"]
    command += ["--metrics", tmp_path / "metrics.json"]
    settings = {"cwd": params.ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run(command, check=False, **settings)
    assert done.returncode == 1
    assert "backbones.hub.vision: facebook/dinov2-small at revision ed25f3a" in done.stderr
    assert "backbones.kind: local and backbones.local.vision_path" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"), [("revision", "main"), ("revision", "A" * 40), ("revision", "a" * 39), ("repository", "dinov2")]
)
def test_backbone_revision_must_be_a_full_commit_hash(monkeypatch, tmp_path, key, value):
    wrong = {**HUB, "vision": {**HUB["vision"], key: value}}
    with pytest.raises(UserError, match=rf"backbones\.hub\.vision\.{key}: String should match pattern"):
        run_stage(monkeypatch, tmp_path, kind="hub", hub=wrong)


def test_unwritable_output_gives_a_one_paragraph_error(monkeypatch, tmp_path, capsys):
    (tmp_path / "metrics").mkdir()
    monkeypatch.setattr(
        "sys.argv", ["backbones", "--out", "/dev/null/backbones", "--metrics", str(tmp_path / "m.json")]
    )
    with pytest.raises(SystemExit) as exit_:
        run_main(stage.main)
    assert exit_.value.code == 1
    assert "error: /dev/null" in capsys.readouterr().err
