"""Shards that lie elsewhere, read once through: over http and by a command, with the same interface as local ones."""

import ast
import functools
import http.server
import itertools
import threading
from collections import Counter

import numpy as np
import pytest
import torch

from pipeline_steps.common import params
from pipeline_steps.common.errors import UserError
from pipeline_steps.streaming import remote
from pipeline_steps.streaming.dataset import TokenizedShards
from pipeline_steps.streaming.loader import Loader, open_training_split, plan_stage
from pipeline_steps.training.schema import MixtureEntry
from tests.model.tiny import make_model
from tests.pipeline_steps import packed
from tests.pipeline_steps.packed import Clip, clips, streaming, write

SAMPLES = [
    *clips(86, text_every=6),
    *(Clip(f"films-two-{n}", source="films", tasks=("card", "gist")) for n in "abcd"),
]
EVERYTHING = (MixtureEntry(source="*", task="*", weight=1.0),)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write(tmp_path_factory.mktemp("packed"), SAMPLES, 12)  # 8 shards, every group in each


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; `broken`: how often a path ends in the middle of the file."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.broken, self.asked = Counter(), Counter()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        self.server.asked[self.path] += 1

    def copyfile(self, source, outputfile):
        if self.server.broken[self.path] > 0:
            self.server.broken[self.path] -= 1
            outputfile.write(source.read(6000))
        else:
            super().copyfile(source, outputfile)


@pytest.fixture
def server(root):
    with Server(root) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(remote, "DELAY", 0.01)
    monkeypatch.setenv("RUN_SCRATCH", str(tmp_path / "scratch"))


def section(url, **changes):
    return streaming(**{"reader": "webdataset", "url": url, "shuffle_samples": 8, **changes})


def dataset(settings, root=None):
    config = make_model().config.__class__(**{**make_model().config.to_dict()})
    config.vision_config.patch_size = 8
    folders = (root / "shards", root / "tokens") if root else (None, None)
    return open_training_split(config, settings, packed.runtime(retries=2), *folders)


def loader(data, settings, num_samples=94, batch_size=8, rank=0, world_size=1, num_workers=1, **changes):
    stage = packed.stage(**{"mixture": EVERYTHING, "text_share": 15 / 94, "num_samples": num_samples, **changes})
    options = {"batch_size": batch_size, "tokens_per_frame": 1, "world_size": world_size}
    served = plan_stage(data, stage, settings, stage="stage2", seed=1, **options)
    runtime = packed.runtime(num_workers=num_workers)
    return Loader(data, served, packed.collator(), settings, runtime, rank=rank, world_size=world_size)


def flat(batches):
    return list(itertools.chain.from_iterable(batch.keys for batch in batches))


def same(one, other):
    assert one.keys == other.keys
    one, other = one.tensors(), other.tensors()
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def pipe(root):
    return f"pipe:cat {root}/{{path}}"


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", ["http", "pipe"])
def test_streamed_epoch_equals_local_shards(root, server, kind, num_workers):
    settings = section(server.url if kind == "http" else pipe(root))
    batches = list(loader(dataset(settings), settings, num_workers=num_workers))
    local = packed.open_split(root)
    assert Counter(flat(batches)) == Counter(row["key"] for row in local.rows)
    collate = packed.collator()
    data = dataset(settings)
    order = loader(data, settings).plan.order
    assert order.tolist() != sorted(order.tolist())
    for step in (0, 5, 11):
        same(collate([local[number] for number in order[step * 8 : step * 8 + 8].tolist()]), batches[step])
    if kind == "http":  # every shard once for each group of it, the sidecars once for two data sets
        assert max(server.asked[path] for path in server.asked if path.endswith(".arrow")) == 1


