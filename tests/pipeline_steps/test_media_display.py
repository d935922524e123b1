"""Pictures come out as a player or viewer shows them: display matrices, EXIF orientation, transparency on white."""

import struct
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from model.pictures import load_image, on_white
from tests.pipeline_steps.clips import write_clip
from tests.pipeline_steps.test_frames import LOSSLESS, read

# What a player does, as a function of the stored pixels, and a, b, c, d of the display matrix that asks for it:
# (x, y) is shown at (a x + c y, b x + d y), with y downwards.
DISPLAYS = {
    "as stored": ((1, 0, 0, 1), lambda pixels: pixels),
    "mirrored left-right": ((-1, 0, 0, 1), lambda pixels: pixels[:, ::-1]),
    "mirrored top-bottom": ((1, 0, 0, -1), lambda pixels: pixels[::-1]),
    "turned by 180": ((-1, 0, 0, -1), lambda pixels: pixels[::-1, ::-1]),
    "turned clockwise": ((0, 1, -1, 0), lambda pixels: np.rot90(pixels, -1)),
    "turned anticlockwise": ((0, -1, 1, 0), lambda pixels: np.rot90(pixels)),
    "transposed": ((0, 1, 1, 0), lambda pixels: pixels.swapaxes(0, 1)),
    "transposed over the other diagonal": ((0, -1, -1, 0), lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1)),
}
EXIF = [1, 2, 4, 3, 6, 8, 5, 7]  # of the displays in their order


def corners(height=32, width=64):
    """Four quadrants of different grey: no two of the eight displays look alike."""
    quadrants = np.array([[30, 90], [150, 210]], np.uint8)
    pixels = quadrants.repeat(height // 2, axis=0).repeat(width // 2, axis=1)
    return np.stack([pixels] * 3, axis=-1)


def with_matrix(clip, signs, scale=1.0):
    """The mp4 with this display matrix in the header of its track."""
    a, b, c, d = (round(value * 65536 * scale) for value in signs)
    content = bytearray(clip.read_bytes())
    start = content.index(b"tkhd") + 4 + 40
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 2**30)
    clip.write_bytes(content)
    return clip


@pytest.mark.parametrize("name", DISPLAYS)
def test_display_matrix(tmp_path, name):
    signs, shown = DISPLAYS[name]
    clip = with_matrix(write_clip(tmp_path / "a.mp4", [corners()] * 2, options=LOSSLESS), signs)
    expected = shown(corners())
    media = read(clip, image_size=64, resize_mode="letterbox")
    assert (media.height, media.width) == expected.shape[:2]
    frame = np.asarray(media.frames[0]).astype(int)
    bars = (slice(16, 48), slice(None)) if media.width > media.height else (slice(None), slice(16, 48))
    inside = frame[bars]
    assert np.abs(inside - expected).mean() < 4
    assert np.median(np.abs(inside - expected)) <= 3


def test_display_matrix_with_pixels_that_are_not_square(tmp_path):
    context = {"sample_aspect_ratio": Fraction(2, 1)}
    clip = write_clip(tmp_path / "a.mp4", [corners(64, 64)] * 2, options=LOSSLESS, context=context)
    content = bytearray(clip.read_bytes())
    for name, size in (("mirrored left-right", (128, 64)), ("transposed", (64, 128))):
        clip.write_bytes(content)
        media = read(with_matrix(clip, DISPLAYS[name][0]), image_size=64)
        assert (media.width, media.height) == size


def test_display_matrix_between_the_axes_is_not_applied(tmp_path):
    clip = write_clip(tmp_path / "a.mp4", [corners(64, 64)] * 2, options=LOSSLESS)
    stored = read(clip, image_size=64).frames[0].tobytes()
    assert read(with_matrix(clip, (0.8, 0.6, -0.6, 0.8)), image_size=64).frames[0].tobytes() == stored
    assert read(with_matrix(clip, (0, 0, 0, 0)), image_size=64).frames[0].tobytes() == stored
    turned = read(with_matrix(clip, (0.001, 1, -1, 0.001)), image_size=64).frames[0]
    assert turned.tobytes() == read(with_matrix(clip, (0, 1, -1, 0)), image_size=64).frames[0].tobytes() != stored


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
@pytest.mark.parametrize(("orientation", "name"), list(zip(EXIF, DISPLAYS, strict=True)))
def test_exif_orientation(tmp_path, orientation, name, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    lossless = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}, "avif": {"quality": 100}}
    Image.fromarray(corners()).save(path, exif=exif, **lossless.get(suffix, {}))
    found, expected = np.asarray(load_image(path)).astype(int), DISPLAYS[name][1](corners())
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 4


# ---------------------------------------------------------------- transparency


def ink():
    """Black ink at the left, half transparent black in the middle, transparent black at the right: RGBA [8, 24, 4]."""
    pixels = np.zeros((8, 24, 4), np.uint8)
    pixels[:, :8, 3], pixels[:, 8:16, 3] = 255, 128
    return pixels


def hard(pixels):
    return np.where(pixels[..., 3:] > 200, pixels, np.array([0, 0, 0, 0], np.uint8))


