"""Time to sample frames from a long video: decoding from key frames compared with decoding all frames.

    python -m benchmarks.long_video
    python -m benchmarks.long_video --minutes 10 --size 224 --frames 64 --codec libx265

Writes a clip of moving texture (30 frames per second, a key frame every 2 s) into a temporary folder, reads it with the
frame policy in both ways alternately, `--repeats` times each, checks that the frames are equal, and prints the fastest
times and their ratio. Cost: about a minute on one core with the defaults, most of it for writing the clip.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import av
import numpy as np

from model import frames
from pipeline_steps.common.errors import UserError, run_main

FPS, KEY_SECONDS = 30, 2


def write_clip(path: Path, seconds: float, size: int, codec: str) -> None:
    """Writes a clip of `seconds` s and `size` px with a moving texture."""
    y, x = np.mgrid[:size, :size]
    texture = np.stack([128 + 60 * np.sin(x / 9 + k) + 40 * np.cos(y / 13 - k) for k in range(3)], axis=-1)
    texture = np.clip(texture + np.random.default_rng(0).normal(0, 6, texture.shape), 0, 255).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options={"preset": "veryfast"})
        stream.width = stream.height = size
        stream.pix_fmt, stream.gop_size = "yuv420p", FPS * KEY_SECONDS
        for number in range(round(seconds * FPS)):
            pixels = np.roll(texture, (number, 2 * number), axis=(0, 1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def measure(path: Path, max_frames: int, repeats: int) -> dict[str, float]:
    """Fastest time of each way in seconds. UserError if the two give different frames."""
    read_index = frames.read_index
    ways = {"keys": read_index, "everything": lambda piece: dataclasses.replace(read_index(piece), keys=[])}
    seconds, pictures = {way: [] for way in ways}, {}
    for _ in range(repeats):
        for way, index in ways.items():
            with patch.object(frames, "read_index", index):
                start = time.perf_counter()
                media = frames.read_media(
                    path, "video", fps=2.0, max_frames=max_frames, image_size=56, resize_mode="crop"
                )
            seconds[way].append(time.perf_counter() - start)
            pictures[way] = [image.tobytes() for image in media.frames]
    if pictures["keys"] != pictures["everything"]:
        raise UserError(
            f"{path}: the two ways give different frames, so their times are not comparable. Report the clip as a bug."
        )
    return {way: min(values) for way, values in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description="Time to sample frames from a long video.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--size", type=int, default=224, help="px")
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 64], help="max_frames of the policy")
    parser.add_argument("--codec", default="libx264", help="an encoder of FFmpeg")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder, "clip.mp4")
        write_clip(clip, 60 * arguments.minutes, arguments.size, arguments.codec)
        print(f"{arguments.minutes:g} min, {arguments.size} px, {clip.stat().st_size / 1e6:.0f} MB, {arguments.codec}")
        for max_frames in arguments.frames:
            found = measure(clip, max_frames, arguments.repeats)
            ratio = found["everything"] / found["keys"]
            print(f"{max_frames} frames: {found['keys']:.2f} s, all decoded {found['everything']:.2f} s, x {ratio:.1f}")


if __name__ == "__main__":
    run_main(main)
