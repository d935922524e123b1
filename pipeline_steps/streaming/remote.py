"""Access to a remote data set: download its small files and read its tars sequentially.

The folder at `streaming.url` holds the output of the stages: shards/manifest.json, shards/{split}/NNNNNN.tar,
tokens/manifest.json and tokens/{split}/NNNNNN.arrow. URLs become shell commands whose output is read: curl, the AWS
CLI, or a user-defined command.
"""

import hashlib
import re
import shlex
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline_steps.common.errors import UserError, printable
from pipeline_steps.common.files import parse, scratch_folder, write_bytes
from pipeline_steps.common.integrity import sha256_file
from pipeline_steps.common.schemas import TokensManifest
from pipeline_steps.streaming.transfer import CHUNK, Command, TransferError, Transfers

CURL = "curl -fsSL --connect-timeout 30"  # transfer.Command limits the time between bytes
MAX_MANIFEST = 512 * 2**20  # bytes
MAX_SIDECAR = 4 * 2**30  # bytes; sidecars are held in memory once, while they are downloaded
MAX_MEMBER, MAX_SAMPLE = 64 * 2**20, 512 * 2**20  # bytes of one file in a tar, and of all files of a sample
DELAY = 1.0  # seconds before the first retry, doubled for each further one
TRANSFER_ERRORS = (OSError, EOFError, ValueError, tarfile.TarError)  # failed transfers, truncated or invalid tars
NAME = re.compile(r"[A-Za-z0-9_.-]+")


def command(url: str, path: str) -> str:
    """Return the shell command that prints the file `path` below `url`. Raises UserError."""
    if not all(NAME.fullmatch(part) and part.strip(".") for part in path.split("/")):
        raise UserError(f"{url}: its manifest names a file {path!r}, which no stage writes. Check the manifest.")
    if url.startswith("pipe:") and "{path}" in url:
        return url.removeprefix("pipe:").replace("{path}", shlex.quote(path))
    address = shlex.quote(f"{url.rstrip('/')}/{path}")
    if url.startswith("s3://"):
        return f"aws s3 cp --only-show-errors {address} -"
    if url.startswith(("http://", "https://")):
        return f"{CURL} {address}"
    raise UserError(
        f"streaming.url is {url!r}, expected http://, https://, s3:// or pipe: (a command that contains {{path}})."
    )


def download(url: str, path: str, retries: int, limit: int = MAX_MANIFEST, transfers: Transfers | None = None) -> bytes:
    """Download a whole file of at most `limit` bytes. Raises UserError after `retries` retries."""
    transfers = transfers or Transfers()
    for attempt in range(retries + 1):
        _begin(attempt, transfers)
        try:
            with Command(command(url, path), transfers, limit) as file:
                return file.read()
        except TRANSFER_ERRORS as error:
            problem = _failed(error, path, attempt, retries, transfers)
    raise unreachable(url, path, problem, retries)


def _begin(attempt: int, transfers: Transfers) -> None:
    """Count an attempt, and wait before a retry."""
    transfers.add(attempts=1, retries=int(attempt > 0))
    time.sleep(DELAY * (2**attempt - 1) / 2 if attempt else 0)


def _failed(error: Exception | str, path: str, attempt: int, retries: int, transfers: Transfers) -> str:
    """Count and report a failed attempt. Returns the problem."""
    transfers.add(failures=1)
    problem = str(error) or type(error).__name__
    if attempt < retries:
        print(printable(f"{path}: {problem}; retry {attempt + 1} of {retries}"), file=sys.stderr)
    return problem


def unreachable(url: str, path: str, reason: object, retries: int) -> UserError:
    """Return the error for a remote file that cannot be read."""
    return UserError(
        f"{url}: cannot read {path} ({reason}), tried {retries + 1} time(s). Check the URL, the network and the "
        "published files, or raise runtime.retries. Rerun the stage: training resumes from its last checkpoint."
    )


