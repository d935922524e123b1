"""Perceptual hashes of packed frames: bits that survive another encoder, size or brightness (imagehash.phash).

Four frames spread over the clip, 16 x 16 bits each; .12 ms a frame on one core.
"""

import imagehash
import numpy as np
from PIL import ImageStat

NUM_FRAMES = 4  # of one sample
SIDE = 16
WORDS = SIDE * SIDE // 64  # uint64 of one hash
MIN_CONTRAST = 2.0  # standard deviation in grey levels of 255; below, a picture says nothing: a black frame, a fade


def hash_frames(frames):
    """uint64 [NUM_FRAMES, WORDS] of a list of at least one PIL image. All 0: a frame without contrast."""
    chosen = [int((i + 0.5) * len(frames) / NUM_FRAMES) for i in range(NUM_FRAMES)]
    hashes = {i: _hash(frames[i]) for i in set(chosen)}
    return np.stack([hashes[i] for i in chosen])


def _hash(frame):
    grey = frame.convert("L")
    if ImageStat.Stat(grey).stddev[0] < MIN_CONTRAST:
        return np.zeros(WORDS, np.uint64)
    bits = imagehash.phash(grey, hash_size=SIDE).hash
    return np.packbits(bits).view("<u8").astype(np.uint64)
