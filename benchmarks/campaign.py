"""Disturb runs and damage their files at random moments, and compare the results.

    python benchmarks/campaign.py [--engine ENGINE] [--faults N | --kills N] [--seed N] [--out DIR]

One run goes from text to converted models undisturbed. Others meet faults of all kinds in turn, at
random moments. With --kills, all processes are killed N times, at random steps of one training.
After each fault the command must have ended with one line and no traceback, and no process and no
lock may be left; then the same command continues. In the end, text, vocabulary, examples and
profile must be those of the undisturbed run, byte for byte, and no other file may be left. With the
native engine, so must the weights, Adam's slots and the exported models. Upstream's scripts resume
with a new shuffle of the examples; so their models must have the same tensors with the same shapes.
Faults of the disk need root: the run directory is then on a small tmpfs.
"""

import argparse
import collections
import contextlib
import fcntl
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from electra_wrap import checkpoints, files, paths, signals, subprocesses
from electra_wrap.architecture import NETWORKS
from electra_wrap.engines import ENGINES
from electra_wrap.run import EXAMPLES

#: The faults, and with which exit codes the command may end beside 0; -9: killed by SIGKILL.
KINDS = {
    **dict.fromkeys(("kill the command", "kill all processes"), (-9,)),
    "kill a child": (-9, 2, 3, 4, 130),
    **dict.fromkeys(("SIGINT", "SIGTERM", "SIGHUP", "SIGINT twice"), (130,)),
    **dict.fromkeys(("damage a checkpoint", "remove an output"), (-9,)),
    **{"full disk": (3,), "disk taken away": (2, 3, 4)},
}
DISK = ("full disk", "disk taken away")

#: Training steps of a run, steps between its checkpoints, and most faults of one run.
STEPS, SAVE_EVERY, FAULTS_PER_RUN = 240, 20, 6

MODEL = "models/electra-tiny-spanish"
MARK = "ELECTRA_WRAP_CAMPAIGN"  # a variable of the environment of a run's processes


class Disk:
    """A small file system, which can be filled and taken away."""

    def __init__(self, directory: Path) -> None:
        self._real, self.path = directory / "real", directory / "mounted"
        self._real.mkdir()
        self.path.mkdir()
        do("mount", "-t", "tmpfs", "-o", "size=300m", "none", self._real)
        do("mount", "--bind", self._real, self.path)

    def damage(self, kind: str) -> None:
        if kind == "disk taken away":
            do("umount", "--lazy", self.path)
            return
        with contextlib.suppress(OSError), (self._real / "filler").open("wb", 0) as file:
            while True:
                file.write(bytes(2**12))

    def repair(self, kind: str) -> None:
        if kind == "disk taken away":
            assert not (written := list(self.path.iterdir())), f"where the disk was: {written}"
            do("mount", "--bind", self._real, self.path)
        (self._real / "filler").unlink(missing_ok=True)

    def close(self) -> None:
        do("umount", "--lazy", self.path, self._real)


def do(*argv: str | Path) -> None:
    subprocess.run(argv, check=True)


def prepare_child() -> None:
    """Have a child end with the campaign, and obey signals.

    nohup has a campaign ignore SIGHUP, and a shell has it ignore SIGINT in the background.
    """
    subprocesses.die_with_parent()
    for number in signals.NUMBERS:
        signal.signal(number, signal.SIG_DFL)


def content(path: Path) -> dict[str, str]:
    """Return the SHA-256 of a file, or of each file in a directory."""
    return {p.name: files.sha256(p) for p in [path, *path.rglob("*")] if p.is_file()}


def read(path: Path) -> str:
    return path.read_text("utf-8", "replace") if path.exists() else ""


