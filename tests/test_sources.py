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
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

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
        self.paths: list[str] = []
        self.breaks: list[int] = []
        self.ranges = True
        self.total: str | None = None
        self.headers: dict[str, str] = {}
        self.status = 200
        self.statuses: dict[str, int] = {}
        self.reason: str | None = None
        self.lie: Callable[[int, dict[str, str], bytes], bytes] = lambda start, headers, body: body
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
        server.paths.append(self.path)
        path = self.path.partition("?")[0]
        status = server.statuses.get(path, server.status) if content is not None else 404
        etag = hashlib.md5(content or b"").hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": "0" * 40, **server.headers}
        body = content if content and status == 200 else b""
        if status != 200:
            headers["X-Error-Code"] = "RepoNotFound" if "nada" in self.path else "EntryNotFound"
        elif server.ranges and (bounds := re.findall(r"\d+", self.headers.get("Range", ""))):
            start, end, total = int(bounds[0]), int(bounds[1]) + 1, len(body)
            body = body[start:end]
            status = 206 if body else 416
            last = start + len(body) - 1
            headers["Content-Range"] = f"bytes {start}-{last}/{server.total or total}"
            if status == 206:
                body = server.lie(start, headers, body)
        self.send_response(status, server.reason)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = body[: server.breaks.pop(0)] if server.breaks and body else body
        self.wfile.write(sent)
        server.sent += len(sent)
        if sent != body:
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
    with contextlib.closing(sources.Stream(*sources.expand(name), sha256)) as stream:
        return b"".join(iter(lambda: stream.readline(1000), b""))


def shard(tmp_path: Path, *names: str, **keys: Any) -> dict[str, int]:
    """Write sources to one shard in `text`; return the counts."""
    settings = Corpus(source="x", shards=1, **keys)
    return corpus.shard(names, tmp_path / "text", tmp_path / "heldout", settings)


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
    expected = r"es\.txt cannot be read beyond byte [0-9,]+ .*; run"
    with pytest.raises(EnvironmentProblem, match=expected):
        read(url)
    server.status = 503
    with pytest.raises(EnvironmentProblem, match="503"):
        read(url)
    server.status, before = 403, len(server.paths)
    with pytest.raises(EnvironmentProblem, match="403"):
        read(url)
    assert len(server.paths) == before + 1, "a refused request is not repeated"
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
    server.status, before = 429, len(server.paths)
    with pytest.raises(EnvironmentProblem, match="429"):
        read(url)
    assert len(server.paths) == before + 4, "too many requests: repeated later"


def test_file_that_changes_during_the_transfer_is_refused(server: Server) -> None:
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
    counts = shard(tmp_path, server.url("es.gz", content), max_lines=3200)
    assert counts["lines"] == 3200 and len(content) > 10_000_000
    assert server.sent == sources.FIRST_BLOCK


def test_urls_of_other_file_systems_and_their_globs_are_read(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for number, suffix in enumerate(COMPRESS):
        memory.pipe(f"/texts/{number}{suffix}", COMPRESS[suffix](f"texto {number}\n".encode()))
    names = corpus.find_sources(["memory://texts/*"], tmp_path)
    assert names == ["memory://texts/*"]
    shard(tmp_path, *names)
    text = (tmp_path / "text" / "part-00000.txt").read_text(encoding="utf-8")
    assert text == "".join(f"texto {number}\n\n" for number in range(len(COMPRESS)))
    with pytest.raises(UsageError, match="matches nothing"):
        sources.expand("memory://texts/*.txt.gz")
    with pytest.raises(UsageError, match=r"Protocol not known: nowhere"):
        sources.expand("nowhere://corpus/es.txt")


@needs_datasets
def test_data_set_is_read_from_a_hub(server: Server, cli: Any, tmp_path: Path) -> None:
    """The real client reads from a server that imitates a hub."""
    rows = b'{"texto": "Uno.\\nDos."}\n{"texto": "Tres."}\n'
    files = {"README.md": b"---\nlicense: mit\n---\n", "train.jsonl": rows}
    server.ranges = False
    for name, content in files.items():
        for revision in ("main", "0" * 40):
            server.url(f"datasets/ana/textos/resolve/{revision}/{name}", content)
    commit = "0" * 40
    common = {"type": "file", "oid": commit}
    listed = [{**common, "path": name, "size": len(content)} for name, content in files.items()]
    server.url(f"api/datasets/ana/textos/tree/{commit}", json.dumps(listed).encode())
    siblings = [{"rfilename": name} for name in files]
    about = {"id": "ana/textos", "sha": commit, "private": False, "siblings": siblings}
    for path in ("", f"/revision/{commit}", "/revision/main"):
        url = server.url(f"api/datasets/ana/textos{path}", json.dumps(about).encode())
    hub = {"HF_ENDPOINT": url.partition("/api")[0], "HF_HOME": str(tmp_path / "hf")}
    arguments = ("run", "--until", "corpus", "--run-dir", "r", "--set", "corpus.shards=1", "--set")
    done = cli(*arguments, "corpus.source=hf://datasets/ana/textos@main::train:texto", env=hub)
    assert done.returncode == 0, done.stderr
    text = "".join(path.read_text() for path in (tmp_path / "r").glob("*/part-00000.txt"))
    assert sorted(text.split("\n\n")) == ["", "Tres.", "Uno.\nDos."]
    missing = cli(*arguments, "corpus.source=hf://datasets/ana/nada", env=hub)
    assert missing.returncode == 2 and "ana/nada" in missing.stderr.splitlines()[-1]


def _start_elsewhere(start: int, headers: dict[str, str], body: bytes) -> bytes:
    if start:
        headers["Content-Range"] = headers["Content-Range"].replace(f" {start}-", f" {start + 7}-")
    return body


def _change_etag(start: int, headers: dict[str, str], body: bytes) -> bytes:
    headers["ETag"] = f'"{start}"'
    headers["Last-Modified"] = "Wed, 25 Nov 2026 10:00:00 GMT"
    return body


def _end_early(start: int, headers: dict[str, str], body: bytes) -> bytes:
    headers["Content-Range"] = headers["Content-Range"].partition("/")[0] + "/*"
    return b"" if start else body


def _change_total(start: int, headers: dict[str, str], body: bytes) -> bytes:
    headers["Content-Range"] += "0" if start else ""
    return body


def _send_more(start: int, headers: dict[str, str], body: bytes) -> bytes:
    return body + b"more than the range\n"


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        (_start_elsewhere, "another range than requested"),
        (_change_etag, "changed while it was read"),
        (_end_early, "sends nothing more"),
        (_change_total, "changed while it was read"),
        (_send_more, None),
    ],
)
def test_server_that_lies_about_ranges_gives_the_text_or_an_error(
    server: Server, lie: Any, message: str | None
) -> None:
    url, server.lie = server.url("es.txt", TEXT), lie
    if message is None:
        assert read(url) == TEXT
        return
    with pytest.raises((UsageError, EnvironmentProblem), match=message):
        read(url)


