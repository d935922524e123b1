"""The autoencoder of the next-frame objective: its folder, its training, and what happens without its libraries."""

import importlib
import json
import re
import shutil
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pipeline_steps.backbones import packed_frames
from pipeline_steps.backbones.__main__ import train_backbones
from pipeline_steps.common import autoencoder
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.params import ROOT
from pipeline_steps.training import objectives
from tests.model.tiny import as_batch, make_batch, make_model
from tests.objectives import settings
from tests.pipeline_steps import packed
from tests.pipeline_steps.predicted import losses, made_with, options


def test_a_missing_or_foreign_autoencoder_is_an_error(tmp_path, monkeypatch):
    own = settings(**options(autoencoder=str(tmp_path / "vae")))
    key = r"training\.stage2\.objective\.next_frame\.autoencoder"
    with pytest.raises(UserError, match=rf"vae/config\.json: missing, but {key} names .*autoencoder_steps=1000"):
        objectives.input_files("stage2", own)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/config.json").write_text(json.dumps({"_class_name": "VQModel"}))
    with pytest.raises(UserError, match="_class_name is 'VQModel', expected 'AutoencoderKL'"):
        objectives.input_files("stage2", own)
    (tmp_path / "vae/config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "latent_channels": 4}))
    with pytest.raises(UserError, match=rf"vae: no {re.escape(autoencoder.WEIGHTS)}\. {key}"):
        objectives.input_files("stage2", own)
    (tmp_path / "vae" / autoencoder.WEIGHTS).touch()
    assert [path.name for path in objectives.input_files("stage2", own)] == ["config.json", autoencoder.WEIGHTS]
    monkeypatch.setattr(autoencoder, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"autoencoder needs the package diffusers, .* pip install '\.\[latents\]'"):
        objectives.build("stage2", own, make_model().config)
    flow = settings(**options(target="flow", autoencoder=None, previous_latent="none"))
    with pytest.raises(UserError, match=r"target flow needs the package cv2"):
        objectives.build("stage2", flow, make_model().config)


def test_training_one_without_diffusers_is_an_error_before_anything_is_read_or_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(autoencoder, "find_spec", lambda name: None)
    says = r"backbones\.embedded\.autoencoder_steps needs the package diffusers, which is not installed"
    with pytest.raises(UserError, match=says):
        train_backbones(SimpleNamespace(autoencoder_steps=1), tmp_path, 1)
    command = ["autoencoder", "--shards", str(tmp_path / "missing"), "--out", str(tmp_path / "out"), "--steps", "1"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(UserError, match=says):
        importlib.import_module("pipeline_steps.backbones.autoencoder").main()


# ---------------------------------------------------------------- frames of packed shards


@pytest.fixture
def shards(tmp_path):
    """A folder of the stage shards: 11 clips and pictures and a chat to train on, 4 to validate, a chat to test."""
    splits = {}
    for split, samples in {"train": packed.clips(12, text_every=12), "validation": packed.clips(4)}.items():
        packed.write(tmp_path, samples, 5, split)
        splits |= json.loads((tmp_path / "shards/manifest.json").read_text())["splits"]
    splits["test"] = splits["train"] | {"num_frames": 0}
    manifest = json.loads((tmp_path / "shards/manifest.json").read_text())
    number = sum(entry["num_samples"] for entry in splits.values())
    manifest |= {"splits": splits, "seen": number, "packed": number}
    (tmp_path / "shards/manifest.json").write_text(json.dumps(manifest))
    return tmp_path / "shards"


def test_an_epoch_of_packed_frames_has_every_frame_once(shards):
    expected = []
    for path in sorted((shards / "train").glob("*.tar")):
        with tarfile.open(path) as tar:
            pictures = [tar.extractfile(name) for name in tar.getnames() if name.endswith(".jpg")]
            expected += [np.asarray(Image.open(picture)).tobytes() for picture in pictures]
    expected.sort()
    frames = packed_frames.PackedFrames(shards, "train")
    assert frames.size == packed.SIZE
    epochs = {}
    for seed in (1, 1, 2):
        batches, found = frames.batches(4, seed), []
        while len(found) < 2 * len(expected):
            batch = next(batches)
            assert batch.dtype == torch.uint8
            assert batch.shape[1:] == (packed.SIZE, packed.SIZE, 3)
            found += [frame.numpy().tobytes() for frame in batch]
        first, second = found[: len(expected)], found[len(expected) :]
        assert sorted(first) == sorted(second) == expected
        assert first != second
        assert epochs.setdefault(seed, first) == first
    assert epochs[1] != epochs[2]


def test_packed_frames_that_are_not_there_are_an_error(shards):
    with pytest.raises(UserError, match=r"shards: split 'test' has no frames\. Add clips"):
        packed_frames.PackedFrames(shards, "test")
    tar = shards / "train/000001.tar"
    content = bytearray(tar.read_bytes())
    content[600] ^= 1
    tar.write_bytes(content)
    with pytest.raises(UserError, match=r"000001\.tar: its content has changed .*`dvc repro shards`"):
        packed_frames.PackedFrames(shards, "train")
    tar.unlink()
    with pytest.raises(UserError, match=r"000001\.tar is missing, .*manifest\.json\. Run `dvc repro shards`"):
        packed_frames.PackedFrames(shards, "train")


def test_the_command_learns_the_frames_of_packed_shards(shards, tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    module = importlib.import_module("pipeline_steps.backbones.autoencoder")
    monkeypatch.chdir(ROOT)
    seen = []
    monkeypatch.setattr(
        module, "batch_loss", lambda network, frames: seen.append(frames) or network(frames).sample.mean()
    )
    out = tmp_path / "autoencoder"
    command = ["autoencoder", "--shards", str(shards), "--out", str(out), "--steps"]
    monkeypatch.setattr("sys.argv", [*command, "0"])
    with pytest.raises(UserError, match=r"--steps or backbones\.embedded\.autoencoder_steps is 0: expected at least 1"):
        module.main()
    monkeypatch.setattr("sys.argv", [*command, "3"])
    module.main()
    assert [frames.shape[1:] for frames in seen] == [(3, packed.SIZE, packed.SIZE)] * 3
    assert json.loads((out / "config.json").read_text())["sample_size"] == packed.SIZE
    assert autoencoder.FrameLatents(out, "key").channels == 4


# ---------------------------------------------------------------- the real autoencoder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A few steps of the small autoencoder: (folder, metrics)."""
    pytest.importorskip("diffusers")
    module = importlib.import_module("pipeline_steps.backbones.autoencoder")
    folder = tmp_path_factory.mktemp("autoencoder")
    given = SimpleNamespace(seed=1, image_size=56, autoencoder_steps=3, device="cpu")
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(module, "NUM_HELD_OUT", 32)
        patch.setattr(module, "BATCH_SIZE", 8)
        return folder, module.train_autoencoder(given, folder, module.rendered(given, 1))


def test_the_small_autoencoder_is_a_diffusers_model_with_latents_of_unit_variance(trained):
    folder, metrics = trained
    assert metrics["psnr"] > 0
    latents = autoencoder.FrameLatents(folder, "key")
    frames = as_batch(make_batch()).pixel_values
    found = latents(frames)
    assert found.shape == (6, latents.channels, 14, 14)  # 4 px a latent
    from diffusers import AutoencoderKL

    network = AutoencoderKL.from_pretrained(folder)
    with torch.no_grad():
        expected = network.encode(autoencoder.unit_range(frames) * 2 - 1).latent_dist.mean
    expected = (expected - network.config.shift_factor) * network.config.scaling_factor
    torch.testing.assert_close(found, expected)
    before = torch.random.get_rng_state()
    autoencoder.FrameLatents(folder, "key")
    assert torch.equal(before, torch.random.get_rng_state())  # a resumed run loads it, too


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers_per_block": 3}, r"\d+ tensors are missing \(decoder\.\S+, decoder\.\S+, decoder\.\S+ \.\.\.\)"),
        ({"layers_per_block": 0}, r"\d+ tensors are not of such a network \((de|en)coder\."),
        ({"use_quant_conv": False}, r"2 tensors are not of such a network \(quant_conv\.bias, quant_conv\.weight\)"),
        (
            {"latent_channels": 5},
            r"7 tensors have another shape \(decoder\.conv_in\.weight \[.*\] instead of \[.*, 5, ",
        ),
    ],
    ids=str,
)
def test_weights_of_another_configuration_are_an_error(trained, tmp_path, change, words):
    """diffusers fills in missing tensors at random and ignores the others."""
    folder = changed(trained, tmp_path, **change)
    again = rf"\. Copy config\.json and {autoencoder.WEIGHTS} again from the same model\.$"
    with pytest.raises(UserError, match=rf"vae \(a\.key\): {autoencoder.WEIGHTS} does not fit .*: {words}.*{again}"):
        autoencoder.FrameLatents(folder, "a.key")


def changed(trained, tmp_path, **changes):
    """A copy of the autoencoder with other values in its configuration; None: without the key."""
    folder = shutil.copytree(trained[0], tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("channels", [None, True, 0, "4"])
def test_a_configuration_without_a_number_of_channels_is_an_error(trained, tmp_path, channels):
    folder = changed(trained, tmp_path, latent_channels=channels)
    message = rf"vae/config\.json: latent_channels is {channels!r}, expected a positive integer\. Copy .* of a\.key"
    for read in (autoencoder.latent_channels, autoencoder.FrameLatents):
        with pytest.raises(UserError, match=message):
            read(folder, "a.key")


def test_what_diffusers_cannot_build_or_read_is_an_error(trained, tmp_path):
    folder = changed(trained, tmp_path, norm_num_groups=7)
    with pytest.raises(UserError, match=r"vae \(a\.key\) cannot be loaded: .* divisible by .*7.*\. Copy config\.json"):
        autoencoder.FrameLatents(folder, "a.key")
    folder = changed(trained, tmp_path / "other", block_out_channels=[])
    with pytest.raises(UserError, match=r"vae \(a\.key\) cannot be loaded: .*\. Copy config\.json and"):
        autoencoder.FrameLatents(folder, "a.key")
    shutil.copy(trained[0] / "config.json", folder)
    (folder / autoencoder.WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"vae \(a\.key\) cannot be loaded: .*[^.]\. Copy config\.json and"):
        autoencoder.FrameLatents(folder, "a.key")


def test_names_of_earlier_versions_of_diffusers_are_read(trained, tmp_path):
    folder = shutil.copytree(trained[0], tmp_path / "vae")
    weights = load_file(folder / autoencoder.WEIGHTS)
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in weights.items():
        for new, old in former.items():
            name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = value
    assert set(renamed) != set(weights)
    save_file(renamed, folder / autoencoder.WEIGHTS, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: config[key] for key in config if key != "shift_factor"}))
    frames = as_batch(make_batch()).pixel_values
    found, expected = (autoencoder.FrameLatents(own, "key") for own in (folder, trained[0]))
    torch.testing.assert_close(found(frames), expected(frames) + expected.shift * expected.scale)


@pytest.mark.parametrize("target", ["latent", "delta", "flow"])
def test_training_on_real_targets(trained, target):
    if target == "flow":
        pytest.importorskip("cv2")
    training, batch = made_with(target=target, autoencoder=str(trained[0])), as_batch(make_batch())
    assert not any("vae" in name or "encoder.conv_in" in name for name in training.state_dict())
    optimizer = torch.optim.AdamW(training.parameters(), 3e-3)
    first = losses(training, batch)["loss_next_frame"]
    for _ in range(25):
        last = losses(training, batch)["loss_next_frame"]
        optimizer.step()
    assert last < 0.8 * first
