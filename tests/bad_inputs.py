"""Feed bad inputs to the command line, and check that each is refused in one line.

    python tests/bad_inputs.py [--inputs 1000] [--seed 0] [--kinds texts,…] [--directory DIR]

Each input is a command line with the files that it reads, made from seed, kind and number alone;
only the server's port varies. It runs as `python -m electra_wrap` does, in a forked process. The
functions `judge_…` check how it ends. Failures are grouped, each with its shortest command line.
--kinds KIND --first NUMBER --inputs 1 --directory DIR repeats an input and keeps its files.
"""

from __future__ import annotations

import argparse
import base64
import bz2
import collections
import contextlib
import ctypes
import gzip
import http.server
import importlib
import io
import json
import lzma
import os
import random
import re
import reprlib
import resource
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from backports import zstd

from electra_wrap import paths
from electra_wrap.commands import COMMANDS
from electra_wrap.data import sources

#: Imported once, before the processes are forked. None of them imports TensorFlow or PyTorch.
MODULES = [f"electra_wrap.tools.{name}" for name in ("bench", "convert", "detect", "tensorboard")]
MODULES += ["electra_wrap.cli", "electra_wrap.pipeline.execute", "electra_wrap.monitor.report"]
MODULES += ["electra_wrap.upstream.hparams", "fsspec.implementations.http", "tokenizers"]

#: Limits of an input: seconds, resident bytes, and bytes of address space.
SECONDS, MEMORY, ADDRESS_SPACE = 20, 2**30, 2**32

#: What a command may write (the run directory, --out and caches), and how an error begins.
WRITABLE = ("work/run", "work/out", "work/cache", "stdout", "stderr")
ERROR = "electra_wrap: error: "

#: Settings of the run whose directory is tampered with.
SET = ["--set=corpus.held_out=0.05", "--set=tokenizer.vocab_size=300", "--set=train.device=cpu"]
SET += ["--set=model.hidden_size=64", "--set=model.max_seq_length=32", "--set=train.steps=4"]
SET += ["--set=train.save_every=4", "--set=train.warmup_steps=1", "--set=train.batch_size=4"]

#: What inputs are made of. `Campaign.try_input` makes the files that PATHS names.
TEXT = "".join(f"Línea {n} de un texto: {'áéíóú ' * (n % 9)}\n" for n in range(400)).encode()
NUMBERS = "0 -1 1 3 1.5 1e400 1e-320 -0.0 nan inf true 1_0 0x10 ٣ ² 4294967296 9223372036854775808"
WORDS = 'x - -- = \' " """ [ { # \x1b[31mred \x9b31mred \a \u202e \u2028 \x85 \ufeff \U0010ffff '
WORDS += "\udcff\udc80 $(id) %s%n{0} ${MY_SECRET} ${UNSET} [red] ~ ~nobody ñ¿ [MASK] best 0/1 run"
PATHS = "missing missing/x.toml loop loop/x directory fifo empty random random/x . .. / * ** out "
PATHS += "/dev/zero /dev/null /proc/self/mem ../canary/file.txt \x1b[31m.txt \udcff.txt text.txt"
ODD = [*f"{NUMBERS} {WORDS} {PATHS}".split(" "), "", " ", "a\nb", "a\rb", "\0", "9" * 5000]
ODD += ["ñ" * 200, "x" * 300, "x" * 100_000, "x/" * 2500, "[" * 99_999, '{"a":' * 9999]


def to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def mutate_bytes(source: random.Random, content: bytes) -> bytes:
    """Return content of which some words or other parts are replaced."""
    for _ in range(source.choice([1, 1, 2, 8])):
        start = source.randrange(len(content) + 1)
        end = start + source.choice([0, 1, 4, 100, len(content)])
        if (words := list(re.finditer(rb"\w+", content[:9999]))) and source.random() < 0.6:
            start, end = source.choice(words).span()
        new = [b"", content[start:end] * 3, source.randbytes(4), b"\n" * 100]
        new += [to_bytes(odd) for odd in source.choices(ODD, k=5)]
        content = content[:start] + source.choice(new) + content[end:]
    return content


