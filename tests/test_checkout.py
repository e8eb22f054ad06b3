"""The checkout of upstream is exactly the pin, or it is refused."""

from __future__ import annotations

import concurrent.futures
import errno
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import git

from electra_wrap import paths
from electra_wrap.errors import EnvironmentProblem
from electra_wrap.upstream import checkout


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def refusal(source: str | None = None) -> str:
    """Return the message with which `ensure` fails, leaving nothing behind."""
    with pytest.raises(EnvironmentProblem) as raised:
        checkout.ensure(source)
    assert "\n" not in str(raised.value)
    assert set(names(paths.vendor_directory())) <= {".lock", "electra.lock"}
    return str(raised.value)


def test_hash_tree_equals_git(git_repository: Path, tmp_path: Path) -> None:
    """With subdirectories, an executable, and names that sort differently with a slash."""
    for name in ("a.b", "a/x", "a-b", "ñ"):
        path = git_repository / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name, encoding="utf-8")
    (git_repository / "link").symlink_to("a.b")
    git(git_repository, "add", "--all")
    tree = git(git_repository, "write-tree")
    (git_repository / ".git").rename(tmp_path / "moved.git")
    assert checkout.hash_tree(git_repository) == tree


def test_checkout_is_patched_and_fetched_once(fake_upstream: Path) -> None:
    directory = checkout.ensure()
    scripts = ["build_pretraining_dataset.py", "model", "run.sh", "run_pretraining.py"]
    assert names(directory) == scripts
    assert (directory / "run_pretraining.py").read_text(encoding="utf-8").startswith("# patched\n")
    fake_upstream.rename(fake_upstream.with_name("gone"))
    assert checkout.ensure() == directory, "a verified checkout needs no remote"