def test_server_that_refuses_the_rest_gives_an_error(server: Server) -> None:
    server.headers = {"Content-Range": f"bytes */{len(TEXT)}"}

    def refuse(start: int, headers: dict[str, str], body: bytes) -> bytes:
        server.statuses["/es.txt"] = 416
        headers["Content-Range"] = headers["Content-Range"].partition("/")[0] + "/*"
        return body

    url, server.lie = server.url("es.txt", TEXT), refuse
    with pytest.raises(EnvironmentProblem, match="refuses to send the rest"):
        read(url)


def test_retry_is_logged(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    url = server.url("es.txt", TEXT)
    server.breaks = [100]
    assert read(url) == TEXT
    assert re.search(r"es\.txt: .*; trying again in 0 s", capsys.readouterr().err)


@pytest.mark.parametrize(
    "url",
    [
        "simplecache::http://127.0.0.1/es.txt",
        "zip://es.txt::http://127.0.0.1/es.zip",
        "zip://es.txt::/tmp/es.zip",
    ],
)
def test_chain_of_file_systems_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="is a chain of file systems; give one URL"):
        sources.expand(url)


def test_unset_variable_in_a_url_is_refused() -> None:
    with pytest.raises(UsageError, match=r"\$\{NOT_SET_AT_ALL\} is not set; export it"):
        sources.expand("https://me:${NOT_SET_AT_ALL}@127.0.0.1/es.txt")


def test_listing_of_a_server_gets_no_environment_variable(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SECRET", "hunter2")
    names = ["leak-${MY_SECRET}.txt", "leak-$MY_SECRET.txt", "x::file:$MY_SECRET.txt", "es.txt"]
    links = "".join(f'<a href="{name}">{name}</a>' for name in names)
    url = server.url("", links.encode())
    for name in names:
        server.url(name, TEXT)
        server.url(quote(name), TEXT)
    with contextlib.suppress(UsageError, EnvironmentProblem):
        shard(tmp_path, f"{url}*.txt")
    assert len(server.paths) > 1 and "hunter2" not in "".join(server.paths)


@pytest.mark.parametrize("name", ["es.zip", "es.tar.gz", "es.tgz", "es.7z"])
def test_archives_of_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UsageError, match="unpack it"):
        sources.Stream(*sources.expand(str(tmp_path / name)))


