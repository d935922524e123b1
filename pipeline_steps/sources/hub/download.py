"""Download videos that media_dir lacks, from the URLs in a data set's rows (webvid).

    python -m pipeline_steps.sources.hub.download [--params params.yaml] [--num-connections 16]

downloads up to max_samples videos for each such entry of sources.hub. It is not a stage, and it is idempotent: existing
files are skipped, interrupted downloads resume, and a file gets its name only when it is complete. Failures are listed
in MEDIA_DIR/failed.jsonl with the reason. Then run `dvc repro --force sources`.
"""

import argparse
import http.client
import os
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

from pipeline_steps.common import params
from pipeline_steps.common.errors import UserError, run_main
from pipeline_steps.common.files import writable, write_jsonl
from pipeline_steps.sources.hub import reader
from pipeline_steps.sources.hub.media import MediaFolder
from pipeline_steps.sources.hub.registry import ADAPTERS
from pipeline_steps.sources.hub.tables import chosen_tables, where

PARAMS = ("sources",)
CHUNK = 2**18  # bytes
PERMANENT = {400, 401, 403, 404, 405, 410, 451}  # status codes that are not retried


class DownloadError(Exception):
    """A file could not be downloaded. The message is the reason."""


def fetch(url: str, path: Path, num_tries: int = 4, timeout: float = 30.0, pause: float = 1.0) -> None:
    """Download `url` to `path` by way of a hidden partial file, which a later attempt resumes. Raises DownloadError.

    timeout: seconds without a byte. pause: seconds before the second attempt, doubled before each further one.
    """
    if not url.startswith(("http://", "https://")):
        raise DownloadError(f"not an http(s) URL: {url[:60]}")
    partial = path.with_name(f".{path.name}.partial")
    for number in range(num_tries):
        if number:
            time.sleep(pause * 2 ** (number - 1))
        try:
            if _continue(url, partial, timeout):
                os.replace(partial, path)
                return
            reason = "connection closed early"
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code}"
            if error.code == 416:  # invalid range: the partial file belongs to another file
                partial.unlink(missing_ok=True)
            if error.code in PERMANENT:
                break
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
    raise DownloadError(reason)


def _continue(url, partial, timeout):
    """Download the rest of `partial`. Returns whether the file is complete."""
    start = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        start = start if response.status == 206 else 0  # 200: the server sends the whole file
        length = response.headers.get("Content-Length")
        with writable(partial):
            file = open(partial, "ab" if start else "wb", buffering=0)  # noqa: SIM115 - UserError if it cannot be opened
        with file:
            while chunk := response.read(CHUNK):
                with writable(partial):  # UserError if the disk is full; errors of read are retried
                    file.write(chunk)
            end = file.tell()
    return length is None or end == start + int(length)


def download(entry, num_connections: int, **options) -> Counter:
    """Download all missing videos of an entry (schema.HubEntry). `options` are passed to `fetch`.

    Returns the counts `present`, `downloaded` and `failed`. Raises UserError if media_dir is not writable.
    """
    folder = MediaFolder(entry.media_dir, ADAPTERS[entry.dataset].media_subfolders, where(entry))
    counts, failures, pending = Counter(), [], {}
    with ThreadPoolExecutor(num_connections) as pool:
        for draft in _wanted(entry):
            if folder.find(draft.videos, folders=False):
                counts["present"] += 1
                continue
            path = Path(entry.media_dir).expanduser() / draft.videos[0]
            with writable(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            pending[pool.submit(fetch, draft.url or "", path, **options)] = draft
            if len(pending) >= 4 * num_connections:  # bounds the number of queued downloads
                _settle(pending, counts, failures)
        while pending:
            _settle(pending, counts, failures)
    write_jsonl(Path(entry.media_dir).expanduser() / "failed.jsonl", failures)
    return counts


def _wanted(entry):
    adapter = ADAPTERS[entry.dataset]
    last = reader.last_rank(entry, adapter)
    known = set()
    for table in chosen_tables(entry, adapter):
        for _, key, draft, _ in reader.drafts(entry, adapter, table):
            if draft is None or draft.videos in known or (last is not None and reader.rank(key) > last):
                continue
            known.add(draft.videos)
            yield draft


def _settle(pending, counts, failures):
    for future in wait(pending, return_when=FIRST_COMPLETED).done:
        draft = pending.pop(future)
        try:
            future.result()
            counts["downloaded"] += 1
        except DownloadError as problem:
            counts["failed"] += 1
            failures.append({"path": draft.videos[0], "url": draft.url, "reason": str(problem)})


def main():
    parser = argparse.ArgumentParser(description="Download missing videos from the URLs in the rows.")
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--num-connections", type=int, default=16)
    arguments = parser.parse_args()
    if arguments.num_connections < 1:
        parser.error(f"--num-connections is {arguments.num_connections}, expected at least 1")
    section = params.read(arguments.params, *PARAMS).sources
    entries = [entry for entry in reader.entries(section) if ADAPTERS[entry.dataset].has_urls]
    if not entries:
        raise UserError(f"{arguments.params}: sources.hub lists no data set whose rows contain URLs (webvid).")
    for entry in entries:
        counts = download(entry, arguments.num_connections)
        print(
            f"{entry.media_dir}: {counts['present']} already present, {counts['downloaded']} downloaded, "
            f"{counts['failed']} failed"
        )


if __name__ == "__main__":
    run_main(main)
