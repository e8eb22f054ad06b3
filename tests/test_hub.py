"""The model card, and the upload to a hub: the real client against as much of a hub as takes two models."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny
from huggingface_hub import ModelCard

from electra_wrap import card, stages
from electra_wrap.profile import NETWORKS, Profile, toml
from electra_wrap.rundir import RunDir
from electra_wrap.stages import Run

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

TOKEN = "hf_hunter2"


class Hub(http.server.ThreadingHTTPServer):
    """Model repositories by name, each with whether it is private, its files, and what its card says."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    @property
    def writes(self) -> list[str]:
        return [request for request in self.requests if not request.startswith("GET")]

    def add(self, name: str, private: bool) -> None:
        self.repositories[name] = {"private": private, "files": {}, "card": {}}


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def answer(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, value = 401, {"error": "Invalid username or password."}
        if self.path.startswith("/objects/") or self.headers.get("Authorization") == f"Bearer {TOKEN}":
            status, value = self.act(body)
        content = json.dumps(value).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = answer

    def act(self, body: bytes) -> tuple[int, Any]:
        hub, path = self.server, self.path.split("?")[0]
        if path == "/api/whoami-v2":
            return 200, {"name": "ana", "type": "user"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization'] or 'ana'}/{asked['name']}"
            status = 409 if name in hub.repositories else 200
            if status == 200:
                hub.add(name, asked.get("visibility") == "private" or asked.get("private") is True)
            return status, {"url": f"{hub.url}/{name}"}
        if path.startswith("/objects/"):
            hub.objects[path.removeprefix("/objects/")] = body
            return 200, {}
        if path.endswith(".git/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            return 200, {
                "transfer": "basic",
                "objects": [o | {"actions": {"upload": {"href": f"{hub.url}/objects/{o['oid']}"}}} for o in wanted],
            }
        name, _, rest = path.removeprefix("/api/models/").partition("/preupload/")
        if rest:
            modes = [(file["path"], file["path"].endswith(".safetensors")) for file in json.loads(body)["files"]]
            keys = ({"path": path, "uploadMode": "lfs" if large else "regular"} for path, large in modes)
            return 200, {"files": [key | {"shouldIgnore": False} for key in keys]}
        name, _, rest = path.removeprefix("/api/models/").partition("/commit/")
        if name not in hub.repositories:
            return 404, {"error": "Repository not found"}
        repository = hub.repositories[name]
        if rest:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    repository["files"][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    repository["files"][value["path"]] = hub.objects[value["oid"]]
            return 200, {"commitUrl": f"{hub.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40}
        private, said = repository["private"], repository["card"]
        return 200, {"id": name, "private": private, "cardData": said, "siblings": [], "sha": "0" * 40}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, corpus_text: Path) -> Run:
    """A run of two steps, up to the exported models."""
    profile = tiny(corpus_text, 'engine="native"', 'description="Un modelo: «pequeño»"', "language=es-MX", steps=2)
    run = Run(profile, RunDir(tmp_path_factory.mktemp("converted") / "run"))
    stages.execute(run, "convert")
    return run


@pytest.fixture
def export(cli: Cli, converted: Run, hub: Hub, tmp_path: Path) -> Cli:
    """Run `export` of the converted models, without what the machine knows of hubs."""
    profile = tmp_path / "mine.toml"
    profile.write_text(toml(converted.profile.model_dump()), encoding="utf-8")

    def call(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        known = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
        # The storage that large files go to today has no protocol that could be served here.
        env = {**known, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", **variables}
        return cli("export", "--profile", "mine.toml", "--run-dir", str(converted.directory.path), *arguments, env=env)

    return call


def test_what_arrives_is_the_export_bit_for_bit_and_private(export: Cli, hub: Hub, converted: Run) -> None:
    done = export("--push-to-hub", "chica")
    assert done.returncode == 0, done.stderr + str(hub.requests)
    assert done.stdout.splitlines() == [f"{hub.url}/ana/chica-{network}" for network in NETWORKS]
    for network in NETWORKS:
        folder, repository = converted.directory / "hf" / network, hub.repositories[f"ana/chica-{network}"]
        assert repository["private"] is True
        assert repository["files"] == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert all(hashlib.sha256(content).hexdigest() == name for name, content in hub.objects.items())
    assert TOKEN not in done.stdout + done.stderr
    for path in converted.directory.path.rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path


def test_a_licence_that_was_given_on_the_hub_stays(export: Cli, hub: Hub, converted: Run) -> None:
    hub.add("org/chica-generator", private=True)
    hub.repositories["org/chica-generator"]["card"] = {"license": "cc-by-4.0", "tags": ["other"]}
    assert export("--push-to-hub", "org/chica", "--public").returncode == 0
    assert not hub.repositories["org/chica-discriminator"]["private"], "which --public is for"
    ours = ModelCard.load(converted.directory / "hf" / "generator" / "README.md")
    theirs = ModelCard(hub.repositories["org/chica-generator"]["files"]["README.md"].decode())
    assert theirs.data.to_dict() == ours.data.to_dict() | {"license": "cc-by-4.0"} and theirs.text == ours.text


@pytest.mark.parametrize(
    ("arguments", "variables", "code", "says"),
    [
        ([], {}, 2, "--push-to-hub"),
        (["--push-to-hub", "publica"], {}, 2, "publica-generator is public, and nothing was uploaded"),
        (["--push-to-hub", "a--b"], {}, 2, "a--b"),
        (["--push-to-hub", "a/b/c"], {}, 2, "a/b/c"),
        (["--push-to-hub", "chica", "--set", "description=other"], {}, 2, "description was"),
        (["--push-to-hub", "chica", "--run-dir", "nowhere"], {}, 2, "not done yet"),
        (["--push-to-hub", "chica"], {"HF_TOKEN": "hf_hunter3"}, 3, "says 401"),
        (["--push-to-hub", "chica"], {"HF_TOKEN": "hf_\x0bhunter3"}, 3, "Bearer …"),
        (["--push-to-hub", "chica"], {"HF_TOKEN": ""}, 3, "there is no token"),
        (["--push-to-hub", "chica"], {"HF_ENDPOINT": "http://127.0.0.1:9"}, 3, "cannot be reached"),
        (["--push-to-hub", "chica"], {"HF_HUB_OFFLINE": "1"}, 3, "HF_HUB_OFFLINE"),
    ],
)
def test_what_may_not_go_up_stays_and_that_is_one_line(
    export: Cli, hub: Hub, arguments: list[str], variables: dict[str, str], code: int, says: str
) -> None:
    hub.add("ana/publica-generator", private=False)
    done = export(*arguments, **variables)
    assert done.returncode == code and says in done.stderr, done.stderr
    assert done.stderr.startswith("electra_wrap: error: ") and done.stderr.count("\n") == 1 and done.stdout == ""
    assert "hunter3" not in done.stderr
    assert not hub.writes and not hub.repositories["ana/publica-generator"]["files"]


def test_a_card_says_what_the_model_is_and_what_it_was_made_from(converted: Run, tmp_path: Path) -> None:
    facts = converted.recorded("corpus")["facts"]
    for network in NETWORKS:
        path = converted.directory / "hf" / network / "README.md"
        data = ModelCard.load(path).data.to_dict()
        assert data["language"] == "es" and data["library_name"] == "transformers" and "license" not in data
        assert data["tags"] == ["electra", network, "pretraining"] and "model-index" in data
        assert data.get("pipeline_tag") == {"discriminator": None, "generator": "fill-mask"}[network]
        text = path.read_text(encoding="utf-8")
        assert f"{facts['lines']:,} lines" in text and f"{facts['held_out_lines']:,} lines, in whole doc" in text
        for package in ("torch", "tokenizers"):
            assert f"| {package} | `{stages._version(package)}` |" in text
        assert "`text.txt`" in text and str(converted.profile.corpus.source) not in text and "{" not in text
        (tmp_path / "again.toml").write_text(text.partition("```toml\n")[2].partition("```")[0], encoding="utf-8")
        again = Profile.load(str(tmp_path / "again.toml")).model_dump()
        assert again["corpus"].pop("source") == str(tmp_path / "text.txt")
        expected = converted.profile.model_dump()
        del expected["corpus"]["source"]
        assert again == expected
    assert "torch" not in sys.modules


def test_a_card_has_the_evaluation_of_its_step_and_no_other(converted: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (convert,) = (stage for stage in stages.stages(converted) if stage.name == "convert")
    assert stages.reason(converted, convert) is None
    measured = {key: number / 8 for number, (key, _, _) in enumerate(card.METRICS)} | {"examples": 1234}
    measured["discriminator/auc"] = float("nan")  # where nothing was replaced
    evaluations = {"1": {"generator/accuracy": 0.99}, "2": measured}
    monkeypatch.setitem(converted.directory.manifest, "models", {})
    assert stages.reason(converted, convert) == "evaluated was True and is False"
    model = {converted.profile.model_name: {"evaluations": evaluations}}
    monkeypatch.setitem(converted.directory.manifest, "models", model)
    step, made_by = converted.checkpoint() or (0, None)
    text = card.card(converted, "generator", step, made_by)
    found = {result.metric_name: result.metric_value for result in ModelCard(text).data.eval_results or []}
    assert found == {
        key: measured[key] for key in ("loss/generator", "generator/accuracy", "generator/sampled_accuracy")
    }
    assert "| discriminator/recall | 0.8750 |" in text and "1,234 examples" in text and "nan" not in text


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("/home/ana/secret/es.txt", "es.txt"),
        ("file:///home/ana/secret/es.txt", "es.txt"),
        ("hf://datasets//home/ana/secret/es::train:texto", "es::train:texto"),
        ("https://example.org/texts/es.txt.gz", "https://example.org/texts/es.txt.gz"),
        ("hf://datasets/ana/textos@main:es", "hf://datasets/ana/textos@main:es"),
    ],
)
def test_a_card_has_no_path_of_the_machine(converted: Run, source: str, shown: str) -> None:
    corpus = converted.profile.corpus.model_copy(update={"source": [source]})
    other = Run(converted.profile.model_copy(update={"corpus": corpus}), converted.directory)
    step, made_by = converted.checkpoint() or (0, None)
    text = card.card(other, "generator", step, made_by)
    assert f"- `{shown}`\n" in text and f'source = ["{shown}"]' in text and "/home" not in text
    sets = ModelCard(text).data.to_dict().get("datasets")
    assert sets == (["ana/textos"] if "textos" in source else None)
