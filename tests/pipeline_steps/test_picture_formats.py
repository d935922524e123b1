"""Pictures of less common formats: 16-bit grey, AVIF, HEIC, PNG files with long texts and colour profiles."""

import io

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from model.frames import MediaError, read_media
from model.pictures import is_picture, load_image

RAMP = np.linspace(0, 65535, 64 * 16).astype(np.uint16).reshape(16, 64)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "big-endian.tif", "a.ppm"])
def test_grey_of_16_bits_is_scaled(tmp_path, name):
    if name == "a.ppm":
        (tmp_path / name).write_bytes(b"P5\n64 16\n65535\n" + RAMP.astype(">u2").tobytes())
    else:
        pixels = RAMP.astype(">u2") if name == "big-endian.tif" else RAMP
        Image.fromarray(pixels).save(tmp_path / name)
    found = np.asarray(load_image(tmp_path / name)).astype(int)
    assert found.shape == (16, 64, 3)
    assert np.abs(found - RAMP[..., None] / 257).max() <= 1


def test_grey_of_16_bits_keeps_orientation_and_transparency(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RAMP).save(tmp_path / "a.png", exif=exif)
    assert load_image(tmp_path / "a.png").size == (16, 64)
    pixels = np.where(np.arange(64) < 32, 5, 40000).astype(np.uint16)[None].repeat(16, axis=0)
    Image.fromarray(pixels).save(tmp_path / "b.png", transparency=5)
    found = np.asarray(load_image(tmp_path / "b.png"))
    assert found[:, :32].min() == 255
    assert set(found[:, 32:].ravel().tolist()) == {156}


@pytest.mark.parametrize(("mode", "suffix"), [("I", "tif"), ("F", "tif")])
def test_grey_without_a_known_range_is_refused(tmp_path, mode, suffix):
    Image.fromarray(RAMP.astype(np.int32 if mode == "I" else np.float32)).save(tmp_path / f"a.{suffix}")
    with pytest.raises(MediaError, match=rf"^unsupported pixel mode {mode}$"):
        load_image(tmp_path / f"a.{suffix}")


def test_avif_is_read_as_a_file_and_inside_an_archive(tmp_path):
    pixels = np.full((32, 32, 3), (200, 90, 30), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.avif", quality=100)
    content = (tmp_path / "a.avif").read_bytes()
    assert is_picture(content[:12])
    (tmp_path / "pack").write_bytes(b"xyz" + content)
    options = {"fps": 2.0, "max_frames": 4, "image_size": 16, "resize_mode": "crop"}
    for kind in ("image", "video"):
        media = read_media(tmp_path / "pack", kind, parts=((3, len(content)),), **options)
        assert np.abs(np.asarray(media.frames[0]).astype(int) - pixels[0, 0]).max() <= 4


@pytest.mark.parametrize(("brand", "name"), [(b"heic", "HEIC"), (b"mif1", "HEIC"), (b"heix", "HEIC")])
def test_formats_that_pillow_lacks_are_named(brand, name):
    file = io.BytesIO(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1" + b"heic" + bytes(100))
    with pytest.raises(MediaError, match=rf"^unsupported format {name}$"):
        load_image(file)


@pytest.mark.parametrize("kind", ["text", "compressed text", "international text", "profile"])
@pytest.mark.parametrize("size", [1000, 3_000_000])
def test_png_with_long_texts_is_read(tmp_path, kind, size):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    texts, options = PngImagePlugin.PngInfo(), {}
    exif = Image.Exif()
    exif[0x0112] = 3
    if kind == "profile":
        options["icc_profile"] = b"\0" * size
    elif kind == "international text":
        texts.add_itxt("comment", "x" * size, zip=True)
    else:
        texts.add_text("comment", "x" * size, zip=kind.startswith("compressed"))
    Image.fromarray(pixels).save(tmp_path / "a.png", pnginfo=texts, exif=exif, **options)
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.png")), pixels[::-1, ::-1])
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[:-100])
    with pytest.raises(MediaError, match=r"^truncated or damaged image$"):
        load_image(tmp_path / "cut.png")
