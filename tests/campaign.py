"""Interrupt runs and damage their files at random moments, and compare the results.

    python tests/campaign.py [--faults 50] [--engine native] [--seed 0] [--kinds SIGINT,…]

A local web server serves text as .gz. One run goes from that text to converted models undisturbed.
Others meet faults, and are started again with the same command after each, until they are done.
Their corpus, held-out text, vocabulary, examples and profile must then be those of the undisturbed
run, byte for byte. Their models must have tensors of the same shapes, of the same step; with the
native engine, the same tensors bit for bit. No other file may be left. After each fault the command
must have ended with one line and no traceback, and no process and no lock may be left.

Kinds of faults that need the disk need root: the run directory is then on a small tmpfs.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from electra_wrap import files, paths
from electra_wrap.engines import ENGINES
from electra_wrap.run import MANIFEST, Run, read_manifest

#: The faults, and with which exit codes the command may end. None: it was killed.
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
    "damage a file silently": None,
    "remove an output": None,
    "full disk": (3,),
    "read-only disk": (3,),
    "disk taken away": (2, 3, 4),
}
DISK = ("full disk", "read-only disk", "disk taken away")

#: Training steps of each run.
STEPS = 240

#: Most faults of one run.
FAULTS_PER_RUN = 6


class SlowHandler(http.server.SimpleHTTPRequestHandler):
    """Serves ranges of one file, which takes `seconds` in total."""

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


def remaining_processes(directory: Path) -> list[str]:
    """Return the command lines of processes that mention a run directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(directory) in line:
            found.append(line)
    return found


def _holds_lock(process: int) -> bool:
    """Whether a process has opened the lock of a run directory."""
    with contextlib.suppress(OSError):
        descriptors = Path(f"/proc/{process}/fd").iterdir()
        return any(path.readlink().name == ".lock" for path in descriptors)
    return False


@dataclasses.dataclass
class Outcomes:
    """How runs recovered from one kind of fault: by the same command, or after a repair."""

    faults: int = 0
    recovered: int = 0
    repaired: int = 0
    seconds: list[float] = dataclasses.field(default_factory=list)


class Disk:
    """A small file system, which can be filled, made read-only and unmounted."""

    def __init__(self, directory: Path, megabytes: int = 300) -> None:
        self._real, self.path = directory / "real", directory / "mounted"
        self._filler = self._real / "filler"
        for path in (self._real, self.path):
            path.mkdir()
        self._run("mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(self._real))
        self._run("mount", "--bind", str(self._real), str(self.path))

    def _run(self, *argv: str) -> None:
        subprocess.run(argv, check=True)

    def damage(self, kind: str) -> None:
        if kind == "full disk":
            with contextlib.suppress(OSError), self._filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(2**12))
        elif kind == "read-only disk":
            self._run("mount", "-o", "remount,bind,ro", str(self.path))
        else:
            self._run("umount", "--lazy", str(self.path))

    def repair(self, kind: str) -> None:
        if kind == "full disk":
            self._filler.unlink()
        elif kind == "read-only disk":
            self._run("mount", "-o", "remount,bind,rw", str(self.path))
        else:
            written = [path.name for path in self.path.iterdir()]
            assert not written, f"written where the disk was: {written}"
            self._run("mount", "--bind", str(self._real), str(self.path))

    def close(self) -> None:
        for path in (self.path, self._real):
            subprocess.run(["umount", "--lazy", str(path)], check=False)


