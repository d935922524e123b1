"""Damaged media made of good ones, by a seeded generator, and a child process that reads them.

    python -m tests.pipeline_steps.damage --folder FOLDER --prepare
    python -m tests.pipeline_steps.damage --folder FOLDER --count 2200 --seed 1 [--first 0]

The first command writes the good media; the second one damages them one after the other, reads each with the frame
policy, and prints one JSON line before it is read (number, what was done) and one after it (outcome, reason or what is
wrong with the result, peak memory of the process in bytes, seconds).
"""

import argparse
import itertools
import json
import math
import re
import struct
import time
import traceback
import zlib
from pathlib import Path

import av
import numpy as np
from PIL import Image, PngImagePlugin

from model.frames import MediaError, read_media
from tests.pipeline_steps.clips import write_clip, write_image

SIZE, MAX_FRAMES = 16, 4  # of what is read
RATES = (math.nan, math.inf, -math.inf, 0.0, -1.0, 5e-324, 1e308, 1e-9, 24.0)
SEGMENTS = (
    (0.0, 0.5), (0.4, 0.41), (1e9, 2e9), (0.0, math.inf), (math.nan, 1.0), (1.0, 0.5), (-1.0, 1.0), (1e-320, 1e300),
)  # fmt: skip
ABSURD = (
    0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFE, 0x10000000, 0x01000000, 0x00010000,
)  # fmt: skip
BOXES = (
    b"tkhd", b"mvhd", b"mdhd", b"stts", b"ctts", b"stsz", b"stco", b"stsc", b"stss", b"elst", b"stsd", b"avc1", b"hvc1",
)  # fmt: skip
SIGNATURES = (
    b"\0\0\0\x18ftypisom\0\0\2\0isomiso2", b"\x1aE\xdf\xa3", b"RIFF\xff\xff\0\0AVI LIST",
    b"RIFF\xff\xff\0\0WEBPVP8 ", b"\xff\xd8\xff\xe0\0\x10JFIF\0", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"P6\n", b"FLV\1", b"G@\0\x10" + b"\xff" * 184, b"\0\0\1\xba",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", b"OggS\0\2",
)  # fmt: skip


def moving(num_frames, size=64):  # px; of 48 px pictures x265 corrupts the memory of the process
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:size, :size]
    for i in range(num_frames):
        wave = 128 + 60 * np.sin((x + 3 * i) / 5) + 40 * np.cos((y - 2 * i) / 7)
        yield np.clip(wave[..., None] + rng.normal(0, 6, (size, size, 3)), 0, 255).astype(np.uint8)


def good_videos(folder):
    frames = list(moving(24))
    clips = {
        "b-frames.mp4": ("libx264", {"bf": "3"}),
        "a.mkv": ("libx264", {"crf": "30"}),
        "a.ts": ("libx264", {"crf": "30"}),
        "hevc.mp4": ("libx265", {"x265-params": "log-level=none:pools=1"}),
        "av1.mkv": ("libsvtav1", {"crf": "40", "preset": "12", "svtav1-params": "lp=1"}),
        "vp9.webm": ("libvpx-vp9", {"cpu-used": "8"}),
        "vp8.webm": ("libvpx", {"cpu-used": "8"}),
        "a.avi": ("mpeg4", {"bf": "2"}),
        "mjpeg.avi": ("mjpeg", {}),
        "a.mov": ("prores_ks", {}),
        "a.mpg": ("mpeg2video", {"bf": "2"}),
        "a.flv": ("flv", {}),
        "a.wmv": ("wmv2", {}),
        "a.gif": ("gif", {}),
    }
    formats = {"prores_ks": "yuv422p10le", "gif": "rgb8", "mjpeg": "yuvj420p"}
    for name, (codec, options) in clips.items():
        fps = 25 if name == "a.mpg" else 10
        write_clip(folder / name, frames, fps, codec, options, gop=8, pix_fmt=formats.get(codec, "yuv420p"))
    write_clip(folder / "turned.mp4", frames, 10, options={"crf": "30"}, rotation=90)
    write_clip(folder / "uneven.mkv", frames, 10, stamps=[i * 200 + (i % 5) * 40 for i in range(24)])
    remux(folder / "b-frames.mp4", folder / "index-first.mp4", "faststart")
    remux(folder / "turned.mp4", folder / "fragments.mp4", "frag_keyframe+empty_moov+default_base_moof")


