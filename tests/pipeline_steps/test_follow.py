"""`ask --follow`: a folder and a video that grow while they are read."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time

import av
import numpy as np
import pytest
import torch
from PIL import Image

from model import frames
from pipeline_steps.common.checkpoint import load_checkpoint
from pipeline_steps.common.errors import UserError
from pipeline_steps.inference import follow
from tests import pipeline
from tests.pipeline import ROOT
from tests.pipeline_steps.test_ask import QUESTION, run  # noqa: F401 - a fixture

FPS = 10  # of the written video


@pytest.fixture
def session(made):
    model, processor = load_checkpoint(made.checkpoint)
    return model.stream(processor, QUESTION)


def picture(number):
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (80, 60, 3), dtype=np.uint8))


def grow(*steps, pause=0.4):
    """Runs the steps one after another in a thread, with a pause before each."""

    def work():
        for step in steps:
            time.sleep(pause)
            step()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_a_folder_that_grows(session, tmp_path, monkeypatch):
    """Frames are pushed as they appear, one that is half written is taken when it is whole, strangers are not."""
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.05)
    picture(0).save(tmp_path / "a0.png")
    (tmp_path / "notes.txt").write_text("no frame")
    picture(2).save(tmp_path / ".hidden.png")
    whole = (tmp_path / ".hidden.png").read_bytes()
    lines, seen_at = [], {}

    def say(line):
        lines.append(line)
        seen_at[session.num_frames] = time.monotonic()

    thread = grow(
        lambda: picture(1).save(tmp_path / "a1.png"),
        lambda: (tmp_path / "a2.png").write_bytes(whole[: len(whole) // 2]),
        lambda: (tmp_path / "a2.png").write_bytes(whole),
    )
    follow.follow(session, follow.GrowingFolder(tmp_path, 2.0, "refuse"), 2, 1.5, 4, say)
    thread.join()
    assert [line.split(":")[0] for line in lines] == [
        "frame 0 at 0.0 s",
        "frame 1 at 0.5 s",
        "answer after 2 frames",
        "frame 2 at 1.0 s",
        "answer after 3 frames",
    ]
    assert seen_at[2] - seen_at[1] > 0.2  # printed when they came, not at the end
    assert seen_at[3] - seen_at[2] > 0.4
    alone = session.model.stream(session.processor, QUESTION)
    for number in range(3):
        alone.push(picture(number))
    assert torch.equal(alone.visual_tokens, session.visual_tokens)
    assert lines[-1] == f"answer after 3 frames: {alone.ask(max_new_tokens=4)}"


def test_a_picture_that_stays_damaged_is_named(session, tmp_path):
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    lines = []
    follow.follow(session, follow.GrowingFolder(tmp_path, 2.0, "refuse"), None, 0.1, 2, lines.append)
    assert [line.split(":")[0] for line in lines] == [
        "frame 0 at 0.0 s",
        str(tmp_path / "b.png"),
        "answer after 1 frames",
    ]


def test_the_gaze_is_the_strongest_patch():
    attention = torch.full((4, 5), 0.02)
    attention[2, 3] = 0.62
    assert follow.gaze(attention) == "most attended: row 3 of 4, column 4 of 5 (62 %)"


def write_video(path, num_frames, pause=0.0, after=None):
    """A transport stream of `FPS` frames per second, flushed frame by frame; waits before frame `after`."""
    with open(path, "wb", buffering=0) as file, av.open(file, "w", format="mpegts") as container:
        stream = container.add_stream("mpeg2video", rate=FPS, options={"g": "5", "bf": "0"})
        stream.width = stream.height = 64
        stream.pix_fmt, stream.bit_rate = "yuv420p", 2_000_000
        for number in range(num_frames):
            if number == after:
                time.sleep(pause)
            pixels = np.full((64, 64, 3), 20 + 3 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def test_a_video_that_grows(session, tmp_path, monkeypatch):
    """At two frames per second of 40 frames at ten: those on screen at 0.0, 0.5 ... 3.5 s, each once."""
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.05)
    path, lines = tmp_path / "camera.ts", []
    path.touch()
    shown, push = [], session.push
    monkeypatch.setattr(
        session,
        "push",
        lambda frame, seconds: shown.append((np.asarray(frame).mean(), time.monotonic())) or push(frame),
    )
    thread = threading.Thread(target=write_video, args=(path, 40, 1.0, 25))
    thread.start()
    follow.follow(session, follow.GrowingVideo(path, 2.0, 56, "crop", "refuse"), None, 2.5, 2, lines.append)
    thread.join()
    assert [line.split(":")[0] for line in lines] == [
        *(f"frame {number} at {number / 2:.1f} s" for number in range(8)),
        "answer after 8 frames",
    ]
    assert [mean for mean, _ in shown] == pytest.approx([20 + 15 * number for number in range(8)], abs=4)
    arrived = [moment for _, moment in shown]
    assert max(b - a for a, b in itertools.pairwise(arrived)) > 0.5  # the pause: not read at the end
    whole = frames.read_media(path, "video", fps=2.0, max_frames=8, image_size=56, resize_mode="crop")
    assert len(whole.frames) == 8


def test_a_video_that_never_becomes_readable_is_a_user_error(session, tmp_path):
    (tmp_path / "camera.mp4").write_bytes(b"\0\0\0\x18ftypisom")
    lines = []
    with pytest.raises(UserError, match=r"no frame could be read within 0\.2 s"):
        follow.follow(
            session, follow.GrowingVideo(tmp_path / "camera.mp4", 2.0, 56, "crop", "refuse"), None, 0.2, 2, lines.append
        )
    assert lines == [f"{tmp_path / 'camera.mp4'}: truncated or damaged video, not taken"]


def test_more_frames_than_the_session_holds(made, tmp_path):
    model, processor = load_checkpoint(made.checkpoint)
    session = model.stream(processor, QUESTION, max_num_frames=2)
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    with pytest.raises(UserError, match=r"more than 2 frames\. Raise --max-num-frames; .* at most 64"):
        follow.follow(session, follow.GrowingFolder(tmp_path, 2.0, "refuse"), None, 0.1, 2, lambda line: None)


def test_the_command(run, tmp_path, capsys):  # noqa: F811
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(3):
        picture(number).save(folder / f"{number}.png")
    options = ("--every", 1, "--idle", 0.2, "--max-new-tokens", 2, "--max-num-frames", 3)
    assert run("--video", folder, "--follow", *options) == 0
    lines = capsys.readouterr().out.splitlines()
    starts = [" ".join(line.split(" ")[:2]) for line in lines if line.startswith(("frame", "answer"))]
    assert starts == ["frame 0", "answer after", "frame 1", "answer after", "frame 2", "answer after"]
    assert [file.name for file in tmp_path.iterdir()] == ["frames"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--every", 3), "--every goes with --follow only"),
        (("--idle", 3), "--idle goes with --follow only"),
        (("--max-num-frames", 3), "--max-num-frames goes with --follow only"),
        (("--follow",), "--follow: None: no such file or folder"),
        (("--follow", "--video", "nowhere"), "nowhere: no such file or folder"),
        (("--follow", "--video", ".", "--output", "a.gif"), "--follow writes no animation"),
        (("--follow", "--video", ".", "--mode", "fine"), "--follow reads frame by frame"),
        (("--follow", "--video", ".", "--every", 0), "--every is 0, expected more than 0"),
        (("--follow", "--video", ".", "--max-num-frames", 9999), "max_num_frames=9999"),
    ],
)
def test_wrong_options(run, capsys, arguments, message):  # noqa: F811
    assert run(*arguments) == 1
    assert message in capsys.readouterr().err


def test_ctrl_c_ends_it(made, tmp_path):
    picture(0).save(tmp_path / "0.png")
    command = [sys.executable, "-m", "pipeline_steps.inference.ask", "--checkpoint", made.checkpoint]
    command += ["--question", QUESTION, "--video", tmp_path, "--follow", "--idle", "60"]
    process = subprocess.Popen(
        pipeline.interruptible(*command),
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline().startswith("frame 0 at 0.0 s: most attended: row")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "interrupted\n"
