"""Sources of text: a file, or what fsspec opens, is read completely or refused."""

import bz2
import contextlib
import gzip
import hashlib
import http.server
import lzma
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from backports import zstd
from test_corpus import shard

from electra_wrap.data import corpus, sources
from electra_wrap.errors import EnvironmentProblem, UsageError

TEXT = "".join(f"línea {i}: {'áéíóú ' * (i % 9)}{i * i}\n" for i in range(20_000)).encode()
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    **{".txt": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress},
    ".zst": lambda text: zstd.compress(text, options={zstd.CompressionParameter.checksum_flag: 1}),
}


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` and ranges. Closes a connection after each number of bytes in `breaks`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.breaks, self.passwords = dict[str, bytes](), list[int](), set[str]()
        self.ranges, self.status, self.sent = "bytes", 200, 0

    def url(self, name: str, content: bytes) -> str:
        self.files[f"/{name}"] = content
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def handle_error(self, *client: Any) -> None: ...


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server, body = self.server, self.server.files.get(self.path.partition("?")[0])
        server.passwords.add(self.headers["Authorization"])
        status, body = (404, b"") if body is None else (server.status, body)
        headers = {"ETag": f'"{hash(body)}"', "X-Repo-Commit": "0" * 40}
        if status != 200:
            headers["X-Error-Code"] = "RepoNotFound" if "nada" in self.path else "EntryNotFound"
        elif server.ranges == "bytes" and (ends := re.findall(r"\d+", self.headers["Range"] or "")):
            headers["Content-Range"] = f"bytes {ends[0]}-{ends[1]}/{len(body)}"
            status, body = 206, body[int(ends[0]) : int(ends[1]) + 1]
        headers |= {"Accept-Ranges": server.ranges, "Content-Length": str(len(body))}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            sent = body[: server.breaks.pop(0)] if server.breaks else body
            server.sent += self.wfile.write(sent)
            self.close_connection = sent != body

    do_HEAD = do_GET

    def log_message(self, *message: Any) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(sources, "PAUSES", (0, 0, 0))
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def read(name: str, sha256: str | None = None) -> bytes:
    with contextlib.closing(sources.Stream(name, sha256)) as stream:
        return b"".join(stream)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_all_text_is_read_or_refused(server: Server, tmp_path: Path, suffix: str) -> None:
    compress, path = COMPRESS[suffix], tmp_path / f"es{suffix}"
    content = compress(TEXT[:1000]) + compress(TEXT[1000:])  # as parallel compressors write it
    path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    for name in (str(path), f"{server.url(path.name, content)}?download=1"):
        assert read(name, digest) == TEXT
        with pytest.raises(UsageError, match=f"has sha256 {digest}, the profile says 0000"):
            read(name, "0" * 64)
    intact = compress(TEXT)
    for damaged in (intact[:-20], intact[:1000], intact[:100] + b"damage!!" + intact[108:]):
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match=r"cannot be read as text|has sha256"):
            read(str(path), digest if suffix == ".txt" else None)


@pytest.mark.parametrize("suffix", [".txt", ".gz"])
def test_broken_transfer_is_repeated(server: Server, suffix: str, capsys: Any) -> None:
    url = server.url(f"es{suffix}", content := COMPRESS[suffix](TEXT))
    server.breaks = [len(content) // 2, 0, 10]
    assert read(url) == TEXT
    assert capsys.readouterr().err.count("; trying again in 0 s") == 3


@pytest.mark.parametrize("ranges", ["bytes", "none"])
def test_transfer_that_fails_for_good_is_an_error(server: Server, ranges: str) -> None:
    server.ranges, url = ranges, server.url("es.txt", TEXT)
    assert read(url) == TEXT
    for server.breaks, server.status, reason in (([999] * 9, 200, "999 of"), ([], 503, "503")):
        with pytest.raises(EnvironmentProblem, match=f"es.txt cannot be read .*{reason}.*; run"):
            read(url)


def test_max_lines_ends_the_transfer(server: Server, tmp_path: Path) -> None:
    url = server.url("es.txt", b"una frase cualquiera\n" * 1_000_000)
    assert shard(tmp_path, [url], max_lines=1000)[0]["lines"] == 1000
    assert server.sent < len(server.files["/es.txt"]) / 2


def test_password_in_netrc_is_used(server: Server, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login ana password abc\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read(server.url("es.txt", TEXT)) == TEXT
    assert server.passwords == {"Basic YW5hOmFiYw=="}


@pytest.mark.parametrize("scheme", ["memory", "file", "http"])
def test_globs_of_other_file_systems_are_read(server: Server, tmp_path: Path, scheme: str) -> None:
    base = {"memory": "memory:/", "file": f"file://{tmp_path}", "http": server.url("", b"")[:-1]}
    names = [f"{number}{suffix}" for number, suffix in enumerate(COMPRESS)]
    for name in names:
        content = COMPRESS[name[1:]](f"texto {name}\n".encode())
        fsspec.filesystem("memory").pipe(f"/es/{name}", content)
        fsspec.filesystem("file", auto_mkdir=True).pipe(f"{tmp_path}/es/{name}", content)
        server.url(f"es/{name}", content)
    server.url("es/", "".join(f'<a href="{name}">{name}</a>' for name in names).encode())
    found = corpus.find_sources([f"{base[scheme]}/es/*"], tmp_path)
    assert shard(tmp_path, found)[1] == ["".join(f"texto {name}\n\n" for name in names)]
    with pytest.raises(UsageError, match="matches nothing"):
        sources.expand(f"{base[scheme]}/es/*.txt.gz")


def test_files_of_data_sets_on_a_hub_are_read(server: Server, cli: Any, tmp_path: Path) -> None:
    """The real client reads from a server that imitates a hub."""
    url = server.url("datasets/ana/es/resolve/main/es.txt", b"Uno.\n\nDos.\n")
    server.url("api/datasets/ana/es", b'{"id": "ana/es"}')
    listed = b'[{"type": "file", "oid": "0", "path": "es.txt", "size": 11}]'
    server.url("api/datasets/ana/es/tree/main", listed)
    hub = {"HF_ENDPOINT": url.partition("/datasets")[0], "HF_HOME": str(tmp_path / "hf")}
    arguments = ("run", "--until=corpus", "--set=corpus.held_out=0", "--run-dir=r", "--set")
    done = cli(*arguments, "corpus.source=hf://datasets/ana/es/*.txt", env=hub)
    assert sorted(corpus.lines(tmp_path / "r/corpus")) == [b"Dos.\n", b"Uno.\n"]
    for missing in ("hf://datasets/ana/es/en.txt", url.replace("es.txt", "en.txt")):
        done = cli(*arguments, f"corpus.source={missing}", env=hub)
        error = f"electra_wrap: error: {missing}: no such file; correct corpus.source\n"
        assert done.returncode == 2 and done.stderr.endswith(f"\n{error}")


@pytest.mark.parametrize("name", ["nowhere://es.txt", "es.zip", "es.tar.gz", "es.tgz", "es.7z"])
def test_what_cannot_be_read_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"unpack it|not known: nowhere; correct it"):
        sources.Stream(name)
