"""WebDataset archives for the tests of the source `tars`."""

import io
import json
import tarfile
from collections import Counter
from types import SimpleNamespace

from pipeline_steps.common.schemas import FramePolicy
from pipeline_steps.sources import tars

ENTRY = {"name": "old", "picture_fps": 1.0, "tokenizer": None, "split": None, "max_quarantined": 1.0}
QUESTION = {"user": "What?", "assistant": "A dog."}
CHAT = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]
MORE = [*CHAT, {"role": "user", "content": "C?"}, {"role": "assistant", "content": "D."}]
POLICY = FramePolicy(image_size=16, resize_mode="crop", fps=2.0, max_frames=4, jpeg_quality=95)


def entry(path, **changes):
    return SimpleNamespace(**{"path": str(path), **ENTRY, **changes})


def write_tar(path, members, format=tarfile.GNU_FORMAT):
    """members: (name, content) in their order; content is bytes, a dict (JSON), or a TarInfo that is added as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                content.name = name
                tar.addfile(content)
                continue
            content = json.dumps(content).encode() if isinstance(content, dict) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def frames(pattern, count=3, first=0):
    """Members that look like pictures."""
    return [(pattern.format(i), b"frame %d" % i) for i in range(first, first + count)]


def read_tars(path, num_processes=1, **changes):
    """(samples by key, {key: reason} of the quarantined, {"count", "first", "reasons"} of the members that belong to no
    sample)"""
    quarantined, others = [], {"count": 0, "first": [], "reasons": Counter()}

    def leave(source, names, reasons):
        assert source == changes.get("name", "old")
        others["count"] += reasons.total()
        others["reasons"] += reasons
        others["first"] += names

    folder = path.parent if path.suffix else path
    samples = {}
    for sample in tars.read(entry(path, **changes), folder, quarantined, leave, num_processes):
        assert sample.key not in samples
        samples[sample.key] = sample
    reasons = {row.key: row.reason for row in quarantined}
    assert len(reasons) == len(quarantined)
    return samples, reasons, others


def only(path, members, **changes):
    """The one sample of an archive with these members."""
    samples, reasons, _ = read_tars(write_tar(path / "000000.tar", members), **changes)
    assert reasons == {}
    (sample,) = samples.values()
    return sample
