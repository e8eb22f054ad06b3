"""google-research/electra: pinned, verified, patched.

vendor/electra.lock names a commit, its tree and the tree after patches/. Nothing of upstream is in our
repository; `ensure` brings it once and, before every execution, hashes what is there as git would.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import re
import shutil
import stat
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path

from electra_wrap import paths, process
from electra_wrap.errors import EnvironmentLacks
from electra_wrap.rundir import exclusive

#: Seconds until a remote that does not answer counts as unreachable, and for a whole fetch.
ANSWER_TIMEOUT, FETCH_TIMEOUT = 8, 600

#: git, whatever the user's configuration: no hooks, no prompts, no line-end conversion, no exotic transports.
_GIT_OPTIONS = ("-c", "core.hooksPath=/dev/null", "-c", "core.autocrlf=false", "-c", "core.symlinks=false")
_GIT_ENVIRONMENT = {
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_ASKPASS": "true",
    "GIT_ALLOW_PROTOCOL": "file:git:http:https:ssh",
    "GIT_SSH_COMMAND": "ssh -oBatchMode=yes",
}


@dataclasses.dataclass(frozen=True)
class Pin:
    """vendor/electra.lock. `tree` is the commit's, `patched_tree` the one after all patches."""

    url: str
    commit: str
    tree: str
    patched_tree: str
    licence: str

    @classmethod
    def read(cls) -> Pin:
        return cls(**tomllib.loads(paths.LOCK_FILE.read_text(encoding="utf-8")))

    @property
    def directory(self) -> Path:
        """Where the checkout of this pin with these patches is, or would be."""
        return paths.vendor_directory() / f"electra-{self.patched_tree[:12]}"


def ensure(upstream: str | None = None) -> Path:
    """Return the verified, patched checkout; fetch it from `upstream` (default: the pin's URL) if there is none.

    `upstream` is a URL, a local clone, a bare mirror or a bundle. EnvironmentLacks if it cannot be reached, does
    not have the pinned commit, or if the checkout is not what the lock says.
    """
    pin = Pin.read()
    pin.directory.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(pin.directory.parent / ".lock", wait=True):
        if not pin.directory.exists():
            _fetch(pin, upstream or pin.url)
        verify(pin.directory, pin.patched_tree)
    return pin.directory


def look(upstream: str | None = None) -> str:
    """Return where upstream is: here and verified, or within reach. EnvironmentLacks if it is neither."""
    pin = Pin.read()
    if pin.directory.exists():
        verify(pin.directory, pin.patched_tree)
        return f"verified, in {pin.directory}"
    source = _source(upstream or pin.url)
    _reach(_git(Path("/"), {}), source)
    return f"within reach at {source}"


def verify(directory: Path, tree: str) -> None:
    """EnvironmentLacks unless `directory` holds exactly git's `tree`: each name, mode and byte."""
    found = hash_tree(directory)
    if found != tree:
        raise EnvironmentLacks(
            f"{directory} was changed: its tree is {found[:12]}, pinned is {tree[:12]}; move it away and run again"
        )


def hash_tree(directory: Path) -> str:
    """Return the id of the git tree object of a directory, ignored and untracked files included.

    A tree is the sorted list of (mode, name, id); ids are SHA-1 over `type length\\0content`
    (git's Documentation: "Git Internals - Git Objects").
    """
    entries = []
    for path in directory.iterdir():
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            entries.append((path.name + "/", b"40000", hash_tree(path)))
        elif stat.S_ISLNK(mode):
            entries.append((path.name, b"120000", _object_id(b"blob", os.fsencode(path.readlink()))))
        elif not stat.S_ISREG(mode):
            raise EnvironmentLacks(f"{path} is no file; move the checkout away and run again")
        else:
            executable = mode & stat.S_IXUSR
            entries.append((path.name, b"100755" if executable else b"100644", _object_id(b"blob", path.read_bytes())))
    lines = (
        mode + b" " + os.fsencode(name.rstrip("/")) + b"\0" + bytes.fromhex(object_id)
        for name, mode, object_id in sorted(entries, key=lambda entry: os.fsencode(entry[0]))
    )
    return _object_id(b"tree", b"".join(lines))


