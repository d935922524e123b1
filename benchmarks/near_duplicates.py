"""Margins of `shards.max_hash_distance`: hash distances between different samples, and between copies of one.

    python -m pipeline_steps.sources && python -m benchmarks.near_duplicates

Hashes all media of data/raw as `python -m pipeline_steps.shards` does. The distance of two samples is the smallest
threshold at which three of their four frames match. Prints the distances between held-out samples and their nearest
training sample, and between every `--every`-th clip or still and modified copies (encoder, size, brightness, ...).
Cost: 2 minutes on one core.
"""

import argparse
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageEnhance
from tqdm import tqdm

from model.frames import read_media
from pipeline_steps.common import params
from pipeline_steps.common.errors import run_main
from pipeline_steps.common.schemas import read_samples
from pipeline_steps.shards.hashes import hash_frames

NEEDED = 3  # of four frames


def scale(factor):
    return lambda frame: frame.resize((int(frame.width * factor), int(frame.height * factor)))


def brightness(factor):
    return lambda frame: ImageEnhance.Brightness(frame).enhance(factor)


def box(frame):
    """Adds black bars above and below."""
    tall = Image.new("RGB", (frame.width, frame.height * 5 // 4 // 2 * 2))
    tall.paste(frame, (0, (tall.height - frame.height) // 2))
    return tall


def crop(frame):
    """Crops 2.5 % from every side."""
    border = frame.width // 40
    return frame.crop((border, border, frame.width - border, frame.height - border))


def mirror(frame):
    return frame.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def same(frame):
    return frame


H264 = ("libx264", {})
COPIES = {  # frame transform, (codec, options), file extension
    "h264, crf 30": (same, ("libx264", {"crf": "30"}), "mp4"),
    "h264, crf 40 (blocks)": (same, ("libx264", {"crf": "40"}), "mp4"),
    "mpeg4": (same, ("mpeg4", {}), "avi"),
    "vp9": (same, ("libvpx-vp9", {}), "webm"),
    "half the size": (scale(0.5), H264, "mp4"),
    "twice the size": (scale(2), H264, "mp4"),
    "10 % brighter": (brightness(1.1), H264, "mp4"),
    "20 % darker": (brightness(0.8), H264, "mp4"),
    "bars above and below": (box, H264, "mp4"),
    "2.5 % cut off each side": (crop, H264, "mp4"),
    "mirrored": (mirror, H264, "mp4"),
}


def encode(path, frames, rate, codec, options):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(rate), options=options)
        stream.width, stream.height, stream.pix_fmt = frames[0].width // 2 * 2, frames[0].height // 2 * 2, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode(None))


def read_video(path):
    """All frames and the frame rate."""
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        return [frame.to_image() for frame in container.decode(video=0)], rate


def copy_distances(path, kind, change, codec, ending, hashes, policy, folder):
    """Sorted Hamming distances between the frame hashes of a sample and of its modified copy."""
    if kind == "image":
        copy = folder / "copy.jpg"
        change(Image.open(path).convert("RGB")).save(copy, quality=60)
    else:
        copy = folder / f"copy.{ending}"
        frames, rate = read_video(path)
        encode(copy, [change(frame) for frame in frames], rate, *codec)
    again = hash_frames(read_media(copy, kind, **policy).frames)
    return np.sort(np.bitwise_count(hashes ^ again).sum(-1, dtype=int))


def nearest_distances(queries, references):
    """For every query the smallest threshold at which NEEDED frames of some reference match."""
    found = []
    for query in tqdm(queries, desc="compare", mininterval=1):
        bits = np.bitwise_count(references ^ query).sum(-1, dtype=int)
        found.append(np.sort(bits, axis=1)[:, NEEDED - 1].min())
    return np.array(found)


def line(name, values):
    low, middle, high = np.percentile(values, (0, 50, 100))
    return f"{name:<44}{len(values):6d}{low:8.0f}{middle:8.0f}{high:8.0f}"


def measure(section, raw, every, folder):
    policy = {"fps": section.fps, "max_frames": section.max_frames, "image_size": section.image_size}
    policy["resize_mode"], policy["hdr"] = section.resize_mode, section.hdr
    samples = [sample for sample in read_samples(raw / "index.jsonl") if sample.kind != "text"]
    hashes = {}
    for sample in tqdm(samples, desc="hash", mininterval=1):
        media = read_media(raw / sample.path, sample.kind, **policy)
        hashes[sample.key] = hash_frames(media.frames)
    print(f"{'bits of 256 at which 3 of 4 frames match':<44}{'number':>6}{'least':>8}{'median':>8}{'most':>8}")
    train = np.stack([hashes[sample.key] for sample in samples if sample.split == "train"])
    for kind in ("video", "image"):
        held_out = [hashes[s.key] for s in samples if s.split in ("validation", "test") and s.kind == kind]
        print(line(f"held-out {kind}, nearest of {len(train)} in training", nearest_distances(held_out, train)))
    for name, (change, codec, ending) in COPIES.items():
        distances = {"video": [], "image": []}
        for kind, values in distances.items():
            for sample in [s for s in samples if s.kind == kind][::every]:
                places = (raw / sample.path, kind, change, codec, ending, hashes[sample.key], policy, folder)
                values.append(copy_distances(*places)[NEEDED - 1])
        print(line(f"copy of a video: {name}", distances["video"]))
        if codec == H264:
            print(line(f"copy of a still, JPEG 60: {name}", distances["image"]))


def main():
    parser = argparse.ArgumentParser(description="Distances of perceptual hashes between samples and their copies.")
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--raw", type=Path, default=Path("data/raw"))
    parser.add_argument("--every", type=int, default=60)
    arguments = parser.parse_args()
    section = params.read(arguments.params, "shards").shards
    with tempfile.TemporaryDirectory() as folder:
        measure(section, arguments.raw, arguments.every, Path(folder))


if __name__ == "__main__":
    run_main(main)
