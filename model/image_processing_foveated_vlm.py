"""The image processor: images -> normalised squares, resized and compressed as in the training data (model/frames.py).

Shapes: N images, S side of the square in px.
"""

import base64
import binascii
import io
import math
import os
import tempfile
import urllib.request
from contextlib import contextmanager
from http.client import HTTPException
from numbers import Integral, Real
from urllib.error import URLError
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs

from .hdr import HDR_MODES
from .pictures import RESIZE_MODES, MediaError, jpeg, load_image, square, upright

IMAGE_MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # DINOv2's image processor
IMAGE_STD = np.array([0.229, 0.224, 0.225], np.float32)
FETCH_SECONDS, FETCH_BYTES = 20, 2**30  # limits of a medium that is given by its URL
SAVED_BY_LIBRARY = ("auto_map", "image_processor_type", "video_processor_type", "processor_class")


def normalise(frames: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """uint8 [F, height, width, 3] -> normalised float32 [F, 3, height, width] for DINOv2, written to `out` if given."""
    if out is None:
        out = np.empty((len(frames), 3, *frames.shape[1:3]), np.float32)
    out[:] = frames.transpose(0, 3, 1, 2)  # channels first makes the rest several times faster
    out *= 1 / 255
    out -= IMAGE_MEAN[:, None, None]
    out /= IMAGE_STD[:, None, None]
    return out


class FoveatedVLMImagesKwargs(ImagesKwargs, total=False):
    resize_mode: str
    jpeg_quality: int | None
    hdr: str


class SquareFrames:
    """How one frame is made: the options and methods that the image and the video processor share."""

    def _set_options(self, size, resize_mode, jpeg_quality, hdr, image_mean, image_std, others: dict) -> dict:
        """Checks the options. Returns the attributes to set."""
        side = size.get("height") if isinstance(size, dict) else size
        if isinstance(size, dict) and (set(size) != {"height", "width"} or size["height"] != size["width"]):
            raise ValueError(f"size={size!r}, expected equal height and width: frames are square")
        if resize_mode not in RESIZE_MODES:
            raise ValueError(f"resize_mode={resize_mode!r} is not one of {', '.join(RESIZE_MODES)}")
        if hdr not in HDR_MODES:
            raise ValueError(f"hdr={hdr!r} is not one of {', '.join(HDR_MODES)}")
        for name, given, used in (("image_mean", image_mean, IMAGE_MEAN), ("image_std", image_std, IMAGE_STD)):
            if given is not None and not np.allclose(given, used, atol=1e-6):
                raise ValueError(f"{name}={given!r}, but the vision encoder was trained with {numbers(used)}")
        unknown = sorted(set(others) - set(SAVED_BY_LIBRARY))
        if unknown:
            raise ValueError(f"{type(self).__name__} has no option {', '.join(unknown)}. Check the spelling")
        side = positive_integer("image_size", side)
        quality = None if jpeg_quality is None else positive_integer("jpeg_quality", jpeg_quality, 100, " or None")
        return {
            "size": {"height": side, "width": side},
            "resize_mode": resize_mode,
            "jpeg_quality": quality,
            "hdr": hdr,
            "image_mean": numbers(IMAGE_MEAN),
            "image_std": numbers(IMAGE_STD),
            **({"auto_map": others["auto_map"]} if "auto_map" in others else {}),
        }

    @property
    def image_size(self) -> int:
        """Side of the square frames in px."""
        return self.size["height"]

    def square(self, frame, name: str = "images") -> Image.Image:
        """An image, or uint8 array [height, width, 3], made square as in the training data. name: for messages."""
        if isinstance(frame, str | os.PathLike):
            with local_file(frame) as file:
                frame = opened_image(file, frame, self.hdr)
        if isinstance(frame, Image.Image):
            try:
                return square(upright(frame), self.image_size, self.resize_mode)
            except MediaError as error:
                raise ValueError(f"{name}: PIL image: {error.reason}. Pass an intact 8-bit image") from None
        array = np.asarray(frame)
        if not is_rgb(array, 3):
            raise wrong_form(array, name)
        return square(Image.fromarray(array), self.image_size, self.resize_mode)

    def frames(self, pictures: list[Image.Image]) -> np.ndarray:
        """Square images -> uint8 [N, S, S, 3], after the JPEG compression of the training data."""
        return np.stack([np.asarray(self._compressed(picture)) for picture in pictures])

    def _compressed(self, picture: Image.Image) -> Image.Image:
        return picture if self.jpeg_quality is None else Image.open(io.BytesIO(jpeg(picture, self.jpeg_quality)))


class FoveatedVLMImageProcessor(SquareFrames, BaseImageProcessor):
    """Makes images square and normalises them.

    Args:
        size: side of the square in px, or {"height": side, "width": side}.
        resize_mode: `crop` (shorter side to size, centre of the longer one) or `letterbox` (longer side to size, black
            bars).
        jpeg_quality: 1 to 100, JPEG compression as in the training data; None: no compression.
        hdr: files with PQ or HLG: `refuse` them, or `tone_map` them to SDR.
        image_mean, image_std: those of the vision encoder; others are an error.

    Raises ValueError for an unknown option or a value outside its range.
    """

    _auto_class = "AutoImageProcessor"  # wherever it was loaded from, a saved configuration names its class
    model_input_names = ["pixel_values"]
    valid_kwargs = FoveatedVLMImagesKwargs
    jpeg_quality = 95

    def __init__(
        self, size, resize_mode="crop", jpeg_quality=95, image_mean=None, image_std=None, hdr="refuse", **others
    ):
        options = self._set_options(size, resize_mode, jpeg_quality, hdr, image_mean, image_std, others)
        BaseImageProcessor.__init__(self, **options)

    def preprocess(self, images, return_tensors: str | None = "pt") -> BatchFeature:
        """pixel_values float32 [N, 3, S, S] of one image or a list: PIL images, uint8 arrays [height, width, 3], paths,
        URLs or base64. Raises ValueError for anything else, or a damaged image."""
        images = list(images) if isinstance(images, list | tuple) else [images]
        frames = self.frames([self.square(image) for image in images])
        return BatchFeature({"pixel_values": normalise(frames)}, tensor_type=return_tensors)


@contextmanager
def local_file(place):
    """Yields a path for a path, or for an http(s) URL, which is downloaded. ValueError if that fails."""
    url = os.fspath(place)
    if not url.startswith(("http://", "https://")):
        yield url
        return
    suffix = os.path.splitext(urlsplit(url).path)[1].lower()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, f"medium{suffix[:16]}")
        try:
            with urllib.request.urlopen(url, timeout=FETCH_SECONDS) as answer, open(path, "wb") as file:
                total = 0
                while block := answer.read(2**20):
                    total += len(block)
                    if total > FETCH_BYTES:
                        raise ValueError(f"{url}: larger than {FETCH_BYTES:,} bytes. Download it and pass its path")
                    file.write(block)
        except (URLError, OSError, HTTPException, UnicodeError) as error:
            raise ValueError(f"{url}: cannot be downloaded ({error}). Check the URL, or pass a path") from None
        yield path


