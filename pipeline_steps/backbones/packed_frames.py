"""Frames of packed shards in random order, for an autoencoder of other data than the digit world.

Shapes: B frames.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from simplejpeg import decode_jpeg
from torch import Tensor

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.files import read_record
from pipeline_steps.common.integrity import verify
from pipeline_steps.common.schemas import ShardsManifest

SHUFFLE_FRAMES = 1_000  # of the buffer from which frames are drawn


class PackedFrames:
    """The frames of one split of the stage `shards`, decoded: uint8 [H, W, 3] with sides of `size` px.

    UserError if the manifest or a shard is missing or damaged, or if the split has no frames.
    """

    def __init__(self, folder: Path, split: str):
        manifest, repair = read_record(ShardsManifest, folder / "manifest.json", "shards"), "Run `dvc repro shards`."
        entry = manifest.splits.get(split)
        if entry is None or not entry.num_frames:
            raise UserError(
                f"{folder}: split '{split}' has no frames. Add clips or pictures to it (sections sources and shards)."
            )
        paths = [folder / split / shard.name for shard in entry.shards]
        if missing := [path for path in paths if not path.exists()]:
            raise UserError(f"{missing[0]} is missing, but recorded in {folder / 'manifest.json'}. {repair}")
        hashes = (shard.sha256 for shard in entry.shards)
        verify(zip(paths, hashes, strict=True), folder / "manifest.json", repair)
        self.size, self.urls = manifest.frames.image_size, [str(path) for path in paths]

    def batches(self, batch_size: int, seed: int) -> Iterator[Tensor]:
        """Batches [B, H, W, 3] without end, the last of an epoch smaller. `seed` decides the order of the shards and
        that of the frames within a buffer."""
        import webdataset  # only here: a machine that trains on local shards may lack it

        shards = webdataset.WebDataset(self.urls, shardshuffle=len(self.urls), detshuffle=True, seed=seed)
        frames = shards.compose(frames_of, webdataset.detshuffle(SHUFFLE_FRAMES, SHUFFLE_FRAMES, seed))
        return map(torch.from_numpy, frames.batched(batch_size, collation_fn=np.stack).repeat())


def frames_of(samples: Iterable[dict]) -> Iterator[np.ndarray]:
    """The decoded pictures of samples of a shard: `jpg` of an image, `000.jpg` and so on of a clip."""
    for sample in samples:
        for name, content in sample.items():
            if name == "jpg" or name.endswith(".jpg"):
                yield decode_jpeg(content)
