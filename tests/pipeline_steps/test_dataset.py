"""Random access to packed data: rows on demand, frames by offset, files that do not belong together."""

import io
import json
import os
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from pipeline_steps.common import sidecar
from pipeline_steps.common.errors import UserError
from pipeline_steps.streaming import index
from pipeline_steps.streaming.dataset import UnreadableSample, decode
from pipeline_steps.streaming.file_cache import FileCache
from tests.pipeline_steps import packed
from tests.pipeline_steps.packed import SIZE, Clip, clips, open_split, write

SAMPLES = [*clips(23, text_every=5), Clip("films-two", num_frames=3, source="films", tasks=("card", "gist"))]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write(tmp_path_factory.mktemp("packed"), SAMPLES, 6)


def test_items_are_the_rows_of_the_sidecars_in_order(root):
    dataset = open_split(root)
    paths = sorted((root / "tokens/train").glob("*.arrow"))
    rows = [row for path in paths for row in sidecar.read(path).to_pylist()]
    assert len(dataset) == len(dataset.rows) == len(rows) == 25
    assert [dataset.rows[number] for number in range(25)] == list(dataset.rows) == rows
    columns = dataset.index
    assert [columns.tasks[code] for code in columns.task] == [row["task"] for row in rows]
    assert [columns.sources[code] for code in columns.source] == [row["source"] for row in rows]
    assert [index.KINDS[code] for code in columns.kind] == [row["kind"] for row in rows]
    assert columns.num_frames.tolist() == [row["num_frames"] for row in rows]
    assert columns.num_tokens.tolist() == [len(row["input_ids"]) for row in rows]
    assert columns.num_rejected.tolist() == [0] * 25
    with pytest.raises(IndexError):
        dataset.rows[25]


def test_items_have_the_frames_of_their_sample(root):
    dataset = open_split(root)
    for number in (0, 1, 3, 22, 23, 24):
        item, clip = dataset[number], SAMPLES[min(number, 23)]
        assert item["key"] == clip.key
        assert item["frames"].dtype == np.uint8
        assert item["frames"].shape == ((clip.num_frames, SIZE, SIZE, 3) if clip.num_frames else (0, 0, 0, 3))
        for frame, pixels in enumerate(item["frames"]):
            colour = pixels.reshape(-1, 3).mean(0)
            assert np.abs(colour - [min(number, 23) * 37 % 256, frame * 60 % 256, 128]).max() < 4
        assert dataset.sample(number).key == clip.key
    assert dataset[24]["item"] == 1
    assert dataset[24]["task"] == "gist"


def test_tasks_and_scored_items_are_found_without_reading_rows(root):
    dataset = open_split(root)
    expected = {}
    for number, row in enumerate(dataset.rows):
        expected.setdefault(row["task"], []).append(number)
    assert {name: numbers.tolist() for name, numbers in dataset.tasks().items()} == expected
    assert dataset.scored.tolist() == [any(row["score_mask"]) for row in dataset.rows]
    found = [entry for part in dataset.scored_tokens() for entry in zip(*(c.tolist() for c in part), strict=True)]
    wanted = []
    for number, row in enumerate(dataset.rows):
        places = np.cumsum(row["answer_mask"])
        wanted += [(number, places[at], row["input_ids"][at]) for at in np.flatnonzero(row["score_mask"])]
    assert found == wanted


def test_has_true_handles_empty_lists():
    column = sidecar.pa.array([[False, True], [], [False], [True]], sidecar.pa.list_(sidecar.pa.bool_()))
    assert index.has_true(column).tolist() == [True, False, False, True]
    assert index.has_true(column.slice(1, 2)).tolist() == [False, False]
    assert index.has_true(column.slice(0, 0)).tolist() == []


def test_batch_bytes_predicts_the_size_of_the_batch(root):
    dataset = open_split(root)
    collate = packed.collator(image_replication=2)
    for numbers in ([0], [1, 2, 3], [3, 10, 24], list(range(25))):
        batch = collate([dataset[number] for number in numbers])
        tensors = [value for name, value in batch.tensors().items() if name != "num_frames"]
        made = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        indices = batch.places.num_bytes
        predicted = dataset.batch_bytes(np.array(numbers), 2, 1)
        assert predicted == pytest.approx(made + indices, rel=0.3)


def test_index_takes_a_few_bytes_per_item():
    columns = packed.columns_only(clips(50)).index
    arrays = [value for value in vars(columns).values() if isinstance(value, np.ndarray)]
    assert sum(array.itemsize for array in arrays) <= 40


def test_reading_keeps_a_bounded_number_of_files_open(tmp_path):
    for number in range(10):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 100)
    files, before = FileCache(limit=3), len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as pool:
        jobs = [(number % 10, number % 90) for number in range(2_000)]
        read = list(pool.map(lambda job: files.read(str(tmp_path / str(job[0])), [(job[1], 7)])[0], jobs))
    assert read == [bytes([number]) * 7 for number, _ in jobs]
    assert len(os.listdir("/proc/self/fd")) <= before + 3
    with pytest.raises(OSError, match="ends 3 bytes too early"):
        files.read(str(tmp_path / "0"), [(95, 8)])


