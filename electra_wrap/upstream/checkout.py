"""google-research/electra: pinned, verified and patched.

vendor/electra.lock names a commit, its git tree, and the tree after patches/. This repository has
no code of upstream. `ensure` fetches it once, and before every execution has git compare the files
with the lock.
"""

from __future__ import annotations

import contextlib
import re
import tomllib
from pathlib import Path

from electra_wrap import files, paths
from electra_wrap.errors import EnvironmentProblem

#: Seconds after which a remote that does not answer is unreachable, and for a fetch.
ANSWER_TIMEOUT, FETCH_TIMEOUT = 8, 600

# Whatever the user's git configuration: no hooks, no conversion of line ends, no attributes.
_GIT = ["git", "-c", "core.hooksPath=/dev/null", "-c", "core.autocrlf=false"]
_GIT += ["-c", "core.attributesFile=/dev/null"]


def read_pin() -> dict[str, str]:
    """Return the contents of vendor/electra.lock."""
    return tomllib.loads(paths.LOCK_FILE.read_text(encoding="utf-8"))


def ensure(upstream: str | None = None) -> Path:
    """Return the verified, patched checkout. Fetch it from `upstream` if it does not exist.

    `upstream` is a URL, a local clone, a bare mirror or a bundle; default: the pin's URL.
    EnvironmentProblem if it cannot be reached or lacks the pinned commit, if the checkout cannot be
    written, or if it differs from the lock. A checkout that exists may be read-only.
    """
    pin = read_pin()
    directory = _directory(pin)
    vendor = directory.parent
    try:
        if not directory.exists():
            vendor.mkdir(parents=True, exist_ok=True)
            with files.lock(vendor / ".lock", wait=True):
                if not directory.exists():
                    _fetch(pin, directory, _resolve(upstream or pin["url"]))
    except OSError as error:
        fix = "use a clone that can" if paths.IN_CHECKOUT else "set XDG_CACHE_HOME"
        message = f"{vendor}, where upstream's scripts go, cannot be written ({error.strerror})"
        raise EnvironmentProblem(f"{message}; {fix}, or --set engine=native") from None
    _verify(directory, pin["patched_tree"])
    return directory


def look(upstream: str | None = None) -> str:
    """Describe where upstream is. EnvironmentProblem if it is neither here nor reachable."""
    pin = read_pin()
    if _directory(pin).exists():
        return f"verified, in {ensure()}"
    source = _resolve(upstream or pin["url"])
    _refuse_unreachable(Path("/"), source)
    return f"reachable at {source}"


def _directory(pin: dict[str, str]) -> Path:
    return paths.vendor_directory() / f"electra-{pin['patched_tree'][:12]}"


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
    command.update_environment(
        GIT_DIR=str(directory / ".git"),
        GIT_WORK_TREE=str(directory),
        GIT_INDEX_FILE=str(directory / ".git" / "index"),
        GIT_TERMINAL_PROMPT="0",
    )
    try:
        return str(command.execute([*_GIT, *arguments], kill_after_timeout=timeout))
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


def _fetch(pin: dict[str, str], directory: Path, source: str) -> None:
    """Fetch, verify, patch and verify in a temporary directory, then rename it."""
    with files.atomic(directory, directory=True) as work:
        _git(work, "init", "--quiet", "--template=")
        _refuse_unreachable(work, source)
        _check_out(work, pin, source)
        for patch in sorted(paths.PATCHES.glob("*.patch")):
            try:
                _git(work, "apply", "--index", "--unidiff-zero", "--whitespace=nowarn", str(patch))
            except _GitFailed as error:
                message = f"{patch.name} does not apply ({error}); restore patches/"
                raise EnvironmentProblem(message) from None
        tree = _git(work, "write-tree")
        if tree != pin["patched_tree"]:
            message = f"the patches give tree {tree[:12]}, pinned is {pin['patched_tree'][:12]}"
            raise EnvironmentProblem(f"{message}; restore patches/ and vendor/")


def _check_out(work: Path, pin: dict[str, str], source: str) -> None:
    """Fetch and check out the pinned commit. EnvironmentProblem if its tree is not the pinned."""
    try:
        _git(work, "fetch", "--quiet", "--depth=1", "--no-tags", "--", source, pin["commit"])
    except _GitFailed:
        # Bundles have no shallow history, and some servers refuse to send a commit by its id.
        with contextlib.suppress(_GitFailed):
            _git(work, "fetch", "--quiet", "--no-tags", "--", source, "+refs/*:refs/upstream/*")
    try:
        _git(work, "checkout", "--quiet", "--detach", pin["commit"])
        tree = _git(work, "rev-parse", "HEAD^{tree}")
    except _GitFailed as error:
        message = f"{source} does not give commit {pin['commit'][:12]} ({error})"
        raise EnvironmentProblem(f"{message}; use a complete copy of {pin['url']}") from None
    if tree != pin["tree"]:
        message = f"{source}: its tree is {tree[:12]}, pinned is {pin['tree'][:12]}"
        raise EnvironmentProblem(f"{message}; use another copy")


def _verify(directory: Path, tree: str) -> None:
    """Raise EnvironmentProblem unless the files of a checkout are those of a git tree."""
    try:
        changed = _git(directory, "diff", "--name-only", "--no-ext-diff", tree)
        changed += _git(directory, "ls-files", "--others")
    except _GitFailed as error:
        changed = str(error)
    if changed:
        names = ", ".join(changed.splitlines()[:3])
        message = f"{directory} was changed: {names}; move it away and run again"
        raise EnvironmentProblem(message)
