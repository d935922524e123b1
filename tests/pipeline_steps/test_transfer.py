"""Remote reading from a server that drops, delays, truncates or floods: bounded memory and time, all of it counted."""

import hashlib
import http.server
import io
import tarfile
import threading
import time
import tracemalloc

import numpy as np
import pytest

from pipeline_steps.common.errors import UserError
from pipeline_steps.streaming import remote, transfer
from pipeline_steps.streaming.mixture import Groups
from pipeline_steps.streaming.transfer import Command, TransferError, Transfers
from pipeline_steps.streaming.webdataset_reader import StreamedMixture


def tar_of(samples, **sizes):
    """A tar with members {name: content}. sizes: of members whose headers claim more than there is."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


TAR = tar_of({f"clip-{n}.{part}": bytes([n]) * 3_000 for n in range(8) for part in ("000.jpg", "json")})
KEYS = {f"clip-{n}" for n in range(8)}


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with the server's content, damaged as `server.plan` says: one entry per request, then none."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        content, how = self.server.content, self.server.plan.pop(0) if self.server.plan else "whole"
        self.server.requests += 1
        if how == "error":
            return self.send_error(503)
        self.send_response(200)
        if how == "truncate":  # a proxy that ends the answer as if it were whole
            content = content[:9_000]
        if how not in ("endless", "end"):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        try:
            if how == "drop":
                self.wfile.write(content[:9_000])
            elif how == "drip":
                for place in range(len(content)):
                    self.wfile.write(content[place : place + 1])
                    time.sleep(0.05)
            elif how == "flip":  # one bit of a member that is read, which a checksum of the network missed
                self.wfile.write(content[:6_000] + bytes([content[6_000] ^ 1]) + content[6_001:])
            elif how == "end":  # only the padding is missing
                self.wfile.write(content[:-2_000])
            elif how == "endless":
                while True:
                    self.wfile.write(bytes(2**16))
            elif how == "stall":
                self.wfile.write(content[:5_000])
                self.server.ended.wait(30)
            else:
                self.wfile.write(content)
        except OSError:
            pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(remote, "DELAY", 0.01)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.plan, server.requests, server.ended = TAR, [], 0, threading.Event()
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.ended.set()
        server.shutdown()


def read(server, transfers=None, retries=2, sha256=None):
    sha256 = hashlib.sha256(server.content).hexdigest() if sha256 is None else sha256
    return list(remote.read_shard(server.url, "shards/train/000000.tar", set(KEYS), sha256, retries, transfers))


@pytest.mark.parametrize("how", ["drop", "truncate", "error", "end"])
def test_broken_answers_are_retried_and_counted(server, how):
    server.plan, transfers = [how, how], Transfers()
    samples = read(server, transfers)
    assert [sample["__key__"] for sample in samples] == sorted(KEYS)
    assert all(sample["000.jpg"] == sample["json"] == bytes([n]) * 3_000 for n, sample in enumerate(samples))
    found = transfers.summary()
    assert (found["attempts"], found["failures"], found["retries"]) == (3, 2, 2)
    assert found["success_rate"] == pytest.approx(1 / 3, abs=1e-3)
    assert found["megabytes"] >= 0.048
    assert found["megabytes_per_second"] > 0


def test_a_damaged_tar_is_named_with_both_hashes_before_its_last_sample_is_served(server):
    expected = hashlib.sha256(server.content).hexdigest()
    server.content = bytearray(server.content)
    server.content[6_000] ^= 1
    found = hashlib.sha256(server.content).hexdigest()
    samples, served = remote.read_shard(server.url, "shards/train/000000.tar", set(KEYS), expected, 1), []
    with pytest.raises(UserError) as error:
        served.extend(samples)  # what came before the error is kept
    message = f"cannot read shards/train/000000.tar (its sha256 is {found[:12]}..., expected {expected[:12]}..."
    assert message in str(error.value)
    assert server.requests == 2
    one = remote.read_shard(server.url, "shards/train/000000.tar", {"clip-0"}, expected, 0)
    with pytest.raises(UserError, match="its sha256 is"):
        next(one)


@pytest.mark.parametrize("plan", [["flip"], ["flip", "drop"], ["drop", "flip"], ["flip", "flip"], ["flip", "end"]])
def test_samples_of_a_transfer_that_was_damaged_on_the_way_do_not_go_unnoticed(server, plan):
    """The last attempt reads the tar intact."""
    server.plan = list(plan)
    with pytest.raises(UserError, match=r"000000[.]tar: samples of a transfer that was damaged on the way have been"):
        read(server)
    assert server.requests == len(plan) + 1


def test_hashing_holds_no_more_of_a_tar_than_one_sample(server):
    server.content = tar_of({f"clip-{n}.jpg": bytes(1_000_000) for n in range(8)})
    sha256 = hashlib.sha256(server.content).hexdigest()
    tracemalloc.start()
    for sample in remote.read_shard(server.url, "a.tar", {"clip-0"}, sha256, 0):
        assert len(sample["jpg"]) == 1_000_000
    assert tracemalloc.get_traced_memory()[1] < 4_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("how", ["drip", pytest.param("stall", marks=pytest.mark.slow)])
def test_time_limits_fire_on_slow_servers(server, how, monkeypatch):
    monkeypatch.setattr(transfer, "STALL_SECONDS", 1.0)
    server.plan, started = [how] * 3, time.monotonic()
    with pytest.raises(UserError, match=r"000000.tar \(too slow: [\d,]+ bytes/s .* tried 3 time"):
        read(server)
    assert time.monotonic() - started < 60
    server.plan, server.requests = [how], 0
    assert len(read(server)) == 8
    assert server.requests == 2


def test_a_reader_that_pauses_keeps_its_connection(server, monkeypatch):
    monkeypatch.setattr(transfer, "STALL_SECONDS", 2.0)
    server.content = tar_of({f"clip-{n}.jpg": bytes(300_000) for n in range(8)})
    transfers, sha256 = Transfers(), hashlib.sha256(server.content).hexdigest()
    samples = remote.read_shard(server.url, "a.tar", set(KEYS), sha256, 0, transfers)
    next(samples)
    time.sleep(2.5)
    assert len(list(samples)) == 7
    assert transfers.failures == 0


def test_downloads_are_bounded(server):
    server.plan = ["endless"]
    tracemalloc.start()
    with pytest.raises(UserError, match="longer than 1,000,000 bytes"):
        remote.download(server.url, "shards/manifest.json", 0, limit=1_000_000)
    assert tracemalloc.get_traced_memory()[1] < 8_000_000
    tracemalloc.stop()


def test_members_of_a_tar_are_bounded(server, monkeypatch):
    monkeypatch.setattr(remote, "MAX_MEMBER", 2_000)
    with pytest.raises(UserError, match=r"clip-0.000.jpg has 3,000 bytes"):
        read(server, retries=0)
    monkeypatch.setattr(remote, "MAX_MEMBER", 5_000)
    monkeypatch.setattr(remote, "MAX_SAMPLE", 4_000)
    with pytest.raises(UserError, match=r"its sample at least 6,000"):
        read(server, retries=0)


def test_a_failed_command_is_quoted_and_no_process_is_left():
    with Command("echo broken >&2; exit 7", Transfers()) as file, pytest.raises(TransferError, match="broken"):
        file.read()
    with Command("sleep 60 & sleep 60", Transfers()) as file:
        process = file._process
    assert process.poll() is not None


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("uneven", [False, True])
def test_every_item_is_served_once_per_epoch_whatever_the_ranks(world_size, uneven):
    """Shards of different sizes: ranks that divided whole shards would begin the next epoch at different times."""
    rng, num_items = np.random.default_rng(world_size), 3_000
    sizes = rng.multinomial(num_items, rng.dirichlet(np.ones(12)) if uneven else np.full(12, 1 / 12))
    shard_of = np.repeat(np.arange(12, dtype=np.int32), sizes)
    text = np.arange(num_items) % 7 == 0
    groups = {"card": np.flatnonzero(~text), "text": np.flatnonzero(text)}
    options = {"shard_of": shard_of, "shuffle_samples": 50, "batch_size": 24, "world_size": world_size}
    weights = {name: len(items) / num_items for name, items in groups.items()}
    mixture = StreamedMixture(Groups(groups, weights, {}), 3 * num_items, 1, **options)
    for group, name in enumerate(mixture.names):
        served, own = mixture.order[mixture.group_of == group], groups[name]
        for epoch in range(len(served) // len(own)):
            assert sorted(served[epoch * len(own) : (epoch + 1) * len(own)]) == own.tolist(), (name, epoch)
        left = served[len(served) // len(own) * len(own) :]
        assert len(set(left.tolist())) == len(left)
        shards = [mixture.stream_epoch(group, 0, rank)[1] for rank in range(world_size)]
        assert sum(map(len, shards)) <= 12 + world_size - 1  # only shards at the bounds are read twice