def remux(clip, path, movflags):
    with av.open(str(clip)) as source, av.open(str(path), "w", options={"movflags": movflags}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)


def good_pictures(folder):
    pixels = next(moving(1))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    write_image(folder / "a.jpg", pixels, exif=exif)
    write_image(folder / "progressive.jpg", pixels, progressive=True)
    write_image(folder / "a.png", pixels)
    write_image(folder / "grey.bmp", pixels[..., 0])
    write_image(folder / "a.webp", pixels)
    write_image(folder / "lossless.webp", pixels, lossless=True, exif=exif)
    write_image(folder / "lzw.tif", pixels, compression="tiff_lzw")
    write_image(folder / "deflate.tif", pixels, compression="tiff_adobe_deflate")
    write_image(folder / "a.ppm", pixels)
    pages = [Image.fromarray(pixels) for pixels in moving(4)]
    palettes = [page.convert("P", palette=Image.Palette.ADAPTIVE) for page in pages]
    palettes[0].save(folder / "still.gif", save_all=True, append_images=palettes[1:], duration=100)
    palettes[0].save(folder / "palette.png", transparency=3)
    pages[0].save(folder / "pages.tif", save_all=True, append_images=pages[1:])
    pages[0].save(folder / "moving.webp", save_all=True, append_images=pages[1:])
    pages[0].save(folder / "moving.png", save_all=True, append_images=pages[1:])
    pages[0].save(folder / "two.mpo", save_all=True, append_images=pages[1:2])
    Image.fromarray(pixels).convert("CMYK").save(folder / "cmyk.jpg")


def prepare(folder):
    """The good media, and bombs, as FOLDER/video, FOLDER/image and FOLDER/bombs."""
    for name, write in {"video": good_videos, "image": good_pictures, "bombs": bombs}.items():
        (folder / name).mkdir(parents=True)
        write(folder / name)


# ---------------------------------------------------------------- kinds of damage: (rng, bytes, other bytes) -> bytes


def truncated(rng, content, other):
    return content[: int(rng.integers(0, len(content)))]


def flipped_at_the_start(rng, content, other):
    return flip(rng, content, int(rng.integers(1, 9)), min(len(content), 256))


def flipped_anywhere(rng, content, other):
    return flip(rng, content, int(rng.integers(1, 60)), len(content))


def flipped_at_the_end(rng, content, other):
    return flip(rng, content[::-1], int(rng.integers(1, 20)), min(len(content), 1500))[::-1]


def flip(rng, content, count, within):
    damaged = bytearray(content)
    for place in rng.integers(0, within, count):
        damaged[place] ^= 1 << int(rng.integers(0, 8))
    return bytes(damaged)


def overwritten(rng, content, other):
    start = int(rng.integers(0, len(content)))
    count = int(rng.integers(1, 400))
    return content[:start] + (bytes(count) if rng.random() < 0.3 else rng.bytes(count)) + content[start + count :]


def cut_out(rng, content, other):
    start = int(rng.integers(0, len(content)))
    return content[:start] + content[start + int(rng.integers(1, 300)) :]


def repeated(rng, content, other):
    start, end = sorted(int(place) for place in rng.integers(0, len(content), 2))
    return content[:end] + content[start:end] * int(rng.integers(1, 4)) + content[end:]


def spliced(rng, content, other):
    return content[: int(rng.integers(1, len(content)))] + other[int(rng.integers(0, len(other))) :]


def absurd_number(rng, content, other):
    """A field of 2, 4 or 8 bytes somewhere: sizes, dimensions, counts, times."""
    within = min(len(content), 600) if rng.random() < 0.5 else len(content)
    start, order = int(rng.integers(0, within)), "<" if rng.random() < 0.5 else ">"
    value, code = ABSURD[int(rng.integers(0, len(ABSURD)))], "HIQ"[int(rng.integers(0, 3))]
    field = struct.pack(order + code, value & 0xFFFF if code == "H" else value * (value if code == "Q" else 1) % 2**64)
    return content[:start] + field + content[start + len(field) :]