class Campaign:
    """Runs of one engine and their faults."""

    def __init__(
        self, directory: Path, engine: str, seed: int, port: int, disk: Disk | None
    ) -> None:
        self.engine, self.random, self.disk = engine, random.Random(seed), disk
        self.undisturbed = directory / "undisturbed"
        self.run = (disk.path if disk else directory) / "run"
        self.repeated_steps = 0
        self.kinds: collections.defaultdict[str, Outcomes] = collections.defaultdict(Outcomes)
        self._command = [sys.executable, "-m", "electra_wrap", "run"]
        overrides = [
            f'corpus.source="http://127.0.0.1:{port}/es.txt.gz"',
            "corpus.shards=6",
            "corpus.held_out=0.05",
            "tokenizer.vocab_size=2000",
            "tokenizer.sample_bytes=2000000",
            f'engine="{engine}"',
            "train.device=cpu",
            f"train.steps={STEPS}",
            "train.save_every=40",
            "train.keep=3",
            "train.log_every=1",
            "train.batch_size=8",
            "model.hidden_size=64",
            "model.max_seq_length=32",
        ]
        for override in overrides:
            self._command += ["--set", override]

    def start(self, run: Path, *options: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self._command, "--run-dir", str(run), *options],
            env={**os.environ, "PYTHONPATH": str(paths.PACKAGE.parent)},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run_undisturbed(self) -> float:
        """Run without faults; return the seconds it took."""
        started = time.monotonic()
        child = self.start(self.undisturbed)
        output = child.communicate()[1]
        assert child.returncode == 0, output
        return time.monotonic() - started

    def disturb(self, kind: str, wait: float) -> str | None:
        """Start the run and cause a fault after `wait` seconds; return in which stage.

        None if the run was done before that.
        """
        child = self.start(self.run)
        try:
            child.wait(wait)
            output = child.communicate()[1]
            assert child.returncode == 0, output
            return None
        except subprocess.TimeoutExpired:
            pass
        stages = read_manifest(self.run)["stages"]
        current = (name for name, record in stages.items() if record["outcome"] == "interrupted")
        stage = next(current, "between stages").split()[0]
        started = time.monotonic()
        self._cause(kind, child)
        output = child.communicate(timeout=120)[1]
        took = time.monotonic() - started
        allowed = KINDS[kind] if child.returncode != -signal.SIGKILL else None
        if kind == "full disk":  # while it is full, the same command fails at once
            self._expect_one_line(self.start(self.run), (0, *(allowed or ())))
        if self.disk and kind in DISK:
            self.disk.repair(kind)
        if allowed is not None:
            self._expect_one_line(child, (0, *allowed), output)
        for _ in range(50):  # a killed process takes a moment to end
            if not (remaining := remaining_processes(self.run)):
                break
            time.sleep(0.1)
        assert not remaining, remaining
        if self.run.exists():
            with (self.run / ".lock").open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        outcomes = self.kinds[kind]
        outcomes.faults += 1
        outcomes.seconds.append(took)
        if kind in DISK:
            outcomes.repaired += 1
        else:
            outcomes.recovered += 1
        return f"{stage} (exit {child.returncode})"

    def _expect_one_line(
        self, child: subprocess.Popen[str], allowed: tuple[int, ...], output: str | None = None
    ) -> None:
        output = child.communicate(timeout=120)[1] if output is None else output
        assert child.returncode in allowed and "Traceback" not in output, (
            f"{child.returncode}: {output}"
        )
        assert child.returncode == 0 or output.splitlines()[-1].startswith(
            "electra_wrap: error: "
        ), output

    def _cause(self, kind: str, child: subprocess.Popen[str]) -> None:
        if kind == "kill a child":
            children = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
            with contextlib.suppress(ProcessLookupError):
                os.kill(
                    int(self.random.choice(children)) if children else child.pid, signal.SIGKILL
                )
        elif kind == "kill the command":
            child.kill()
        elif kind.startswith("SIG"):
            name, _, twice = kind.partition(" ")
            child.send_signal(signal.Signals[name])
            if twice:
                time.sleep(self.random.uniform(0, 0.5))
                child.send_signal(signal.Signals[name])
        elif kind in DISK and kind != "read-only disk":
            assert self.disk
            while child.poll() is None and not _holds_lock(child.pid):
                time.sleep(0.05)  # without its disk, a new run would begin
            self.disk.damage(kind)
        else:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            time.sleep(0.3)
            if kind == "read-only disk":  # it cannot be remounted while a process writes
                assert self.disk
                self.disk.damage(kind)
                self._expect_one_line(self.start(self.run), (3,))
            elif kind == "remove an output":
                self._remove_output()
            elif kind != "kill all processes":
                self._damage_file(kind)

    def _damage_file(self, kind: str) -> None:
        # The manifest is only written atomically: nothing can restore a damaged one.
        found = [
            path
            for path in self.run.rglob("*")
            if path.is_file() and path.stat().st_size and path.name != MANIFEST
        ]
        if not found:
            return
        # Choose a place first: some places have many files.
        place = self.random.choice(sorted({path.relative_to(self.run).parts[0] for path in found}))
        path = self.random.choice(
            sorted(path for path in found if path.relative_to(self.run).parts[0] == place)
        )
        print(f"    {path.relative_to(self.run)}", flush=True)
        content, status = bytearray(path.read_bytes()), path.stat()
        if kind == "remove a file":
            path.unlink()
        elif kind == "cut a file":
            path.write_bytes(content[: self.random.randrange(len(content))])
        else:
            content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
            path.write_bytes(content)
            if kind == "damage a file silently":  # as a disk does
                os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    def _remove_output(self) -> None:
        """Remove what a stage left for the next ones."""
        names = ["corpus", "heldout", "vocab.txt", "hf", *ENGINES[self.engine].EXAMPLES]
        outputs = [path for name in names if (path := self.run / name).exists()]
        outputs += (self.run / "models").glob("*")
        if outputs:
            path = self.random.choice(outputs)
            print(f"    {path.relative_to(self.run)}", flush=True)
            files.remove(path)

    def finish(self, *options: str) -> None:
        """Run to the end."""
        child = self.start(self.run, *options)
        output = child.communicate()[1]
        assert child.returncode == 0, output
        assert not remaining_processes(self.run), remaining_processes(self.run)

    def compare(self, damaged: bool) -> int:
        """Compare the run with the undisturbed one; return how many steps it trained twice.

        AssertionError if they differ. With a file `damaged`, archived files may be left.
        """
        expected, actual = Run.open(self.undisturbed), Run.open(self.run)
        names = ["corpus", "heldout", "vocab.txt", "profile.json", *ENGINES[self.engine].EXAMPLES]
        if self.engine == "native":
            names += ["hf/discriminator/model.safetensors", "hf/generator/model.safetensors"]
        for name in names:
            digests = [run.digest(run.directory / name) for run in (expected, actual)]
            assert digests[0] == digests[1], name
        records = [run.manifest["stages"] for run in (expected, actual)]
        assert [record["convert"]["results"]["step"] for record in records] == [STEPS, STEPS]
        assert all(record["outcome"] == "done" for record in records[1].values())
        assert records[0]["corpus"]["results"] == records[1]["corpus"]["results"]
        for network in ("discriminator", "generator"):
            models = [run.exported / network / "model.safetensors" for run in (expected, actual)]
            assert shapes(models[0]) == shapes(models[1])
        expected_names, names = (
            {p.name for p in run.directory.iterdir()} for run in (expected, actual)
        )
        archived = {name for name in names if damaged and ".old-" in name}
        if damaged:  # nothing is made of it; `show --what hparams` prints it
            expected_names, names = (each - {"hparams.json"} for each in (expected_names, names))
        assert expected_names == names - archived, expected_names ^ names
        temporary = re.compile("partial|temp|removed|exported")
        left = [path.name for path in actual.model_dir.iterdir() if temporary.search(path.name)]
        assert not left, left
        log = actual.log_file("train").read_text(encoding="utf-8", errors="replace")
        steps = len(re.findall(r'^\{"event": "step"', log, re.M))
        return max(0, steps - STEPS)  # the log itself may have been damaged


