"""DamagedArchive and hostile archives: no traceback, no hang, bounded memory, and seen = taken + quarantined."""

import gzip
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.params import ROOT
from pipeline_steps.sources import tars
from pipeline_steps.sources.tar_sample import MAX_JSON
from tests.pipeline_steps.archives import QUESTION, read_tars, write_tar

GOOD = [("good.jpg", b"picture"), ("good.json", QUESTION)]
MEMORY = 1_000  # MB of address space for all the mutations
NUM_MUTATIONS = 600


def special(kind, size=0, linkname=""):
    member = tarfile.TarInfo()
    member.type, member.linkname, member.size = kind, linkname, size
    return member


def json_cases():
    deep = b'{"user": "A?", "assistant": "B.", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    return {
        "deep": (deep, "not valid JSON: maximum recursion depth"),
        "deep objects": (b'{"a":' * 100_000, "not valid JSON: maximum recursion depth"),
        "large": (b'{"user": "' + b"x" * 100_000_000 + b'"}', f"has 100000012 bytes, at most {MAX_JSON} are allowed"),
        "huge number": (b'{"frame_count": ' + b"9" * 5000 + b"}", "not valid JSON: Exceeds the limit (4300 digits)"),
        "large number": (b'{"frame_count": 1e400, "user": "A?", "assistant": "B."}', "frame_count"),
        "NaN": (b'{"user": "A?", "assistant": "B.", "x": NaN}', "NaN is not a JSON number"),
        "Infinity": (b'{"user": "A?", "assistant": "B.", "x": -Infinity}', "-Infinity is not a JSON number"),
        "field twice": (b'{"user": "A?", "user": "C?", "assistant": "B."}', "the field 'user' occurs twice"),
        "not UTF-8": (b'{"user": "\xff", "assistant": "B."}', "not valid JSON: 'utf-8' codec"),
        "UTF-16, cut": ('{"user": "A?"'.encode("utf-16"), "not valid JSON"),
        "half a character": (b'{"user": "A\\ud800?", "assistant": "B."}', "not valid JSON: 'utf-8' codec can't encode"),
        "cut": (b'{"user": "A?", "assist', "not valid JSON: Unterminated string"),
        "empty": (b"", "not valid JSON: Expecting value"),
        "zeros": (b"\0" * 100, "not valid JSON"),
        "a list": (b"[1]", "expected an object"),
        "a word": (b"null", "expected an object"),
    }


@pytest.mark.parametrize(("content", "expected"), json_cases().values(), ids=json_cases().keys())
def test_invalid_json_is_quarantined(tmp_path, content, expected):
    samples, reasons, _ = read_tars(write_tar(tmp_path / "0.tar", [*GOOD, ("bad.jpg", b"x"), ("bad.json", content)]))
    assert list(samples) == ["old-0-good"]
    assert list(reasons) == ["old-0-bad"]
    assert expected in reasons["old-0-bad"]


FIELDS = (
    "user",
    "assistant",
    "chosen_assistant",
    "rejected_assistant",
    "caption",
    "messages",
    "token_ids",
    "loss_mask",
)
FIELDS += ("source", "task", "video_id", "yt_id", "frame_count", "is_text_only", "has_frames", "items")
VALUES = (0, -1, 2.5, True, "x", "", [], [1], ["x"], [[]], {}, {"role": "user"}, [{"role": "user"}], 10**30, [10**30])


@pytest.mark.parametrize("field", FIELDS)
def test_wrong_types_in_every_field_are_quarantined(tmp_path, field):
    members = [(f"k{i}.json", QUESTION | {field: value}) for i, value in enumerate(VALUES)]
    samples, reasons, _ = read_tars(write_tar(tmp_path / "0.tar", members))
    assert len(samples) + len(reasons) == len(VALUES)
    assert "old-0-k10" in reasons  # {} fits no field
    assert all(isinstance(sample.items[0].user, str) for sample in samples.values())


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("../../k.jpg", b"x", "points outside of the archive"),
        ("a/../../k.jpg", b"x", "points outside of the archive"),
        ("/etc/k.jpg", b"x", "points outside of the archive"),
        ("k.jpg", special(tarfile.SYMTYPE, linkname="/etc/passwd"), "'k.jpg': a symbolic link"),
        ("k.jpg", special(tarfile.LNKTYPE, linkname="good.jpg"), "'k.jpg': a hard link"),
        ("k.jpg", special(tarfile.CHRTYPE), "'k.jpg': a device"),
        ("k.json", special(tarfile.FIFOTYPE), "'k.json': a pipe"),
    ],
)
def test_hostile_members_are_quarantined(tmp_path, name, content, expected):
    members = [*GOOD, (name, content)]
    members += [(name.replace(".jpg", ".json"), QUESTION)] if name.endswith(".jpg") else []
    samples, reasons, _ = read_tars(write_tar(tmp_path / "0.tar", members))
    assert list(samples) == ["old-0-good"]
    (found,) = reasons.values()
    assert expected in found