def absurd_box(rng, content, other):
    """A field of a box of an mp4: dimensions, time scales, durations, counts, offsets. Other files: absurd_number."""
    places = [content.find(box) for box in BOXES if box in content]
    if not places:
        return absurd_number(rng, content, other)
    start = places[int(rng.integers(0, len(places)))] + 4 + 4 * int(rng.integers(0, 24))
    return content[:start] + struct.pack(">I", ABSURD[int(rng.integers(0, len(ABSURD)))]) + content[start + 4 :]


def huge_picture(rng, content, other):
    """Other dimensions in the header of a picture, with a right check sum. Other files: absurd_number."""
    width, height = (int(2 ** rng.uniform(0, 31)) for _ in range(2))
    frame = max(content.find(b"\xff\xc0"), content.find(b"\xff\xc2"))
    if content.startswith(b"\x89PNG"):
        header = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
        return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]
    if content.startswith(b"\xff\xd8") and frame > 0:
        return content[: frame + 5] + struct.pack(">HH", height % 65536, width % 65536) + content[frame + 9 :]
    if content.startswith(b"GIF"):
        return content[:6] + struct.pack("<HH", width % 65536, height % 65536) + content[10:]
    if content.startswith(b"BM"):
        return content[:18] + struct.pack("<ii", width, -height if rng.random() < 0.5 else height) + content[26:]
    if content.startswith(b"P6"):
        return b"P6\n%d %d\n255\n" % (width, height) + content[13:]
    return absurd_number(rng, content, other)


def random_bytes(rng, content, other):
    return SIGNATURES[int(rng.integers(0, len(SIGNATURES)))] + rng.bytes(int(rng.integers(0, 3000)))


def twice(rng, content, other):
    """Two damages, one after the other."""
    first, second = (DAMAGES[int(rng.integers(0, len(DAMAGES) - 1))] for _ in range(2))
    return second(rng, first(rng, content, other) or b"x", other)


DAMAGES = (
    truncated, flipped_at_the_start, flipped_anywhere, flipped_at_the_end, overwritten, cut_out, repeated, spliced,
    absurd_number, absurd_box, huge_picture, random_bytes, twice,
)  # fmt: skip


def bombs(folder):
    """Small files that say, or hold, a lot."""
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 50_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(folder / "text.png", pnginfo=text)
    Image.new("1", (20_000, 20_000)).save(folder / "wide.png")
    Image.new("L", (8_000, 8_000)).save(folder / "large.png")
    Image.new("L", (20_000, 20_000)).save(folder / "strips.tif", compression="tiff_adobe_deflate")
    Image.new("L", (16_000, 16_000)).save(folder / "wide.gif")
    Image.new("RGB", (16_000, 12_000)).save(folder / "wide.jpg", quality=5)
    Image.new("RGB", (65_500, 1)).save(folder / "line.jpg")
    promising_clips(folder)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "zeros.mp4").write_bytes(bytes(100_000))
    (folder / "boxes.mp4").write_bytes(b"\0\0\0\x10ftypisom\0\0\0\0" + b"\0\0\0\x08moov" * 20_000)
    (folder / "nested.mp4").write_bytes(b"".join(struct.pack(">I", 8 * n) + b"moov" for n in range(20_000, 0, -1)))
    (folder / "long.mp4").write_bytes(b"\0\0\0\x10ftypisom\0\0\0\0" + struct.pack(">I4sQ", 1, b"moov", 2**64 - 9))
    (folder / "nested.mkv").write_bytes(b"\x1aE\xdf\xa3\x80" + b"\x18S\x80g\x01\xff\xff\xff\xff\xff\xff\xff" * 10_000)
    (folder / "list.avi").write_bytes(b"RIFF\xff\xff\xff\x7fAVI " + b"LIST\xff\xff\xff\x7fhdrl" * 20_000)


