"""The checkout of upstream is exactly the pin, or it is refused."""

import concurrent.futures
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import git

from electra_wrap import paths
from electra_wrap.errors import EnvironmentProblem
from electra_wrap.profile import toml
from electra_wrap.upstream import checkout


def refusal(source: str | None = None) -> str:
    """Return the message with which `ensure` fails, leaving nothing behind."""
    with pytest.raises(EnvironmentProblem) as raised:
        checkout.ensure(source)
    assert "\n" not in str(raised.value)
    assert {p.name for p in paths.vendor_directory().iterdir()} <= {".lock", "electra.lock"}
    return str(raised.value)


def test_checkout_is_patched_and_fetched_once_and_then_only_read(fake_upstream: Path) -> None:
    """So it may be on a read-only file system. Git updates its own index if it can."""

    def snapshot() -> dict[Path, int]:
        found = (path for path in vendor.rglob("*") if ".git" not in path.parts)
        return {path: path.stat().st_mtime_ns for path in [vendor, *found]}

    directory, vendor = checkout.ensure(), paths.vendor_directory()
    assert (directory / "run_pretraining.py").read_text(encoding="utf-8").startswith("# patched\n")
    shutil.rmtree(fake_upstream)
    (vendor / ".lock").unlink()
    os.utime(directory / "run.sh", (0, 0))
    before = snapshot()
    assert checkout.ensure() == directory and snapshot() == before


def test_directory_that_cannot_be_made_is_named_with_a_fix(
    fake_upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "vendor_directory", lambda: fake_upstream / "run.sh" / "vendor")
    monkeypatch.setattr(paths, "IN_CHECKOUT", False)
    expected = r"run.sh/vendor.* cannot be written \(.*\); set XDG_CACHE_HOME, or --set engine="
    with pytest.raises(EnvironmentProblem, match=expected):
        checkout.ensure()


@pytest.mark.parametrize("kind", ["clone", "mirror", "bundle", "url"])
def test_every_kind_of_source(
    fake_upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Also with later commits, and by a relative path."""
    later = "-c user.name=t -c user.email=t@example.org commit --quiet --allow-empty -m later"
    git(fake_upstream, *later.split())
    git(tmp_path, "clone", "--quiet", fake_upstream.name, "clone")
    git(tmp_path, "clone", "--quiet", "--mirror", fake_upstream.name, "mirror")
    git(fake_upstream, "bundle", "create", "--quiet", "../bundle", "--all")
    monkeypatch.chdir(tmp_path)
    directory = checkout.ensure(fake_upstream.as_uri() if kind == "url" else kind)
    assert (directory / "model" / "__init__.py").is_file()


def test_urls_are_rewritten_and_nothing_else_of_the_user_has_an_effect(
    fake_upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither hooks, attributes and ignored names, nor the variables that git sets for a hook."""
    url, settings = "https://host.invalid/e.git", tmp_path / "git"
    settings.mkdir()
    config = f'[core]\n hooksPath = {settings}\n[url "{fake_upstream}"]\n insteadOf = {url}\n'
    files = {"config": config, "attributes": "* text eol=crlf\n", "ignore": "*.pyc\n"}
    files["post-checkout"] = f"#!/bin/sh\ntouch {tmp_path}/ran\n"
    for name, content in files.items():
        (settings / name).write_text(content, encoding="utf-8")
        (settings / name).chmod(0o755)
    monkeypatch.delenv("GIT_CONFIG_GLOBAL", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):
        monkeypatch.setenv(name, str(tmp_path / "other"))
    directory = checkout.ensure(url)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "other").exists()
    assert b"\r" not in (directory / "run_pretraining.py").read_bytes()
    (directory / "model" / "m.pyc").touch()
    with pytest.raises(EnvironmentProblem, match=r"was changed: model/m\.pyc;"):
        checkout.ensure()


def test_concurrent_callers_share_one_checkout(fake_upstream: Path) -> None:
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: checkout.ensure(), range(4)))) == 1
    assert len(list(paths.vendor_directory().glob("*electra-*"))) == 1


def replace(path: Path) -> None:
    """Change a file's content, but not its size."""
    path.write_bytes(b"#" * path.stat().st_size)


TAMPERS: dict[str, Callable[[Path], Any]] = {
    "run_pretraining.py": lambda d: replace(d / "run_pretraining.py"),
    "build_pretraining_dataset.py": lambda d: (d / "build_pretraining_dataset.py").write_text("\n"),
    "model/sitecustomize.py": lambda d: (d / "model" / "sitecustomize.py").touch(),
    "run.sh": lambda d: (d / "run.sh").chmod(0o644),
    "run.sh, z": lambda d: [(d / "z").touch(), (d / "run.sh").unlink()],
    ".*": lambda d: (d / ".git" / "HEAD").unlink(),
}


@pytest.mark.parametrize("changed", TAMPERS)
def test_changed_checkout_is_refused(fake_upstream: Path, changed: str) -> None:
    TAMPERS[changed](checkout.ensure())
    with pytest.raises(EnvironmentProblem, match=rf"was changed: {changed}; move it away and run"):
        checkout.ensure()


def test_scripts_that_were_run_by_hand_are_no_change(fake_upstream: Path) -> None:
    (compiled := checkout.ensure() / "model" / "__pycache__").mkdir()
    (compiled / "__init__.cpython-311.pyc").touch()
    checkout.ensure()


def test_other_patches_or_commits_are_refused(fake_upstream: Path) -> None:
    change = "diff --git a/run.sh b/run.sh\n--- a/run.sh\n+++ b/run.sh\n@@ -0,0 +1 @@\n+#\n"
    (paths.PATCHES / "0002-more.patch").write_text(change, encoding="utf-8")
    assert "the patches give tree" in refusal()
    lock = toml(checkout.read_pin() | {"commit": "0" * 40})
    paths.LOCK_FILE.write_text(lock, encoding="utf-8")
    assert "commit 000000000000 is not" in refusal()


def test_unreachable_remote_is_reported_with_both_alternatives(
    fake_upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkout, "TIMEOUT", 1)
    command = f"ext::sh -c 'touch {tmp_path}/ran'"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        never_answers = f"http://127.0.0.1:{silent.getsockname()[1]}/e.git"
        for source in ("http://127.0.0.1:9/e", str(tmp_path / "nowhere"), command, never_answers):
            assert re.search("bundle of it with --upstream PATH, .*engine=native", refusal(source))
    assert not (tmp_path / "ran").exists()


def test_patches_have_no_text_of_upstream_but_what_they_remove() -> None:
    """Zero context: every line is a header, an insertion, or one of very few removals."""
    removed = 0
    for patch in sorted(paths.PATCHES.glob("*.patch")):
        text = patch.read_text(encoding="utf-8")
        body = text[text.index("diff --git") :].splitlines()
        assert all(re.match(r"diff --git |index |@@ .*@@$|[+-]", line) for line in body)
        removed += sum(line.startswith("-") and not line.startswith("---") for line in body)
    assert 0 < removed <= 10