def mutate_json(source: random.Random, value: Any) -> Any:
    """Return a value of which a part is removed, renamed or of another type."""
    if not isinstance(value, dict | list) or not value or source.random() < 0.1:
        odd = [None, True, 0, -1, 0.5, 2**70, 1e308, float("nan"), [], {}, [value], {"a": value}]
        return source.choice([*odd, str(value), *source.choices(ODD, k=10)])
    mutated: Any = value.copy()
    key: Any = source.choice(list(value) if isinstance(value, dict) else range(len(value)))
    action = source.random()
    if action < 0.1:
        del mutated[key]
    elif action < 0.2 and isinstance(value, dict):
        mutated[source.choice(ODD)] = mutated.pop(key)
    else:
        mutated[key] = mutate_json(source, value[key])
    return mutated


def odd_url(campaign: Campaign) -> str:
    """Return a URL, mostly of the hostile server and possibly with secrets."""
    choice, literal = campaign.random.choice, campaign.secrets["LITERAL"]
    secret = choice([literal, "${UNSET}", *["${PASSWORD}", "${MY_SECRET}", "${API_KEY}"] * 3])
    scheme = choice(["http"] * 30 + ["https", "file", "memory", "s3", "zip", "data", "x"])
    user = choice(["", "", f"me:{secret}@", f"{secret}@"])
    host = choice([f"127.0.0.1:{campaign.port}"] * 30 + ["127.0.0.1:1", "127.0.0.1:99999", "[::1"])
    seed, behavior = campaign.random.random(), choice(["bad", "bad", "redirect", "listing"])
    file = choice(["*", "*.txt"] if behavior == "listing" else ["es.txt", "es.gz", "a b", "\x1b"])
    query = choice(["", "", f"?key={secret}", f"?a=1#k={secret}"])
    url = f"{scheme}://{user}{host}/{behavior}/{seed}/{file}{query}"
    if literal in url or campaign.random.random() < 0.8:
        return url  # in a damaged URL, nobody could recognize the literal as a secret
    damaged = mutate_bytes(campaign.random, url.encode()).decode("utf-8", "surrogateescape")
    return choice([f"simplecache::{url}", f"{url}::file:///etc/hostname", damaged])


# The kinds of inputs. Each function makes files in `campaign.work` and returns a command line.


def profile_values(campaign: Campaign) -> list[str]:
    """Odd values of the keys of a profile, by --set."""
    source, choice = campaign.random, campaign.random.choice
    profile = json.loads((campaign.run / "profile.json").read_text())
    values = {"extends": "x", "x.y": 1, **profile}
    for section in ("corpus", "tokenizer", "model", "train"):
        values |= {f"{section}.{key}": value for key, value in profile[section].items()}
    flags = ["--set=corpus.source=text.txt"]
    for _ in range(choice([1, 1, 2, 4])):
        key = choice([*values, *["corpus.source", "tokenizer.source"] * 9])
        odd = [choice(ODD), *[json.dumps(mutate_json(source, values[key]))] * 3]
        odd += [json.dumps(odd_url(campaign))] * 9 if key == "corpus.source" else []
        flags += [f"--set={key}={choice(odd)}"]
    show = ["show", f"--what={choice(['profile', 'hparams', 'generator'])}"]
    until = choice(["--dry-run", "--until=corpus", "--until=vocab"])
    return [*choice([show, ["run", "--run-dir=run", until]]), *flags]


def profile_files(campaign: Campaign) -> list[str]:
    """Profiles of which bytes or values are changed, and files that are no profiles."""
    source, choice = campaign.random, campaign.random.choice
    content = choice(sorted(paths.CONFIGS.glob("*.toml"))).read_bytes()
    start, end = choice(list(re.finditer(rb"(?<= = ).*", content))).span()
    odd = [json.dumps(mutate_json(source, "x")), json.dumps(odd_url(campaign)), choice(ODD)]
    contents = [content[:start] + to_bytes(choice(odd)) + content[end:]]
    contents += [mutate_bytes(source, content), b"extends = " + to_bytes(json.dumps(choice(ODD)))]
    (campaign.work / "x.toml").write_bytes(choice([*contents, b'extends = "x"']))
    commands = [["show", "--what=discriminator"], ["run", "--dry-run", "--run-dir=run"]]
    return [*choice(commands), "--profile", choice(["x.toml"] * 9 + PATHS.split(" "))]