def test_single_items_can_be_read_by_random_access(root, server):
    data, local = dataset(section(server.url)), packed.open_split(root)
    for number in (0, 3, 50, 93):
        one, other = data[number], local[number]
        assert np.array_equal(one.pop("frames"), other.pop("frames"))
        assert one == other


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_read_disjoint_shards_and_samples(root, world_size):
    settings = section(pipe(root))
    data, served, shards = dataset(settings), [], []
    for rank in range(world_size):
        one = loader(data, settings, num_samples=32, rank=rank, world_size=world_size)
        served.append(flat(one))
        numbers = np.concatenate([one._items(step) for step in range(one.num_steps)])
        shards.append({(data.rows[int(number)]["task"], int(data.shard_of[number])) for number in numbers})
    everything = list(itertools.chain.from_iterable(served))
    assert len(everything) == 32
    assert max(Counter(everything).values()) <= 2  # films-two-*: an item in two groups
    for one, other in itertools.combinations(shards, 2):
        assert not one & other


@pytest.mark.slow
def test_resuming_anywhere_gives_the_same_batches(root):
    settings = section(pipe(root))
    data = dataset(settings)
    whole = list(loader(data, settings, num_samples=300))  # three epochs
    rng = np.random.default_rng(0)
    for stop in rng.integers(1, len(whole), 8).tolist():
        first = loader(data, settings, num_samples=300)
        batches = iter(first)
        for _ in range(stop):
            next(batches)
        state = first.state_dict()
        batches.close()
        again = section(pipe(root))
        second = loader(dataset(again), again, num_samples=300, num_workers=int(rng.integers(0, 4)))
        second.load_state_dict(state)
        for one, other in zip(second, whole[stop:], strict=True):
            same(one, other)


def test_streamed_shares_are_exact_and_shuffled_within_a_buffer(root):
    settings = section(pipe(root), shuffle_samples=5)
    data = dataset(settings)
    one = loader(data, settings, num_samples=40_000, text_share=0.14)
    text = np.cumsum(np.concatenate([[0], data.index.is_text[one.plan.order]]))
    shares = (text[10_000:] - text[:-10_000]) / 10_000
    assert 0.135 < shares.min() <= shares.max() < 0.145
    for group in range(len(one.mixture.names)):
        items, shards = one.mixture.stream_epoch(group, 0, 0)
        place = {int(shard): at for at, shard in enumerate(shards)}
        read = sorted(items.tolist(), key=lambda number: (place[int(data.shard_of[number])], number))
        assert max(abs(read.index(number) - at) for at, number in enumerate(items.tolist())) < 5
        assert one.mixture.stream_epoch(group, 1, 0)[0].tolist() != items.tolist()


def test_streaming_respects_budgets_on_one_rank(root):
    settings = section(pipe(root), batching={"by": "frames", "budget": 15})
    one = loader(dataset(settings), settings)
    batches = list(one)
    assert len(batches) == one.num_steps
    assert all(int(torch.clamp(batch.num_frames, min=1).sum()) <= 15 for batch in batches)
    assert sum(len(batch.keys) for batch in batches) == 94


def test_closing_early_leaves_no_threads_or_processes(root, server):
    import psutil

    settings = section(server.url)
    threads, before = threading.active_count(), psutil.Process().children(recursive=True)
    for _ in loader(dataset(settings), settings, num_samples=1_000, num_workers=2):
        break
    after = psutil.Process().children(recursive=True)
    assert not [child for child in after if child not in before and child.is_running()]
    server.shutdown()  # its own threads
    assert threading.active_count() <= threads


def test_a_damaged_copy_of_a_sidecar_is_downloaded_again(root, server):
    folder = remote.download_index(server.url, "train", 0)
    (first, *_) = sorted((folder / "tokens/train").iterdir())
    content = first.read_bytes()
    first.write_bytes(content[:100])
    assert remote.download_index(server.url, "train", 0) == folder
    assert first.read_bytes() == content


def test_broken_connection_is_retried_without_duplicate_samples(root, server):
    settings = section(server.url)
    data = dataset(settings)
    expected = flat(loader(data, settings))
    server.broken["/shards/train/000002.tar"] = server.broken["/shards/train/000005.tar"] = 2
    assert flat(loader(data, settings)) == expected
    assert not +server.broken


