"""Downloading the videos that rows give an address for, from a server on this machine that fails in known ways."""

import csv
import json
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipeline_steps.common.errors import UserError
from pipeline_steps.sources import schema
from pipeline_steps.sources.hub import reader
from pipeline_steps.sources.hub.download import DownloadError, download, fetch, main
from tests.pipeline_steps.clips import grey_frames, write_clip

CONTENT = bytes(range(256)) * 2000


class Handler(BaseHTTPRequestHandler):
    """/whole, /broken (halfway, twice), /busy (503 once), /closed (no answer, twice), /gone, /plain (no ranges)."""

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        name = self.path.split("/")[1]
        server.asked.append((name, asked))
        times = sum(path == name for path, _ in server.asked)
        if name == "closed" and times <= 2:
            return
        if name == "gone" or (name == "busy" and times == 1):
            self.send_error(404 if name == "gone" else 503)
            return
        content = server.content
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and name != "plain" else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        half = start + (len(content) - start) // 2
        self.wfile.write(content[start:half] if name == "broken" and times <= 2 else content[start:])


@pytest.fixture
def server(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.content = [], CONTENT
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["whole", "broken", "busy", "closed", "plain"])
def test_file_is_downloaded_completely(tmp_path, server, name):
    fetch(f"{server.url}/{name}", tmp_path / "a.mp4", pause=0.01)
    assert (tmp_path / "a.mp4").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_interrupted_download_resumes_in_the_next_run(tmp_path, server):
    with pytest.raises(DownloadError, match="connection closed early"):
        fetch(f"{server.url}/broken", tmp_path / "a.mp4", num_tries=1)
    assert not (tmp_path / "a.mp4").exists()
    fetch(f"{server.url}/broken", tmp_path / "a.mp4", pause=0.01)
    assert (tmp_path / "a.mp4").read_bytes() == CONTENT
    half = len(CONTENT) // 2
    assert [asked for _, asked in server.asked] == [None, f"bytes={half}-", f"bytes={half + half // 2}-"]


def test_partial_file_of_another_download_is_discarded(tmp_path, server):
    (tmp_path / ".a.mp4.partial").write_bytes(CONTENT + b"more")
    fetch(f"{server.url}/whole", tmp_path / "a.mp4", pause=0.01)
    assert (tmp_path / "a.mp4").read_bytes() == CONTENT


def test_failed_downloads_report_the_reason(tmp_path, server):
    with pytest.raises(DownloadError, match="HTTP 404"):
        fetch(f"{server.url}/gone", tmp_path / "a.mp4", pause=0.01)
    assert len(server.asked) == 1  # another try would not help
    with pytest.raises(DownloadError, match="not an http\\(s\\) URL: file:///etc/passwd"):
        fetch("file:///etc/passwd", tmp_path / "a.mp4")
    server.shutdown()
    server.server_close()
    with pytest.raises(DownloadError, match="refused"):
        fetch(f"{server.url}/whole", tmp_path / "a.mp4", num_tries=2, pause=0.01)


def test_unwritable_target_stops_the_download(tmp_path, server):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\)"):
        fetch(f"{server.url}/whole", tmp_path / "file" / "a.mp4")


def test_all_missing_videos_are_downloaded(tmp_path, server):
    server.content = write_clip(tmp_path / "clip.mp4", grey_frames(4)).read_bytes()
    names = ("whole", "broken", "gone", "busy", "whole", "closed")
    with open(tmp_path / "list.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["videoid", "contentUrl", "duration", "page_dir", "name"])
        for number, name in enumerate(names):
            writer.writerow(
                [number, f"{server.url}/{name}/{number}", "PT00H00M05S", "000001_000050", f"Footage {number}"]
            )
    media = tmp_path / "media"
    write_clip(media / "000001_000050/4.mp4", grey_frames(4))
    values = {"dataset": "webvid", "path": str(tmp_path / "list.csv"), "revision": None, "subsets": None}
    values |= {"media_dir": str(media), "max_samples": None, "max_missing": 0.2}
    entry = schema.HubEntry.model_validate_json(json.dumps(values))
    assert download(entry, num_connections=2, pause=0.01) == Counter(present=1, downloaded=4, failed=1)
    (failed,) = [json.loads(line) for line in (media / "failed.jsonl").read_text().splitlines()]
    assert failed == {"path": "000001_000050/2.mp4", "url": f"{server.url}/gone/2", "reason": "HTTP 404"}
    quarantined = []
    samples = list(reader.read(entry, tmp_path / "raw", quarantined))
    assert sorted(sample.video_id for sample in samples) == [f"webvid-{number}" for number in (0, 1, 3, 4, 5)]
    assert [row.path for row in quarantined] == ["000001_000050/2.mp4"]
    assert download(entry, num_connections=2, pause=0.01) == Counter(present=5, failed=1)


def test_only_selected_samples_are_downloaded(tmp_path, server):
    rows = [f"{number},{server.url}/whole/{number},,p,Footage {number}" for number in range(20)]
    (tmp_path / "list.csv").write_text("\n".join(["videoid,contentUrl,duration,page_dir,name", *rows]))
    (tmp_path / "media").mkdir()
    values = {"dataset": "webvid", "path": str(tmp_path / "list.csv"), "revision": None, "subsets": None}
    values |= {"media_dir": str(tmp_path / "media"), "max_samples": 3, "max_missing": 0.0}
    entry = schema.HubEntry.model_validate_json(json.dumps(values))
    assert download(entry, num_connections=2) == Counter(downloaded=3)
    assert len(list(reader.read(entry, tmp_path / "raw", []))) == 3


def test_the_number_of_connections_is_checked(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["download", "--num-connections=0"])
    with pytest.raises(SystemExit):
        main()
    assert "--num-connections is 0, expected at least 1" in capsys.readouterr().err