def command_lines(campaign: Campaign) -> list[str]:
    """Options and arguments that are wrong, missing, duplicated or odd."""
    source, choice = campaign.random, campaign.random.choice
    shutil.copytree(campaign.run, campaign.work / "run")
    commands = {function.__name__: arguments for function, _, arguments in COMMANDS}
    del commands["doctor"]  # it works for seconds
    name, parser, argv = choice(list(commands)), argparse.ArgumentParser(add_help=False), []
    for add in commands[name]:
        add(parser)
    actions = parser._actions
    for action in source.choices(actions, k=source.randrange(8) if actions else 0):
        value = choice([choice(ODD), choice([*(action.choices or ()), "run", "out", "corpus"])])
        option = choice([*action.option_strings, value])
        argv += choice([[option, value], [option, value], [f"{option}={value}"], [option]])
    ends = ["--run-dir=run", "--until=corpus", "--step=999", "--steps=0", "--host=::x"]
    ends += [f"--upstream={choice(['ext::sh -c id', 'http://127.0.0.1:1/x', *ODD])}"]
    options = parser._option_string_actions  # the last of an option counts: nothing takes minutes
    argv += [end for end in ends if end.split("=")[0] in options]
    return [name, *argv, *choice([[]] * 9 + [["--x"], ["-h"], ["--", "x"], ["\x1b[31m"]])]


def run_directories(campaign: Campaign) -> list[str]:
    """Run directories of which a file is changed, for the commands that start no process."""
    source, choice, run = campaign.random, campaign.random.choice, campaign.work / "run"
    shutil.copytree(campaign.run, run)
    files = sorted(run.rglob("*"))
    names = "step-٣ best-7 step-99999999999999999999 part-1.txt \x1b[31m.txt model.ckpt-5.index "
    names += ".lock report.html report.html.partial events.out.tfevents.1 vocab.txt.partial logs"
    new = choice([run, *filter(Path.is_dir, files)]) / choice(names.split())
    important = [path for path in files if path.name in ("manifest.json", "profile.json")]
    path = choice([choice(files), choice(important), choice(important), new])
    if path.is_file() and source.random() < 0.6:
        content = mutate_bytes(source, path.read_bytes())
        if path.suffix == ".json" and source.random() < 0.8:
            content = json.dumps(mutate_json(source, json.loads(path.read_text()))).encode()
        path.write_bytes(content)
    else:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        target = campaign.work / choice(["../canary", "../canary/new", "/dev/zero", ".."])
        make: list[Callable[[Path], Any]] = [os.mkfifo, os.mkdir, Path.touch, Path.exists]
        make += [lambda path: path.symlink_to(target)] * 4
        choice(make)(path)
    run_it = ["run", "--run-dir=run", *SET]
    commands = [["show", "run", "--what=hparams"], [*run_it, "--dry-run"]] * 3
    commands += [[*run_it, "--until=vocab"]] * 3 + [[*run_it, "--shard=3/4"], ["corpus", "run"]]
    commands += [["report", "run", "--out=out"], ["evaluate", "run", "--step=9"], ["report", "run"]]
    commands += [["convert", "run", "--out=out", "--step=9"], ["tensorboard", "run", "--host=::x"]]
    return choice(commands)


def texts(campaign: Campaign) -> list[str]:
    """Text, archives and bombs."""
    source, choice = campaign.random, campaign.random.choice
    odd = [TEXT] * 5 + [b"", b"\0" * 10**5, b"a " * 10**5, TEXT.decode().encode("utf-16")]
    odd += [source.randbytes(30_000), "ñ".encode() * 99_999, b"\n" * 9999, b"a" * 3 * 10**6]
    compress: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress}
    compress |= {".xz": lzma.compress, ".zst": zstd.compress, ".txt": bytes}
    suffix = choice(list(compress))
    content = compress[suffix](mutate_bytes(source, choice(odd)))
    content = mutate_bytes(source, content) if source.random() < 0.6 else content
    stem = choice(["text"] * 50 + WORDS.split(" ")).replace("/", "")
    name = stem + choice([suffix] * 9 + [".zip", ".gz", ""])
    (campaign.work / name).write_bytes(content)
    named = choice([name] * 9 + ["*", "**/*"])
    settings = [f"source={json.dumps(named)}", f"shards={choice('12')}"]
    settings += [f"bad_lines={choice(['repair', 'skip', 'stop'])}", f"held_out=0.{choice('039')}"]
    settings += [choice(["deduplicate=lines", "deduplicate=documents", "max_lines=7"])]
    return ["run", "--until=corpus", "--run-dir=run", *(f"--set=corpus.{s}" for s in settings)]


