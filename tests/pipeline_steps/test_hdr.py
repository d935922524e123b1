"""HDR video and pictures: refused with a reason, or shown as on an SDR screen."""

import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from model import FoveatedVLMProcessor, video
from model.frames import MediaError, read_media
from model.hdr import BT709, BT2020, P3, to_sdr
from model.pictures import load_image
from model.video import EXACT
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.schemas import FramePolicy, RawSample
from pipeline_steps.inference import ask
from pipeline_steps.shards.pack import Settings, pack_shard
from tests.pipeline_steps.clips import index_row, write_clip

PQ, HLG = 16, 18
NAMES = {PQ: "smpte2084", HLG: "arib-std-b67"}
MATRIX = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])  # ITU-R BT.2087
LOSSES = {"libx265": 2, "prores_ks": 5, "libvpx-vp9": 10}  # of 8 bits, by the compression
FRAME = {"fps": 2.0, "max_frames": 4, "image_size": 64, "resize_mode": "crop"}


def signal(nits, transfer):
    """Light of a screen in cd/m2, grey or a channel -> signal 0..1: ITU-R BT.2100."""
    if transfer == PQ:
        powered = (np.asarray(nits) / 10_000) ** 0.1593017578125
        return ((0.8359375 + 18.8515625 * powered) / (1 + 18.6875 * powered)) ** 78.84375
    scene = (np.asarray(nits) / 1_000) ** (1 / 1.2)
    return np.where(
        scene <= 1 / 12, np.sqrt(3 * scene), 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    )


def sdr_code(nits):
    """The code of this light on an SDR screen whose white is 203 cd/m2: BT.1886."""
    return 255 * (np.asarray(nits) / 203) ** (1 / 2.4)


def shown(rgb, transfer, primaries=BT2020):
    """to_sdr of one colour with these signals."""
    codes = np.full((2, 2, 3), np.rint(65535 * np.asarray(rgb)), np.uint16)
    return to_sdr(codes, transfer, primaries)[0, 0].astype(int)


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_a_grey_ramp_stays_grey_and_monotone_from_black_to_white(transfer):
    codes = np.linspace(0, 65535, 4096).astype(np.uint16).reshape(64, 64, 1).repeat(3, axis=2)  # of 12 bits
    found = to_sdr(codes, transfer, BT2020).astype(int)
    assert np.abs(found - found[..., :1]).max() <= 1
    ramp = found[..., 0].ravel()
    assert (np.diff(ramp) >= 0).all()
    assert (ramp[0], ramp[-1]) == (0, 255)
    assert set(ramp) == set(range(256))


@pytest.mark.parametrize("transfer", [PQ, HLG])
@pytest.mark.parametrize("nits", [0.5, 5, 26, 50, 88])
def test_light_below_the_knee_is_shown_as_bright_as_it_is(transfer, nits):
    """26 cd/m2 is the grey card of 18 % of ITU-R BT.2408, 38 % of either signal."""
    assert signal(26, transfer) == pytest.approx(0.38, abs=0.005)
    found = shown([signal(nits, transfer)] * 3, transfer)
    assert np.abs(found - sdr_code(nits)).max() <= 1


def test_the_signals_of_ITU_R_BT_2408_are_reference_white():
    assert signal(203, PQ) == pytest.approx(0.58, abs=0.002)
    assert signal(203, HLG) == pytest.approx(0.75, abs=0.002)
    white = shown([0.58] * 3, PQ)
    assert np.abs(white - shown([0.75] * 3, HLG)).max() <= 1
    assert 215 <= white[0] <= 235  # near white, with room for highlights
    assert shown([signal(1_000, PQ)] * 3, PQ).tolist() == [255] * 3
    assert shown([1.0] * 3, PQ).tolist() == [255] * 3


@pytest.mark.parametrize("transfer", [PQ, HLG])
@pytest.mark.parametrize("light", [(60, 20, 20), (20, 70, 30), (15, 20, 80), (600, 200, 200), (150, 300, 700)])
def test_the_hue_is_kept(transfer, light):
    """light: linear BT.709 in cd/m2. Below the knee the colour is exact, above it the ratios of its channels are."""
    wide = np.linalg.solve(MATRIX, light)
    if transfer == HLG:  # the system gamma acts on luminance
        luminance = wide @ (0.2627, 0.678, 0.0593)
        scene = wide / 1_000 * (luminance / 1_000) ** (1 / 1.2 - 1)
        rgb = signal((scene**1.2) * 1_000, HLG)
    else:
        rgb = signal(wide, PQ)
    found = (shown(rgb, transfer) / 255) ** 2.4
    assert found / found.max() == pytest.approx(np.array(light) / max(light), abs=0.02)
    if max(light) < 88:
        assert found * 203 == pytest.approx(light, abs=1.5)