def opened_image(path: str, name, hdr: str) -> Image.Image:
    """An upright RGB image from a path, or from base64 with or without `data:`. ValueError with `name` if damaged."""
    encoded = path.partition(",")[2] if path.startswith("data:image/") else path
    file = path
    if encoded is not path or (len(path) > 255 and not os.path.exists(path)):
        name = f"base64 image of {len(path)} characters"
        try:
            file = io.BytesIO(base64.b64decode(encoded, validate=True))
        except binascii.Error as error:
            raise ValueError(f"{name}: not base64 ({error})") from None
    elif not os.path.isfile(path):
        raise ValueError(f"{name}: missing file. Pass an intact image file")
    try:
        return load_image(file, hdr)
    except MediaError as error:
        raise ValueError(f"{name}: {error.reason}. Pass an intact image file") from None


def positive_integer(name: str, value, largest=math.inf, otherwise="") -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not 1 <= value <= largest:
        allowed = "of at least 1" if largest == math.inf else f"from 1 to {largest}"
        raise ValueError(f"{name}={value!r}, expected an integer {allowed}{otherwise}")
    return value


def positive_number(name: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r}, expected a finite number above 0")
    return value


def numbers(values: np.ndarray) -> list[float]:
    """float32 values as the decimal numbers that they were written as."""
    return [round(float(value), 6) for value in values]


def is_rgb(array: np.ndarray, ndim: int) -> bool:
    """Whether an array is uint8 [..., height, width, 3] with `ndim` axes and at least one pixel per frame."""
    return array.dtype == np.uint8 and array.ndim == ndim and array.shape[-1] == 3 and 0 not in array.shape[-3:]


def wrong_form(value, name: str) -> ValueError:
    """The error for an image or a video of another form."""
    expected = "[height, width, 3]" if name == "images" else "[frames, height, width, 3]"
    return ValueError(
        f"{name}: found {type(value).__name__} of shape {list(np.shape(value))} and type "
        f"{getattr(value, 'dtype', 'unknown')}, expected a path, PIL images, or an array {expected} of type uint8"
    )
