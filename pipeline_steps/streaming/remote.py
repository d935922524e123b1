"""Access to a remote data set: download its small files and read its tars sequentially.

The folder at `streaming.url` holds the output of the stages: shards/manifest.json, shards/{split}/NNNNNN.tar,
tokens/manifest.json and tokens/{split}/NNNNNN.arrow. URLs become shell commands whose output is read: curl, the AWS
CLI, or a user-defined command.
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

CURL = "curl -fsSL --connect-timeout 30 --speed-time 60 --speed-limit 1"  # aborts after a minute without data
DELAY = 1.0  # seconds before the first retry, doubled for each further one
TRANSFER_ERRORS = (OSError, EOFError, ValueError, tarfile.TarError)  # raised for a tar that is truncated or invalid
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


def download(url: str, path: str, retries: int) -> bytes:
    """Download a whole file. Raises UserError after `retries` retries."""
    for attempt in range(retries + 1):
        time.sleep(DELAY * (2**attempt - 1) / 2 if attempt else 0)
        done = subprocess.run(command(url, path), shell=True, capture_output=True, check=False)
        if done.returncode == 0:
            return done.stdout
    raise unreachable(url, path, done.stderr.decode(errors="replace").strip() or f"exit {done.returncode}", retries)


def unreachable(url: str, path: str, reason: object, retries: int) -> UserError:
    """Return the error for a remote file that cannot be read."""
    return UserError(
        f"{url}: cannot read {path} ({reason}), tried {retries + 1} time(s). Check the URL, the network and the "
        "published files, or raise runtime.retries. Rerun the stage: training resumes from its last checkpoint."
    )


def download_index(url: str, split: str, retries: int) -> Path:
    """Download the manifests and the sidecars of a split of the data set at `url`. Returns their local folder.

    Sidecars are verified by sha256. Files of an earlier call are not downloaded again. Raises UserError.
    """
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
            raise UserError(
                f"{url}: tokens/{split}/{entry.name} does not match the sha256 in its manifest. "
                "Publish the data set again."
            )
        write_bytes(path, content)
    for name, content in manifests.items():
        write_bytes(folder / name / "manifest.json", content)
    return folder


def read_shard(url: str, path: str, keys: set[str], retries: int) -> Iterator[dict]:
    """Yield the samples of a tar with these keys, in tar order: {"__key__": key, member: bytes}.

    After a broken connection the tar is read again from its start, without repeating samples. Raises UserError if all
    retries fail, or if keys are missing.
    """
    import webdataset  # imported here: not needed for local shards

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
            problem = f"it has no sample '{min(missing)}', {len(missing)} of {len(keys)} are missing"
        except TRANSFER_ERRORS as error:
            problem = error.args[0] if error.args else type(error).__name__
    raise unreachable(url, path, problem, retries)
