"""Images: reading, upright rotation, square resizing and rejection of unusable files. The basis of frames.py.

Checkpoints contain this file, like frames.py. It requires Pillow and numpy, and does not import torch.
"""

import contextlib
import io
import os
import struct
import warnings
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageOps

from .hdr import BT2020, TO_BT709, TRANSFERS, refusal, to_sdr

RESIZE_MODES = ("crop", "letterbox")
MAX_PIXELS = 2**26  # of an image: 8192 x 8192; reading takes 4 to 20 bytes per pixel, depending on the format
STRIP_PIXELS = 2**20  # converted at a time
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".heic", ".heif")
PNG = b"\x89PNG\r\n\x1a\n"
TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # chunks of a PNG
MAX_CHUNKS = 2**20  # of a PNG
AVIF_HEAD = 2**16  # bytes, in which an AVIF describes its colours
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
SIGNATURES = (b"\xff\xd8\xff", PNG, b"BM", b"II*\0", b"MM\0*", b"P3", b"P6")  # and WebP's
DAMAGED = (OSError, SyntaxError, ValueError, struct.error, zlib.error)  # Pillow's exceptions for damaged files
TRUNCATED = "truncated or damaged image"


class MediaError(Exception):
    """A damaged or unsupported media file. reason: a few words for the quarantine list, equal on every machine."""

    def __init__(self, reason):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Piece:
    """One media file: a separate file, or a part of a container file such as a tar."""

    path: str
    size: int  # bytes
    offset: int | None = None  # bytes; None: a separate file

    @property
    def url(self):
        """URL for FFmpeg, which reads a part in place."""
        if self.offset is None:
            return f"file:{self.path}"
        return f"subfile,,start,{self.offset},end,{self.offset + self.size},,:file:{self.path}"

    def read(self, size=None):
        """All bytes, or the first `size`."""
        with open(self.path, "rb") as file:
            file.seek(self.offset or 0)
            return file.read(self.size if size is None else min(size, self.size))


def load_image(file, hdr="refuse"):
    """An image, from a path or binary file object, as an upright PIL RGB image. Raises MediaError.

    hdr: what becomes of an AVIF or PNG with PQ or HLG, of hdr.HDR_MODES.
    """
    try:
        image = _load_image(file)
    except MediaError as error:
        without = _without_texts(file) if error.reason == TRUNCATED else None
        if without is None:
            raise
        image = _load_image(without)
    primaries, transfer = _colours(file)
    if transfer not in TRANSFERS:
        return image
    if hdr != "tone_map":
        raise MediaError(refusal("image", transfer))
    if primaries not in TO_BT709:
        raise MediaError(f"HDR image ({TRANSFERS[transfer]}) with unsupported primaries {primaries}")
    return Image.fromarray(to_sdr(np.asarray(image).astype(np.uint16) * 257, transfer, primaries))


def _colours(file):
    """(primaries, transfer function) of an AVIF or PNG, by the numbers of ITU-T H.273; 2: not given."""
    with _opened(file) as source:
        head = source.read(AVIF_HEAD)
        if head.startswith(PNG):
            source.seek(len(PNG))
            found = next((start for name, length, start in _png_chunks(source) if (name, length) == (b"cICP", 4)), None)
            source.seek(0 if found is None else found + 8)
            primaries, transfer = (2, 2) if found is None else source.read(2).ljust(2, b"\2")
        else:
            _, found, values = head.partition(b"colrnclx")
            is_avif = found and head[4:8] == b"ftyp" and len(values) >= 4
            primaries, transfer = struct.unpack(">HH", values[:4]) if is_avif else (2, 2)
    return (BT2020 if primaries == 2 else primaries), transfer


def _load_image(file):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about flaws of files that Pillow can read
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                return upright(image)
    except Image.UnidentifiedImageError:
        raise MediaError(_unknown_format(file)) from None
    except Image.DecompressionBombError:  # Pillow's limit is above MAX_PIXELS
        raise MediaError(f"unsupported size of the image, at most {MAX_PIXELS} px") from None
    except DAMAGED:
        raise MediaError(TRUNCATED) from None


def _opened(file):
    """A context manager of the path or binary file object, at its start."""
    if isinstance(file, str | os.PathLike):
        return open(file, "rb")
    file.seek(0)
    return contextlib.nullcontext(file)


