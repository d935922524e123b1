"""Tiny media files and raw indexes for the tests of the data stages."""

import hashlib
import json
import os
from contextlib import contextmanager
from fractions import Fraction

import av
import numpy as np
from PIL import Image


def grey_frames(num_frames, width=32, height=32):
    """Frame i is uniformly grey, 20 + 200 * i / num_frames, so that a decoded frame tells its index."""
    return [np.full((height, width, 3), 20 + 200 * i // num_frames, np.uint8) for i in range(num_frames)]


def index_of(image, num_frames):
    """The index that grey_frames gave this picture."""
    return round((float(np.asarray(image).mean()) - 20) * num_frames / 200)


@contextmanager
def kept_scheduling():
    """libsvtav1, when root runs it, gives the thread that calls it real-time priority (99) and leaves it so. Ordinary
    threads cannot preempt such a thread or its children: a few that wait for each other hold all cores."""
    if not hasattr(os, "sched_setscheduler"):  # not Linux
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


@kept_scheduling()
def write_clip(
    path, frames, fps=2, codec="libx264", options=None, gop=12, stamps=None, rotation=0, pix_fmt="yuv420p", context=None
):
    """Encodes frames [H, W, 3] uint8. stamps: display times in 1/1000 s instead of the regular ones. context: further
    attributes of the encoder's context."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codec, rate=Fraction(fps), options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.gop_size = pix_fmt, gop
        stream.thread_count = 1
        for name, value in (context or {}).items():
            setattr(stream.codec_context, name, value)
        if rotation:
            stream.set_display_rotation(rotation)
        if stamps:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if stamps:
                frame.pts, frame.time_base = stamps[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_image(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def index_row(raw, path, kind="video", split=None, video_id=None, key=None, items=None):
    """One row of data/raw/index.jsonl for a file in `raw`."""
    content = (raw / path).read_bytes()
    key = key or "test-" + path.replace(".", "-").replace("/", "-")
    return {
        "key": key,
        "source": "test",
        "split": split,
        "video_id": video_id or key,
        "path": path,
        "kind": kind,
        "sha256": hashlib.sha256(content).hexdigest(),
        "size": len(content),
        "items": items or [{"user": "What?", "assistant": "grey", "task": "caption"}],
    }


def text_row(key, user, assistant, split=None, **item):
    item = {"user": user, "assistant": assistant, "task": "text", **item}
    return {"key": key, "source": "test", "split": split, "video_id": key, "kind": "text", "items": [item]}


def write_index(raw, rows):
    raw.mkdir(parents=True, exist_ok=True)
    (raw / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