def shapes(path: Path) -> Any:
    """Return names and shapes of the tensors in a safetensors file."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}


@contextlib.contextmanager
def serving(text: bytes, seconds: float) -> Iterator[int]:
    """Serve a text, which takes `seconds`; yield the port."""
    SlowHandler.content, SlowHandler.seconds = gzip.compress(text, 1), seconds
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), SlowHandler)
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
    kinds: tuple[str, ...] = tuple(KINDS),
    seconds: float = 3.0,
) -> Campaign:
    """Disturb runs with `faults` faults of these kinds, in turn.

    The text takes `seconds` to transfer. AssertionError if a result differs.
    """
    disk = Disk(directory) if set(kinds) & set(DISK) else None
    with serving(text, seconds) as port:
        runs = Campaign(directory, engine, seed, port, disk)
        try:
            took = runs.run_undisturbed()
            print(f"undisturbed: {took:.1f} s", flush=True)
            met: list[str] = []
            for number in range(faults):
                kind = kinds[number % len(kinds)]
                if len(met) == FAULTS_PER_RUN:
                    _end(runs, met)
                stage = None
                while stage is None:
                    longest = runs.random.choice((4, took))  # early stages take a few seconds
                    wait = runs.random.uniform(0.2, longest)
                    stage = runs.disturb(kind, wait)
                    if stage is None:
                        _end(runs, met)
                met.append(kind)
                print(f"{number + 1}: {kind} after {wait:.1f} s, in {stage}", flush=True)
            _end(runs, met)
            return runs
        finally:
            if disk:
                disk.close()


def _end(runs: Campaign, met: list[str]) -> None:
    """Verify a finished run, compare it with the undisturbed one, and remove it."""
    runs.finish("--verify")
    repeated = runs.compare(any("file" in kind or "output" in kind for kind in met))
    runs.repeated_steps += repeated
    print(f"done after {len(met)} faults, {repeated} steps repeated; results are equal", flush=True)
    met.clear()
    shutil.rmtree(runs.run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=26)
    parser.add_argument("--megabytes", type=int, default=2)
    parser.add_argument("--engine", choices=list(ENGINES), default="native")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS))
    arguments = parser.parse_args()
    sample = (paths.CONFIGS / "spanish-sample.txt").read_text(encoding="utf-8")
    copies = (
        re.sub(r"\b(\w+)\.", rf"\1 {i}.", sample)
        for i in range(arguments.megabytes * 10**6 // len(sample))
    )
    text = "\n".join(copies).encode()
    kinds = tuple(arguments.kinds.split(","))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        runs = campaign(
            Path(directory), text, arguments.engine, arguments.faults, arguments.seed, kinds
        )
    print(f"{'':20} faults  recovered  after repair  seconds to exit (median)")
    for name, outcomes in runs.kinds.items():
        median = sorted(outcomes.seconds)[len(outcomes.seconds) // 2]
        counts = f"{outcomes.faults:6} {outcomes.recovered:10} {outcomes.repaired:13}"
        print(f"{name:20} {counts} {median:10.2f}")
    faults, recovered, repaired = (
        sum(getattr(outcomes, key) for outcomes in runs.kinds.values())
        for key in ("faults", "recovered", "repaired")
    )
    counts = f"{faults:6} {recovered:10} {repaired:13}"
    print(f"{'all':20} {counts}; {runs.repeated_steps} steps repeated; nothing lost")


if __name__ == "__main__":
    main()
