"""google-research/electra: pinned, verified and patched.

vendor/electra.lock names a commit, its tree, and the tree after patches/. This repository has no
code of upstream. `ensure` fetches it once, and before every execution hashes it as git does.
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

from electra_wrap import paths, subprocesses
from electra_wrap.errors import EnvironmentProblem
from electra_wrap.files import lock

#: Seconds after which a remote that does not answer is unreachable, and for a fetch.
ANSWER_TIMEOUT, FETCH_TIMEOUT = 8, 600

# Whatever the user's git configuration: no hooks, no prompts, no conversion of line ends or
# symbolic links, and no transports that run commands.
_GIT = ["git", "-c", "core.hooksPath=/dev/null", "-c", "core.autocrlf=false"]
_GIT += ["-c", "core.symlinks=false"]
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
        """The directory of the checkout, whether it exists or not."""
        return paths.vendor_directory() / f"electra-{self.patched_tree[:12]}"


def ensure(upstream: str | None = None) -> Path:
    """Return the verified, patched checkout. Fetch it from `upstream` if it does not exist.

    `upstream` is a URL, a local clone, a bare mirror or a bundle; default: the pin's URL.
    EnvironmentProblem if it cannot be reached or lacks the pinned commit, if the checkout cannot be
    written, or if it differs from the lock. A checkout that exists may be read-only.
    """
    pin = Pin.read()
    vendor = pin.directory.parent
    if not pin.directory.exists():
        try:
            vendor.mkdir(parents=True, exist_ok=True)
            with lock(vendor / ".lock", wait=True):
                if not pin.directory.exists():
                    _fetch(pin, _resolve(upstream or pin.url))
        except OSError as error:
            writable = "set XDG_CACHE_HOME to a directory that can"
            if paths.IN_CHECKOUT:
                writable = "use a clone of electra_wrap that can"
            raise EnvironmentProblem(
                f"{vendor}, where upstream's scripts go, cannot be written ({error.strerror}); "
                f"{writable}, or do without them: --set engine=native"
            ) from None
    verify(pin.directory, pin.patched_tree)
    return pin.directory


def look(upstream: str | None = None) -> str:
    """Describe where upstream is. EnvironmentProblem if it is neither here nor reachable."""
    pin = Pin.read()
    if pin.directory.exists():
        verify(pin.directory, pin.patched_tree)
        return f"verified, in {pin.directory}"
    source = _resolve(upstream or pin.url)
    _refuse_unreachable(_git(Path("/"), {}), source)
    return f"reachable at {source}"


def verify(directory: Path, tree: str) -> None:
    """EnvironmentProblem unless `directory` holds exactly git's `tree`: names, modes and bytes."""
    found = hash_tree(directory)
    if found != tree:
        raise EnvironmentProblem(
            f"{directory} was changed: its tree is {found[:12]}, pinned is {tree[:12]}; move it "
            "away and run again"
        )


def hash_tree(directory: Path) -> str:
    """Return the id of a directory's git tree object, with ignored and untracked files.

    A tree is the sorted list of (mode, name, id); ids are SHA-1 of `type length\\0content`
    (git's documentation, "Git Internals - Git Objects").
    """
    entries = []
    for path in directory.iterdir():
        mode, name = path.lstat().st_mode, os.fsencode(path.name)
        if stat.S_ISDIR(mode):
            entries.append((name + b"/", b"40000", hash_tree(path)))
        elif stat.S_ISLNK(mode):
            entries.append((name, b"120000", _object_id(b"blob", os.fsencode(path.readlink()))))
        elif stat.S_ISREG(mode):
            git_mode = b"100755" if mode & stat.S_IXUSR else b"100644"
            entries.append((name, git_mode, _object_id(b"blob", path.read_bytes())))
        else:
            raise EnvironmentProblem(f"{path} is not a file; move the checkout away and run again")
    lines = (
        mode + b" " + name.rstrip(b"/") + b"\0" + bytes.fromhex(object_id)
        for name, mode, object_id in sorted(entries)
    )
    return _object_id(b"tree", b"".join(lines))


def _object_id(kind: bytes, content: bytes) -> str:
    header = kind + b" %d\0" % len(content)
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()