@pytest.mark.parametrize(
    ("path", "damage"),
    [
        ("shards/train/000003.tar", "missing"),
        ("shards/train/000003.tar", "other"),
        ("tokens/train/000003.arrow", "missing"),
        ("tokens/train/000003.arrow", "other"),
        ("shards/manifest.json", "missing"),
    ],
)
@pytest.mark.parametrize("kind", ["http", "pipe"])
def test_unreadable_remote_files_are_named(tmp_path, kind, path, damage):
    root = write(tmp_path / "data", SAMPLES, 12)
    (root / path).write_bytes((root / path.replace("3", "2")).read_bytes()) if damage == "other" else (
        root / path
    ).unlink()
    with Server(root) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        settings = section(server.url if kind == "http" else pipe(root))
        with pytest.raises(UserError, match=rf"{path.replace('.', '[.]')}") as error:
            list(loader(dataset(settings), settings))
        assert settings.url in str(error.value)
        server.shutdown()


def test_damaged_frame_is_skipped_as_with_local_shards(tmp_path):
    root = write(tmp_path / "data", SAMPLES, 12)
    local = packed.open_split(root)
    with open(root / "shards/train/000000.tar", "r+b") as tar:
        tar.seek(local.rows[1]["frame_offsets"][0])
        tar.write(b"damaged")
    settings = section(pipe(root), max_quarantined=0.1)
    with pytest.raises(UserError, match=r"shards/train/000000.tar \(its sha256 is .*expected"):
        flat(loader(dataset(settings), settings))
    packed.rewrite_hashes(root)  # packed from a file that was damaged before
    one = loader(dataset(settings), settings)
    assert len(flat(one)) == 93
    assert list(one.quarantined) == [SAMPLES[1].key]


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"world_size": 16, "batch_size": 16, "num_samples": 64}, {}, r"is in 8 shard\(s\), fewer than 16 ranks"),
        ({}, {"batching": {"bucket_samples": 50}}, "bucket_samples is 50, but the reader webdataset"),
        ({"world_size": 2}, {"batching": {"by": "frames", "budget": 20}}, "2 ranks need batches of samples"),
    ],
)
def test_unsupported_streaming_settings_are_rejected(root, options, changes, message):
    settings = section(pipe(root), **changes)
    with pytest.raises(UserError, match=message):
        loader(dataset(settings), settings, **options)


def test_urls_become_shell_commands():
    assert remote.command("pipe:ssh host cat /data/{path}", "shards/a.tar") == "ssh host cat /data/shards/a.tar"
    assert (
        remote.command("s3://bucket/it's/", "a.tar")
        == """aws s3 cp --only-show-errors 's3://bucket/it'"'"'s/a.tar' -"""
    )
    assert remote.command("https://host/x", "a.tar").endswith(" https://host/x/a.tar")
    for url in ("ftp://host", "/data", "pipe:cat /data"):
        with pytest.raises(UserError, match=r"streaming.url is .*, expected http"):
            remote.command(url, "a.tar")
    for path in ("../a.tar", "a b.tar", "a;rm.tar", "x/./a.tar", ""):
        with pytest.raises(UserError, match="names a file"):
            remote.command("https://host", path)


def test_local_shards_need_neither_webdataset_nor_a_url(root):
    """A machine that trains on local shards may lack the package: it is imported where a tar is streamed only."""
    for file in (params.ROOT / "pipeline_steps").rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [name.name for name in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            assert "webdataset" not in [*names, getattr(node, "module", None)], file
    assert type(dataset(streaming(), root)) is TokenizedShards


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_serve_every_item_once_per_epoch(root, world_size):
    """Read from the tars, not planned only: three epochs of every group, in batches of all ranks."""
    settings = section(pipe(root))
    data, epochs, batch_size = dataset(settings), 3, 6
    served = []
    for rank in range(world_size):
        one = loader(data, settings, 94 * epochs, batch_size, rank=rank, world_size=world_size)
        items = [n for step in range(one.num_steps) for n in one._items(step).tolist()]
        assert [data.rows[n]["key"] for n in items] == flat(one)
        served.append((one, items))
    mixture = served[0][0].mixture
    counts = Counter(n for _, items in served for n in items)
    for name in mixture.names:
        own = [counts[n] for n in mixture.groups[name].tolist()]
        assert max(own) - min(own) <= 1, name
    assert sum(counts.values()) == 94 * epochs