def refuse_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have opening the lock fail as it does where the directory is read-only."""

    def fail(path: Path, **options: bool) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(checkout, "lock", fail)


def test_existing_checkout_is_used_without_writing(
    fake_upstream: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = checkout.ensure()
    (paths.vendor_directory() / ".lock").unlink()
    refuse_writing(monkeypatch)
    assert checkout.ensure() == directory
    assert names(paths.vendor_directory()) == [directory.name, "electra.lock"]


@pytest.mark.parametrize("in_checkout", [True, False])
def test_unwritable_directory_is_named_with_a_fix(
    fake_upstream: Path, monkeypatch: pytest.MonkeyPatch, in_checkout: bool
) -> None:
    monkeypatch.setattr(paths, "IN_CHECKOUT", in_checkout)
    refuse_writing(monkeypatch)
    message = refusal()
    assert message.startswith(f"{paths.vendor_directory()}, ")
    assert "cannot be written (Read-only file system)" in message
    assert ("use a clone that can" if in_checkout else "set XDG_CACHE_HOME") in message
    assert "--set engine=native" in message


def test_directory_that_cannot_be_made_is_named(
    fake_upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    vendor = tmp_path / "file" / "electra_wrap"
    monkeypatch.setattr(paths, "vendor_directory", lambda: vendor)
    with pytest.raises(EnvironmentProblem, match=f"^{vendor}, .* cannot be written"):
        checkout.ensure()


@pytest.mark.parametrize("kind", ["clone", "mirror", "bundle", "url"])
def test_every_kind_of_source(fake_upstream: Path, tmp_path: Path, kind: str) -> None:
    source = str(tmp_path / "source")
    if kind == "clone":
        git(tmp_path, "clone", "--quiet", str(fake_upstream), source)
    elif kind == "mirror":
        git(tmp_path, "clone", "--quiet", "--mirror", str(fake_upstream), source)
    elif kind == "bundle":
        git(fake_upstream, "bundle", "create", "--quiet", source, "--all")
    else:
        source = fake_upstream.as_uri()
    assert (checkout.ensure(source) / "model" / "__init__.py").is_file()


def test_source_may_have_later_commits(fake_upstream: Path) -> None:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    git(fake_upstream, *identity, "commit", "--quiet", "--allow-empty", "-m", "later")
    assert checkout.ensure(str(fake_upstream)).is_dir()


def test_url_rewriting_of_the_user_applies(
    fake_upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "https://host.invalid/e.git"
    lock = paths.LOCK_FILE.read_text(encoding="utf-8")
    paths.LOCK_FILE.write_text(lock.replace(str(fake_upstream), url), encoding="utf-8")
    config = tmp_path / "gitconfig"
    config.write_text(f'[url "{fake_upstream}"]\n insteadOf = {url}\n', encoding="utf-8")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    assert checkout.ensure().is_dir()


def test_git_variables_of_the_caller_have_no_effect(
    fake_upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "index"))
    checkout.ensure()
    assert not (tmp_path / "other").exists() and not (tmp_path / "index").exists()


def test_git_hooks_of_the_user_do_not_run(
    fake_upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("post-checkout", "post-index-change", "reference-transaction"):
        hook = tmp_path / "template" / "hooks" / name
        hook.parent.mkdir(parents=True, exist_ok=True)
        hook.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n", encoding="utf-8")
        hook.chmod(0o755)
    monkeypatch.setenv("GIT_TEMPLATE_DIR", str(tmp_path / "template"))
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "core.hooksPath")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", str(tmp_path / "template" / "hooks"))
    checkout.ensure()
    assert not (tmp_path / "ran").exists()


def test_git_attributes_of_the_user_have_no_effect(
    fake_upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attributes = tmp_path / "config" / "git" / "attributes"
    attributes.parent.mkdir(parents=True)
    attributes.write_text("* text eol=crlf\n", encoding="utf-8")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    checkout.ensure()


def test_concurrent_callers_share_one_checkout(fake_upstream: Path) -> None:
    (paths.vendor_directory() / ".fetch-of-a-killed-process").mkdir()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: checkout.ensure(), range(4)))) == 1
    directory = checkout.Pin.read().directory.name
    assert names(paths.vendor_directory()) == [".lock", directory, "electra.lock"]


@pytest.mark.parametrize(
    "tamper",
    [
        lambda d: (d / "build_pretraining_dataset.py").write_text("\n", encoding="utf-8"),
        lambda d: (d / "sitecustomize.py").write_text("", encoding="utf-8"),
        lambda d: (d / "model" / "__init__.py").unlink(),
        lambda d: (d / "run.sh").chmod(0o644),
        lambda d: (d / "submodule").mkdir(),
        lambda d: (d / ".git" / "hooks").mkdir(parents=True),
    ],
    ids=["content", "new file", "missing file", "mode", "submodule", "git directory"],
)
def test_changed_checkout_is_refused(fake_upstream: Path, tamper: Callable[[Path], None]) -> None:
    tamper(checkout.ensure())
    for function in (checkout.ensure, checkout.look):
        with pytest.raises(EnvironmentProblem, match=r"was changed: its tree is .* pinned is"):
            function()


def test_other_patches_are_refused(fake_upstream: Path) -> None:
    patch = paths.PATCHES / "0002-more.patch"
    change = "diff --git a/run.sh b/run.sh\n--- a/run.sh\n+++ b/run.sh\n@@ -0,0 +1 @@\n+#\n"
    patch.write_text(change, encoding="utf-8")
    assert "the patches give tree" in refusal()
    patch.write_text(change.replace("run.sh", "none").replace("-0,0", "-1"), encoding="utf-8")
    assert "0002-more.patch does not apply" in refusal()


def test_other_commit_or_tree_is_refused(fake_upstream: Path) -> None:
    lock = paths.LOCK_FILE.read_text(encoding="utf-8")
    paths.LOCK_FILE.write_text(lock.replace('\ntree = "', '\ntree = "f'), encoding="utf-8")
    assert "pinned is f" in refusal()
    pin = checkout.Pin.read()
    paths.LOCK_FILE.write_text(lock.replace(pin.commit, "0" * 40), encoding="utf-8")
    assert "does not give commit 000000000000" in refusal()


def test_unreachable_remote_is_reported_with_both_alternatives(
    fake_upstream: Path, tmp_path: Path
) -> None:
    command = f"ext::sh -c 'touch {tmp_path}/ran'"
    for source in ("http://127.0.0.1:9/e.git", str(tmp_path / "nowhere"), command):
        started = time.monotonic()
        message = refusal(source)
        assert "local clone, mirror or bundle of it with --upstream PATH" in message
        assert "--set engine=native" in message
        assert time.monotonic() - started < 10
    assert not (tmp_path / "ran").exists()


def test_remote_that_never_answers_is_unreachable(
    fake_upstream: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkout, "ANSWER_TIMEOUT", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "cannot be reached" in refusal(f"http://127.0.0.1:{silent.getsockname()[1]}/e.git")


def test_vendor_prints_the_checkout_or_fails_in_one_line(
    cli: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    pin = checkout.Pin.read()
    if pin.directory.exists():
        done = cli("vendor")
        assert (done.returncode, done.stdout.strip()) == (0, str(pin.directory))
    else:
        done = cli("vendor", "--upstream", "http://127.0.0.1:9/e.git")
        assert done.returncode == 3 and done.stderr.count("\n") == 1


def test_patches_have_no_text_of_upstream_but_what_they_remove() -> None:
    """Zero context: every line is a header, an insertion, or one of very few removals."""
    headers = ("diff --git ", "index ", "--- ", "+++ ", "@@ ", "+", "-")
    patches = sorted(paths.PATCHES.parent.joinpath("patches").glob("*.patch"))
    assert patches
    removed = 0
    for patch in patches:
        text = patch.read_text(encoding="utf-8")
        assert text.startswith("What: ") and "\nWhy: " in text
        body = text[text.index("diff --git") :].splitlines()
        assert all(line.startswith(headers) for line in body)
        assert all(line.endswith("@@") for line in body if line.startswith("@@"))
        removed += sum(line.startswith("-") and not line.startswith("---") for line in body)
    assert removed <= 10