def servers(campaign: Campaign) -> list[str]:
    """Hostile web servers. A secret may go to the server that the URL names, and to no other."""
    source = f"--set=corpus.source={json.dumps(odd_url(campaign))}"
    return ["run", "--until=corpus", "--run-dir=run", "--set=corpus.held_out=0.0", source]


def vocabularies(campaign: Campaign) -> list[str]:
    """Vocabularies of which words or bytes are changed."""
    tokens = (campaign.run / "vocab.txt").read_bytes().splitlines(keepends=True)[:100]
    (campaign.work / "vocab.txt").write_bytes(mutate_bytes(campaign.random, b"".join(tokens)))
    flags = ["--set=tokenizer.source=vocab.txt", "--set=corpus.source=text.txt"]
    commands = [["run", "--until=vocab", "--run-dir=run"], ["show", "--what=discriminator"]]
    return [*campaign.random.choice(commands), *flags]


FUNCTIONS = [profile_values, profile_files, command_lines, run_directories, texts]
KINDS = {function.__name__: function for function in [*FUNCTIONS, servers, vocabularies]}

#: Names of the hostile server. No secret is for the second one, where redirects and links lead.
HOSTS = ("127.0.0.1", "localhost")


class HostileServer(http.server.BaseHTTPRequestHandler):
    """Answers as the first part of the path says, with the second as seed; records requests."""

    requests: Path

    def do_GET(self) -> None:
        _, kind, seed, *names = f"{self.path}//".split("/")
        token = base64.b64decode(self.headers.get("Authorization", "").removeprefix("Basic "))
        with self.requests.open("a") as file:
            file.write(f"{[self.headers['Host'], self.path, token, self.headers.items()]}\n")
        block = re.search(r"(\d+)-(\d+)", self.headers.get("Range", "0-999999"))
        start, end = (int(block[1]), min(len(TEXT), int(block[2]) + 1)) if block else (0, 0)
        source = random.Random(f"{seed} {start}")
        status, body = "206 OK", TEXT[start:end]
        head = f"Content-Range: bytes {start}-{end - 1}/{len(TEXT)}"
        port = self.server.server_address[1]  # type: ignore[index]
        places = ["", "file:/", *(f"http://{host}:{port}/bad/1/" for host in HOSTS)]
        files = ["${MY_SECRET}.txt", "%24%7BMY_SECRET%7D.txt", "es.txt", source.choice(ODD)]
        links = [source.choice(places) + source.choice(files) for _ in range(20)]
        if kind == "redirect":
            status, head = source.choice(["301 x", "302 x", "307 x"]), f"Location: {links[0]}"
        elif kind == "listing" and not re.search(r"\w\.", names[0]):
            body = to_bytes("".join(f'<a href="{link}">x</a>\n' for link in links))
            status, head = "200 OK", "Content-Type: text/html"
        elif kind == "bad":
            status = f"{source.choice([200, 206, source.randrange(600)])} {source.choice(ODD)}"
            head += source.choice(["", "\r\nTransfer-Encoding: chunked", f"\r\nETag: {id(self)}"])
            body = source.choice([body, body * 2, mutate_bytes(source, body)])
            time.sleep(source.choice([0] * 30 + [3]))
        head = f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n{head}"
        answer = to_bytes(f"{head}\r\n\r\n")
        if kind == "bad" and source.random() < 0.6:
            answer = mutate_bytes(source, answer)
        with contextlib.suppress(OSError):
            self.wfile.write(answer + body)

    do_HEAD = do_GET


class Outcome(NamedTuple):
    """How an input ended, and what is wrong with that."""

    name: str
    argv: list[str]
    code: int
    message: str
    problems: list[str]


