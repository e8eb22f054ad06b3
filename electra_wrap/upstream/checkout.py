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
from pathlib import Path

from electra_wrap import paths, subprocesses
from electra_wrap.errors import EnvironmentProblem
from electra_wrap.files import lock

#: Seconds after which a remote that does not answer is unreachable, and for a fetch.
ANSWER_TIMEOUT, FETCH_TIMEOUT = 8, 600

# Whatever the user's git configuration: no hooks, no prompts, no attributes, no conversion of line
# ends or symbolic links, and no transports that run commands.
_GIT = ["git", "-c", "core.hooksPath=/dev/null", "-c", "core.autocrlf=false"]
_GIT += ["-c", "core.symlinks=false", "-c", "core.attributesFile=/dev/null"]
_GIT_ENVIRONMENT = {
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_ATTR_NOSYSTEM": "1",
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
    license: str

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
    try:
        if not pin.directory.exists():
            vendor.mkdir(parents=True, exist_ok=True)
            with lock(vendor / ".lock", wait=True):
                if not pin.directory.exists():
                    _fetch(pin, _resolve(upstream or pin.url))
    except OSError as error:
        fix = "use a clone that can" if paths.IN_CHECKOUT else "set XDG_CACHE_HOME"
        message = f"{vendor}, where upstream's scripts go, cannot be written ({error.strerror})"
        raise EnvironmentProblem(f"{message}; {fix}, or --set engine=native") from None
    tree = hash_tree(pin.directory)
    if tree != pin.patched_tree:
        change = f"its tree is {tree[:12]}, pinned is {pin.patched_tree[:12]}"
        message = f"{pin.directory} was changed: {change}; move it away and run again"
        raise EnvironmentProblem(message)
    return pin.directory


def look(upstream: str | None = None) -> str:
    """Describe where upstream is. EnvironmentProblem if it is neither here nor reachable."""
    pin = Pin.read()
    if pin.directory.exists():
        return f"verified, in {ensure()}"
    source = _resolve(upstream or pin.url)
    _refuse_unreachable(Path("/"), source)
    return f"reachable at {source}"


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


def _git(directory: Path, *arguments: str, timeout: float = FETCH_TIMEOUT) -> str:
    """Run git in a directory that is a work tree with its own .git; return its output."""
    try:
        import git  # this import runs git
    except ImportError:
        message = "git is not installed; install it, for example apt-get install git"
        raise EnvironmentProblem(message) from None
    command = git.Git(directory)
    # All three are set, so that the caller's (in a git hook, say) have no effect.
    repository = str(directory / ".git")
    command.update_environment(
        **_GIT_ENVIRONMENT,
        GIT_DIR=repository,
        GIT_WORK_TREE=str(directory),
        GIT_INDEX_FILE=f"{repository}/index",
    )
    die_with_us = functools.partial(subprocesses.die_with_parent, os.getpid())
    argv = [*_GIT, *arguments]
    try:
        return str(command.execute(argv, kill_after_timeout=timeout, preexec_fn=die_with_us))
    except git.GitCommandError as error:
        reason = re.search(r"\b(?:fatal|error): (.+)", str(error.stderr or error))
        raise _GitFailed(reason[1].strip(" '") if reason else "no answer") from None


def _refuse_unreachable(directory: Path, source: str) -> None:
    try:
        _git(directory, "ls-remote", "--", source, timeout=ANSWER_TIMEOUT)
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
        _git(work, "init", "--quiet", "--template=")
        _refuse_unreachable(work, source)
        _check_out(work, pin, source)
        for patch in sorted(paths.PATCHES.glob("*.patch")):
            try:
                _git(work, "apply", "--unidiff-zero", "--whitespace=nowarn", str(patch))
            except _GitFailed as error:
                message = f"{patch.name} does not apply ({error}); restore patches/"
                raise EnvironmentProblem(message) from None
        shutil.rmtree(work / ".git")
        patched = hash_tree(work)
        if patched != pin.patched_tree:
            message = f"the patches give tree {patched[:12]}, pinned is {pin.patched_tree[:12]}"
            raise EnvironmentProblem(f"{message}; restore patches/ and vendor/")
        work.rename(pin.directory)


def _check_out(work: Path, pin: Pin, source: str) -> None:
    """Fetch and check out the pinned commit. EnvironmentProblem if its tree is not the pinned."""
    try:
        _git(work, "fetch", "--quiet", "--depth=1", "--no-tags", "--", source, pin.commit)
    except _GitFailed:
        # Bundles have no shallow history, and some servers refuse to send a commit by its id.
        with contextlib.suppress(_GitFailed):
            _git(work, "fetch", "--quiet", "--no-tags", "--", source, "+refs/*:refs/upstream/*")
    try:
        _git(work, "checkout", "--quiet", "--detach", pin.commit)
        tree = _git(work, "rev-parse", "HEAD^{tree}")
    except _GitFailed as error:
        message = f"{source} does not give commit {pin.commit[:12]} ({error})"
        raise EnvironmentProblem(f"{message}; use a complete copy of {pin.url}") from None
    if tree != pin.tree:
        message = f"{source}: its tree is {tree[:12]}, pinned is {pin.tree[:12]}"
        raise EnvironmentProblem(f"{message}; use another copy")