def transparent_images():
    """{file name: (image, options of save)}; the transparent pixels are stored black."""
    ink_image = Image.fromarray(ink())
    clear = Image.fromarray(hard(ink()))
    palette = Image.fromarray(np.where(hard(ink())[..., 3] == 255, 0, 1).astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 0, 0, 0])
    grey = Image.fromarray(np.where(hard(ink())[..., 3] == 255, 0, 7).astype(np.uint8))
    rgb = Image.fromarray(np.where(hard(ink())[..., 3:] == 255, 0, np.array([1, 2, 3])).astype(np.uint8))
    one = Image.fromarray(np.where(hard(ink())[..., 3] == 255, 0, 255).astype(np.uint8)).convert("1")
    return {
        "rgba.png": (ink_image, {}),
        "la.png": (ink_image.convert("LA"), {}),
        "palette.png": (palette, {"transparency": 1}),
        "palette-alphas.png": (palette, {"transparency": b"\xff\0"}),
        "grey-trns.png": (grey, {"transparency": 7}),
        "rgb-trns.png": (rgb, {"transparency": (1, 2, 3)}),
        "one-trns.png": (one, {"transparency": 1}),
        "lossless.webp": (ink_image, {"lossless": True, "exact": True}),
        "lossy.webp": (ink_image, {"quality": 100}),
        "a.gif": (palette, {"transparency": 1}),
        "rgba.tif": (ink_image, {}),
        "a.avif": (ink_image, {"quality": 100}),
        "clear.webp": (clear, {"lossless": True, "exact": True}),
    }


@pytest.mark.parametrize("name", transparent_images())
def test_transparency_shows_white(tmp_path, name):
    image, options = transparent_images()[name]
    image.save(tmp_path / name, **options)
    found = np.asarray(load_image(tmp_path / name)).astype(int)
    assert found.shape == (8, 24, 3)
    assert found[:, 1:7].max() <= 6
    assert found[:, 17:23].min() >= 249
    if image.mode in ("RGBA", "LA") and name != "clear.webp":
        assert np.abs(found[:, 10:14] - 127).max() <= 6


def test_a_transparent_colour_of_16_bits_shows_white(tmp_path):
    """A PNG with 16 bits per channel, which Pillow reads as 8 bits but whose tRNS it does not scale."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    pixels = np.array([[[65535, 256, 32768], [0, 0, 0]]], ">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)), chunk(b"tRNS", pixels[0, 0].tobytes())]
    parts += [chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert np.asarray(load_image(tmp_path / "a.png"))[0].tolist() == [[255] * 3, [0] * 3]


@pytest.mark.parametrize("mode", ["RGBa", "La", "LA", "PA"])
def test_every_mode_with_alpha_is_composed_on_white(mode):
    image = Image.fromarray(hard(ink()))
    alpha = image.getchannel("A")
    if mode == "PA":
        image = image.convert("L").convert("P")
        image.putalpha(alpha)
    else:
        image = image.convert(mode) if mode == "RGBa" else image.convert("LA").convert(mode)
    assert image.mode == mode
    found = np.asarray(on_white(image))
    assert found[:, :8].max() == 0
    assert found[:, 16:].min() == 255


def test_strips_join_without_a_seam(monkeypatch):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (37, 11, 4), np.uint8))
    whole = on_white(image).tobytes()
    monkeypatch.setattr("model.pictures.STRIP_PIXELS", 50)
    assert on_white(image).tobytes() == whole


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.mov", "qtrle", "argb"),
        ("a.mov", "png", "rgba"),
        ("a.mov", "prores_ks", "yuva444p10le"),
        ("a.gif", "gif", None),
    ],
)
def test_videos_with_transparency_show_white(tmp_path, name, codec, pix_fmt):
    pixels = np.zeros((32, 96, 4), np.uint8)
    pixels[:, :32, 3] = 255
    path = tmp_path / name
    if codec == "gif":
        image = transparent_images()["a.gif"][0].resize((96, 32), Image.Resampling.NEAREST)
        image.save(path, save_all=True, append_images=[image.copy()], transparency=1, duration=500, disposal=2)
    else:
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=2)
            stream.width, stream.height, stream.pix_fmt = 96, 32, pix_fmt
            for _ in range(2):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgba")))
            container.mux(stream.encode())
    frame = np.asarray(read(path, image_size=96, resize_mode="letterbox").frames[0])[32:64]
    assert frame[4:-4, 2:28].max() <= 8
    assert frame[4:-4, 70:94].min() >= 247


def test_the_processor_composes_on_white_and_applies_the_orientation(tmp_path):
    from model import FoveatedVLMImageProcessor

    square = FoveatedVLMImageProcessor(24, resize_mode="letterbox").square
    for name, (image, options) in transparent_images().items():
        image.save(tmp_path / name, **options)
        with Image.open(tmp_path / name) as opened:
            found = np.asarray(square(opened))[8:16]
        assert found[2:-2, 1:7].max() <= 6, name
        assert found[2:-2, 17:23].min() >= 249, name
