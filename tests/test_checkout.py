"""The checkout of upstream: exactly the pin, or a refusal."""

from __future__ import annotations

import concurrent.futures
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import git

from electra_wrap import paths
from electra_wrap.errors import EnvironmentLacks
from electra_wrap.upstream import checkout


def files(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def refused(source: str | None = None) -> str:
    with pytest.raises(EnvironmentLacks) as raised:
        checkout.ensure(source)
    assert "\n" not in str(raised.value)
    # nothing half made stays behind
    assert not [n for n in files(paths.vendor_directory()) if n not in (".lock", "electra.lock")]
    return str(raised.value)


def test_tree_hash_is_gits(git_repository: Path, tmp_path: Path) -> None:
    """With subdirectories, an executable, and names that sort differently with and without a slash."""
    for name in ("a.b", "a/x", "a-b", "ñ"):
        path = git_repository / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name, encoding="utf-8")
    (git_repository / "link").symlink_to("a.b")
    git(git_repository, "add", "--all")
    tree = git(git_repository, "write-tree")
    (git_repository / ".git").rename(tmp_path / "moved.git")
    assert checkout.hash_tree(git_repository) == tree


def test_the_checkout_is_the_patched_pin_and_made_once(fake_upstream: Path) -> None:
    directory = checkout.ensure()
    assert files(directory) == ["build_pretraining_dataset.py", "model", "run.sh", "run_pretraining.py"]
    assert (directory / "run_pretraining.py").read_text(encoding="utf-8").startswith("# patched\n")
    fake_upstream.rename(fake_upstream.with_name("gone"))
    assert checkout.ensure() == directory, "a verified checkout needs no remote"


@pytest.mark.parametrize("kind", ["clone", "mirror", "bundle", "url", "insteadOf", "newer"])
def test_every_kind_of_source(fake_upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    source: str | None = str(tmp_path / "source")
    if kind == "clone":
        git(tmp_path, "clone", "--quiet", str(fake_upstream), "source")
    elif kind == "mirror":
        git(tmp_path, "clone", "--quiet", "--mirror", str(fake_upstream), "source")
    elif kind == "bundle":
        git(fake_upstream, "bundle", "create", "--quiet", str(source), "--all")
    elif kind == "url":
        source = fake_upstream.as_uri()
    elif kind == "newer":
        source = str(fake_upstream)
        (fake_upstream / "later.py").write_text("", encoding="utf-8")
        git(fake_upstream, "add", "--all")
        git(fake_upstream, "-c", "user.name=t", "-c", "user.email=t@e", "commit", "--quiet", "-m", "later")
    else:
        lock = paths.LOCK_FILE.read_text(encoding="utf-8")
        paths.LOCK_FILE.write_text(lock.replace(str(fake_upstream), "https://host.invalid/e.git"), encoding="utf-8")
        config = tmp_path / "gitconfig"
        config.write_text(f'[url "{fake_upstream}"]\n insteadOf = https://host.invalid/e.git\n', encoding="utf-8")
        monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
        source = None
    assert (checkout.ensure(source) / "model" / "__init__.py").is_file()


def test_git_variables_of_the_caller_do_not_lead_elsewhere(
    fake_upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "index"))
    checkout.ensure()
    assert not (tmp_path / "other").exists() and not (tmp_path / "index").exists()


def test_nothing_of_the_users_git_runs(fake_upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_two_that_come_at_once_share_one_checkout(fake_upstream: Path, tmp_path: Path) -> None:
    (paths.vendor_directory() / ".fetch-by-somebody-who-was-killed").mkdir()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: checkout.ensure(), range(4)))) == 1
    assert files(paths.vendor_directory()) == sorted([".lock", "electra.lock", checkout.Pin.read().directory.name])