def test_unusual_member_names_are_accepted(tmp_path):
    names = ["\udcff\udcfe", "new\nline", "tab\t", "x" * 3000, "y" * 5000]
    members = [member for name in names for member in ((f"{name}.jpg", b"picture"), (f"{name}.json", QUESTION))]
    samples, reasons, others = read_tars(write_tar(tmp_path / "0.tar", members))
    assert len(samples) == 4
    assert (len(reasons), others["count"]) == (0, 2)  # a name of 5,000 characters has lost its ending


def archive(tmp_path, num_samples=6):
    members = [(f"k{i}.{j:03d}.jpg", bytes([i, j]) * 700) for i in range(num_samples) for j in range(3)]
    members += [(f"k{i}.json", QUESTION | {"frame_count": 3}) for i in range(num_samples)]
    members.sort()
    return write_tar(tmp_path / "0.tar", members)


def damaged(tmp_path, content):
    (tmp_path / "0.tar").write_bytes(content)
    samples, reasons, _ = read_tars(tmp_path / "0.tar")
    return samples, reasons


def test_truncated_archive_loses_only_its_end(tmp_path):
    content = archive(tmp_path).read_bytes()
    whole, _, _ = read_tars(tmp_path / "0.tar")
    for size in range(512, 6 * 7168, 1024):
        samples, reasons = damaged(tmp_path, content[:size])
        rest = reasons.pop("old-0")
        assert rest.startswith("at byte ")
        assert rest.endswith("bytes are unreadable")
        assert samples.items() <= whole.items()
        assert len(samples) + len(reasons) == -(-size // 7168)  # 14 blocks each
        assert len(reasons) <= 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda content: b"", "at byte 0: an empty file"),
        (lambda content: content[:100], "at byte 0: not a tar archive"),
        (lambda content: b"not a tar" * 1000, "at byte 0: not a tar archive"),
        (lambda content: gzip.compress(content), "compressed with gzip, decompress it"),
        (lambda content: content[:14336] + b"garbage!" * 64 + content[14336:], "at byte 14336: damaged header"),
        (lambda content: content + b"garbage", "bytes follow the end mark"),
        (lambda content: content + content, "bytes follow the end mark"),
        (lambda content: content[:14336] + bytes(1024) + content[14336:], "at byte 14336: "),
        (lambda content: content.rstrip(b"\0"), "cut off|without an end mark"),
    ],
)
def test_damage_is_reported_with_its_offset_and_reason(tmp_path, change, expected):
    content = archive(tmp_path).read_bytes()
    samples, reasons = damaged(tmp_path, change(content))
    assert any(part in reasons["old-0"] for part in expected.split("|"))
    assert len(reasons) <= 2
    assert all(len(sample.parts) == 3 for sample in samples.values())


def test_damaged_archives_are_listed_on_stderr(tmp_path, capsys):
    content = archive(tmp_path).read_bytes()
    for number in range(12):
        (tmp_path / f"{number:02d}.tar").write_bytes(content[:20000] if number else content)
    read_tars(tmp_path)
    printed = capsys.readouterr().err
    assert "old: 11 of 13 archives are damaged" in printed
    assert f"  {tmp_path / '10.tar'}: at byte 18432: cut off after" in printed
    assert "  ... and 1 more" in printed


def _dies(entry, job):
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_worker_process_fails_the_stage(tmp_path, monkeypatch):
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", GOOD)
    monkeypatch.setattr(tars, "_work", _dies)
    with pytest.raises(UserError, match="was killed, probably for lack of memory"):
        read_tars(tmp_path, num_processes=2)


