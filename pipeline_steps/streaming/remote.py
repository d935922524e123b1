"""A published data set at a remote address: its URL, its small files, and sequential reading of its tars.

The folder at `streaming.url` holds what the stages publish: shards/manifest.json, shards/{split}/NNNNNN.tar,
tokens/manifest.json and tokens/{split}/NNNNNN.arrow. Addresses become commands whose output is read: curl, the AWS
command line, or the user's own.
"""

import hashlib
import re
import shlex
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.files import parse, scratch_folder, write_bytes
from pipeline_steps.common.schemas import TokensManifest

CURL = "curl -fsSL --connect-timeout 30 --speed-time 60 --speed-limit 1"  # an end after a minute without a byte
DELAY = 1.0  # seconds before a broken connection is tried again, twice as long every time
BROKEN = (OSError, EOFError, ValueError, tarfile.TarError)  # what a tar that ends early or is no tar gives
NAME = re.compile(r"[A-Za-z0-9_.-]+")


def command(url: str, path: str) -> str:
    """The shell command that prints the file `path` of the data set at `url`. UserError for an unknown kind of url."""
    if not all(NAME.fullmatch(part) and part.strip(".") for part in path.split("/")):
        raise UserError(f"{url}: its manifest names a file {path!r}, which no stage would write. Check what is there.")
    if url.startswith("pipe:") and "{path}" in url:
        return url.removeprefix("pipe:").replace("{path}", shlex.quote(path))
    address = shlex.quote(f"{url.rstrip('/')}/{path}")
    if url.startswith("s3://"):
        return f"aws s3 cp --only-show-errors {address} -"
    if url.startswith(("http://", "https://")):
        return f"{CURL} {address}"
    raise UserError(
        f"streaming.url is {url!r}: begin it with http://, https://, s3:// or pipe: (a command with {{path}} in it)."
    )


def download(url: str, path: str, retries: int) -> bytes:
    """A whole file. UserError that names it when it cannot be read."""
    for attempt in range(retries + 1):
        time.sleep(DELAY * (2**attempt - 1) / 2 if attempt else 0)
        done = subprocess.run(command(url, path), shell=True, capture_output=True, check=False)
        if done.returncode == 0:
            return done.stdout
    raise unreachable(url, path, done.stderr.decode(errors="replace").strip() or f"exit {done.returncode}", retries)


def unreachable(url: str, path: str, reason: object, retries: int) -> UserError:
    return UserError(
        f"{url}: cannot read {path} ({reason}), tried {retries + 1} time(s). Check the address, the network and what "
        "is published there, or raise runtime.retries. Rerun the stage: training resumes from its last checkpoint."
    )


def copy_index(url: str, split: str, retries: int) -> Path:
    """A folder with the manifests and the sidecars of a split of the data set at `url`, each checked against its
    sha256. Files of an earlier call are not downloaded again."""
    manifests = {name: download(url, f"{name}/manifest.json", retries) for name in ("shards", "tokens")}
    digest = hashlib.sha256(b"".join(manifests.values())).hexdigest()[:16]
    folder = scratch_folder("streaming", digest)
    where = f"{url}: tokens/manifest.json"
    tokens = parse(TokensManifest, manifests["tokens"].decode("utf-8", "replace"), where).splits.get(split)
    for entry in tokens.shards if tokens else ():
        path = folder / "tokens" / split / entry.name
        if path.exists():
            continue
        content = download(url, f"tokens/{split}/{entry.name}", retries)
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            raise UserError(f"{url}: tokens/{split}/{entry.name} is not the file that its manifest describes (sha256).")
        write_bytes(path, content)
    for name, content in manifests.items():
        write_bytes(folder / name / "manifest.json", content)
    return folder


def read_shard(url: str, path: str, keys: set[str], retries: int) -> Iterator[dict]:
    """The samples of a tar with these keys, in its order: {"__key__": key, member: bytes}. A broken connection is
    tried again from the start, without giving a sample twice. UserError that names the file when it stays broken, or
    does not hold all the keys."""
    import webdataset  # here, so that machines that read local shards do without it

    missing, source = set(keys), f"pipe:{command(url, path)}"
    for attempt in range(retries + 1):
        time.sleep(DELAY * (2**attempt - 1) / 2 if attempt else 0)
        try:
            samples = webdataset.WebDataset(
                [source], shardshuffle=False, nodesplitter=None, workersplitter=None, empty_check=False
            )
            for sample in samples:
                if sample["__key__"] in missing:
                    missing.remove(sample["__key__"])
                    yield sample
                if not missing:
                    return
            problem = f"it has no sample '{min(missing)}' ({len(missing)} of {len(keys)} are missing)"
        except BROKEN as error:
            problem = error.args[0] if error.args else type(error).__name__
    raise unreachable(url, path, problem, retries)
