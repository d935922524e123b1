"""Damaged media give frames or a short reason: no other exception, no hang, no memory above a bound."""

import json
import re
import subprocess
import sys
from collections import Counter
from threading import Timer

import pytest

from pipeline_steps.common.params import ROOT

COUNT, SEED = 2200, 1
MAX_SECONDS = 30  # for one file, on a busy machine; most take some milliseconds, a picture of 8192 x 8192 px a second
MAX_BYTES = 800 * 2**20  # peak of the process: a picture of 8192 x 8192 px, and the libraries
REASONS = (
    "empty file|not an image file|truncated or damaged image|"
    "unsupported size (of the image|\\d+x\\d+), at most \\d+ px|"
    "unsupported pixel mode .+|unsupported format (AVIF|HEIC)|"
    "not a video file|truncated or damaged video|truncated video|no video stream|no frames|"
    r"no frame can be decoded|undecodable at \d+\.\d s|frames out of order|unsupported proportions of a pixel|"
    r"unsupported duration (\d+|inf) s|unsupported frame rate (nan|-?inf|0|-1)|5 pictures, at most 4 are taken|"
    r"unsupported segment from \S+ to \S+ s|the segment begins at \S+ s of \S+ s"
)
COMMAND = [sys.executable, "-m", "tests.pipeline_steps.damage", "--folder"]


def read_all(folder):
    """[(what was done, what came of it)], by one child process that is killed when it stands still."""
    subprocess.run([*COMMAND, folder, "--prepare"], cwd=ROOT, check=True, capture_output=True)
    command = [*COMMAND, folder, "--count", str(COUNT), "--seed", str(SEED)]
    lines = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        while True:
            watchdog = Timer(MAX_SECONDS, child.kill)
            watchdog.start()
            line = child.stdout.readline()
            watchdog.cancel()
            if not line:
                break
            lines.append(json.loads(line))
    assert child.returncode == 0, f"stopped at {lines[-1:]}"
    return list(zip(lines[::2], lines[1::2], strict=True))


@pytest.mark.slow
def test_damaged_media_give_frames_or_a_short_reason(tmp_path):
    results = read_all(tmp_path / "media")
    damaged = [result for done, result in results if ", " in done["done"]]
    assert len(damaged) == COUNT
    wrong = [(done, result["text"]) for done, result in results if result["outcome"] == "wrong"]
    assert not wrong, wrong[:3]
    counts = Counter(result["outcome"] for result in damaged)
    assert min(counts["frames"], counts["error"]) > COUNT / 5
    unknown = {result["text"] for _, result in results if not re.fullmatch(f"({REASONS})?", result["text"])}
    assert not unknown
    assert max(result["peak"] for _, result in results) < MAX_BYTES
    by_file = {done["done"]: result["outcome"] for done, result in results if ", " not in done["done"]}
    good = [name for name in by_file if (tmp_path / "media/video" / name).exists()]
    assert len(good) >= 18
    assert {by_file[name] for name in good} == {"frames"}