def _object_id(kind: bytes, content: bytes) -> str:
    return hashlib.sha1(kind + b" %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _source(source: str) -> str:
    """What git is given for a URL or a path."""
    local = Path(source).expanduser()
    return str(local.resolve()) if local.exists() else source


def _git(directory: Path, places: dict[str, Path]) -> Callable[..., str]:
    """Return what runs git in a directory with these GIT_… variables."""
    try:
        import git  # its import runs git
    except ImportError:
        raise EnvironmentLacks("git is not installed; install it, for example apt-get install git") from None
    repository = git.Git(directory)
    end_with_us = functools.partial(process.die_with_parent, os.getpid())
    repository.update_environment(**_GIT_ENVIRONMENT, **{k: str(v) for k, v in places.items()})

    def run(*arguments: str, timeout: float = FETCH_TIMEOUT) -> str:
        try:
            argv = ["git", *_GIT_OPTIONS, *arguments]
            return str(repository.execute(argv, kill_after_timeout=timeout, preexec_fn=end_with_us))
        except git.GitCommandError as error:
            said = re.search(r"\b(?:fatal|error): (.+)", str(error.stderr or error))
            raise _Failed(said[1].strip(" '") if said else "no answer") from None

    return run


class _Failed(EnvironmentLacks):
    """git failed; its own last word on it. Where nothing better is known, that is what a user is told."""


def _reach(run: Callable[..., str], source: str) -> None:
    try:
        run("ls-remote", "--", source, timeout=ANSWER_TIMEOUT)
    except _Failed as error:
        raise EnvironmentLacks(
            f"google-research/electra cannot be reached at {source} ({error}); "
            "with a local clone, mirror or bundle of it: --upstream PATH"
        ) from None


def _fetch(pin: Pin, source: str) -> None:
    """Fetch, verify, patch and verify in a temporary directory, then move it into place."""
    source = _source(source)
    for left in pin.directory.parent.glob(".fetch-*"):  # by somebody who was killed
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=pin.directory.parent, prefix=".fetch-") as temporary:
        work = Path(temporary) / "electra"
        work.mkdir()
        # Named, so that a GIT_DIR of the caller's (in a git hook, say) does not lead elsewhere.
        places = {"GIT_DIR": work / ".git", "GIT_WORK_TREE": work, "GIT_INDEX_FILE": work / ".git" / "index"}
        run = _git(work, places)
        run("init", "--quiet", "--template=")
        _reach(run, source)
        try:
            run("fetch", "--quiet", "--depth=1", "--no-tags", "--", source, pin.commit)
        except _Failed:
            # A bundle has no shallow history, and some servers give no commit by its id: take what they have.
            with contextlib.suppress(_Failed):
                run("fetch", "--quiet", "--no-tags", "--", source, "+refs/*:refs/upstream/*")
        try:
            run("checkout", "--quiet", "--detach", pin.commit)
            tree = run("rev-parse", "HEAD^{tree}")
        except _Failed as error:
            raise EnvironmentLacks(
                f"{source} does not give commit {pin.commit[:12]} ({error}); use a complete copy of {pin.url}"
            ) from None
        if tree != pin.tree:
            raise EnvironmentLacks(
                f"{source}: commit {pin.commit[:12]} has tree {tree[:12]}, pinned is {pin.tree[:12]}; use another copy"
            )
        for patch in sorted(paths.PATCHES.glob("*.patch")):
            try:
                run("apply", "--unidiff-zero", "--whitespace=nowarn", str(patch))
            except _Failed as error:
                raise EnvironmentLacks(f"{patch.name} does not apply ({error}); restore patches/") from None
        shutil.rmtree(work / ".git")
        patched = hash_tree(work)
        if patched != pin.patched_tree:
            raise EnvironmentLacks(
                f"the patches give tree {patched[:12]}, {paths.LOCK_FILE.name} says {pin.patched_tree[:12]}; "
                "restore patches/ and vendor/"
            )
        work.rename(pin.directory)