def touch_line(directory: Path) -> None:
    path = directory / "build_pretraining_dataset.py"
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    "tamper",
    [
        touch_line,
        lambda d: (d / "sitecustomize.py").write_text("", encoding="utf-8"),
        lambda d: (d / "model" / "__init__.py").unlink(),
        lambda d: (d / "run.sh").chmod(0o644),
        lambda d: (d / "submodule").mkdir(),
        lambda d: (d / ".git" / "hooks").mkdir(parents=True) or (d / ".git" / "hooks" / "post-checkout").touch(),
        lambda d: (d / ".git").mkdir() or (d / ".git" / "x").write_text("", encoding="utf-8"),
    ],
    ids=["line", "new file", "missing file", "mode", "submodule", "hook", "git directory"],
)
def test_a_touched_checkout_is_refused(fake_upstream: Path, tamper: Callable[[Path], None]) -> None:
    directory = checkout.ensure()
    tamper(directory)
    with pytest.raises(EnvironmentLacks, match=r"was changed: its tree is .* pinned is"):
        checkout.ensure()


def test_another_patch_is_refused(fake_upstream: Path) -> None:
    (paths.PATCHES / "0002-more.patch").write_text(
        "diff --git a/run.sh b/run.sh\n--- a/run.sh\n+++ b/run.sh\n@@ -0,0 +1 @@\n+#\n", encoding="utf-8"
    )
    assert "the patches give tree" in refused()
    (paths.PATCHES / "0002-more.patch").write_text(
        "diff --git a/none b/none\n--- a/none\n+++ b/none\n@@ -1 +1 @@\n-a\n+b\n", encoding="utf-8"
    )
    assert "0002-more.patch does not apply" in refused()


def test_another_commit_or_tree_is_refused(fake_upstream: Path) -> None:
    lock = paths.LOCK_FILE.read_text(encoding="utf-8")
    paths.LOCK_FILE.write_text(lock.replace('\ntree = "', '\ntree = "f'), encoding="utf-8")
    assert "pinned is f" in refused()
    pin = checkout.Pin.read()
    paths.LOCK_FILE.write_text(lock.replace(pin.commit, "0" * 40), encoding="utf-8")
    assert "does not give commit 000000000000" in refused()


def test_an_unreachable_remote_says_how_to_go_on(fake_upstream: Path, tmp_path: Path) -> None:
    for source in ("http://127.0.0.1:9/e.git", str(tmp_path / "nowhere"), "ext::sh -c 'touch /tmp/x'"):
        began = time.monotonic()
        assert "with a local clone, mirror or bundle of it: --upstream PATH" in refused(source)
        assert time.monotonic() - began < 10


def test_a_remote_that_never_answers_is_given_up(fake_upstream: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkout, "ANSWER_TIMEOUT", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "cannot be reached" in refused(f"http://127.0.0.1:{silent.getsockname()[1]}/e.git")


def test_vendor_says_so_in_one_line_with_exit_code_3(cli: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    pin = checkout.Pin.read()
    if pin.directory.exists():
        done = cli("vendor")
        assert (done.returncode, done.stdout.strip()) == (0, str(pin.directory))
    else:
        done = cli("vendor", "--upstream", "http://127.0.0.1:9/e.git")
        assert done.returncode == 3 and done.stderr.count("\n") == 1


def test_patches_keep_no_text_of_upstream_but_what_they_remove() -> None:
    """Zero context: every line is a header, an insertion of ours, or one of very few removals."""
    patches = sorted(paths.PATCHES.parent.joinpath("patches").glob("*.patch"))
    assert patches
    removed = 0
    for patch in patches:
        text = patch.read_text(encoding="utf-8")
        assert text.startswith("What: ") and "\nWhy: " in text
        body = text[text.index("diff --git") :].splitlines()
        assert all(line.startswith(("diff --git ", "index ", "--- ", "+++ ", "@@ ", "+", "-")) for line in body)
        assert all(line.endswith("@@") for line in body if line.startswith("@@"))
        removed += sum(line.startswith("-") and not line.startswith("---") for line in body)
    assert removed <= 10