class Campaign:
    """Runs inputs one after the other, each in a directory of its own.

    `run` is the directory of a run until a stage, `port` that of the hostile server. While an input
    is made, `random` is its source of numbers and `work` its working directory.
    """

    random: random.Random
    work: Path

    def __init__(self, directory: Path, seed: int, until: str) -> None:
        for module in MODULES:
            importlib.import_module(module)
        self.directory, self.seed = directory.resolve(), seed
        self.run = self.directory / "base"
        run = [sys.executable, "-m", "electra_wrap", "run", f"--run-dir={self.run}", *SET]
        environment = {**os.environ, "PYTHONPATH": str(paths.PACKAGE.parent)}
        subprocess.run([*run, "--until", until], check=True, capture_output=True, env=environment)
        names = ("PASSWORD", "MY_SECRET", "API_KEY", "LITERAL")
        self.secrets = {name: random.Random(f"{seed} {name}").randbytes(12).hex() for name in names}
        ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: adopt what a command leaves
        HostileServer.requests = self.directory / "requests"
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), HostileServer) as server:
            self.port = server.server_port
            self._server = get_context("fork").Process(target=server.serve_forever, daemon=True)
            with contextlib.redirect_stderr(io.StringIO()):  # it logs requests
                self._server.start()

    def close(self) -> None:
        self._server.kill()
        self._server.join()

    def try_input(self, kind: str, number: int, *, keep: bool = False) -> Outcome:
        """Run an input and judge what it did. With `keep`, its files stay."""
        place = self.directory / f"{kind}-{number}"
        self.random, self.work = random.Random(f"{self.seed} {kind} {number}"), place / "work"
        for directory in (self.work / "directory", place / "canary", place / "tmp"):
            directory.mkdir(parents=True)
        files = {"text.txt": TEXT, "../canary/file.txt": TEXT, "random": TEXT[::-1], "empty": b""}
        for name, content in files.items():
            (self.work / name).write_bytes(content)
        (self.work / "loop").symlink_to("loop")
        os.mkfifo(self.work / "fifo")
        argv = [argument.replace("\0", "") for argument in KINDS[kind](self)]
        (self.directory / "requests").write_text("")
        before, others = snapshot(place), children()
        if not (process := os.fork()):
            self._execute(argv, place)
        _, status, usage = os.wait4(process, 0)
        code = os.waitstatus_to_exitcode(status)
        problems = ["memory"] if usage.ru_maxrss * 1024 > MEMORY else []
        problems += [*self.judge_output(place, code), *self.judge_processes(others)]
        problems += dict.fromkeys(self.judge_files(place, before, argv))
        errors = (place / "stderr").read_text("utf-8", "replace")
        if not keep:
            shutil.rmtree(place)
        return Outcome(place.name, argv, code, errors.rstrip("\n").rpartition("\n")[2], problems)

    def _execute(self, argv: list[str], place: Path) -> None:
        """Run a command line in this process, which was forked for it, and end."""
        code: Any = 70
        try:
            os.setsid()
            signal.alarm(SECONDS)  # ends this process
            os.chdir(self.work)
            for descriptor, name in enumerate((os.devnull, "../stdout", "../stderr")):
                os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), descriptor)
            sys.stdin, sys.stdout, sys.stderr = map(open, range(3), "rww")
            resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
            environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
            environment |= {"HOME": f"{self.work}/cache", "XDG_CACHE_HOME": f"{self.work}/cache"}
            environment |= self.secrets | {"PASSWORD": f"p{self.secrets['PASSWORD']}/@é%"}
            # Nothing is requested from other machines: there is no proxy at this address.
            environment |= dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:1")
            environment |= {"no_proxy": "127.0.0.1,localhost", "TMPDIR": f"{place}/tmp"}
            os.environ.clear()
            os.environ.update(environment)
            tempfile.tempdir = None
            paths.IN_CHECKOUT = False  # else `vendor` writes to the checkout
            sources.PAUSES, sources.TIMEOUT = (0.01, 0.01), 2  # type: ignore[assignment]
            sources.FIRST_BLOCK, sources.LAST_BLOCK = 2**12, 2**13
            sys.argv = ["electra_wrap", *argv]
            importlib.import_module("electra_wrap.__main__").main()
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:  # nothing of the parent's is cleaned up here
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 70)

    def _secrets_in(self, raw: bytes) -> list[str]:
        return [name for name, secret in self.secrets.items() if secret.encode() in raw]

    def judge_output(self, place: Path, code: int) -> Iterator[str]:
        output, errors = ((place / name).read_bytes() for name in ("stdout", "stderr"))
        text = errors.decode("utf-8", "replace")
        if code not in (0, 2, 3, 4):
            yield "time" if code == -signal.SIGALRM else f"exit code {code}"
        elif "Traceback" in text or "this is a bug of electra_wrap" in text:
            yield "bug"
        elif code and not re.fullmatch(f"((?!{ERROR}).*\n)*{ERROR}.{{9,2000}}\n", text):
            yield "the last line of stderr is not the only error, or too long"
        for stream, raw in (("stdout", output), ("stderr", errors)):
            decoded = raw.decode("utf-8", "surrogateescape")
            if found := re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\udc80-\udcff]", decoded):
                yield f"control character or invalid UTF-8 on {stream}: {found[0]!r}"
            for name in self._secrets_in(raw):
                if (name, stream) != ("LITERAL", "stdout"):  # `show` shows what a profile says
                    yield f"secret on {stream}: {name}"

    def judge_processes(self, others: set[int]) -> Iterator[str]:
        for _ in range(100):  # a killed process takes a moment to end
            for process in (left := children() - others):
                os.waitpid(process, os.WNOHANG)
            if not left:
                return
            time.sleep(0.02)
        for process in left:  # a lock that is left has a process that holds it
            yield f"process left: {Path(f'/proc/{process}/cmdline').read_bytes()!r}"
            os.kill(process, signal.SIGKILL)

    def judge_files(self, place: Path, before: dict[Path, Any], argv: list[str]) -> Iterator[str]:
        for path in sorted({path for path, _ in before.items() ^ snapshot(place).items()}):
            name = str(path.relative_to(place))
            if not name.startswith(WRITABLE):
                yield f"written elsewhere: {name!r}"
            if path.is_file() and not path.is_symlink():
                found = self._secrets_in(os.fsencode(path) + path.read_bytes())
                for secret in set(found) - {"LITERAL"}:
                    yield f"secret in a file: {secret} in {name!r}"
        command = " ".join(argv)
        for request in (self.directory / "requests").read_text().splitlines():
            for name in self._secrets_in(request.encode()):
                named = f"{{{name}}}" in command or self.secrets[name] in command
                if not named or request.startswith(f"['{HOSTS[1]}"):
                    yield f"secret sent to a server: {name} in {request[:150]}"


