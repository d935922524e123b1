"""The members of a tar archive that nobody vouches for: where they lie, and where the archive stops making sense.

`tarfile` parses the headers. Its own iteration is not used: it takes a damaged header for the end of the archive, reads
extended headers of any size into memory, and keeps all members. Here every byte up to the end mark is accounted for.
"""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
MAX_EXTENDED = 2**20  # bytes of one extended header (long name, PAX)
MAX_NAME = 4096
MAX_PADDING = 2**22  # zero bytes after the end mark; writers fill up their last record
COMPRESSED = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"
}  # fmt: skip
FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
EXTENDED = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
EXTENDED += (tarfile.XGLTYPE,)
WITHOUT_DATA = {
    tarfile.SYMTYPE: "a symbolic link", tarfile.LNKTYPE: "a hard link", tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device", tarfile.FIFOTYPE: "a pipe", tarfile.DIRTYPE: "a folder"
}  # fmt: skip


class Damaged(Exception):
    """From `offset` on the archive cannot be read; `reason` in a few words."""

    def __init__(self, offset: int, reason: str):
        super().__init__(reason)
        self.offset, self.reason = offset, reason


@dataclass(slots=True)
class Member:
    name: str
    offset: int  # of its data in the archive
    size: int  # bytes
    problem: str | None  # why it must not be used: what it is instead of a file


def members(file: BinaryIO) -> Iterator[Member]:
    """All members of an open archive but folders. Raises Damaged where it cannot be read on, OSError from the disk."""
    end = os.fstat(file.fileno()).st_size
    offset, extended = 0, {}
    while (header := _header(file, offset)) is not None:
        start, size = offset + BLOCK, int(extended.get("size", header.size))
        size = 0 if header.type in WITHOUT_DATA else size
        if size < 0 or header.type == tarfile.GNUTYPE_SPARSE:
            raise Damaged(offset, "a member of negative size" if size < 0 else "a sparse member")
        if header.type in EXTENDED:
            extended |= _extended(file, header, offset, end)
        else:
            name = extended.get("path", header.name)
            problem = f"cut off after {max(end - start, 0)} of {size} bytes" if start + size > end else _problem(header)
            if header.type != tarfile.DIRTYPE:
                yield Member(name[:MAX_NAME], start, size, problem if len(name) <= MAX_NAME else "its name is too long")
            if start + size > end:
                raise Damaged(offset, problem)
            extended = {}
        offset = start + -(-size // BLOCK) * BLOCK
    _check_end(file, offset, end)


def _problem(header: tarfile.TarInfo) -> str | None:
    return None if header.type in FILES else WITHOUT_DATA.get(header.type, "no ordinary file")


def _header(file: BinaryIO, offset: int) -> tarfile.TarInfo | None:
    """The header at `offset`, None for the end mark."""
    file.seek(offset)
    block = file.read(BLOCK)
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.EOFHeaderError:
        return None
    except tarfile.EmptyHeaderError:
        reason = "it ends without an end mark, what came after is lost" if offset else "an empty file"
    except tarfile.TruncatedHeaderError:
        reason = "cut off in a header" if offset else _no_archive(block)
    except tarfile.HeaderError as error:
        reason = f"damaged header ({error})" if offset else _no_archive(block)
    raise Damaged(offset, reason)


def _no_archive(block: bytes) -> str:
    kind = next((name for magic, name in COMPRESSED.items() if block.startswith(magic)), None)
    how = "unpack it: media are read at their places in the archive"
    return f"compressed with {kind}, {how}" if kind else "no tar archive"


def _extended(file: BinaryIO, header: tarfile.TarInfo, offset: int, end: int) -> dict[str, str]:
    """`path` and `size` of the next member, as far as its extended header gives them."""
    if header.size > MAX_EXTENDED or offset + BLOCK + header.size > end:
        raise Damaged(offset, f"an extended header of {header.size} bytes")
    data = file.read(header.size)  # the file stands at its data
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.split(b"\0")[0].decode("utf-8", "surrogateescape")}
    if header.type not in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
        return {}
    values = dict(_pax_records(data, offset))
    if any(name.startswith(b"GNU.sparse") for name in values):
        raise Damaged(offset, "a sparse member")
    if not values.get(b"size", b"0").isdigit() or len(values.get(b"size", b"")) > 19:
        raise Damaged(offset, "a PAX header with a wrong size")
    wanted = {name: values[name.encode()] for name in ("path", "size") if name.encode() in values}
    return {name: value.decode("utf-8", "surrogateescape") for name, value in wanted.items()}


def _pax_records(data: bytes, offset: int) -> Iterator[tuple[bytes, bytes]]:
    """(name, value) of the lines `LENGTH NAME=VALUE` of a PAX header."""
    place = 0
    while place < len(data) and data[place]:
        space = data.find(b" ", place, place + 8)
        digits = data[place : max(space, place)]
        length = int(digits) if digits.isdigit() else 0
        name, equals, value = data[space + 1 : place + length - 1].partition(b"=")
        if not equals or data[place + length - 1 : place + length] != b"\n":
            raise Damaged(offset, "a damaged PAX header")
        yield name, value
        place += length


def _check_end(file: BinaryIO, offset: int, end: int) -> None:
    """Nothing but zeros may follow the end mark at `offset`."""
    file.seek(offset)
    if end - offset > MAX_PADDING or file.read(MAX_PADDING).strip(b"\0"):
        raise Damaged(offset, f"{end - offset} bytes after its end mark")
