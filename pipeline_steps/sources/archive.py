"""List the members of an untrusted tar archive, and find the byte from which a damaged archive is unreadable.

`tarfile` parses the headers, but its iteration is not used: it treats a damaged header as the end of the archive, reads
extended headers of any size into memory and keeps all members. This module accounts for every byte up to the
end-of-archive mark.
"""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
MAX_EXTENDED = 2**20  # bytes in one extended header (long name, PAX)
MAX_NAME = 4096
MAX_PADDING = 2**22  # zero bytes after the end mark; writers pad their last record
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


class DamagedArchive(Exception):
    """The archive is unreadable from byte `offset`. `reason` is a short phrase."""

    def __init__(self, offset: int, reason: str):
        super().__init__(reason)
        self.offset, self.reason = offset, reason


@dataclass(slots=True)
class Member:
    """A member of an archive and the location of its data."""

    name: str
    offset: int  # of the data in the archive, bytes
    size: int  # bytes
    problem: str | None  # why it is unusable (cut off, or not a regular file); None: usable


def members(file: BinaryIO) -> Iterator[Member]:
    """Yield all members of an open archive except folders.

    Raises DamagedArchive at the first unreadable byte, and OSError if the disk fails.
    """
    end = os.fstat(file.fileno()).st_size
    offset, extended = 0, {}
    while (header := _header(file, offset)) is not None:
        start, size = offset + BLOCK, int(extended.get("size", header.size))
        size = 0 if header.type in WITHOUT_DATA else size
        if size < 0 or header.type == tarfile.GNUTYPE_SPARSE:
            raise DamagedArchive(offset, "a member with a negative size" if size < 0 else "a sparse member")
        if header.type in EXTENDED:
            extended |= _extended(file, header, offset, end)
        else:
            name = extended.get("path", header.name)
            problem = f"cut off after {max(end - start, 0)} of {size} bytes" if start + size > end else _problem(header)
            if header.type != tarfile.DIRTYPE:
                yield Member(name[:MAX_NAME], start, size, problem if len(name) <= MAX_NAME else "its name is too long")
            if start + size > end:
                raise DamagedArchive(offset, problem)
            extended = {}
        offset = start + -(-size // BLOCK) * BLOCK
    _check_end(file, offset, end)


def _problem(header: tarfile.TarInfo) -> str | None:
    return None if header.type in FILES else WITHOUT_DATA.get(header.type, "not a regular file")


def _header(file: BinaryIO, offset: int) -> tarfile.TarInfo | None:
    """Read the header at `offset`. Returns None at the end mark."""
    file.seek(offset)
    block = file.read(BLOCK)
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.EOFHeaderError:
        return None
    except tarfile.EmptyHeaderError:
        reason = "the archive ends without an end mark, later members are lost" if offset else "an empty file"
    except tarfile.TruncatedHeaderError:
        reason = "cut off within a header" if offset else _not_a_tar(block)
    except tarfile.HeaderError as error:
        reason = f"damaged header ({error})" if offset else _not_a_tar(block)
    raise DamagedArchive(offset, reason)


def _not_a_tar(block: bytes) -> str:
    kind = next((name for magic, name in COMPRESSED.items() if block.startswith(magic)), None)
    hint = "decompress it: media are read in place, by their offsets"
    return f"compressed with {kind}, {hint}" if kind else "not a tar archive"


def _extended(file: BinaryIO, header: tarfile.TarInfo, offset: int, end: int) -> dict[str, str]:
    """Return the `path` and `size` of the next member that its extended header sets."""
    if header.size > MAX_EXTENDED or offset + BLOCK + header.size > end:
        raise DamagedArchive(offset, f"an extended header of {header.size} bytes")
    data = file.read(header.size)  # _header has read up to here
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.split(b"\0")[0].decode("utf-8", "surrogateescape")}
    if header.type not in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
        return {}
    values = dict(_pax_records(data, offset))
    if any(name.startswith(b"GNU.sparse") for name in values):
        raise DamagedArchive(offset, "a sparse member")
    if not values.get(b"size", b"0").isdigit() or len(values.get(b"size", b"")) > 19:
        raise DamagedArchive(offset, "a PAX header with an invalid size")
    wanted = {name: values[name.encode()] for name in ("path", "size") if name.encode() in values}
    return {name: value.decode("utf-8", "surrogateescape") for name, value in wanted.items()}


def _pax_records(data: bytes, offset: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield (name, value) of each line `LENGTH NAME=VALUE` of a PAX header."""
    place = 0
    while place < len(data) and data[place]:
        space = data.find(b" ", place, place + 8)
        digits = data[place : max(space, place)]
        length = int(digits) if digits.isdigit() else 0
        name, equals, value = data[space + 1 : place + length - 1].partition(b"=")
        if not equals or data[place + length - 1 : place + length] != b"\n":
            raise DamagedArchive(offset, "a damaged PAX header")
        yield name, value
        place += length


def _check_end(file: BinaryIO, offset: int, end: int) -> None:
    """Check that only zeros follow the end mark at `offset`. Raises DamagedArchive."""
    file.seek(offset)
    if end - offset > MAX_PADDING or file.read(MAX_PADDING).strip(b"\0"):
        raise DamagedArchive(offset, f"{end - offset} bytes follow the end mark")