def promising_clips(folder, num_samples=60_000_000):
    """Clips whose tables say that they have so many frames: as one number, so the files stay small."""
    clip = write_clip(folder / "plain.mp4", list(moving(8)), 10, gop=1)
    table = bytearray(clip.read_bytes())
    for box, at, fields in (
        (b"stsz", 4, (1, num_samples)),
        (b"stts", 8, (num_samples,)),
        (b"stsc", 12, (num_samples,)),
    ):
        start = table.index(box) + 4 + at
        table[start : start + 4 * len(fields)] = struct.pack(f">{len(fields)}I", *fields)
    (folder / "table.mp4").write_bytes(table)
    remux(clip, folder / "run.mp4", "frag_keyframe+empty_moov+default_base_moof")
    run = bytearray((folder / "run.mp4").read_bytes())
    start = run.index(b"trun") + 4
    run[start : start + 8] = struct.pack(">II", 1, num_samples)
    (folder / "run.mp4").write_bytes(run)


# ---------------------------------------------------------------- reading


def cases(folder, seed, count):
    """(what was done, arguments of read_media): bombs and good media as they are, then `count` damaged ones."""
    good = {path: kind for kind in ("video", "image") for path in sorted((folder / kind).iterdir())}
    both = itertools.product(sorted((folder / "bombs").iterdir()), ("image", "video"))
    for path, kind in [*both, *good.items()]:
        yield path.name, {"path": path, "kind": kind}
    contents = {path: path.read_bytes() for path in good}
    turns = itertools.cycle(itertools.product(DAMAGES, good))
    for number, (damage, path) in enumerate(itertools.islice(turns, count)):
        rng = np.random.default_rng([seed, number])
        others = list(contents.values())
        content = damage(rng, contents[path], others[int(rng.integers(0, len(others)))])
        kind = good[path] if rng.random() < 0.9 else ("image" if good[path] == "video" else "video")
        options = damaged_input(rng, folder / f"bad{path.suffix}", content, kind)
        yield f"{path.name}, {damage.__name__}", options


def damaged_input(rng, path, content, kind):
    """Writes the content as a file, as a part of a container, or among good pictures; arguments of read_media."""
    options = {"path": path, "kind": kind, "resize_mode": ("crop", "letterbox")[int(rng.integers(0, 2))]}
    if rng.random() < 0.2:
        lead, repeat = rng.bytes(int(rng.integers(0, 600))), int(rng.integers(1, 6))
        path.write_bytes(lead + content + rng.bytes(100))
        options["parts"] = ((len(lead), len(content)),) * repeat
        if kind == "video" and (repeat > 1 or rng.random() < 0.5):
            options["picture_fps"] = RATES[int(rng.integers(0, len(RATES)))]
    else:
        path.write_bytes(content)
    if kind == "video" and rng.random() < 0.15:
        options["segment"] = SEGMENTS[int(rng.integers(0, len(SEGMENTS)))]
    return options


def outcome(options):
    """("frames" | "error" | "wrong", text): what read_media gives, "wrong" if it may not."""
    try:
        media = read_media(
            **{"fps": 2.0, "max_frames": MAX_FRAMES, "image_size": SIZE, "resize_mode": "crop"} | options
        )
    except MediaError as error:
        fine = error.reason.isprintable() and error.reason.isascii() and 0 < len(error.reason) < 60
        return ("error" if fine else "wrong"), error.reason
    except Exception:
        return "wrong", traceback.format_exc()
    times = media.timestamps
    checks = {
        "number of frames": 1 <= len(media.frames) <= MAX_FRAMES and len(times) == len(media.frames),
        "form of the frames": all(f.size == (SIZE, SIZE) and f.mode == "RGB" for f in media.frames),
        "timestamps": times == sorted(times) and all(0 <= time < 1e7 for time in times),
        "duration": 0 <= media.duration < 1e7,
        "size": media.width >= 1 and media.height >= 1,
    }
    wrong = [name for name, fine in checks.items() if not fine]
    return ("wrong", f"{wrong}: {media}") if wrong else ("frames", "")


def peak_memory():
    """Bytes, of this program alone: what getrusage says begins with the memory of the process that started it."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--count", type=int, default=2200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare(arguments.folder)
        return
    for number, (done, options) in enumerate(cases(arguments.folder, arguments.seed, arguments.count)):
        if number < arguments.first:
            continue
        print(
            json.dumps({"number": number, "done": done, "options": {k: str(v) for k, v in options.items()}}), flush=True
        )
        start = time.perf_counter()
        what, text = outcome(options)
        peak = peak_memory()
        seconds = time.perf_counter() - start
        print(json.dumps({"outcome": what, "text": text, "peak": peak, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
