"""google-research/electra: pinned, verified and patched.

vendor/electra.lock names a commit, and the git tree after patches/. This repository has
no code of upstream. `ensure` fetches it once, and before every execution has git compare the files
with the lock.
"""

import re
import tomllib
from pathlib import Path

from electra_wrap import files, paths
from electra_wrap.errors import EnvironmentProblem

#: Seconds after which git is killed.
TIMEOUT = 600

# Whatever the user's git configuration: no hooks, no conversion of line ends, no attributes.
_GIT = ["git", "-c", "core.hooksPath=/dev/null", "-c", "core.autocrlf=false"]
_GIT += ["-c", "core.attributesFile=/dev/null"]


def read_pin() -> dict[str, str]:
    """Return the contents of vendor/electra.lock."""
    return tomllib.loads(paths.LOCK_FILE.read_text(encoding="utf-8"))


def directory() -> Path:
    """Return the directory of the checkout, whether it exists or not."""
    return paths.vendor_directory() / f"electra-{read_pin()['patched_tree'][:12]}"


def ensure(upstream: str | None = None) -> Path:
    """Return the verified, patched checkout. Fetch it from `upstream` if it does not exist.

    `upstream` is a URL, a local clone, a bare mirror or a bundle; default: the pin's URL.
    EnvironmentProblem if it cannot be reached or lacks the pinned commit, if the checkout cannot be
    written, or if it differs from the lock. A checkout that exists may be read-only.
    """
    pin, path = read_pin(), directory()
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with files.lock(path.parent / ".lock", wait=True):
                if not path.exists():
                    _fetch(pin, path, upstream or pin["url"])
    except OSError as error:
        fix = "use a clone that can" if paths.IN_CHECKOUT else "set XDG_CACHE_HOME"
        message = f"{path}, for upstream's scripts, cannot be written ({error.strerror})"
        raise EnvironmentProblem(f"{message}; {fix}, or --set engine=native") from None
    _verify(path, pin["patched_tree"])
    return path


class _GitFailed(EnvironmentProblem):
    """A git command failed. The message is git's."""


def _git(directory: Path, *arguments: str) -> str:
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
        return str(command.execute([*_GIT, *arguments], kill_after_timeout=TIMEOUT))
    except git.GitCommandError as error:
        reason = re.search(r"\b(?:fatal|error): (.+)", str(error.stderr or error))
        what = f"git {arguments[0]} {arguments[-1]}"
        raise _GitFailed(f"{what}: {reason[1] if reason else 'no answer'}") from None


def _fetch(pin: dict[str, str], path: Path, source: str) -> None:
    """Fetch, verify, patch and verify in a temporary directory, then rename it."""
    if Path(source).expanduser().exists():
        source = str(Path(source).expanduser().resolve())
    with files.atomic(path, directory=True) as work:
        _git(work, "init", "--quiet", "--template=")
        _check_out(work, pin, source)
        for patch in sorted(paths.PATCHES.glob("*.patch")):
            _git(work, "apply", "--index", "--unidiff-zero", "--whitespace=nowarn", str(patch))
        tree = _git(work, "write-tree")
        if tree != pin["patched_tree"]:
            message = f"the patches give tree {tree[:12]}, pinned is {pin['patched_tree'][:12]}"
            raise EnvironmentProblem(f"{message}; restore patches/ and vendor/")


def _check_out(work: Path, pin: dict[str, str], source: str) -> None:
    """Fetch and check out the pinned commit. EnvironmentProblem if that is not possible."""
    try:
        try:
            _git(work, "fetch", "--quiet", "--depth=1", "--no-tags", "--", source, pin["commit"])
        except _GitFailed:  # bundles, and servers that do not send a commit by its id
            _git(work, "fetch", "--quiet", "--no-tags", "--", source, "+refs/*:refs/upstream/*")
        _git(work, "checkout", "--quiet", "--detach", pin["commit"])
    except _GitFailed as error:
        message = f"google-research/electra's commit {pin['commit'][:12]} is not to be had at"
        raise EnvironmentProblem(
            f"{message} {source} ({error}); give a local clone, mirror or bundle of it with "
            "--upstream PATH, or do without it: --set engine=native"
        ) from None


def _verify(directory: Path, tree: str) -> None:
    """Raise EnvironmentProblem unless the files of a checkout are those of a git tree."""
    try:
        changed = _git(directory, "diff", "--name-only", "--no-ext-diff", tree).splitlines()
        # Python checks what it compiled against the scripts.
        others = _git(directory, "ls-files", "--others", "--exclude=__pycache__/")
        changed += others.splitlines()
    except _GitFailed as error:
        changed = [str(error)]
    if changed:
        names = ", ".join(changed[:3])
        message = f"{directory} was changed: {names}; move it away and run again"
        raise EnvironmentProblem(message)