def _without_texts(file):
    """A PNG without its texts and colour profile, in memory: Pillow refuses more than 1 MB of them. None: no such file.

    The colour profile is not used in any case.
    """
    with _opened(file) as source:
        if source.read(len(PNG)) != PNG:
            return None
        chunks = _png_chunks(source)
        if not any(name in TEXTS for name, _, _ in chunks):
            return None
        kept = [PNG]
        for name, length, start in chunks:
            if name not in TEXTS:
                source.seek(start)
                kept.append(source.read(length + 12))
        return io.BytesIO(b"".join(kept))


def _png_chunks(source):
    """[(name, bytes of data, offset)] of the chunks of a PNG opened behind its signature, up to the first damage."""
    chunks, at = [], len(PNG)
    while len(head := source.read(8)) == 8 and len(chunks) < MAX_CHUNKS:
        length, name = struct.unpack(">I4s", head)
        chunks.append((name, length, at))
        at += length + 12
        source.seek(at)
    return chunks


def _unknown_format(file):
    """The reason why Pillow does not know the format of a file."""
    with _opened(file) as source:
        head = source.read(64)
    brands = {head[place : place + 4] for place in range(8, len(head), 4)} if head[4:8] == b"ftyp" else set()
    if brands & {b"avif", b"avis"}:
        return "unsupported format AVIF"
    return "unsupported format HEIC" if brands & HEIC_BRANDS else "not an image file"


def upright(image):
    """A PIL image of any common mode as an upright RGB image; transparency shows white. Raises MediaError."""
    check_size(image.width, image.height, MAX_PIXELS)
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):  # Pillow scales a PPM to 16 bits
        raise MediaError(f"unsupported pixel mode {image.mode}")
    try:
        _scale_transparent_colour(image)
        image.load()
        if image.mode.startswith("I"):
            image = _from_16_bits(image)
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            return on_white(image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except DAMAGED:
        raise MediaError(TRUNCATED) from None


def _scale_transparent_colour(image):
    """Gives the transparent colour of a PNG with 16 bits per channel the 8 bits that Pillow reads of its pixels."""
    colour = image.info.get("transparency")
    is_deep = any("16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    if image.mode == "RGB" and isinstance(colour, tuple) and is_deep:
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _from_16_bits(image):
    """A grey image of 16 bits per pixel with 8 bits, the orientation kept."""
    values = np.asarray(image)
    scaled = Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8))
    scaled.getexif().update(image.getexif())
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        scaled.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return scaled


def on_white(image):
    """A PIL image with transparency, composed on white: an RGB image. Converts in strips to save memory."""
    whole = Image.new("RGB", image.size, "white")
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        strip = (strip.convert("LA") if strip.mode == "La" else strip).convert("RGBA")
        whole.paste(strip, (0, top), strip)
    return whole


def square(image, size, resize_mode, pixel_aspect=1.0):
    """The image as `size` x `size` px with its displayed aspect ratio, by one bicubic resampling.

    resize_mode: "crop" scales the shorter side to `size` and keeps the centre of the longer one; "letterbox" scales the
    longer side to `size` and adds black bars. pixel_aspect: width of a pixel / its height.
    """
    if resize_mode == "letterbox":
        return _letterbox(image, size, pixel_aspect)
    side = min(image.width * pixel_aspect, image.height)
    half_width, half_height = side / pixel_aspect / 2, side / 2
    x, y = image.width / 2, image.height / 2
    box = (x - half_width, y - half_height, x + half_width, y + half_height)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def _letterbox(image, size, pixel_aspect):
    width, height = image.width * pixel_aspect, image.height
    scale = size / max(width, height)
    inner = (max(1, round(width * scale)), max(1, round(height * scale)))
    whole = Image.new("RGB", (size, size))
    whole.paste(image.resize(inner, Image.Resampling.BICUBIC), ((size - inner[0]) // 2, (size - inner[1]) // 2))
    return whole


def jpeg(image, quality):
    """The image as JPEG bytes without chroma subsampling. quality: 1 to 100."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def is_picture(head):
    """Whether a file whose first bytes (12 or more) are `head` is an image of IMAGE_FORMATS other than GIF."""
    return head.startswith(SIGNATURES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or head[4:12] == b"ftypavif"


def file_size(path):
    """Size of a file in bytes. MediaError if it is missing or empty."""
    try:
        size = os.path.getsize(path)
    except (FileNotFoundError, NotADirectoryError):
        raise MediaError("missing file") from None
    if size == 0:
        raise MediaError("empty file")
    return size


def check_size(width, height, max_pixels):
    """MediaError unless both sides are positive and the area is at most `max_pixels`."""
    if width < 1 or height < 1 or width * height > max_pixels:
        raise MediaError(f"unsupported size {width}x{height}, at most {max_pixels} px")
