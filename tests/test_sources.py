"""Sources of text: read completely or refused, and no more is transferred than is used."""

from __future__ import annotations

import bz2
import contextlib
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

from electra_wrap.data import corpus, sources
from electra_wrap.errors import EnvironmentProblem, UsageError
from electra_wrap.profile import Corpus

TEXT = "".join(
    f"línea {i}: {'áéíóú ' * (i % 9)}{i * i}\n" + "\n" * (i % 10 == 0) for i in range(20_000)
).encode()
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".txt": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda text: zstd.compress(text, options={zstd.CompressionParameter.checksum_flag: 1}),
}


needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="needs datasets"
)


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` and counts the bytes `sent`.

    Each of `breaks` is a number of bytes after which it closes one connection.
    """

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
        """Ignore clients that close the connection early."""


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
            code = "RepoNotFound" if "nada" in self.path else "EntryNotFound"
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start, end = 0, len(content)
        if server.ranges and (
            match := re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        ):
            start, end = int(match[1]), min(end, int(match[2]) + 1)
            self.send_response(206 if start < end else 416)
            end = max(start, end)
            self.send_header(
                "Content-Range", f"bytes {start}-{end - 1}/{server.total or len(content)}"
            )
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
            time.sleep(0.1)  # so that the client gets all bytes before the connection closes
            self.close_connection = True
            server.after()

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(sources, "PAUSES", (0, 0, 0))
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def read(name: str, sha256: str | None = None) -> bytes:
    with contextlib.closing(sources.Stream(name, sha256)) as stream:
        return b"".join(iter(lambda: stream.readline(1000), b""))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_text_is_read_and_damaged_files_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"es{suffix}"
    compress = COMPRESS[suffix]
    # Parallel compressors write several members.
    path.write_bytes(compress(TEXT[:1000]) + compress(TEXT[1000:]))
    assert read(str(path)) == TEXT
    if suffix != ".txt":
        intact = compress(TEXT)
        corrupt = intact[:100] + b"damage!!" + intact[108:]
        for damaged in (intact[:-20], intact[: len(intact) // 2], corrupt):
            path.write_bytes(damaged)
            with pytest.raises(UsageError, match=f"es{suffix}: cannot be read as text"):
                read(str(path))


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("suffix", [".txt", ".gz"])
def test_broken_transfers_continue(server: Server, suffix: str, ranges: bool) -> None:
    content = COMPRESS[suffix](TEXT)
    server.ranges, server.breaks = ranges, [70_000, len(content) // 3, 10]
    url = f"{server.url(f'es{suffix}', content)}?download=1"
    assert read(url, hashlib.sha256(content).hexdigest()) == TEXT
    assert not server.breaks
    assert server.sent <= len(content) * (1 if ranges else 2) + 70_000 + len(content) // 3 + 10


def test_failing_transfers_are_reported(server: Server) -> None:
    url = server.url("es.txt", TEXT)
    server.breaks = [1000] + [0] * 6
    with pytest.raises(
        EnvironmentProblem, match=r"es\.txt cannot be read beyond byte [0-9,]+ .*; run"
    ):
        read(url)
    server.status = 503
    with pytest.raises(EnvironmentProblem, match="503"):
        read(url)
    server.status, before = 403, len(server.requests)
    with pytest.raises(EnvironmentProblem, match="403"):
        read(url)
    assert len(server.requests) == before + 1, "a refused request is not repeated"
    with pytest.raises(UsageError, match="no such file"):
        read(f"{url}.gz")


def test_unusual_servers_are_supported(server: Server) -> None:
    """An empty file, an unknown length, and an encoding that was not requested."""
    url = server.url("es.txt", TEXT)
    assert read(server.url("empty.txt", b"")) == b""
    server.total = "*"
    assert read(url) == TEXT
    server.total, server.headers = None, {"Content-Encoding": "gzip"}
    assert read(server.url("es.gz", gzip.compress(TEXT))) == TEXT, "the file is compressed"
    server.status = 429
    before = len(server.requests)
    with pytest.raises(EnvironmentProblem, match="429"):
        read(url)
    assert len(server.requests) == before + 4, "too many requests: repeated later"


def test_a_file_that_changes_during_the_transfer_is_refused(server: Server) -> None:
    url = server.url("es.txt", TEXT)
    server.breaks, server.after = [1000], lambda: server.files.update({"/es.txt": TEXT.upper()})
    with pytest.raises(UsageError, match="changed while it was read"):
        read(url)


@pytest.mark.parametrize("suffix", [".txt", ".gz"])
def test_sha256_is_that_of_the_stored_file(server: Server, tmp_path: Path, suffix: str) -> None:
    content = COMPRESS[suffix](TEXT)
    digest = hashlib.sha256(content).hexdigest()
    path = tmp_path / f"es{suffix}"
    path.write_bytes(content)
    for name in (str(path), server.url(f"es{suffix}", content)):
        assert read(name, digest) == TEXT
        with pytest.raises(UsageError, match=f"has sha256 {digest}, the profile says 0000"):
            read(name, "0" * 64)


def test_max_lines_ends_the_transfer(server: Server, tmp_path: Path) -> None:
    """Of text that is compressed to 12 MB, one line in a hundred costs the first block."""
    lines = [hashlib.sha256(i.to_bytes(3, "little")).hexdigest() for i in range(320_000)]
    content = gzip.compress("\n".join(lines).encode(), 1)
    settings = Corpus(source="x", shards=2, max_lines=3200, blank_lines_separate_documents=False)
    url = server.url("es.gz", content)
    counts = corpus.shard([url], tmp_path / "text", tmp_path / "heldout", settings)
    assert counts["lines"] == 3200 and len(content) > 10_000_000
    assert server.sent == sources.FIRST_BLOCK


def test_urls_of_other_file_systems_and_their_globs_are_read(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for number, suffix in enumerate(COMPRESS):
        memory.pipe(f"/texts/{number}{suffix}", COMPRESS[suffix](f"texto {number}\n".encode()))
    names = corpus.find_sources(["memory://texts/*"], tmp_path)
    assert names == ["memory://texts/*"]
    corpus.shard(names, tmp_path / "text", tmp_path / "heldout", Corpus(source="x", shards=1))
    shard = (tmp_path / "text" / "part-00000.txt").read_text(encoding="utf-8")
    assert shard == "".join(f"texto {number}\n\n" for number in range(len(COMPRESS)))
    with pytest.raises(UsageError, match="matches nothing"):
        sources.expand("memory://texts/*.txt.gz")
    with pytest.raises(UsageError, match=r"Protocol not known: nowhere"):
        sources.Stream("nowhere://corpus/es.txt")


@needs_datasets
def test_a_data_set_is_read_from_a_hub(server: Server, cli: Any, tmp_path: Path) -> None:
    """The real client reads from a server that imitates a hub."""
    rows = b'{"texto": "Uno.\\nDos."}\n{"texto": "Tres."}\n'
    files = {"README.md": b"---\nlicense: mit\n---\n", "train.jsonl": rows}
    server.ranges = False
    for name, content in files.items():
        for revision in ("main", "0" * 40):
            server.url(f"datasets/ana/textos/resolve/{revision}/{name}", content)
    commit = "0" * 40
    listed = [
        {"type": "file", "path": name, "oid": commit, "size": len(content)}
        for name, content in files.items()
    ]
    server.url(f"api/datasets/ana/textos/tree/{commit}", json.dumps(listed).encode())
    siblings = [{"rfilename": name} for name in files]
    about = {"id": "ana/textos", "sha": commit, "private": False, "siblings": siblings}
    for path in ("", f"/revision/{commit}", "/revision/main"):
        url = server.url(f"api/datasets/ana/textos{path}", json.dumps(about).encode())
    hub = {"HF_ENDPOINT": url.partition("/api")[0], "HF_HOME": str(tmp_path / "hf")}
    arguments = ("run", "--until", "corpus", "--run-dir", "r", "--set", "corpus.shards=1", "--set")
    done = cli(*arguments, "corpus.source=hf://datasets/ana/textos@main::train:texto", env=hub)
    assert done.returncode == 0, done.stderr
    held_out, text = (
        (tmp_path / "r" / name / "part-00000.txt").read_text() for name in ("heldout", "corpus")
    )
    assert sorted(f"{held_out}{text}".split("\n\n")) == ["", "Tres.", "Uno.\nDos."]
    missing = cli(*arguments, "corpus.source=hf://datasets/ana/nada", env=hub)
    assert missing.returncode == 2 and "ana/nada" in missing.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ["es.zip", "es.tar.gz", "es.tgz", "es.7z"])
def test_archives_of_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UsageError, match="unpack it"):
        sources.Stream(str(tmp_path / name))


@needs_datasets
def test_a_data_set_is_streamed_row_by_row(tmp_path: Path) -> None:
    rows = ["Uno.\nDos.\n\n \nTres.", "", "Cuatro.", "Cinco."]
    (tmp_path / "es").mkdir()
    lines = "".join(json.dumps({"texto": row}) + "\n" for row in rows)
    (tmp_path / "es" / "es.jsonl").write_text(lines, encoding="utf-8")
    name = f"{sources.DATASET}{tmp_path}/es::train:texto"
    assert read(name).decode() == "Uno.\nDos.\nTres.\n\n\n\nCuatro.\n\nCinco.\n\n"
    settings = Corpus(source="x", shards=1)
    counts = corpus.shard([name], tmp_path / "text", tmp_path / "heldout", settings)
    assert (counts["lines"], counts["documents"]) == (5, 3)
    with pytest.raises(UsageError, match=r"no text in a column 'text'; there are texto"):
        sources.Stream(f"{sources.DATASET}{tmp_path}/es")
    assert "torch" not in sys.modules, "datasets imports it unless USE_TORCH is 0"
    with pytest.raises(UsageError, match="is not hf://datasets/NAME"):
        sources.Stream(f"{sources.DATASET}a:b:c:d:e")


def test_secrets_in_urls_are_not_written(
    server: Server, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.url("es.txt", TEXT).replace("es.txt", "es.txt?token=${CORPUS_TOKEN}")
    monkeypatch.setenv("CORPUS_TOKEN", "hunter2")
    settings = (f'corpus.source="{url}"', "tokenizer.vocab_size=300")
    arguments = ("run", "--run-dir", "run", "--set", settings[0], "--set", settings[1])
    assert cli(*arguments, "--until", "corpus").returncode == 0
    assert "/es.txt?token=hunter2" in server.paths
    done = cli(*arguments, "--until", "vocab")
    server.status = 403
    failed = cli(*arguments, "--set", "corpus.shards=3", "--until", "corpus")
    assert done.returncode == 0 and failed.returncode == 3 and "403" in failed.stderr
    assert "hunter2" not in done.stderr + failed.stderr
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or b"hunter2" not in path.read_bytes(), path