@needs_datasets
def test_data_set_is_streamed_row_by_row(tmp_path: Path) -> None:
    rows = ["Uno.\nDos.\n\n \nTres.", "", "Cuatro.", "Cinco."]
    (tmp_path / "es").mkdir()
    lines = "".join(json.dumps({"texto": row}) + "\n" for row in rows)
    (tmp_path / "es" / "es.jsonl").write_text(lines, encoding="utf-8")
    name = f"{sources.DATASET}{tmp_path}/es::train:texto"
    assert read(name).decode() == "Uno.\nDos.\nTres.\n\n\n\nCuatro.\n\nCinco.\n\n"
    counts = shard(tmp_path, name)
    assert (counts["lines"], counts["documents"]) == (5, 3)
    with pytest.raises(UsageError, match=r"no text in a column 'text'; there are texto"):
        sources.Stream(*sources.expand(f"{sources.DATASET}{tmp_path}/es"))
    assert "torch" not in sys.modules, "datasets imports it unless USE_TORCH is 0"
    with pytest.raises(UsageError, match="is not hf://datasets/NAME"):
        sources.Stream(*sources.expand(f"{sources.DATASET}a:b:c:d:e"))


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EnvironmentProblem, match=r"needs: pip install -e '\.\[datasets\]'"):
        sources.Stream(*sources.expand("hf://datasets/ana/textos"))


def test_secrets_in_urls_are_not_written(
    server: Server, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.url("es.txt", TEXT).replace("es.txt", "es.txt?token=${CORPUS_TOKEN}")
    monkeypatch.setenv("CORPUS_TOKEN", "hunter2")
    settings = ("--set", f'corpus.source="{url}"', "--set", "tokenizer.vocab_size=300")
    arguments = ("run", "--run-dir", "run", *settings)
    assert cli(*arguments, "--until", "corpus").returncode == 0
    assert "/es.txt?token=hunter2" in server.paths
    done = cli(*arguments, "--until", "vocab")
    server.status = 403
    failed = cli(*arguments, "--set", "corpus.shards=3", "--until", "corpus")
    assert done.returncode == 0 and failed.returncode == 3 and "403" in failed.stderr
    assert "hunter2" not in done.stderr + failed.stderr
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or b"hunter2" not in path.read_bytes(), path


def glob_with_password(server: Server) -> str:
    """Serve a text and a listing; return a URL with `*` and a variable."""
    url = server.url("texts/", b'<a href="es.txt">es.txt</a>')
    server.url("texts/es.txt", TEXT)
    return url.replace("http://", "http://me:${CORPUS_PASSWORD}@") + "*.txt"


@pytest.mark.parametrize("status", [200, 403])
def test_password_of_a_glob_is_not_written(
    server: Server, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setenv("CORPUS_PASSWORD", "hunter2")
    server.statuses["/texts/es.txt"] = status
    setting = f'corpus.source="{glob_with_password(server)}"'
    done = cli("run", "--run-dir", "run", "--until", "corpus", "--set", setting)
    assert done.returncode == (0 if status == 200 else 3), done.stderr
    assert "/texts/es.txt" in server.paths
    assert "hunter2" not in done.stderr and (status == 200 or "${CORPUS_PASSWORD}" in done.stderr)
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or b"hunter2" not in path.read_bytes(), path


@pytest.mark.parametrize("status", [302, 500])
def test_error_hides_a_password_that_the_server_sends_back(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    status: int,
) -> None:
    monkeypatch.setenv("CORPUS_PASSWORD", "hunter2")
    server.statuses["/texts/es.txt"] = status
    server.headers = {"Location": "http://hunter2.invalid/es.txt"}
    server.reason = "hunter2"
    with pytest.raises(EnvironmentProblem, match="cannot be read") as raised:
        shard(tmp_path, glob_with_password(server))
    assert "hunter2" not in str(raised.value) + capsys.readouterr().err


def xz_with_dictionary(text: bytes, size_code: int) -> bytes:
    """Compress a text, and declare a dictionary of another size (xz-file-format, 5.3.1)."""
    content = bytearray(lzma.compress(text))
    length = 4 * (content[12] + 1)
    header = content[12 : 12 + length]
    header[header.index(b"\x21\x01") + 2] = size_code
    header[-4:] = zlib.crc32(header[:-4]).to_bytes(4, "little")
    return bytes(content[:12] + header + content[12 + length :])


def zstd_with_window(text: bytes, exponent: int) -> bytes:
    """Store a text in one raw block, and declare a window of 2^(10 + exponent) bytes (RFC 8878)."""
    block = (len(text) << 3 | 1).to_bytes(3, "little")
    return b"\x28\xb5\x2f\xfd\x00" + bytes([exponent << 3]) + block + text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("es.xz", xz_with_dictionary(b"uno\n", 39)),  # 3 GiB
        ("es.zst", zstd_with_window(b"uno\n", 21)),
    ],
)
def test_compressed_text_that_takes_much_memory_is_refused(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=r"cannot be read as text: .*[Mm]emory"):
        read(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("es.xz", xz_with_dictionary(b"uno\n", 28)),  # 64 MiB, that of `xz -9`
        ("es.xz", lzma.compress(b"u") + lzma.compress(b"no\n") + bytes(8)),
        ("es.xz", lzma.compress(b"u") + bytes(4) + lzma.compress(b"no\n")),
        ("es.zst", zstd_with_window(b"uno\n", 17)),
    ],
)
def test_valid_compressed_text_is_read(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert read(str(tmp_path / name)) == b"uno\n"
