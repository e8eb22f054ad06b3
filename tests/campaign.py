"""Do to a run what machines and people do to runs, at random moments of all its stages, and let it go on.

    python tests/campaign.py [--faults 50] [--engine native] [--seed 0] [--kinds kill,interrupt,…] [--megabytes 2]

A web server of its own serves text as .gz. One run goes from that to converted models, undisturbed. Others meet faults
and are begun again after each, with the same command, until they are done; then corpus, held-out text, vocabulary,
training data and profile must be those of the undisturbed run, byte for byte, the models' tensors of the same shapes
and of the same step (with the native engine: the same, bit for bit), and nothing else may lie about. After each fault
the command must have ended as README says, in a line and without a traceback, and no process and no lock be left.

The kinds that take the disk away need root: the run directory is then on a small tmpfs, mounted for that.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import fcntl
import gzip
import http.server
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from electra_wrap import paths
from electra_wrap.rundir import RunDir

DATA = {"native": ("examples", "heldout_examples"), "upstream": ("pretrain_tfrecords", "heldout_tfrecords")}

#: What is done, and with which exit codes the command may end then. None: it was killed, and says nothing.
KINDS: dict[str, tuple[int, ...] | None] = {
    "kill the command": None,
    "kill all processes": None,
    "kill a child": (2, 3, 4, 130),
    "SIGINT": (130,),
    "SIGTERM": (130,),
    "SIGHUP": (130,),
    "SIGINT twice": (130,),
    "damage a file": None,
    "cut a file": None,
    "remove a file": None,
    "full disk": (3,),
    "read-only disk": (3,),
    "disk taken away": (2, 3, 4),
}
DISK = ("full disk", "read-only disk", "disk taken away")

#: Steps of each run, and the most faults that it meets.
STEPS, EACH = 240, 3


class Slow(http.server.SimpleHTTPRequestHandler):
    """Serves one file, with ranges, in no less than `seconds`."""

    content = b""
    seconds = 8.0
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        match = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "bytes=0-999999999999")
        assert match
        start, end = int(match[1]), min(len(self.content), int(match[2]) + 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(self.content)}")
        self.send_header("Content-Length", str(end - start))
        self.send_header("ETag", '"one"')
        self.end_headers()
        try:
            for position in range(start, end, 2**16):
                self.wfile.write(self.content[position : min(end, position + 2**16)])
                time.sleep(self.seconds * 2**16 / len(self.content))
        except OSError:  # the client was killed
            self.close_connection = True

    def log_message(self, *arguments: Any) -> None:
        pass


def left_over(directory: Path) -> list[str]:
    """Command lines of processes that have to do with a run directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(directory) in line:
            found.append(line)
    return found


@dataclasses.dataclass
class Kind:
    """What became of one kind of fault."""

    faults: int = 0
    alone: int = 0
    mended: int = 0
    seconds: list[float] = dataclasses.field(default_factory=list)


class Disk:
    """A small file system under a directory, which can be filled, made read-only and taken away."""

    def __init__(self, directory: Path, megabytes: int = 300) -> None:
        self._real, self.path = directory / "real", directory / "mounted"
        self._filler = self._real / "filler"
        for path in (self._real, self.path):
            path.mkdir()
        self._run("mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(self._real))
        self._run("mount", "--bind", str(self._real), str(self.path))

    def _run(self, *argv: str) -> None:
        subprocess.run(argv, check=True)

    def break_it(self, kind: str) -> None:
        if kind == "full disk":
            with contextlib.suppress(OSError), self._filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(2**12))
        elif kind == "read-only disk":
            self._run("mount", "-o", "remount,bind,ro", str(self.path))
        else:
            self._run("umount", "--lazy", str(self.path))

    def mend(self, kind: str) -> None:
        if kind == "full disk":
            self._filler.unlink()
        elif kind == "read-only disk":
            self._run("mount", "-o", "remount,bind,rw", str(self.path))
        else:
            left = [path.name for path in self.path.iterdir()]
            assert not left, f"written where the disk was: {left}"
            self._run("mount", "--bind", str(self._real), str(self.path))

    def close(self) -> None:
        for path in (self.path, self._real):
            subprocess.run(["umount", "--lazy", str(path)], check=False)