def _resolve(source: str) -> str:
    """Return a URL as it is, and the absolute path of a local source."""
    local = Path(source).expanduser()
    return str(local.resolve()) if local.exists() else source


class _GitFailed(EnvironmentProblem):
    """A git command failed. The message is git's."""


def _git(directory: Path, variables: dict[str, Path]) -> Callable[..., str]:
    """Return a function that runs git in a directory with additional environment variables."""
    try:
        import git  # this import runs git
    except ImportError:
        raise EnvironmentProblem(
            "git is not installed; install it, for example apt-get install git"
        ) from None
    repository = git.Git(directory)
    die_with_us = functools.partial(subprocesses.die_with_parent, os.getpid())
    paths_as_text = {name: str(path) for name, path in variables.items()}
    repository.update_environment(**_GIT_ENVIRONMENT, **paths_as_text)

    def run(*arguments: str, timeout: float = FETCH_TIMEOUT) -> str:
        try:
            argv = [*_GIT, *arguments]
            output = repository.execute(argv, kill_after_timeout=timeout, preexec_fn=die_with_us)
            return str(output)
        except git.GitCommandError as error:
            message = re.search(r"\b(?:fatal|error): (.+)", str(error.stderr or error))
            raise _GitFailed(message[1].strip(" '") if message else "no answer") from None

    return run


def _refuse_unreachable(run: Callable[..., str], source: str) -> None:
    try:
        run("ls-remote", "--", source, timeout=ANSWER_TIMEOUT)
    except _GitFailed as error:
        raise EnvironmentProblem(
            f"google-research/electra cannot be reached at {source} ({error}); give a local clone, "
            "mirror or bundle of it with --upstream PATH, or do without it: --set engine=native"
        ) from None


def _fetch(pin: Pin, source: str) -> None:
    """Fetch, verify, patch and verify in a temporary directory, then rename it."""
    vendor = pin.directory.parent
    for abandoned in vendor.glob(".fetch-*"):  # by a process that was killed
        shutil.rmtree(abandoned)
    with tempfile.TemporaryDirectory(dir=vendor, prefix=".fetch-") as temporary:
        work = Path(temporary) / "electra"
        work.mkdir()
        # Set, so that the caller's GIT_DIR (in a git hook, say) has no effect.
        git_directory = work / ".git"
        variables = {
            "GIT_DIR": git_directory,
            "GIT_WORK_TREE": work,
            "GIT_INDEX_FILE": git_directory / "index",
        }
        run = _git(work, variables)
        run("init", "--quiet", "--template=")
        _refuse_unreachable(run, source)
        _check_out(run, pin, source)
        for patch in sorted(paths.PATCHES.glob("*.patch")):
            try:
                run("apply", "--unidiff-zero", "--whitespace=nowarn", str(patch))
            except _GitFailed as error:
                message = f"{patch.name} does not apply ({error}); restore patches/"
                raise EnvironmentProblem(message) from None
        shutil.rmtree(git_directory)
        patched = hash_tree(work)
        if patched != pin.patched_tree:
            raise EnvironmentProblem(
                f"the patches give tree {patched[:12]}, {paths.LOCK_FILE.name} says "
                f"{pin.patched_tree[:12]}; restore patches/ and vendor/"
            )
        work.rename(pin.directory)


def _check_out(run: Callable[..., str], pin: Pin, source: str) -> None:
    """Fetch and check out the pinned commit. EnvironmentProblem if its tree is not the pinned."""
    try:
        run("fetch", "--quiet", "--depth=1", "--no-tags", "--", source, pin.commit)
    except _GitFailed:
        # Bundles have no shallow history, and some servers refuse to send a commit by its id.
        with contextlib.suppress(_GitFailed):
            run("fetch", "--quiet", "--no-tags", "--", source, "+refs/*:refs/upstream/*")
    commit = pin.commit[:12]
    try:
        run("checkout", "--quiet", "--detach", pin.commit)
        tree = run("rev-parse", "HEAD^{tree}")
    except _GitFailed as error:
        message = f"{source} does not give commit {commit} ({error})"
        raise EnvironmentProblem(f"{message}; use a complete copy of {pin.url}") from None
    if tree != pin.tree:
        raise EnvironmentProblem(
            f"{source}: commit {commit} has tree {tree[:12]}, pinned is {pin.tree[:12]}; use "
            "another copy"
        )