class Campaign:
    """Runs of one engine in a directory, and their faults."""

    def __init__(self, directory: Path, engine: str, seed: int, disk: Disk | None) -> None:
        self.engine, self.random, self.disk = engine, random.Random(seed), disk
        self.undisturbed = directory / "undisturbed"
        self.run = (disk.path if disk else directory) / "run"
        #: The steps that were trained twice; for each kind, the seconds until the command ended.
        self.repeated, self.seconds = 0, collections.defaultdict[str, list[float]](list)
        text = directory / "text.txt.gz"
        sample = (paths.CONFIGS / "spanish-sample.txt").read_text(encoding="utf-8")
        copies = (re.sub(r"\b(\w+)\.", rf"\1 {i}.", sample) for i in range(10**6 // len(sample)))
        text.write_bytes(gzip.compress("\n".join(copies).encode(), 1))
        settings = f"""engine={engine} corpus.shards=6 corpus.held_out=0.05 train.device=cpu
            tokenizer.vocab_size=2000 model.hidden_size=64 model.max_seq_length=32 train.log_every=1
            train.steps={STEPS} train.save_every={SAVE_EVERY} train.keep=3 train.batch_size=8"""
        self._command = [sys.executable, "-m", "electra_wrap", "run", "--profile=spanish-tiny"]
        self._command += [f"--set={setting}" for setting in settings.split()]
        self._command += [f"--set=corpus.source={json.dumps(str(text))}"]
        started = time.monotonic()
        self.finish(self.undisturbed)
        print(f"{engine}: undisturbed in {time.monotonic() - started:.1f} s", flush=True)

    def start(self, run: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self._command, f"--run-dir={run}"],
            env={**os.environ, MARK: str(run)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=prepare_child,  # noqa: PLW1509
        )

    def finish(self, run: Path) -> None:
        output = (child := self.start(run)).communicate()[1]
        assert child.returncode == 0, output

    def processes(self) -> list[int]:
        """Return the command of the disturbed run and the processes that it started."""
        found, mark = [], f"{MARK}={self.run}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    found.append(int(process.name))
        return found

    def records(self, run: Path) -> dict[str, Any]:
        """Return the manifest's records of the stages that were begun, by name."""
        stages = json.loads(read(run / "manifest.json") or '{"stages": {}}')["stages"]
        return {key.split()[0]: record for key, record in stages.items()}

    def logged_steps(self) -> list[int]:
        """Return the steps of all attempts to train."""
        log = read(self.run / "logs" / "train.log")
        return [int(step) for step in re.findall(r'^{"event": "step", "step": (\d+)', log, re.M)]

    def choose(self, kind: str, kills: int) -> tuple[int, float]:
        """Return a step of the training, or 0 and the seconds to a random moment.

        Of several `kills`, the next one leaves steps for the others.
        """
        last = max(checkpoints.steps(self.run / MODEL), default=0)
        # A command whose disk is gone before it starts to work would begin a new run.
        if kills or kind == "disk taken away" or self.random.random() < 0.5:
            most = last + 1 + 2 * (STEPS - last) // max(2, kills)
            return self.random.randint(min(last + 1, STEPS - 1), min(most, STEPS - 1)), 0
        done = [name for name, record in self.records(self.run).items() if record["done"]]
        stages = self.records(self.undisturbed).items()
        left = sum(record["seconds"] for name, record in stages if name not in done)
        return 0, self.random.uniform(0, 2 + left)

    def wait(self, child: subprocess.Popen[str], step: int, seconds: float) -> str:
        """Wait for a step, or some seconds. Return what the run then does; "" if it ended."""
        before, started = len(self.logged_steps()), time.monotonic()
        while child.poll() is None:
            time.sleep(0.01)
            if step and max(self.logged_steps()[before:], default=0) >= step:
                return f"train, step {step}"
            if not step and time.monotonic() - started > seconds:
                undone = (name for name, rec in self.records(self.run).items() if not rec["done"])
                return next(undone, "between stages")
        assert child.returncode == 0, child.communicate()[1]
        return ""

    def disturb(self, kind: str, kills: int) -> str:
        """Start the run and cause a fault. Return what happened, or "" if it ended before."""
        chosen = self.choose(kind, kills)
        child = self.start(self.run)
        if not (place := self.wait(child, *chosen)):
            return ""
        started = time.monotonic()
        note = self.cause(kind, child)
        ended = [(child.communicate(timeout=120)[1], child.returncode)]
        self.seconds[kind].append(time.monotonic() - started)
        if self.disk and kind in DISK:
            if kind == "full disk":  # meanwhile, the same command fails
                again = self.start(self.run)
                ended.append((again.communicate(timeout=120)[1], again.returncode))
            self.disk.repair(kind)
        for output, code in ended:
            problem = f"{kind}: exit code {code}: {output}"
            assert code in (0, *KINDS[kind]) and "Traceback" not in output, problem
            last = output.strip().rpartition("\n")[2]
            assert code <= 0 or last.startswith("electra_wrap: error: "), problem
        while remaining := self.processes():  # a killed process takes a moment to end
            assert time.monotonic() < started + 120, f"processes are left: {remaining}"
        if (self.run / ".lock").exists():
            with (self.run / ".lock").open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return f"{kind} in {place}{note}: exit code {child.returncode}"

    def cause(self, kind: str, child: subprocess.Popen[str]) -> str:
        """Cause a fault. Return the file that it concerns, if any."""
        if kind.startswith("SIG"):
            name, _, twice = kind.partition(" ")
            for _ in range(1 + bool(twice)):
                child.send_signal(signal.Signals[name])
                time.sleep(self.random.uniform(0, 0.5))
        elif self.disk and kind in DISK:
            self.disk.damage(kind)
        else:
            killed = [child.pid] if kind == "kill the command" else self.processes()
            if kind == "kill a child":
                killed = [self.random.choice([n for n in killed if n != child.pid] or killed)]
            for process in killed:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            if not kind.startswith("kill"):
                time.sleep(0.3)  # until they are gone
                return self.damage_files(kind)
        return ""

    def damage_files(self, kind: str) -> str:
        """Remove an output, or remove, cut or change a file of the latest checkpoint."""
        names = ["corpus", "heldout", "vocab.txt", "hf", MODEL, *EXAMPLES[self.engine]]
        found, how = [self.run / name for name in names], "remove"
        if kind == "damage a checkpoint":
            last = max(checkpoints.steps(self.run / MODEL), default=0)
            every = sorted(path for path in (self.run / MODEL).rglob("*") if path.is_file())
            found = [path for path in every if re.search(rf"-{last}[./]", str(path)[-60:])]
            how = self.random.choice(["remove", "cut", "change"])
        if not (found := [path for path in found if path.exists()]):
            return " (nothing is there yet)"
        path = self.random.choice(found)
        if how == "remove":
            files.remove(path)
        else:
            written = bytearray(path.read_bytes())
            place = self.random.randrange(len(written))
            written[place] ^= 1 << self.random.randrange(8)
            path.write_bytes(written[:place] if how == "cut" else written)
        return f" ({how} {path.relative_to(self.run)})"

    def end(self, met: list[str]) -> None:
        """Finish the run, compare it with the undisturbed one, and remove it."""
        self.finish(self.run)
        runs = one, other = self.undisturbed, self.run
        names = ["corpus", "heldout", "vocab.txt", "profile.json", *EXAMPLES[self.engine]]
        models = [f"hf/{network}/model.safetensors" for network in NETWORKS]
        names += [*models, f"{MODEL}/step-{STEPS}"] if self.engine == "native" else []
        for name in names:
            assert content(one / name) == content(other / name), f"{name} is another one"
        shapes = [[t.shape for m in models for t in load_file(run / m).values()] for run in runs]
        assert shapes[0] == shapes[1], "the models have other tensors"
        assert all(record["done"] for record in self.records(other).values()), "a stage is not done"
        lost = "remove an output" in met
        expected, found = ({path.name for path in run.iterdir()} for run in runs)
        # What was complete, but not yet in the manifest, is renamed, never removed.
        unlike = {name for name in found ^ expected if ".old-" not in name}
        assert unlike <= {"report.html"}, unlike  # it is written when all stages are done
        left = [p.name for p in (other / MODEL).iterdir() if re.search("partial|te?mp", p.name)]
        assert not left, left
        repeated = len(steps := self.logged_steps()) - len(set(steps))
        assert lost or repeated <= 3 * SAVE_EVERY * len(met), f"{repeated} steps were repeated"
        self.repeated += repeated
        print(f"{len(met)} faults, {repeated} steps repeated: the same result", flush=True)
        met.clear()
        shutil.rmtree(other)

    def disturb_all(self, kinds: Sequence[str], faults: int, *, kills: bool) -> None:
        """Cause faults of these kinds in turn. `kills` are all in one training."""
        met: list[str] = []
        for number in range(faults):
            if len(met) == FAULTS_PER_RUN and not kills:
                self.end(met)
            kind = kinds[number % len(kinds)]
            while not (event := self.disturb(kind, kills and faults - number)):
                self.end(met)
            met.append(kind)
            print(f"{number + 1}: {event}", flush=True)
        self.end(met)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=list(ENGINES), help="default: both")
    parser.add_argument("--faults", type=int, default=22, metavar="N", help="default: 22")
    parser.add_argument("--kills", type=int, metavar="N", help="instead of --faults")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    usual = [kind for kind in KINDS if os.geteuid() == 0 or kind not in DISK]
    parser.add_argument("--kinds", default=",".join(usual), help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a new one, where all files stay")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that disks are unmounted
    kinds = ["kill all processes"] if arguments.kills else arguments.kinds.split(",")
    rows = ["engine     fault                 times  most seconds to exit"]
    with contextlib.ExitStack() as stack:
        out = arguments.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for engine in [arguments.engine] if arguments.engine else ENGINES:
            (directory := out.resolve() / engine).mkdir(parents=True)
            if disk := Disk(directory) if set(kinds) & set(DISK) else None:
                stack.callback(disk.close)
            runs = Campaign(directory, engine, arguments.seed, disk)
            faults = arguments.kills or arguments.faults
            runs.disturb_all(kinds, faults, kills=faults == arguments.kills)
            for kind, seconds in runs.seconds.items():
                rows.append(f"{engine:10} {kind:20} {len(seconds):6} {max(seconds):10.2f}")
            rows.append(f"{engine:10} {'all':20} {faults:6}; {runs.repeated} steps repeated")
    print(*rows, sep="\n")


if __name__ == "__main__":
    main()
