"""Random access to packed shards and their token sidecars.

An item is one question with its answer; several items may share the frames of one clip, which are stored once. Frames
are read from the tar by byte offset: opening a data set reads the tar headers once and nothing is unpacked.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline_steps import sidecar
from pipeline_steps.params import UserError
from pipeline_steps.records import PackedSample, ShardsManifest, TokensManifest, parse, read_record
from pipeline_steps.streaming.fit import check_fit
from pipeline_steps.streaming.targets import truth


@dataclass(frozen=True)
class Member:
    """Where one file of a tar lies."""

    tar: Path
    offset: int  # bytes
    size: int  # bytes

    def read(self) -> bytes:
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class TokenizedShards:
    """The items of one split.

    `target_patch_size` (px): items say where their target is, as the query source `oracle` needs it. Raises UserError
    when a stage's output is missing, or when a sidecar does not belong to the shard beside it.
    """

    def __init__(
        self, shards_dir: str | Path, tokens_dir: str | Path, split: str, target_patch_size: int | None = None
    ):
        self.shards_dir, self.tokens_dir, self.split = Path(shards_dir), Path(tokens_dir), split
        self.target_patch_size = target_patch_size
        manifest = read_record(ShardsManifest, self.shards_dir / "manifest.json", "shards")
        self.image_size, self.fit = manifest.frames.image_size, manifest.frames.fit
        shards = manifest.splits.get(split)
        tokens = read_record(TokensManifest, self.tokens_dir / "manifest.json", "tokens").splits.get(split)
        if shards is None or tokens is None or tokens.num_items == 0:
            raise UserError(
                f"{self.tokens_dir}: split '{split}' has no items. Give it samples (sources, shards sections)."
            )
        self._tars: dict[str, Path] = {}  # key -> shard
        self._rows_of: dict[str, dict] = {}  # key -> one of its rows
        rows = []
        for shard, entry in zip(shards.shards, tokens.shards, strict=True):
            if entry.shard_sha256 != shard.sha256:
                raise UserError(
                    f"{self.tokens_dir / split / entry.name} was made for a shard with sha256 "
                    f"{entry.shard_sha256[:12]}..., but {self.shards_dir / split / shard.name} has "
                    f"{shard.sha256[:12]}...: rerun `python -m pipeline_steps.tokens`."
                )
            own = sidecar.read(self.tokens_dir / split / entry.name).to_pylist()
            tar = self.shards_dir / split / shard.name
            self._tars |= {row["key"]: tar for row in own}
            self._rows_of |= {row["key"]: row for row in own}
            rows += own
        self.rows: list[dict] = rows

    @classmethod
    def for_model(
        cls, config, shards_dir: str | Path, tokens_dir: str | Path, split: str, image_replication: int
    ) -> "TokenizedShards":
        """With targets where the FoveatedVLMConfig asks for them. UserError when a sample does not fit the network."""
        oracle = config.query_source == "oracle"
        dataset = cls(shards_dir, tokens_dir, split, config.vision_config.patch_size if oracle else None)
        check_fit(config, dataset, image_replication)
        return dataset

    def __len__(self) -> int:
        return len(self.rows)

    def families(self) -> dict[str, list[int]]:
        """Row numbers of every family, text-only samples under their own families."""
        families: dict[str, list[int]] = {}
        for number, row in enumerate(self.rows):
            families.setdefault(row["family"], []).append(number)
        return families

    def is_text(self, number: int) -> bool:
        return self.rows[number]["kind"] == "text"

    def frames(self, key: str) -> np.ndarray:
        """uint8 [T, height, width, 3]; T = 0 for a text-only sample."""
        row, tar = self._rows_of[key], self._tars[key]
        places = zip(row["frame_offsets"], row["frame_sizes"], strict=True)
        pictures = [_decode(Member(tar, *place), key, number) for number, place in enumerate(places)]
        return np.stack(pictures) if pictures else np.zeros((0, 0, 0, 3), np.uint8)

    def sample(self, key: str) -> PackedSample:
        """The packed sample with its ground truth."""
        row = self._rows_of[key]
        content = Member(self._tars[key], row["sample_offset"], row["sample_size"]).read()
        return parse(PackedSample, content.decode(), f"{key}.json")

    def __getitem__(self, number: int) -> dict:
        """The row's fields, with `frames` uint8 [T, height, width, 3] and, where asked for, `target_patches` bool
        [T, N], all False in frames of no known target."""
        row = self.rows[number]
        item = {**row, "frames": self.frames(row["key"])}
        if self.target_patch_size is not None:
            num_frames, grid = len(item["frames"]), item["frames"].shape[1] // self.target_patch_size
            known = truth(self.sample(row["key"]), row["item"], num_frames, grid, self.fit) if num_frames else None
            item["target_patches"] = np.zeros((num_frames, grid * grid), bool) if known is None else known.target
        return item


def _decode(member: Member, key: str, number: int) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(member.read())) as picture:
            return np.asarray(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(
            f"{member.tar}: frame {number} of {key} cannot be decoded ({error}): rebuild the shards."
        ) from None
