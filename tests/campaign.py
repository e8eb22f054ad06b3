"""Kill a run at random moments of its data stages, let it go on, and compare with an undisturbed run.

    python tests/campaign.py [--kills 10] [--megabytes 20] [--engine native] [--seed 0]

A web server of its own serves text as .gz. One run downloads and shards it, trains a vocabulary and builds the
training data, undisturbed. The other is killed (SIGKILL, of the command alone or of all its processes) at random
moments and begun again, until it was killed often enough; then it is left alone. Corpus, held-out text, vocabulary and
training data must be the same, byte for byte, and no process may be left over. Prints a line for each kill.
"""

from __future__ import annotations

import argparse
import gzip
import http.server
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from electra_wrap import paths
from electra_wrap.rundir import RunDir

DATA = {"native": ("examples", "heldout_examples"), "upstream": ("pretrain_tfrecords", "heldout_tfrecords")}


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


def campaign(
    directory: Path, text: bytes, engine: str, kills: int, seed: int, say: Callable[[str], None], seconds: float = 8.0
) -> None:
    """Kill a run so often, whose text takes so many seconds to arrive. AssertionError if that shows in the result."""
    draw, Slow.seconds = random.Random(seed), seconds
    Slow.content = gzip.compress(text, 1)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    last = DATA[engine][0] if engine == "native" else "tfrecords"
    command = [sys.executable, "-m", "electra_wrap", "run", "--until", last]
    for key in (
        f'corpus.source="http://127.0.0.1:{server.server_port}/es.txt.gz"',
        *("corpus.shards=6", "corpus.held_out=0.05", "tokenizer.vocab_size=3000", "tokenizer.sample_bytes=2000000"),
        f'engine="{engine}"',
    ):
        command += ["--set", key]
    environment = {**os.environ, "PYTHONPATH": str(paths.PACKAGE.parent)}

    def start(name: str) -> subprocess.Popen[bytes]:
        line = [*command, "--run-dir", str(directory / name)]
        return subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, start_new_session=True)

    began = time.monotonic()
    whole = start("undisturbed")
    said = whole.communicate()[1].decode()
    assert whole.returncode == 0, said
    took = time.monotonic() - began
    say(f"undisturbed: {took:.1f} s")
    killed = 0
    while killed < kills:
        child, wait = start("killed"), draw.uniform(0.2, 0.9 * took)
        try:
            child.wait(wait)
        except subprocess.TimeoutExpired:
            alone = draw.random() < 0.5
            (os.kill if alone else os.killpg)(child.pid, signal.SIGKILL)
            child.wait()
            time.sleep(draw.uniform(0, 0.3))  # what is left over would disturb the next one
            stages = RunDir(directory / "killed").manifest["stages"] if (directory / "killed").exists() else {}
            inside = ", ".join(name for name, entry in stages.items() if entry["outcome"] != "done") or "between stages"
            killed += 1
            say(f"kill {killed}: after {wait:.1f} s, {'the command' if alone else 'all processes'}, in {inside}")
        else:
            assert child.returncode == 0, child.communicate()[1].decode()
            say(f"done after {killed} kills; begun anew")
            compare(directory, engine)
            (directory / "killed").rename(directory / f"killed-{killed}")
        finally:
            if child.stderr:
                child.stderr.close()
    end = start("killed")
    said = end.communicate()[1].decode()
    assert end.returncode == 0, said
    assert not left_over(directory), left_over(directory)
    compare(directory, engine)
    server.shutdown()
    server.server_close()


def compare(directory: Path, engine: str) -> None:
    """AssertionError unless the run that was killed has what the undisturbed one has, and nothing else."""
    one, other = (RunDir(directory / name) for name in ("undisturbed", "killed"))
    for name in ("corpus", "heldout", "vocab.txt", *DATA[engine]):
        assert one.digest(one / name) == other.digest(other / name), name
    facts = [json.loads((run / "manifest.json").read_text(encoding="utf-8"))["stages"] for run in (one, other)]
    assert facts[0]["corpus"]["facts"] == facts[1]["corpus"]["facts"]
    names, others = ({path.name for path in run.path.iterdir()} for run in (one, other))
    assert names == others, names ^ others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--megabytes", type=int, default=20)
    parser.add_argument("--engine", choices=list(DATA), default="native")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sample = (paths.CONFIGS / "spanish-sample.txt").read_text(encoding="utf-8")
    copies = (re.sub(r"\b(\w+)\.", rf"\1 {i}.", sample) for i in range(arguments.megabytes * 10**6 // len(sample)))
    text = "\n".join(copies).encode()
    with tempfile.TemporaryDirectory() as directory:
        campaign(Path(directory), text, arguments.engine, arguments.kills, arguments.seed, print)
    print(f"{arguments.kills} kills; every result is that of the undisturbed run, byte for byte")


if __name__ == "__main__":
    main()