class Campaign:
    """Runs of one engine, their faults, and what was seen of them."""

    def __init__(self, directory: Path, engine: str, seed: int, port: int, disk: Disk | None) -> None:
        self.engine, self.draw, self.disk = engine, random.Random(seed), disk
        self.undisturbed, self.run = directory / "undisturbed", (disk.path if disk else directory) / "run"
        self.redone = 0
        self.kinds: collections.defaultdict[str, Kind] = collections.defaultdict(Kind)
        self._command = [sys.executable, "-m", "electra_wrap", "run"]
        for key in (
            f'corpus.source="http://127.0.0.1:{port}/es.txt.gz"',
            *("corpus.shards=6", "corpus.held_out=0.05", "tokenizer.vocab_size=2000", "tokenizer.sample_bytes=2000000"),
            *(f'engine="{engine}"', "train.device=cpu", f"train.steps={STEPS}", "train.save_every=40", "train.keep=3"),
            *("train.log_every=1", "train.batch_size=8", "model.hidden_size=64", "model.max_seq_length=32"),
        ):
            self._command += ["--set", key]

    def start(self, run: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self._command, "--run-dir", str(run)],
            env={**os.environ, "PYTHONPATH": str(paths.PACKAGE.parent)},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def whole(self) -> float:
        """Run undisturbed; return the seconds it took."""
        began = time.monotonic()
        child = self.start(self.undisturbed)
        said = child.communicate()[1]
        assert child.returncode == 0, said
        return time.monotonic() - began

    def meet(self, kind: str, wait: float) -> str | None:
        """Start the run, and after a while do this to it; return in which stage. None if it was done before."""
        child = self.start(self.run)
        try:
            child.wait(wait)
            said = child.communicate()[1]
            assert child.returncode == 0, said
            return None
        except subprocess.TimeoutExpired:
            pass
        stages = RunDir(self.run).manifest["stages"] if self.run.exists() else {}
        stage = next((name for name, entry in stages.items() if entry["outcome"] == "interrupted"), "between stages")
        stage = stage.split()[0]
        began = time.monotonic()
        self._do(kind, child)
        said = child.communicate(timeout=120)[1]
        took = time.monotonic() - began
        allowed = KINDS[kind] if child.returncode != -signal.SIGKILL else None
        if kind == "full disk":  # begun again while it is full, it says so at once
            self._says_so(self.start(self.run), (0, *(allowed or ())))
        if self.disk and kind in DISK:
            self.disk.mend(kind)
        if allowed is not None:
            self._says_so(child, (0, *allowed), said)
        for _ in range(50):  # a process that was killed takes a moment to go
            if not (left := left_over(self.run)):
                break
            time.sleep(0.1)
        assert not left, left
        if self.run.exists():
            with (self.run / ".lock").open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        one = self.kinds[kind]
        one.faults += 1
        one.seconds.append(took)
        if kind in DISK:
            one.mended += 1
        else:
            one.alone += 1
        return f"{stage} (exit {child.returncode})"

    def _says_so(self, child: subprocess.Popen[str], allowed: tuple[int, ...], said: str | None = None) -> None:
        said = child.communicate(timeout=120)[1] if said is None else said
        assert child.returncode in allowed and "Traceback" not in said, f"{child.returncode}: {said}"
        assert child.returncode == 0 or said.splitlines()[-1].startswith("electra_wrap: error: "), said

    def _do(self, kind: str, child: subprocess.Popen[str]) -> None:
        if kind == "kill a child":
            children = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(self.draw.choice(children)) if children else child.pid, signal.SIGKILL)
        elif kind == "kill the command":
            child.kill()
        elif kind.startswith("SIG"):
            name, _, twice = kind.partition(" ")
            child.send_signal(signal.Signals[name])
            if twice:
                time.sleep(self.draw.uniform(0, 0.5))
                child.send_signal(signal.Signals[name])
        elif kind in DISK and kind != "read-only disk":
            assert self.disk
            self.disk.break_it(kind)
        else:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            time.sleep(0.3)
            if kind == "read-only disk":  # it cannot be made so while somebody writes
                assert self.disk
                self.disk.break_it(kind)
                self._says_so(self.start(self.run), (3,))
            elif kind != "kill all processes":
                self._harm(kind)

    def _harm(self, kind: str) -> None:
        files = [path for path in self.run.rglob("*") if path.is_file() and path.stat().st_size]
        if not files:
            return
        # Not by files, of which there are many of some kinds, but by where they are.
        places = sorted({path.relative_to(self.run).parts[0] for path in files})
        place = self.draw.choice(places)
        path = self.draw.choice(sorted(path for path in files if path.relative_to(self.run).parts[0] == place))
        print(f"    {path.relative_to(self.run)}", flush=True)
        content = bytearray(path.read_bytes())
        if kind == "remove a file":
            path.unlink()
        elif kind == "cut a file":
            path.write_bytes(content[: self.draw.randrange(len(content))])
        else:
            content[self.draw.randrange(len(content))] ^= 1 << self.draw.randrange(8)
            path.write_bytes(content)

    def finish(self) -> None:
        """Let the run go to its end."""
        child = self.start(self.run)
        said = child.communicate()[1]
        assert child.returncode == 0, said
        assert not left_over(self.run), left_over(self.run)

    def compare(self, harmed: bool) -> int:
        """AssertionError unless the run has what the undisturbed one has; return how many steps were done twice."""
        one, other = RunDir(self.undisturbed), RunDir(self.run)
        same = ["corpus", "heldout", "vocab.txt", "profile.json", *DATA[self.engine]]
        if self.engine == "native":
            same += [f"hf/{network}/model.safetensors" for network in ("discriminator", "generator")]
        for name in same:
            assert one.digest(one / name) == other.digest(other / name), name
        entries = [run.manifest["stages"] for run in (one, other)]
        assert [entry["convert"]["facts"]["step"] for entry in entries] == [STEPS, STEPS]
        assert all(entry["outcome"] == "done" for entry in entries[1].values())
        assert entries[0]["corpus"]["facts"] == entries[1]["corpus"]["facts"]
        for network in ("discriminator", "generator"):
            headers = [header(run / "hf" / network / "model.safetensors") for run in (one, other)]
            assert headers[0] == headers[1]
        names, others = ({path.name for path in run.path.iterdir()} for run in (one, other))
        aside = {name for name in others if harmed and ".old-" in name}
        assert names == others - aside, names ^ others
        model = next((other / "models").iterdir())
        odd = [p.name for p in model.iterdir() if re.search(r"partial|temp|removed|exported", p.name)]
        assert not odd, odd
        log = (other / "logs" / "train.log").read_text(encoding="utf-8", errors="replace")
        steps = len(re.findall(r'^(?:\{"step": (?=\d)|\d+/\d+ = )', log, re.M))
        return max(0, steps - STEPS)  # the log may be what was cut


