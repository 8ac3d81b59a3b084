"""Some classes out of a tar, over a transfer that breaks: each byte comes once, and the same pictures at the end."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from marten.errors import DataError
from marten.files import ROOT
from marten.places import keep_places
from tests.pictures import draw, encode

CLASSES = ("beach", "alley", "butte", "tower")


def tar_of(path: Path, each: int = 12) -> bytes:
    """Write a tar of the real one's layout, its pictures in the order of the classes."""
    with tarfile.open(path, "w") as archive:
        for part in ("train", "val"):
            for k, name in enumerate(CLASSES):
                for number in range(each if part == "train" else 2):
                    data = encode(draw(10 * k + number, (40, 30)), "JPEG")
                    info = tarfile.TarInfo(f"places365_standard/{part}/{name}/{number:08}.jpg")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return path.read_bytes()


class Breaking(ThreadingHTTPServer):
    """Sends a file, by ranges too, and breaks off after so many bytes of an answer."""

    def __init__(self, data: bytes, most: int) -> None:
        self.data, self.most, self.sent = data, most, 0

        class Handler(BaseHTTPRequestHandler):
            server: Breaking

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                told = self.headers.get("Range", "bytes=0-")
                start = int(told.removeprefix("bytes=").rstrip("-"))
                rest = self.server.data[start:]
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(rest)))
                self.send_header("ETag", hashlib.md5(self.server.data).hexdigest())
                self.end_headers()
                self.wfile.write(rest[: self.server.most])
                self.server.sent += min(len(rest), self.server.most)

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/places.tar"


@pytest.fixture
def breaking(tmp_path: Path) -> Iterator[Breaking]:
    data = tar_of(tmp_path / "places.tar")
    server = Breaking(data, len(data) // 3)
    yield server
    server.shutdown()
    server.server_close()


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_b2_16_one_pass_keeps_the_classes_asked_for_and_their_sums(tmp_path: Path) -> None:
    data = tar_of(tmp_path / "places.tar")
    kept = keep_places(str(tmp_path / "places.tar"), tmp_path / "out", ["beach", "butte"])
    assert kept.counts == {"train/beach": 12, "train/butte": 12, "val/beach": 2, "val/butte": 2}
    assert (kept.size_bytes, kept.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert sorted(p.name for p in (tmp_path / "out").rglob("*") if p.is_dir()) == sorted(
        ["train", "val", *["beach", "butte"] * 2]
    )
    told = subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=tmp_path / "out")
    assert told.returncode == 0
    assert len((tmp_path / "out" / "SHA256SUMS").read_text().splitlines()) == 28


def test_a_transfer_that_breaks_goes_on_where_it_stood(tmp_path: Path, breaking: Breaking) -> None:
    whole = tmp_path / "whole"
    keep_places(str(tmp_path / "places.tar"), whole, ["beach", "tower"])
    for _ in range(2):
        with pytest.raises(DataError, match="the same command goes on"):
            keep_places(breaking.url, tmp_path / "out", ["beach", "tower"])
    with pytest.raises(DataError, match="was begun with"):
        keep_places(breaking.url, tmp_path / "out", ["beach"])
    breaking.most = len(breaking.data)
    kept = keep_places(breaking.url, tmp_path / "out", ["beach", "tower"])
    assert content(tmp_path / "out") == content(whole)
    assert kept.sha256 == ""
    # what is sent again is the picture at which each of two answers broke off
    assert breaking.sent < 1.15 * len(breaking.data)


def test_another_file_of_the_same_name_is_told(tmp_path: Path, breaking: Breaking) -> None:
    with pytest.raises(DataError, match="goes on"):
        keep_places(breaking.url, tmp_path / "out", ["beach"])
    breaking.data = tar_of(tmp_path / "other.tar", each=9)
    with pytest.raises(DataError, match="another file"):
        keep_places(breaking.url, tmp_path / "out", ["beach"])


def test_a_digest_and_a_class_are_held_to_what_was_promised(tmp_path: Path) -> None:
    data = tar_of(tmp_path / "places.tar")
    tar = str(tmp_path / "places.tar")
    md5 = hashlib.md5(data).hexdigest()
    assert keep_places(tar, tmp_path / "a", ["beach"], f"md5:{md5}").sha256
    with pytest.raises(DataError, match=f"md5 {md5}, not 00"):
        keep_places(tar, tmp_path / "b", ["beach"], "md5:00")
    with pytest.raises(DataError, match="no train/moon"):
        keep_places(tar, tmp_path / "c", ["beach", "moon"])
    with pytest.raises(DataError, match="no tar at"):
        keep_places(str(tmp_path / "none.tar"), tmp_path / "d", ["beach"])


def test_the_command_keeps_and_checks(tmp_path: Path) -> None:
    tar_of(tmp_path / "places.tar")
    (tmp_path / "keep.txt").write_text("beach\n\nalley\n")
    words = ["places", "--tar", "places.tar", "--keep", "keep.txt", "--data_dir", "data"]
    told = subprocess.run(
        [sys.executable, ROOT / "scripts" / "data", *words], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert told.returncode == 0, told.stderr
    assert "12 train/beach" in told.stdout
    assert "12 alley" in told.stdout
    assert not (tmp_path / "data" / "train" / "butte").exists()
