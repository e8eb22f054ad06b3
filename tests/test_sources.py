"""Where text comes from: whole or not at all, read once, and no more than is asked for."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import http.server
import importlib.util
import json
import lzma
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from backports import zstd

from electra_wrap import corpus, sources
from electra_wrap.errors import EnvironmentLacks, UsageError
from electra_wrap.profile import Corpus

TEXT = "".join(f"línea {i}: {'áéíóú ' * (i % 9)}{i * i}\n" + "\n" * (i % 10 == 0) for i in range(20_000)).encode()
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".txt": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda text: zstd.compress(text, options={zstd.CompressionParameter.checksum_flag: 1}),
}


needs_datasets = pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs datasets")


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; `sent` is how much of them. `breaks`: after so many bytes it ends a connection, once each."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.sent = 0
        self.requests: list[str | None] = []
        self.paths: list[str] = []
        self.breaks: list[int] = []
        self.ranges = True
        self.total: str | None = None
        self.headers: dict[str, str] = {}
        self.status = 200
        self.after: Callable[[], None] = lambda: None

    def url(self, name: str, content: bytes) -> str:
        self.files[f"/{name}"] = content
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has enough hangs up."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server, content = self.server, self.server.files.get(self.path.partition("?")[0])
        server.requests.append(self.headers.get("Range"))
        server.paths.append(self.path)
        if content is None or server.status != 200:
            self.send_response(404 if content is None else server.status)
            self.send_header("X-Error-Code", "RepoNotFound" if "nada" in self.path else "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start, end = 0, len(content)
        if server.ranges and (match := re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")):
            start, end = int(match[1]), min(end, int(match[2]) + 1)
            self.send_response(206 if start < end else 416)
            end = max(start, end)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{server.total or len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(end - start))
        self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        for name, value in server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        most = server.breaks.pop(0) if server.breaks else end - start
        self.wfile.write(content[start : min(end, start + most)])
        server.sent += min(end - start, most)
        if most < end - start:
            time.sleep(0.1)  # what was sent arrives before the connection ends
            self.close_connection = True
            server.after()

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(sources, "PAUSES", (0, 0, 0))
    with Server() as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        yield one
        one.shutdown()


def read(name: str, sha256: str | None = None, offset: int = 0) -> bytes:
    stream = sources.Stream(name, sha256, offset)
    try:
        return b"".join(iter(lambda: stream.readline(1000), b""))
    finally:
        stream.close()


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_text_is_read_and_a_cut_or_damaged_archive_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"es{suffix}"
    compress = COMPRESS[suffix]
    path.write_bytes(compress(TEXT[:1000]) + compress(TEXT[1000:]))  # of several parts, as parallel compressors write
    assert read(str(path)) == TEXT
    assert read(str(path), offset=5000) == TEXT[5000:]
    if suffix != ".txt":
        whole = compress(TEXT)
        for damaged in (whole[:-20], whole[: len(whole) // 2], whole[:100] + b"damage!!" + whole[108:]):
            path.write_bytes(damaged)
            with pytest.raises(UsageError, match=f"es{suffix}: cannot be read as text"):
                read(str(path))


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("suffix", [".txt", ".gz"])
def test_a_transfer_that_breaks_off_goes_on(server: Server, suffix: str, ranges: bool) -> None:
    content = COMPRESS[suffix](TEXT)
    server.ranges, server.breaks = ranges, [70_000, len(content) // 3, 10]
    assert read(server.url(f"es{suffix}", content), hashlib.sha256(content).hexdigest()) == TEXT
    assert not server.breaks
    assert server.sent <= len(content) * (1 if ranges else 2) + 70_000 + len(content) // 3 + 10
    assert read(server.url(f"es{suffix}", content) + "?download=1", offset=9000) == TEXT[9000:]


def test_a_transfer_that_fails_for_good_is_said(server: Server) -> None:
    url = server.url("es.txt", TEXT)
    server.breaks = [1000] + [0] * 6
    with pytest.raises(EnvironmentLacks, match=r"es\.txt cannot be read beyond byte [0-9,]+ .*; run again"):
        read(url)
    server.status = 503
    with pytest.raises(EnvironmentLacks, match="503"):
        read(url)
    server.status, before = 403, len(server.requests)
    with pytest.raises(EnvironmentLacks, match="403"):
        read(url)
    assert len(server.requests) == before + 1, "what is forbidden is not asked for again"
    with pytest.raises(UsageError, match="there is no such file"):
        read(f"{url}.gz")


def test_a_server_with_ways_of_its_own(server: Server) -> None:
    """Nothing left after the offset, an empty file, a length that is not told, and compression nobody asked for."""
    url = server.url("es.txt", TEXT)
    assert read(url, offset=len(TEXT)) == b""
    assert read(server.url("empty.txt", b"")) == b""
    server.total = "*"
    assert read(url) == TEXT
    server.total, server.headers = None, {"Content-Encoding": "gzip"}
    assert read(server.url("es.gz", gzip.compress(TEXT))) == TEXT, "it is the file that is compressed, not the transfer"
    server.status = 429
    before = len(server.requests)
    with pytest.raises(EnvironmentLacks, match="429"):
        read(url)
    assert len(server.requests) == before + 4, "too many requests: later ones may do"


def test_a_file_that_changes_on_the_way_is_not_mixed(server: Server) -> None:
    url = server.url("es.txt", TEXT)
    server.breaks, server.after = [1000], lambda: server.files.update({"/es.txt": TEXT.upper()})
    with pytest.raises(UsageError, match="changed while it was read"):
        read(url)


@pytest.mark.parametrize("suffix", [".txt", ".gz"])
def test_the_digest_is_that_of_the_whole_file(server: Server, tmp_path: Path, suffix: str) -> None:
    content = COMPRESS[suffix](TEXT)
    digest = hashlib.sha256(content).hexdigest()
    path = tmp_path / f"es{suffix}"
    path.write_bytes(content)
    for name in (str(path), server.url(f"es{suffix}", content)):
        assert read(name, digest, 4000) == TEXT[4000:]
        with pytest.raises(UsageError, match=f"has sha256 {digest}, the profile says 0000"):
            read(name, "0" * 64)


def test_max_lines_ends_the_transfer(server: Server, tmp_path: Path) -> None:
    """Of text that is compressed to 12 MB, one line in a hundred costs a first block and no more."""
    lines = [hashlib.sha256(bytes([i % 256, i // 256 % 256, i // 65536])).hexdigest() for i in range(320_000)]
    content = gzip.compress("\n".join(lines).encode(), 1)
    keys = Corpus(source="x", shards=2, max_lines=3200, blank_lines_separate_documents=False)
    counts = corpus.shard([server.url("es.gz", content)], tmp_path / "work", keys)
    assert counts["lines"] == 3200 and len(content) > 10_000_000
    assert server.sent == sources.FIRST_BLOCK


def test_any_file_system_is_read_and_its_globs(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for number, suffix in enumerate(COMPRESS):
        memory.pipe(f"/texts/{number}{suffix}", COMPRESS[suffix](f"texto {number}\n".encode()))
    names = corpus.find(["memory://texts/*"], tmp_path)
    assert names == ["memory://texts/*"]
    corpus.shard(names, tmp_path / "work", Corpus(source="x", shards=1))
    shard = (tmp_path / "work" / "corpus" / "part-00000.txt").read_text(encoding="utf-8")
    assert shard == "".join(f"texto {number}\n\n" for number in range(len(COMPRESS)))
    with pytest.raises(UsageError, match="matches nothing"):
        sources.expand("memory://texts/*.txt.gz")
    with pytest.raises(UsageError, match=r"Protocol not known: nowhere"):
        sources.Stream("nowhere://corpus/es.txt")


@needs_datasets
def test_a_data_set_comes_from_a_hub(server: Server, cli: Any, tmp_path: Path) -> None:
    """As much of a hub as serves one data set, to the real client."""
    files = {"README.md": b"---\nlicense: mit\n---\n", "train.jsonl": b'{"texto": "Uno.\\nDos."}\n{"texto": "Tres."}\n'}
    server.ranges = False
    for name, content in files.items():
        for revision in ("main", "0" * 40):
            server.url(f"datasets/ana/textos/resolve/{revision}/{name}", content)
    listed = [{"type": "file", "path": name, "oid": "0" * 40, "size": len(c)} for name, c in files.items()]
    server.url(f"api/datasets/ana/textos/tree/{'0' * 40}", json.dumps(listed).encode())
    about = {"id": "ana/textos", "sha": "0" * 40, "private": False, "siblings": [{"rfilename": n} for n in files]}
    for path in ("", f"/revision/{'0' * 40}", "/revision/main"):
        url = server.url(f"api/datasets/ana/textos{path}", json.dumps(about).encode())
    hub = {"HF_ENDPOINT": url.partition("/api")[0], "HF_HOME": str(tmp_path / "hf")}
    arguments = ("run", "--until", "corpus", "--run-dir", "r", "--set", "corpus.shards=1", "--set")
    done = cli(*arguments, "corpus.source=hf://datasets/ana/textos@main::train:texto", env=hub)
    assert done.returncode == 0, done.stderr
    held_out, text = ((tmp_path / "r" / name / "part-00000.txt").read_text() for name in ("heldout", "corpus"))
    assert sorted(f"{held_out}{text}".split("\n\n")) == ["", "Tres.", "Uno.\nDos."]
    missing = cli(*arguments, "corpus.source=hf://datasets/ana/nada", env=hub)
    assert missing.returncode == 2 and "ana/nada" in missing.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ["es.zip", "es.tar.gz", "es.tgz", "es.7z"])
def test_an_archive_of_files_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UsageError, match="unpack it"):
        sources.Stream(str(tmp_path / name))


@needs_datasets
def test_a_data_set_is_streamed_row_by_row(tmp_path: Path) -> None:
    rows = ["Uno.\nDos.\n\n \nTres.", "", "Cuatro.", "Cinco."]
    (tmp_path / "es").mkdir()
    (tmp_path / "es" / "es.jsonl").write_text("".join(json.dumps({"texto": r}) + "\n" for r in rows), encoding="utf-8")
    name = f"{sources.DATASET}{tmp_path}/es::train:texto"
    assert read(name).decode() == "Uno.\nDos.\nTres.\n\n\n\nCuatro.\n\nCinco.\n\n"
    assert read(name, offset=5) == b"Dos.\n" + read(name, offset=10)
    counts = corpus.shard([name], tmp_path / "work", Corpus(source="x", shards=1))
    assert (counts["lines"], counts["documents"]) == (5, 3)
    with pytest.raises(UsageError, match=r"no text in a column 'text'; there are texto"):
        sources.Stream(f"{sources.DATASET}{tmp_path}/es")
    assert "torch" not in sys.modules, "the data set's library imports it unless it is told not to"
    with pytest.raises(UsageError, match="is not hf://datasets/NAME"):
        sources.Stream(f"{sources.DATASET}a:b:c:d:e")


def test_what_is_secret_of_a_url_is_written_nowhere(
    server: Server, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.url("es.txt", TEXT).replace("es.txt", "es.txt?token=${CORPUS_TOKEN}")
    monkeypatch.setenv("CORPUS_TOKEN", "hunter2")
    arguments = ("run", "--run-dir", "run", "--set", f'corpus.source="{url}"', "--set", "tokenizer.vocab_size=300")
    assert cli(*arguments, "--until", "corpus").returncode == 0
    assert "/es.txt?token=hunter2" in server.paths
    done = cli(*arguments, "--until", "vocab")
    server.status = 403
    failed = cli(*arguments, "--set", "corpus.shards=3", "--until", "corpus")
    assert done.returncode == 0 and failed.returncode == 3 and "403" in failed.stderr
    assert "hunter2" not in done.stderr + failed.stderr
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or b"hunter2" not in path.read_bytes(), path