def test_adjacent_pieces_are_read_together(tmp_path, monkeypatch):
    content = np.random.default_rng(0).bytes(100_000)
    (tmp_path / "file").write_bytes(content)
    places = [(0, 10), (600, 3_000), (4_000, 5), (50_000, 7), (50_007, 7), (30_000, 9), (30_000, 9), (30_020, 0)]
    calls = []
    monkeypatch.setattr(os, "pread", lambda *words, original=os.pread: calls.append(words) or original(*words))
    pieces = FileCache().read(str(tmp_path / "file"), places)
    assert pieces == [content[offset : offset + size] for offset, size in places]
    assert [(size, offset) for _, size, offset in calls] == [(4_005, 0), (14, 50_000), (9, 30_000), (20, 30_000)]
    assert FileCache().read(str(tmp_path / "file"), []) == []


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 30}, {"mode": "L"}])
def test_frames_are_decoded_to_the_pixels_of_pillow(options):
    options = {"mode": "RGB"} | options
    noise = np.random.default_rng(1).integers(0, 256, (7, 9, 3)).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).resize((54, 42)).convert(options.pop("mode")).save(content, "JPEG", **options)
    pixels = np.zeros((42, 54, 3), np.uint8)
    decode(content.getvalue(), pixels)
    assert np.array_equal(pixels, Image.open(content).convert("RGB"))
    with pytest.raises(ValueError, match="54 x 42 px instead of 42 x 42"):
        decode(content.getvalue(), np.zeros((42, 42, 3), np.uint8))
    with pytest.raises(ValueError, match="extraneous bytes"):  # Pillow skips them
        decode(content.getvalue()[:2] + b"damage" + content.getvalue()[2:], pixels)


def test_damaged_frames_raise_one_error_that_names_the_sample(tmp_path):
    root = write(tmp_path, SAMPLES[:6], 6)
    dataset, tar = open_split(root), root / "shards/train/000000.tar"
    content = bytearray(tar.read_bytes())
    small = packed.picture(0, 0)
    for number, damage in ((1, b"\0" * 9), (2, None), (3, b"huge")):
        place, size = dataset.rows[number]["frame_offsets"][0], dataset.rows[number]["frame_sizes"][0]
        if damage is None:  # the end is missing
            content[place + size // 2 : place + size] = b"\0" * (size - size // 2)
        elif damage == b"huge":  # the picture claims to have 65,500 x 65,500 px
            at = content.index(b"\xff\xc0", place)
            content[at + 5 : at + 9] = b"\xff\xdc\xff\xdc"
        else:
            content[place : place + len(damage)] = damage
    tar.write_bytes(content)
    assert len(small)
    tracemalloc.start()
    for number in (1, 2, 3):
        with pytest.raises(UnreadableSample, match=r"frame 0 cannot be decoded") as error:
            dataset[number]
        assert error.value.key == SAMPLES[number].key
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()
    assert dataset[4]["key"] == SAMPLES[4].key


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("tar is shorter", r"000001.tar has 2,048 bytes, expected [\d,]+ bytes"),
        ("tar is missing", r"000001.tar is missing, expected"),
        ("sidecar of another shard", r"was made for a shard with sha256"),
        ("sidecar is missing", r"000001.arrow: missing"),
        ("sidecar is cut", r"000001.arrow: not a token sidecar"),
        ("sidecar has other rows", r"000001.arrow has 5 items with \d+ tokens, expected 6 with"),
        ("sidecar has other columns", r"000001.arrow: its columns are not those of this version"),
        ("manifest lacks a sidecar", r"3 sidecars of split 'train' for 4 shards"),
    ],
)
def test_mismatched_files_are_rejected(tmp_path, damage, message):
    root = write(tmp_path, SAMPLES[:22], 6)
    tar, arrow = root / "shards/train/000001.tar", root / "tokens/train/000001.arrow"
    manifest = json.loads((root / "tokens/manifest.json").read_text())
    if damage == "tar is shorter":
        tar.write_bytes(tar.read_bytes()[:2048])
    elif damage == "tar is missing":
        tar.unlink()
    elif damage == "sidecar of another shard":
        manifest["splits"]["train"]["shards"][1]["shard_sha256"] = "other"
    elif damage == "sidecar is missing":
        arrow.unlink()
    elif damage == "sidecar is cut":
        arrow.write_bytes(arrow.read_bytes()[:1000])
    elif damage == "sidecar has other rows":
        sidecar.write(arrow, sidecar.read(arrow).to_pylist()[:5])
    elif damage == "sidecar has other columns":
        table = sidecar.read(arrow).drop_columns(["cue"])
        with sidecar.pa.ipc.new_file(str(arrow) + ".new", table.schema) as writer:
            writer.write_table(table)
        os.replace(str(arrow) + ".new", arrow)
    else:
        entry = manifest["splits"]["train"]
        dropped = entry["shards"].pop()
        entry["num_items"] -= dropped["num_items"]
        for counts in (manifest, manifest["sources"]["all"]):
            counts["seen"] = counts["kept"] = entry["num_items"]
    (root / "tokens/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message):
        open_split(root)


def test_split_without_items_is_rejected(root):
    with pytest.raises(UserError, match="split 'test' has no items"):
        packed.TokenizedShards(root / "shards", root / "tokens", "test")
