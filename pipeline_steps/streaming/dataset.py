"""Random access to packed shards and their token sidecars.

An item is one question with its answer. Items about the same clip share its frames, which are stored once. Frames are
read from the tar at the byte offsets in the sidecar, so opening a data set reads no tar.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from simplejpeg import decode_jpeg, decode_jpeg_header

from pipeline_steps.common import sidecar
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.files import parse, read_record
from pipeline_steps.common.hashing import fingerprint
from pipeline_steps.common.integrity import verify
from pipeline_steps.common.schemas import PackedSample, ShardEntry, ShardsManifest, TokensEntry, TokensManifest
from pipeline_steps.streaming import index
from pipeline_steps.streaming.buffer_pool import BufferPool
from pipeline_steps.streaming.compatibility import check_compatibility
from pipeline_steps.streaming.file_cache import FileCache
from pipeline_steps.streaming.targets import ground_truth

MAX_IDLE_BYTES = 64 * 2**20  # unused memory kept for the frames of later items


class UnreadableSample(UserError):
    """The frames of the sample `key` cannot be read or decoded. `reason` says why."""

    def __init__(self, where: object, key: str, reason: str):
        super().__init__(f"{where}: {key}: {reason}. Rebuild the shards (`dvc repro shards`).")
        self.key, self.reason = key, reason


@dataclass(frozen=True)
class RawItem:
    """An item whose frames are not decoded yet."""

    row: dict  # its row of the sidecar
    jpegs: list[bytes]  # one per frame
    sample: bytes | None  # {key}.json, if targets are needed


class TokenizedShards:
    """The items of one split, in the order of the shards.

    target_patch_size (px): if given, items contain `target_patches`, which the query source `oracle` needs.
    with_frames: False if the tars are remote and only rows are read. The constructor compares the manifests with each
    other, and with the sizes and hashes of all files; a file is hashed only once (common/integrity.py). Raises
    UserError if a stage's output is missing or files do not match.
    """

    sequential = False  # items can be read in any order

    def __init__(
        self,
        shards_dir: str | Path,
        tokens_dir: str | Path,
        split: str,
        target_patch_size: int | None = None,
        with_frames: bool = True,
    ):
        self.shards_dir, self.tokens_dir, self.split = Path(shards_dir), Path(tokens_dir), split
        self.target_patch_size = target_patch_size
        manifest = read_record(ShardsManifest, self.shards_dir / "manifest.json", "shards")
        self.frame_policy, shards = manifest.frames, manifest.splits.get(split)
        self.image_size, self.resize_mode = manifest.frames.image_size, manifest.frames.resize_mode  # px
        tokens = read_record(TokensManifest, self.tokens_dir / "manifest.json", "tokens").splits.get(split)
        if shards is None or tokens is None or tokens.num_items == 0:
            raise UserError(
                f"{self.tokens_dir}: split '{split}' has no items. Add samples to it (sections sources and shards)."
            )
        self.shards, self._sidecars = shards.shards, tokens.shards
        if len(self.shards) != len(self._sidecars):
            raise UserError(
                f"{self.tokens_dir}: found {len(self._sidecars)} sidecars of split '{split}' for "
                f"{len(self.shards)} shards in {self.shards_dir}. Run `dvc repro tokens`."
            )
        batches, self._shard_of = [], []  # record batches of all sidecars, and the shard of each
        for number, (shard, entry) in enumerate(zip(self.shards, self._sidecars, strict=True)):
            own = self._open(shard, entry, with_frames)
            batches += own
            self._shard_of += [number] * len(own)
        self._verify(with_frames)
        self.rows, self.index = index.Rows(batches), index.build(batches)
        self._pool = BufferPool(MAX_IDLE_BYTES)
        self._files, self._tars = FileCache(), [str(self.shards_dir / split / shard.name) for shard in self.shards]

    def _open(self, shard: ShardEntry, entry: TokensEntry, with_frames: bool) -> list:
        """Return the record batches of one sidecar, after comparing it with its manifest and its shard."""
        path, tar = self.tokens_dir / self.split / entry.name, self.shards_dir / self.split / shard.name
        if entry.shard_sha256 != shard.sha256:
            raise UserError(
                f"{path} was made for a shard with sha256 {entry.shard_sha256[:12]}..., but {tar} has "
                f"{shard.sha256[:12]}.... Run `dvc repro tokens`."
            )
        if with_frames and (not tar.exists() or tar.stat().st_size != shard.bytes):
            found = f"has {tar.stat().st_size:,} bytes" if tar.exists() else "is missing"
            raise UserError(f"{tar} {found}, expected {shard.bytes:,} bytes (manifest.json). Run `dvc repro shards`.")
        table = sidecar.read(path)
        num_tokens = pc.sum(pc.list_value_length(table["input_ids"])).as_py() or 0
        if (len(table), num_tokens) != (entry.num_items, entry.num_tokens):
            raise UserError(
                f"{path} has {len(table):,} items with {num_tokens:,} tokens, expected {entry.num_items:,} with "
                f"{entry.num_tokens:,} (manifest.json). Run `dvc repro tokens`."
            )
        return table.to_batches()

    def _verify(self, with_frames: bool) -> None:
        """Compare the content of all files with the manifests. Raises UserError for a damaged file."""
        tokens = [(self.tokens_dir / self.split / entry.name, entry.sha256) for entry in self._sidecars]
        verify(tokens, self.tokens_dir / "manifest.json", "Run `dvc repro tokens`.")
        if with_frames:
            tars = [(self.shards_dir / self.split / entry.name, entry.sha256) for entry in self.shards]
            verify(tars, self.shards_dir / "manifest.json", "Run `dvc repro shards`.")

    @classmethod
    def for_model(
        cls, config, shards_dir: str | Path, tokens_dir: str | Path, split: str, image_replication: int, **options
    ) -> "TokenizedShards":
        """Open a split for a FoveatedVLMConfig. Raises UserError if a sample does not fit the network."""
        oracle = config.query_source == "oracle"
        dataset = cls(shards_dir, tokens_dir, split, config.vision_config.patch_size if oracle else None, **options)
        check_compatibility(config, dataset, image_replication)
        return dataset

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that identify the items, their tokens and their frames."""
        return fingerprint(self.split, [(entry.shard_sha256, entry.sha256) for entry in self._sidecars])

    def tasks(self) -> dict[str, np.ndarray]:
        """Return {task: item numbers, int64, ascending}."""
        return self.index.numbers_by(self.index.task, self.index.tasks)

    @cached_property
    def scored(self) -> np.ndarray:
        """bool [n]: whether an item has a scored token. Reads the masks of all sidecars."""
        return np.concatenate([index.has_true(batch.column("score_mask")) for batch in self.rows.batches])

    def scored_tokens(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield arrays (item number, position in answers from 1, token id) of each record batch's scored tokens."""
        for start, batch in zip(self.rows.starts, self.rows.batches, strict=False):
            rows, places, ids = index.scored_tokens(batch)
            yield rows + start, places, ids

    def shard_number(self, number: int) -> int:
        """Return the index of an item's shard in `shards`."""
        return self._shard_of[self.rows.place(number)[0]]

    def batch_bytes(self, numbers: np.ndarray, image_replication: int, tokens_per_frame: int) -> int:
        """Return the bytes of a collated batch: pixels of one byte, float32 times, and 185 bytes per sequence position:
        25 of text and about 160 of indices."""
        columns = self.index.take(numbers)
        frames = columns.shown_frames(image_replication)
        longest = int((columns.num_tokens + frames * tokens_per_frame).max(initial=0))
        return int(frames.sum()) * (self.image_size**2 * 3 + 4) + len(numbers) * longest * 185

    def read(self, number: int) -> RawItem:
        """Read an item without decoding it. Raises UnreadableSample if the shard is unreadable."""
        row, tar = self.rows[number], self._tar(number)
        try:
            jpegs = self._files.read(tar, list(zip(row["frame_offsets"], row["frame_sizes"], strict=True)))
            sample = self._record(row, tar) if self.target_patch_size is not None else None
        except OSError as error:
            raise UnreadableSample(tar, row["key"], str(error)) from None
        return RawItem(row, jpegs, sample)

    def decode_item(self, raw: RawItem) -> dict:
        """Decode an item: the row's fields, and `frames` uint8 [T, height, width, 3] (T = 0 for a text-only sample).

        With `target_patch_size` it also has `target_patches` bool [T, N], all False in frames without a known target.
        Raises UnreadableSample for damaged frames.
        """
        key, size = raw.row["key"], self.image_size
        frames = self._pool.empty((len(raw.jpegs), size, size, 3) if raw.jpegs else (0, 0, 0, 3), np.uint8)
        for number, content in enumerate(raw.jpegs):
            try:
                decode(content, frames[number])
            except ValueError as error:
                where = f"{self.shards_dir}/{self.split}"
                raise UnreadableSample(where, key, f"frame {number} cannot be decoded ({error})") from None
        item = {**raw.row, "frames": frames}
        if self.target_patch_size is not None:
            grid = frames.shape[1] // self.target_patch_size
            known = (
                ground_truth(_parse(raw), raw.row["item"], len(frames), grid, self.resize_mode) if len(frames) else None
            )
            nothing = np.zeros((len(frames), grid * grid), bool)
            item["target_patches"] = nothing if known is None else known.target
        return item

    def __getitem__(self, number: int) -> dict:
        """Read and decode an item. Raises UnreadableSample."""
        return self.decode_item(self.read(number))

    def sample(self, number: int) -> PackedSample:
        """Read the item's packed sample with its ground truth."""
        row = self.rows[number]
        return _parse(RawItem(row, [], self._record(row, self._tar(number))))

    def _record(self, row: dict, tar: str) -> bytes:
        return self._files.read(tar, [(row["sample_offset"], row["sample_size"])])[0]

    def _tar(self, number: int) -> str:
        return self._tars[self.shard_number(number)]


def decode(content: bytes, pixels: np.ndarray) -> None:
    """Decode a JPEG into `pixels`, uint8 [height, width, 3], to the bit as Pillow does, but faster and without holding
    the interpreter's lock. Raises ValueError for damaged data, also such as other decoders repair, or another size."""
    height, width, *_ = decode_jpeg_header(content)
    if (height, width) != pixels.shape[:2]:
        raise ValueError(f"{width} x {height} px instead of {pixels.shape[1]} x {pixels.shape[0]}")
    decode_jpeg(content, "RGB", fastdct=False, fastupsample=False, buffer=pixels)


def _parse(raw: RawItem) -> PackedSample:
    return parse(PackedSample, raw.sample.decode(), f"{raw.row['key']}.json")