def download_index(url: str, split: str, retries: int, transfers: Transfers | None = None) -> Path:
    """Download the manifests and the sidecars of a split of the data set at `url`. Returns their local folder.

    Sidecars are verified by sha256. Files of an earlier call are not downloaded again. Raises UserError.
    """
    manifests = {
        name: download(url, f"{name}/manifest.json", retries, transfers=transfers) for name in ("shards", "tokens")
    }
    digest = hashlib.sha256(b"".join(manifests.values())).hexdigest()[:16]
    folder = scratch_folder("streaming", digest)
    where = f"{url}: tokens/manifest.json"
    tokens = parse(TokensManifest, manifests["tokens"].decode("utf-8", "replace"), where).splits.get(split)
    for entry in tokens.shards if tokens else ():
        path = folder / "tokens" / split / entry.name
        if path.exists() and sha256_file(path) == entry.sha256:
            continue
        content = download(url, f"tokens/{split}/{entry.name}", retries, MAX_SIDECAR, transfers)
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            raise UserError(
                f"{url}: tokens/{split}/{entry.name} does not match the sha256 in its manifest. "
                "Publish the data set again."
            )
        write_bytes(path, content)
    for name, content in manifests.items():
        write_bytes(folder / name / "manifest.json", content)
    return folder


def read_shard(
    url: str, path: str, keys: set[str], sha256: str, retries: int, transfers: Transfers | None = None
) -> Iterator[dict]:
    """Yield the samples of a tar with these keys, in tar order: {"__key__": key, member: bytes}.

    The tar is hashed while it is read, to its end; the last sample is held back until the hash equals `sha256`. After a
    broken connection or with another hash, the tar is read again from its start, without repeating samples. Raises
    UserError if all retries fail, or if keys are missing. Holds one sample in memory, of at most MAX_SAMPLE bytes.
    """
    missing, transfers = set(keys), transfers or Transfers()
    served: frozenset = frozenset()  # (bytes of the tar, their sha256) after the last sample of every attempt
    for attempt in range(retries + 1):
        _begin(attempt, transfers)
        try:
            with Command(command(url, path), transfers) as source:
                stream = _Hashed(source, served)
                for sample in _samples(stream, missing):
                    if missing == {sample["__key__"]}:
                        _check_hash(stream, sha256, f"{url}: {path}")
                    missing.remove(sample["__key__"])
                    served = stream.before | {(stream.place, stream.sha256.hexdigest())}
                    yield sample
                    if not missing:
                        return
            problem = f"it has no sample '{min(missing)}', {len(missing)} of {len(keys)} are missing"
            problem = _failed(problem, path, attempt, retries, transfers)
        except TRANSFER_ERRORS as error:
            problem = _failed(error, path, attempt, retries, transfers)
    raise unreachable(url, path, problem, retries)


class _Hashed:
    """A file object that hashes what is read from another one.

    before: (bytes, their sha256) of earlier attempts; `differs` tells whether one of them read another content.
    """

    def __init__(self, file: Command, before: frozenset):
        self.file, self.before = file, before
        self.sha256, self.place, self.differs = hashlib.sha256(), 0, False

    def read(self, size: int) -> bytes:
        content = self.file.read(size)
        start = 0
        for place, digest in sorted(self.before):
            if self.place < place <= self.place + len(content):
                self.sha256.update(content[start : place - self.place])
                start = place - self.place
                self.differs |= self.sha256.hexdigest() != digest
        self.sha256.update(content[start:])
        self.place += len(content)
        return content


def _check_hash(stream: _Hashed, expected: str, where: str) -> None:
    """Read a tar to its end. Raises TransferError if its hash is another one, and UserError if it is right, but not in
    what an earlier attempt has served."""
    while stream.read(CHUNK):
        pass
    found = stream.sha256.hexdigest()
    if found != expected:
        raise TransferError(f"its sha256 is {found[:12]}..., expected {expected[:12]}... (shards/manifest.json)")
    if stream.differs:
        raise UserError(
            f"{where}: samples of a transfer that was damaged on the way have been served. Check the network and "
            "rerun the stage: training resumes from its last checkpoint."
        )


def _samples(stream: _Hashed, wanted: set[str]) -> Iterator[dict]:
    """Yield the wanted samples of a tar: neighbouring members with the same name up to the first dot (WebDataset)."""
    sample: dict = {}
    size = 0
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            tar.members = []  # tarfile would keep the headers of all members
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if sample and key != sample["__key__"]:
                yield sample
                sample, size = {}, 0
            if not member.isreg() or key not in wanted:
                continue
            size += member.size
            if member.size > MAX_MEMBER or size > MAX_SAMPLE:
                raise ValueError(
                    f"{member.name} has {member.size:,} bytes, its sample at least {size:,}, but the limits are "
                    f"{MAX_MEMBER:,} and {MAX_SAMPLE:,}"
                )
            sample = sample or {"__key__": key}
            sample[suffix] = tar.extractfile(member).read()
    if sample:
        yield sample
