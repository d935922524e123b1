"""Wrong input to the model: an error with both numbers and the next step, never a silent other result."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Dinov2Model, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, ViTConfig, ViTModel

from model import FoveatedVLMForConditionalGeneration
from tests.model.tiny import MODES, VISUAL, make_batch, make_model, one_sample, with_options


def refuse(message: str, model=None, **changes) -> None:
    model = model or make_model()
    for mode in MODES:
        with pytest.raises(ValueError, match=message):
            model(**with_options(make_batch(model.config.tokens_per_frame) | {"mode": mode} | changes))


def with_value(name: str, value: int, place: int) -> torch.Tensor:
    """A tensor of the batch with another value in sample 2."""
    tensor = make_batch()[name]
    tensor[2, place] = value
    return tensor


def ids(value: int) -> torch.Tensor:
    return with_value("input_ids", value, 9)


def labels(value: int, place: int = 9) -> torch.Tensor:
    return with_value("labels", value, place)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "fin"}, "mode='fin' must be one of coarse, fine, autoregressive"),
        ({"query_source": "oracel"}, "query_source='oracel'"),
        (
            {"num_frames": torch.tensor([3, 0, 1, 1])},
            "sums to 5, but pixel_values has 6 frames. Concatenate the frames",
        ),
        ({"num_frames": None}, "sums to None, but pixel_values has 6 frames. Concatenate the frames"),
        ({"num_frames": torch.tensor([3, 0, 3])}, "num_frames has 3 entries for 4 samples. Pass the number"),
        (
            {"num_frames": torch.tensor([2, 1, 1, 2])},
            "sample 0 has 3 visual placeholders for 2 frames of 1 visual tokens each. input_ids must contain exactly 2",
        ),
        (
            {"pixel_values": None, "num_frames": torch.zeros(4, dtype=torch.long)},
            "sample 0 has 3 visual placeholders for 0 frames of 1 visual tokens each. input_ids must contain exactly 0",
        ),
        ({"pixel_values": None}, "num_frames sums to 6, but pixel_values has 0 frames"),
        ({"num_frames": [3, 0, 1, 2]}, r"num_frames is \[3, 0, 1, 2\], expected an integer tensor"),
        ({"num_frames": torch.ones(4)}, r"num_frames is torch.float32 \[4\], expected an integer tensor"),
        ({"num_plans": 0}, "num_plans=0 must be at least 1"),
        ({"frame_times": torch.zeros(1)}, r"frame_times has shape \[1\], expected \[6\]"),
        ({"attention_mask": torch.ones(4, 3)}, r"attention_mask has shape \[4, 3\], input_ids \[4, 23\]"),
        ({"labels": torch.ones(4, 3)}, r"labels has shape \[4, 3\], input_ids \[4, 23\]"),
        ({"attention_mask": torch.zeros(4, 23)}, "sample 0 has visual placeholders where attention_mask is 0"),
        (
            {"labels": make_batch()["input_ids"]},
            "sample 0 has visual placeholders in labels. Set the labels there to -100",
        ),
        ({"labels": labels(64)}, "sample 2 has visual placeholders in labels"),
        ({"labels": labels(65)}, "sample 2 has the label 65 at place 9, but the vocabulary has 64 tokens"),
        ({"labels": labels(-1)}, "sample 2 has the label -1 at place 9"),
        ({"labels": labels(5, 22)}, "sample 2 has labels where attention_mask is 0. Set them to -100 at padding"),
        ({"input_ids": ids(65)}, "sample 2 has the token id 65 at place 9, but the vocabulary has 64 .* is 64"),
        ({"input_ids": ids(-5)}, "sample 2 has the token id -5 at place 9"),
        (
            {"pixel_values": torch.zeros(6, 3, 56, 56, dtype=torch.uint8)},
            "pixel_values has dtype torch.uint8, expected norm",
        ),
        ({"options": {"num_plan": 1}}, "options: num_plan unknown, expected fields among num_plans, "),
        ({"options": 3}, "options: int instead of FoveationOptions or a dict of its fields"),
        ({"pixel_values": torch.zeros(6, 3, 50, 56)}, r"\(6, 3, 50, 56\).*multiples of the patch size 14. Resize"),
        ({"pixel_values": torch.zeros(6, 1, 56, 56)}, r"\(6, 1, 56, 56\), expected \[frames, 3, height, width\]"),
    ],
)
def test_an_argument_that_does_not_fit_is_named_with_both_numbers(change, message):
    refuse(message, **change)
    if "labels" not in change and "mode" not in change:
        given = make_batch() | change
        given.pop("labels")
        with pytest.raises(ValueError, match=message):
            make_model().encode_frames(**with_options(given))


@pytest.mark.parametrize(
    "targets", [torch.ones(6, 5, dtype=torch.bool), torch.ones(6, 16), torch.ones(3, 16, dtype=torch.bool)]
)
def test_targets_of_another_kind_or_shape_are_refused(targets):
    refuse(
        r"needs target_patches for 6 frames, bool \[6, 16\].*got torch.*\[",
        make_model(query_source="oracle"),
        target_patches=targets,
    )


def test_frames_are_encoded_in_known_modes_from_their_own_text():
    batch = make_batch()
    batch.pop("labels")
    with pytest.raises(ValueError, match="mode='autoregresive' must be one of coarse, fine, autoregressive"):
        make_model().encode_frames(**batch, mode="autoregresive")
    with pytest.raises(ValueError, match=r"needs target_patches for 6 frames.*got None"):
        make_model(query_source="oracle").encode_frames(**batch)
    text = make_model().packed_text(*(batch[name] for name in ("input_ids", "attention_mask", "num_frames")))
    with pytest.raises(ValueError, match="the packed text belongs to another network"):
        make_model().encode_frames(**batch, options={"text": text})


@pytest.mark.parametrize("count", [0, 5, 7])
@torch.no_grad()
def test_every_placeholder_has_a_visual_token(count):
    model, batch = make_model(), make_batch()
    tokens = torch.zeros(count, 1, 48) if count else None
    text = [batch[name] for name in ("input_ids", "attention_mask", "labels")]
    with pytest.raises(ValueError, match=f"{count} visual tokens for 6 visual placeholders. Pass the visual_tokens"):
        model.score_text(*text, tokens)


@pytest.mark.parametrize(
    ("change", "message"), [({"input_ids": ids(70)}, "token id 70"), ({"labels": labels(70)}, "label 70")]
)
def test_scoring_checks_ids_and_labels(change, message):
    batch = make_batch() | change
    with pytest.raises(ValueError, match=f"sample 2 has the {message} at place 9"):
        make_model().score_text(*(batch[name] for name in ("input_ids", "attention_mask", "labels")))


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_pixels_are_taken_in_the_type_of_the_weights(mode):
    model, batch = make_model().to(torch.bfloat16), make_batch()
    cast = batch | {"pixel_values": batch["pixel_values"].to(torch.bfloat16)}
    assert torch.equal(model(**batch, mode=mode).loss, model(**cast, mode=mode).loss)


def test_checkpointing_in_training_is_refused_where_a_cache_is_needed():
    """The library would drop the cache, and frame t would be planned without the frames before."""
    model, sample = make_model().train(), one_sample(make_batch(), 0)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="need a key-value cache, which gradient checkpointing disables"):
        model(**sample, mode="autoregressive")
    question = {name: value for name, value in sample.items() if name != "labels"}
    for mode in MODES:
        with pytest.raises(ValueError, match="need a key-value cache, which gradient checkpointing disables"):
            model.generate(**question, mode=mode, max_new_tokens=2)
    model(**sample, mode="fine").loss.backward()
    assert len(model.eval().generate(**question, max_new_tokens=2, do_sample=False)[0]) == 2


def test_too_many_frames_or_tokens():
    limited = make_model(max_num_frames=2)
    refuse(r"sample 0 has 3 frames, the model takes at most 2 \(max_num_frames\)\. Sample fewer", limited)
    with pytest.raises(ValueError, match=r"129 tokens, but the language model's context is 128\. Use fewer"):
        make_model()(torch.full((1, 129), 5))


def test_frames_that_are_no_squares_cannot_be_pooled():
    model = make_model(architecture="multi_token", num_visual_tokens_per_frame=4)
    message = r"24 patches, which is not a square number \(nearest: 25\)\. Resize"
    refuse(message, model, pixel_values=torch.zeros(6, 3, 56, 84))


def test_text_between_frames_is_refused_in_every_mode():
    """Frame by frame it would not be read, so the modes would answer different questions."""
    batch = make_batch()
    ids = batch["input_ids"]
    ids[0, 6], ids[0, 9] = 5, VISUAL  # places 4, 5 and 9 instead of 4, 5 and 6
    refuse(r"sample 0 has visual placeholders in 2 blocks, expected 1\. .* put it before or after", input_ids=ids)


def test_generation_from_padding_is_refused():
    batch = make_batch()
    batch.pop("labels")
    message = r"sample 1 has 15 tokens in a row of 23 and ends in padding\. Pad on the left"
    with pytest.raises(ValueError, match=message):
        make_model().generate(**batch, max_new_tokens=2)


def test_generation_checks_what_forward_checks():
    sample = one_sample(make_batch(), 0)
    sample.pop("labels")
    with pytest.raises(ValueError, match="sample 0 has 3 visual placeholders for 2 frames"):
        make_model().generate(**sample | {"pixel_values": sample["pixel_values"][:2], "num_frames": torch.tensor([2])})


# ---------------------------------------------------------------- backbone folders


@pytest.fixture
def folders(tmp_path):
    """A vision and a language backbone as the library saves them."""
    config = make_model().config
    LlamaForCausalLM(config.text_config).save_pretrained(tmp_path / "language")
    Dinov2Model(config.vision_config).save_pretrained(tmp_path / "vision")
    return tmp_path


def load(folder):
    return FoveatedVLMForConditionalGeneration.from_backbones(folder / "vision", folder / "language", query_dim=24)


def test_backbones_saved_in_bf16_are_trained_in_fp32(folders):
    """N05: bf16 weights under a bf16 optimizer lose most small steps."""
    model = make_model().to(torch.bfloat16)
    model.language_model.save_pretrained(folders / "language")
    save_file(model.vision_encoder.state_dict(), folders / "vision/model.safetensors")
    new = load(folders)
    assert {p.dtype for p in new.parameters()} == {torch.float32}
    new.save_pretrained(folders / "whole")
    again = FoveatedVLMForConditionalGeneration.from_pretrained(folders / "whole", dtype=torch.float32)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert again.config.visual_token_id == 64
    assert again.config.visual_scale > 0


@torch.no_grad()
def test_backbones_bring_all_of_their_weights(folders):
    new, batch = load(folders), make_batch()
    vision = Dinov2Model.from_pretrained(folders / "vision").eval()
    features = new.vision_encoder.encode(batch["pixel_values"], need_patch_features=True).patch_features
    torch.testing.assert_close(features, vision(batch["pixel_values"]).last_hidden_state, atol=1e-5, rtol=0)
    language = LlamaForCausalLM.from_pretrained(folders / "language").eval()
    text = one_sample(batch, 1)["input_ids"]
    torch.testing.assert_close(
        new(text, options={"return_logits": True}).logits, language(text).logits, atol=1e-5, rtol=0
    )


def test_a_backbone_of_another_architecture_is_refused(folders):
    small = {"num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(hidden_size=32, image_size=56, patch_size=14, **small)).save_pretrained(folders / "vision")
    with pytest.raises(ValueError, match=r"vision contains a 'vit' model, expected 'dinov2'\. Pass the folder"):
        load(folders)
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)).save_pretrained(folders / "language")
    make_model().vision_encoder.config.save_pretrained(folders / "vision")
    with pytest.raises(ValueError, match=r"language contains a 'gpt2' model, expected 'llama'\. Pass the folder"):
        load(folders)


@pytest.mark.parametrize("role", ["vision", "language"])
def test_a_backbone_folder_that_is_not_there_is_named(folders, role):
    (folders / role).rename(folders / "elsewhere")
    with pytest.raises(ValueError, match=f"{role} has no config.json. Pass the folder"):
        load(folders)


@pytest.mark.parametrize("role", ["vision", "language"])
@pytest.mark.parametrize(
    ("layers", "message"), [(3, r"do not match config.json: \d+ missing, 0"), (1, r"0 missing, \d+ un")]
)
def test_a_backbone_with_too_few_or_too_many_weights_is_refused(folders, role, layers, message):
    """Layers without weights would be trained from a random start without a word."""
    path = folders / role / "config.json"
    config = json.loads(path.read_text()) | {"num_hidden_layers": layers}
    path.write_text(json.dumps({key: value for key, value in config.items() if not key.startswith("out_")}))
    with pytest.raises(ValueError, match=f"{role}: the weights .*{message}"):
        load(folders)


def test_a_backbone_with_weights_of_another_shape_is_refused(folders):
    for role, name in (("language", "model.norm.weight"), ("vision", "layernorm.weight")):
        path = folders / role / "model.safetensors"
        weights = load_file(path)
        save_file(weights | {name: torch.ones(7)}, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"{role}: .* 0 missing, 0 unexpected, 1 of another shape .*{name}"):
            load(folders)
        save_file(weights, path, metadata={"format": "pt"})


def shards(folder, **files):
    """Spreads the vision weights over these files: {part of the name: whether the file is there}."""
    path = folder / "vision/model.safetensors"
    weights, names = load_file(path), [f"model-{part}.safetensors" for part in files]
    index = {name: names[number % len(names)] for number, name in enumerate(weights)}
    for name, there in zip(names, files.values(), strict=True):
        if there:
            own = {key: weights[key] for key, file in index.items() if file == name}
            save_file(own, folder / "vision" / name, metadata={"format": "pt"})
    path.unlink()
    (folder / "vision/model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def cut(folder):
    path = folder / "vision/model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shards(folder, a=True, b=False), r"no model-b\.safetensors \(1 of 2 files .* missing\)\. Save"),
        (lambda folder: (folder / "vision/model.safetensors").unlink(), r"no model\.safetensors \(1 of 1 files"),
        (cut, r"vision/model\.safetensors: not a whole safetensors file \(.*\)\. Copy it again"),
        *(
            (
                lambda folder, text=text: (folder / "vision/model.safetensors.index.json").write_text(text),
                r"vision/model\.safetensors\.index\.json: not a JSON object with a weight_map of weights",
            )
            for text in ("{", "[]", "{}", '{"weight_map": []}')
        ),
    ],
)
def test_damaged_vision_weights_are_named(folders, damage, message):
    damage(folders)
    with pytest.raises(ValueError, match=message):
        load(folders)


def test_vision_weights_in_several_files_are_read(folders):
    expected = load(folders).vision_encoder.state_dict()
    shards(folders, a=True, b=True)
    found = load(folders).vision_encoder.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