def test_colours_outside_bt709_lose_saturation_not_luminance():
    green = shown([0, signal(50, PQ), 0], PQ)
    assert green.argmax() == 1
    assert green[1] > green[0] + 20
    linear = (green / 255) ** 2.4 * 203
    assert linear @ (0.2126, 0.7152, 0.0722) == pytest.approx(50 * 0.678, rel=0.03)


def test_bt709_and_p3_primaries_are_converted_from_their_own():
    light = np.array([60.0, 20.0, 30.0])
    assert np.abs(shown(signal(light, PQ), PQ, BT709) - sdr_code(light)).max() <= 1
    to_709 = np.array([[1.2249, -0.2247, 0], [-0.0420, 1.0419, 0], [-0.0197, -0.0786, 1.0979]])  # SMPTE EG 432-1
    assert np.abs(shown(signal(light, PQ), PQ, P3) - sdr_code(to_709 @ light)).max() <= 1


# ---------------------------------------------------------------- files


def write_hdr(path, signals, transfer, codec="libx265", pix_fmt="yuv420p10le", **tags):
    """A clip of grey fields side by side with these signals."""
    tags = {"color_trc": transfer, "color_primaries": BT2020, "colorspace": BT2020, "color_range": 1} | tags
    options = {"preset": "ultrafast", "x265-params": "lossless=1:log-level=none"} if codec == "libx265" else {}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=2, options=options)
        stream.width = stream.height = 64
        stream.pix_fmt = pix_fmt
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        scale, kind = (2 ** (stream.format.components[0].bits - 8), "<u2" if "10" in pix_fmt else "u1")
        for i in range(4):
            frame = av.VideoFrame(64, 64, pix_fmt)
            luma = np.repeat(np.rint(scale * (16 + 219 * np.asarray(signals))), 64 // len(signals))
            fields = (np.tile(luma, (64, 1)), 128 * scale, 128 * scale, 1023)
            for plane, values in zip(frame.planes, fields, strict=False):
                row = np.zeros((plane.height, plane.line_size // np.dtype(kind).itemsize), kind)
                row[:, : plane.width] = values
                plane.update(row.tobytes())
            frame.pts, frame.time_base = i, Fraction(1, 2)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(("transfer", "name"), [(PQ, "PQ"), (HLG, "HLG")])
@pytest.mark.parametrize(
    ("file", "codec", "pix_fmt"),
    [
        ("a.mkv", "libx265", "yuv420p10le"),
        ("a.mp4", "libx265", "yuv420p10le"),
        ("a.ts", "libx265", "yuv420p10le"),
        ("8-bit.webm", "libvpx-vp9", "yuv420p"),  # the container has the transfer function, the stream has not
        ("a.mov", "prores_ks", "yuv422p10le"),  # the container has the colours, the stream says that it has none
        ("alpha.mov", "prores_ks", "yuva444p10le"),
    ],
)
def test_hdr_video_is_refused_with_a_reason_or_tone_mapped(tmp_path, file, codec, pix_fmt, transfer, name):
    nits = [5, 26, 100, 1_000]
    clip = write_hdr(tmp_path / file, signal(nits, transfer), transfer, codec, pix_fmt)
    with pytest.raises(MediaError, match=rf"^HDR video \({name}\), convert it to SDR or set hdr to tone_map$"):
        read_media(clip, "video", **FRAME)
    media = read_media(clip, "video", hdr="tone_map", **FRAME)
    assert len(media.frames) == 4
    for frame in media.frames:
        found = np.asarray(frame).astype(int)[32, [8, 24, 40, 56]]
        assert np.abs(found - np.append(sdr_code(nits[:3]), 255)[:, None]).max() <= LOSSES[codec]


@pytest.mark.parametrize("changes", [{"color_primaries": 8}, {"colorspace": 14}])
def test_hdr_video_with_other_colours_is_refused(tmp_path, changes):
    clip = write_hdr(tmp_path / "a.mkv", [0.5], PQ, **changes)
    with pytest.raises(MediaError, match=r"^HDR video \(PQ\) with unsupported colours"):
        read_media(clip, "video", hdr="tone_map", **FRAME)


def test_sdr_video_is_not_changed_by_the_setting(tmp_path):
    rng = np.random.default_rng(0)
    clip = write_clip(tmp_path / "a.mp4", [rng.integers(0, 255, (64, 64, 3)).astype(np.uint8) for _ in range(4)])
    one, two = (read_media(clip, "video", hdr=hdr, **FRAME).frames for hdr in ("refuse", "tone_map"))
    with av.open(str(clip)) as container:
        stored = [f.reformat(format="rgb24", interpolation=EXACT).to_ndarray() for f in container.decode(video=0)]
    assert all(np.array_equal(a, b) and np.array_equal(a, c) for a, b, c in zip(one, two, stored, strict=True))


def test_transparent_hdr_video_shows_white(tmp_path):
    """ProRes 4444, black and transparent."""
    clip = write_hdr(tmp_path / "a.mov", [0.0], HLG, "prores_ks", "yuva444p10le")
    assert np.asarray(read_media(clip, "video", hdr="tone_map", **FRAME).frames[0]).max() <= 2  # opaque
    frame = av.VideoFrame(64, 64, "yuva444p10le")
    for plane, value in zip(frame.planes, (64, 512, 512, 0), strict=True):
        plane.update(np.full(plane.buffer_size // 2, value, "<u2").tobytes())
    image = video._sdr(video.VideoReformatter(), frame, "tone_map", HLG, BT2020, BT2020)
    assert np.asarray(image).min() == 255


@pytest.mark.parametrize("name", ["a.png", "a.avif"])
@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_hdr_pictures_are_refused_or_tone_mapped(tmp_path, name, transfer):
    pixels = np.full((64, 64, 3), np.rint(255 * signal(26, transfer)), np.uint8)
    if name == "a.png":
        tags = PngImagePlugin.PngInfo()
        tags.add(b"cICP", bytes([BT2020, transfer, 0, 1]))
        Image.fromarray(pixels).save(tmp_path / name, pnginfo=tags)
    else:
        Image.fromarray(pixels).save(tmp_path / name, quality=100)
        head, box, rest = (tmp_path / name).read_bytes().partition(b"colrnclx")
        assert box
        (tmp_path / name).write_bytes(head + box + bytes([0, BT2020, 0, transfer]) + rest[4:])
    with pytest.raises(MediaError, match=r"^HDR image \((PQ|HLG)\), convert it to SDR or set hdr to tone_map$"):
        load_image(tmp_path / name)
    found = np.asarray(load_image(tmp_path / name, "tone_map")).astype(int)
    assert np.abs(found - sdr_code(26)).max() <= 4  # of 8-bit signals


def test_the_setting_decides_what_is_packed(tmp_path):
    write_hdr(tmp_path / "a.mkv", [0.5], HLG)
    sample = RawSample.model_validate(index_row(tmp_path, "a.mkv", split="train"))
    for hdr, packed in (("refuse", 0), ("tone_map", 1)):
        frames = FramePolicy(image_size=16, resize_mode="crop", fps=2.0, max_frames=4, jpeg_quality=95, hdr=hdr)
        report = pack_shard([sample], Settings(raw_dir=str(tmp_path), frames=frames), tmp_path / hdr / "000000")
        assert (report.shard.num_samples, len(report.quarantined)) == (packed, 1 - packed)


def test_the_processor_refuses_or_tone_maps(made, tmp_path):
    clip = write_hdr(tmp_path / "a.mkv", [float(signal(26, HLG))], HLG)
    with pytest.raises(ValueError, match=r"a.mkv: HDR video \(HLG\), convert it to SDR or set hdr to tone_map"):
        FoveatedVLMProcessor.from_pretrained(made.checkpoint)(text="What?", videos=clip)
    FoveatedVLMProcessor.from_pretrained(made.checkpoint, hdr="tone_map").save_pretrained(tmp_path)
    processor = FoveatedVLMProcessor.from_pretrained(tmp_path)
    found = processor.pictures(processor(text="What?", videos=clip)["pixel_values"]).astype(int)
    assert np.abs(found - sdr_code(26)).max() <= 2
    with pytest.raises(ValueError, match="hdr='clip' is not one of refuse, tone_map"):
        FoveatedVLMProcessor.from_pretrained(made.checkpoint, hdr="clip")


def test_ask_takes_the_setting(made, tmp_path, monkeypatch, capsys):
    write_hdr(tmp_path / "a.mkv", [0.5], PQ)
    monkeypatch.chdir(tmp_path)
    arguments = ["ask", "--checkpoint", str(made.checkpoint), "--question", "What?", "--max-new-tokens", "2"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--video", "a.mkv", "--hdr", "tone_map"])
    ask.main()
    assert "attention animation written" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*arguments, "--video", "a.mkv"])
    with pytest.raises(UserError, match=r"a.mkv: HDR video \(PQ\)"):
        ask.main()