def children() -> set[int]:
    """Return the processes whose parent is this one. It adopts those that a command leaves."""
    listed = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return set(map(int, listed.split()))


def snapshot(directory: Path) -> dict[Path, Any]:
    """Return type, size and time of the files under a directory, and the type of directories."""
    found = {}
    for path in directory.rglob("*"):
        status = path.lstat()
        changing = () if stat.S_ISDIR(status.st_mode) else (status.st_size, status.st_mtime_ns)
        found[path] = (stat.S_IFMT(status.st_mode), *changing)
    return found


def describe_failures(outcomes: Sequence[Outcome]) -> list[str]:
    """Describe each distinct failure, with the shortest input that has it, most frequent first."""
    groups = collections.defaultdict(list)
    for outcome in outcomes:
        if outcome.problems:
            words = re.findall("[a-z]{2,14}", outcome.message[-150:])[-10:]
            groups[outcome.problems[0].split(":")[0], *words].append(outcome)
    descriptions, reprlib.aRepr.maxstring = [], 500
    for group in sorted(groups.values(), key=len, reverse=True):
        best = min(group, key=lambda outcome: len(" ".join(outcome.argv)))
        title = f"{len(group)} × {'; '.join(best.problems)} ({best.name}, exit code {best.code})"
        lines = [title, shlex.join(best.argv), best.message]
        descriptions.append("\n    ".join(map(reprlib.repr, lines)))
    return descriptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=1000, help="of each kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--directory", type=Path, help="an empty one, where all files stay")
    arguments = parser.parse_args()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as temporary:
        directory, keep = arguments.directory or Path(temporary), arguments.directory is not None
        with contextlib.closing(Campaign(directory, arguments.seed, "evaluate")) as campaign:
            for kind in arguments.kinds.split(","):
                numbers = range(arguments.first, arguments.first + arguments.inputs)
                new = [campaign.try_input(kind, number, keep=keep) for number in numbers]
                print(f"{kind}: exit codes {collections.Counter(o.code for o in new)}", flush=True)
                outcomes += new
    descriptions = describe_failures(outcomes)
    print(*descriptions, f"{len(descriptions)} distinct failures", sep="\n\n")
    sys.exit(1 if descriptions else 0)


if __name__ == "__main__":
    main()