def header(path: Path) -> Any:
    """Names and shapes of the tensors in a safetensors file."""
    with path.open("rb") as file:
        found = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: one["shape"] for name, one in found.items() if name != "__metadata__"}


@contextlib.contextmanager
def serving(text: bytes, seconds: float) -> Iterator[int]:
    """Serve a text so slowly; yield the port."""
    Slow.content, Slow.seconds = gzip.compress(text, 1), seconds
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def campaign(
    directory: Path,
    text: bytes,
    engine: str,
    faults: int,
    seed: int,
    say: Callable[[str], None],
    kinds: tuple[str, ...] = tuple(KINDS),
    seconds: float = 3.0,
) -> Campaign:
    """Let runs meet so many faults of these kinds, in turn. AssertionError if that shows in a result."""
    disk = Disk(directory) if set(kinds) & set(DISK) else None
    with serving(text, seconds) as port:
        one = Campaign(directory, engine, seed, port, disk)
        try:
            took = one.whole()
            say(f"undisturbed: {took:.1f} s")
            met: list[str] = []
            for number in range(faults):
                kind = kinds[number % len(kinds)]
                if len(met) == EACH:
                    one.finish()
                    _end(one, met, say)
                # Early stages take a few seconds only.
                while (stage := one.meet(kind, wait := one.draw.uniform(0.2, one.draw.choice((4, took))))) is None:
                    _end(one, met, say)
                met.append(kind)
                say(f"{number + 1}: {kind} after {wait:.1f} s, in {stage}")
            one.finish()
            _end(one, met, say)
            return one
        finally:
            if disk:
                disk.close()


def _end(one: Campaign, met: list[str], say: Callable[[str], None]) -> None:
    """Compare a run that is done, and remove it."""
    redone = one.compare(any("file" in kind for kind in met))
    one.redone += redone
    say(f"done after {len(met)} faults, {redone} steps done twice; all is that of the undisturbed run")
    met.clear()
    shutil.rmtree(one.run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=26)
    parser.add_argument("--megabytes", type=int, default=2)
    parser.add_argument("--engine", choices=list(DATA), default="native")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS))
    arguments = parser.parse_args()
    sample = (paths.CONFIGS / "spanish-sample.txt").read_text(encoding="utf-8")
    copies = (re.sub(r"\b(\w+)\.", rf"\1 {i}.", sample) for i in range(arguments.megabytes * 10**6 // len(sample)))
    text = "\n".join(copies).encode()
    kinds = tuple(arguments.kinds.split(","))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:

        def say(line: str) -> None:
            print(line, flush=True)

        found = campaign(Path(directory), text, arguments.engine, arguments.faults, arguments.seed, say, kinds)
    print(f"{'':20} faults  recovered alone  after a mend  seconds until it ended (median)")
    for name, one in found.kinds.items():
        median = sorted(one.seconds)[len(one.seconds) // 2]
        print(f"{name:20} {one.faults:6} {one.alone:16} {one.mended:13} {median:10.2f}")
    total = [sum(getattr(one, key) for one in found.kinds.values()) for key in ("faults", "alone", "mended")]
    print(f"{'all':20} {total[0]:6} {total[1]:16} {total[2]:13}; {found.redone} steps done twice; nothing lost")


if __name__ == "__main__":
    main()