def test_huge_extended_header_is_not_read_into_memory(tmp_path):
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 2**40
    good = io.BytesIO((write_tar(tmp_path / "0.tar", GOOD)).read_bytes()[:2048]).getvalue()
    _, reasons = damaged(tmp_path, good + header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    assert f"an extended header of {2**40} bytes" in reasons["old-0"]


def test_pax_header_sets_name_and_size(tmp_path):
    long = "k" * 150
    path = write_tar(tmp_path / "0.tar", [(f"{long}.jpg", b"x"), (f"{long}.json", QUESTION)], tarfile.PAX_FORMAT)
    content = path.read_bytes()
    assert damaged(tmp_path, content)[1] == {}
    for old, new in ((b" path=", b" puth="), (b"\x31\x36", b"\x39\x39"), (b"path=k", b"size=k")):
        samples, reasons = damaged(tmp_path, content.replace(old, new))
        assert samples == {} or reasons == {}


def test_unreadable_archive_is_quarantined(tmp_path, monkeypatch):
    archive(tmp_path)
    monkeypatch.setattr(tars, "open", _failing(open), raising=False)
    _, reasons, _ = read_tars(tmp_path / "0.tar")
    assert reasons == {"old-0": "cannot be opened (Permission denied)"}


def _failing(plain):
    def fail(path, *arguments, **named):
        if str(path).endswith(".tar"):
            raise PermissionError(13, "Permission denied")
        return plain(path, *arguments, **named)

    return fail


class Unreadable(io.FileIO):
    """A disk that gives nothing between two bytes."""

    def __init__(self, path, mode, first=14336, last=21504):
        super().__init__(path, "rb")
        self.first, self.last = first, last

    def read(self, size=-1):
        if self.first <= self.tell() < self.last:
            raise OSError(5, "Input/output error")
        return super().read(size)


@pytest.mark.parametrize(
    ("first", "expected"), [(14336, {"old-0": "at byte 14336: "}), (14336 + 512, {"old-0-k2": ""})]
)
def test_disk_read_errors_are_quarantined(tmp_path, monkeypatch, first, expected):
    archive(tmp_path)
    plain = open

    def unreadable(path, *arguments, **named):
        if str(path).endswith(".tar"):
            return Unreadable(path, "rb", first, first + 1)
        return plain(path, *arguments, **named)

    monkeypatch.setattr(tars, "open", unreadable, raising=False)
    samples, reasons, _ = read_tars(tmp_path / "0.tar")
    for key, reason in expected.items():
        assert reasons[key].startswith(reason + "cannot be read (Input/output error)")
    assert len(samples) + len(reasons) == (3 if "old-0" in expected else 6)


# ---------------------------------------------------------------- random damage, in a process with a limit


def base_archives(folder):
    small = [(f"k{i}.{j:03d}.jpg", bytes([i, j]) * 300) for i in range(3) for j in range(3)]
    rows = [(f"k{i}.json", QUESTION | {"frame_count": 3, "source": "s", "messages": None}) for i in range(3)]
    text = [(f"t{i}.json", QUESTION | {"is_text_only": True}) for i in range(6)]
    long = [
        ("d" * 120 + f"/k{i}.{suffix}", content) for i in range(3) for suffix, content in (("jpg", b"x"), ("txt", b"y"))
    ]
    yield write_tar(folder / "frames.tar", sorted(small + rows))
    yield write_tar(folder / "text.tar", text)
    yield write_tar(folder / "gnu.tar", long)
    yield write_tar(folder / "pax.tar", long, tarfile.PAX_FORMAT)


def repaired(content, place):
    """The header at `place` with a right checksum, so that what was changed in it is believed."""
    block = bytearray(content[place : place + 512])
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return content[:place] + bytes(block) + content[place + 512 :]


def mutate(rng, content):
    blocks = [place for place in range(0, len(content), 512) if content[place + 257 : place + 262] == b"ustar"]
    place, kind = rng.choice(blocks), rng.randrange(9)
    if kind == 0:
        return content[: rng.randrange(len(content))]
    if kind == 1:
        start = rng.randrange(len(content))
        return content[:start] + rng.randbytes(rng.choice([1, 100, 512, 5000])) + content[start:]
    if kind == 2:
        return content[:place] + content[place + 512 * rng.randrange(1, 4) :]
    if kind == 3:
        return content[:place] + content[rng.choice(blocks) :]
    if kind == 4:  # the size of a member, octal or base 256, also negative
        size = rng.choice([b"%011o\0" % rng.randrange(2**33), rng.randbytes(12), b"\xff" * 12, b"\x80" + b"\x7f" * 11])
        return repaired(content[: place + 124] + size + content[place + 136 :], place)
    if kind == 5:  # the type of a member
        return repaired(
            content[: place + 156] + rng.choice(b"0123456789xgLKSXVMDN\0A").to_bytes() + content[place + 157 :], place
        )
    if kind == 6:  # the name of a member
        return repaired(content[:place] + rng.randbytes(100) + content[place + 100 :], place)
    changed = bytearray(content)
    for _ in range(rng.choice([1, 10, 200])):
        at = rng.randrange(len(content)) if kind == 7 else rng.randrange(place, place + 512)
        changed[at % len(changed)] ^= 1 << rng.randrange(8)
    return repaired(bytes(changed), place) if kind == 8 else bytes(changed)


def costly_json():
    """What takes far more memory or time than its size says, if one is careless. All within the limit of size."""
    many = b",".join(b'"%d":0' % i for i in range(MAX_JSON // 12))
    zeros = b"0," * (MAX_JSON // 2 - 200)
    own = b'{"kind": "text", "split": "test", "duration": 0.0, "items": [{"task": "x", "user": "A?", '
    yield b"{" + many + b"," + many[:5] + b"}"
    yield b'{"x": [' + b"[]," * (MAX_JSON // 3 - 100) + b"0]}"
    yield b'{"x": [' + b"{}," * (MAX_JSON // 3 - 100) + b"0]}"
    yield b'{"messages": [' + zeros + b"0]}"
    yield b'{"messages": [' + b"{}," * (MAX_JSON // 3 - 100) + b"{}]}"
    yield b'{"token_ids": [' + b'"",' * (MAX_JSON // 3 - 100) + b"0]}"
    yield b'{"items": [' + zeros + b"0]}"
    yield own + b'"options": [' + zeros + b"0]}]}"
    yield own + b'"messages": [' + zeros + b"0]}]}"
    yield b'{"user": "' + b"\\ud83d\\ude00" * (MAX_JSON // 12 - 10) + b'"}'


def run_costly_json(folder):
    """In the child: prints the reasons."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY * 2**20, MEMORY * 2**20))
    path = write_tar(Path(folder) / "0.tar", [(f"k{i}.json", content) for i, content in enumerate(costly_json())])
    print(json.dumps(read_tars(path)[1]))


def run_mutations(folder):
    """In the child: every mutation is read; prints how many samples and reasons there were."""
    folder = Path(folder)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY * 2**20, MEMORY * 2**20))
    bases = [path.read_bytes() for path in base_archives(folder)]
    counts = {"mutations": 0, "taken": 0, "quarantined": 0, "untouched": 0}
    for number in range(NUM_MUTATIONS):
        rng = random.Random(number)
        (folder / "0.tar").write_bytes(mutate(rng, rng.choice(bases)))
        samples, reasons, _ = read_tars(folder / "0.tar")  # checks that keys are unique
        counts["mutations"] += 1
        counts["taken"] += len(samples)
        counts["quarantined"] += len(reasons)
        counts["untouched"] += not reasons
    print(json.dumps(counts))


def run_child(function, folder):
    code = f"from tests.pipeline_steps import test_damaged_tars as t; t.{function.__name__}({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_pathological_json_takes_bounded_time_and_memory(tmp_path):
    assert len(run_child(run_costly_json, tmp_path)) == len(list(costly_json()))


def test_random_damage_never_crashes_the_reader(tmp_path):
    counts = run_child(run_mutations, tmp_path)
    assert counts["mutations"] == NUM_MUTATIONS
    assert counts["taken"] > NUM_MUTATIONS
    assert counts["quarantined"] > NUM_MUTATIONS / 2
    assert counts["untouched"] < NUM_MUTATIONS / 2
