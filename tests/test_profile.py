"""Profiles: strict, with errors that name the file, the key and the value."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import PROFILES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from electra_wrap import paths, profile, profiles
from electra_wrap.errors import UsageError
from electra_wrap.upstream.hparams import hparams

BASE = """
description = "d"
language = "es"
model_name = "m"
[corpus]
source = "text.txt"
[tokenizer]
source = "vocab.txt"
[train]
steps = 100
warmup_steps = 10
"""


@pytest.fixture
def base(tmp_path: Path) -> str:
    path = tmp_path / "base.toml"
    path.write_text(BASE, encoding="utf-8")
    return str(path)


def error(name: str, *overrides: str) -> str:
    with pytest.raises(UsageError) as raised:
        profiles.load(name, overrides)
    message = str(raised.value)
    assert "\n" not in message and "\0" not in message
    return message


def test_second_phase_needs_the_first() -> None:
    assert "runs/spanish-base-128' is not there" in error("spanish-base")


@pytest.mark.parametrize("name", PROFILES)
def test_shipped_profiles_load_and_describe_themselves(name: str) -> None:
    loaded = profiles.load(name)
    assert len(loaded.description) > 20
    json.dumps(loaded.model_dump())


def test_shipped_profiles() -> None:
    assert [name for name, _ in profiles.shipped()] == [
        "spanish-base",
        "spanish-base-128",
        "spanish-demo",
        "spanish-small",
        "spanish-small-32k",
        "spanish-tiny",
    ]


def test_spanish_demo_has_the_tutorials_values() -> None:
    demo = profiles.load("spanish-demo")
    values = hparams(demo, 119_547)
    assert demo.corpus.max_lines == 1_000_000
    assert (values["vocab_size"], values["max_seq_length"]) == (119_547, 128)
    assert (values["model_size"], values["do_lower_case"]) == ("small", False)
    assert (values["train_batch_size"], values["num_train_steps"]) == (32, 100)


def test_hparams_have_json_types(base: str) -> None:
    """A non-empty string is true in upstream's config: "false" would evaluate."""
    values = json.loads(json.dumps(hparams(profiles.load(base), 30_522)))
    assert (values["do_train"], values["do_eval"], values["use_tpu"]) == (True, False, False)
    assert [key for key, value in values.items() if isinstance(value, str)] == ["model_size"]


@pytest.mark.upstream
def test_hparams_are_keys_of_upstream(upstream: Path) -> None:
    source = (upstream / "configure_pretraining.py").read_text(encoding="utf-8")
    for name in PROFILES:
        for key in hparams(profiles.load(name), 100):
            assert f"self.{key} = " in source, key


@pytest.mark.parametrize(
    ("size", "generator", "expected"),
    [
        # (embedding, hidden, layers, heads, intermediate) of both networks: Table 6 of the paper
        ("small", 0.25, [(128, 256, 12, 4, 1024), (128, 64, 12, 1, 256)]),
        ("base", 0.33333, [(768, 768, 12, 12, 3072), (768, 256, 12, 4, 1024)]),
        ("large", 0.25, [(1024, 1024, 24, 16, 4096), (1024, 256, 24, 4, 1024)]),
    ],
)
def test_sizes_of_both_networks(
    base: str, size: str, generator: float, expected: list[tuple[int, ...]]
) -> None:
    loaded = profiles.load(base, [f"model.size={size}", f"model.generator_hidden_size={generator}"])
    keys = (
        "embedding_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
    )
    for network, sizes in zip(profile.NETWORKS, expected, strict=True):
        config = loaded.hf_config(network, 1000)
        assert tuple(config[key] for key in keys) == sizes
        assert config["vocab_size"] == 1000 and config["layer_norm_eps"] == 1e-12


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.step=5", ["--set", "train.step", "did you mean steps?"]),
        ("trian.steps=5", ["--set", "trian", "did you mean train?"]),
        ("train.steps=soon", ["--set", "train.steps", "'soon'", "integer"]),
        ("train.steps=true", ["train.steps", "True"]),
        ("train.steps=0", ["train.steps", "greater than 0"]),
        ("train.warmup_steps=100", ["train.warmup_steps = 100", "does not end in 100 steps"]),
        ("model.hidden_size=200", ["model.hidden_size = 200", "does not fit 3 attention heads"]),
        (
            "model.generator_hidden_size=0.7",
            ["model.generator_hidden_size = 0.7", "hidden size 179", "2 attention heads"],
        ),
        ("model.generator_layers=0.01", ["model.generator_layers = 0.01", "no layers"]),
        ("model.max_seq_length=513", ["model.max_seq_length = 513", "512"]),
        ("model.size=tiny", ["model.size = 'tiny'", "'small', 'base' or 'large'"]),
        ("tokenizer.strip_accents=true", ["tokenizer.strip_accents", "lowercase"]),
        ("tokenizer.vocab_size=100", ["tokenizer.vocab_size = 100", "needs a trained vocabulary"]),
        ("tokenizer.source=train", ["tokenizer.vocab_size", "32000"]),
        ("tokenizer.sample_bytes=9", ["tokenizer.sample_bytes = 9", "needs a trained vocabulary"]),
        (
            "corpus={deduplicate='documents', blank_lines_separate_documents=false}",
            ["corpus.deduplicate = 'documents'", "there are no documents"],
        ),
        ("corpus.similarity=0.9", ["unknown key corpus.similarity"]),
        ("corpus.shards=1001", ["corpus.shards = 1001", "less than or equal to 1000"]),
        (
            f"corpus={{source=['a','b'],sha256='{'0' * 64}'}}",
            ["corpus.sha256", "is the digest of one file"],
        ),
        ("corpus.bad_lines=ignore", ["corpus.bad_lines = 'ignore'", "'repair', 'skip' or 'stop'"]),
        ("tokenizer.sha256=abc", ["tokenizer.sha256", "'abc'"]),
        ("model_name=../../etc", ["model_name", "'../../etc'"]),
        ("corpus.held_out=1.5", ["corpus.held_out = 1.5"]),
        ("corpus.source=[1]", ["corpus.source"]),
        ("train=5", ["train = 5"]),
        ("engine=tpu", ["engine = 'tpu'", "'upstream'", "'native'"]),
        ("train.precision=bfloat16", ["--set: train.precision = 'bfloat16'", 'engine = "native"']),
        ("train.compile=true", ["--set: train.compile = True", 'engine = "native"']),
        ("train.micro_batches=2", ["--set: train.micro_batches = 2", 'engine = "native"']),
        ("train.compile=maybe", ["--set: train.compile = 'maybe'"]),
        ("train.steps", ["is not KEY=VALUE"]),
        ('model_name="a', ["neither TOML nor a bare word"]),
    ],
)
def test_error_names_key_value_and_fix(base: str, override: str, parts: list[str]) -> None:
    message = error(base, override)
    for part in parts:
        assert part in message
    assert ";" in message, "it does not say what to do"


def test_error_names_the_file_that_set_the_key(tmp_path: Path, base: str) -> None:
    child = tmp_path / "child.toml"
    child.write_text('extends = "base"\n[train]\nsteps = 5\n', encoding="utf-8")
    assert error(str(child)).startswith(f"{base}: train.warmup_steps = 10")
    child.write_text('extends = "base"\n[train]\nwarmup_steps = 500\n', encoding="utf-8")
    assert error(str(child)).startswith(f"{child}: train.warmup_steps = 500")


def test_extends_inherits_and_refuses_cycles(tmp_path: Path, base: str) -> None:
    child = tmp_path / "child.toml"
    child.write_text(
        'extends = "base"\nmodel_name = "other"\n[train]\nsteps = 50\n', encoding="utf-8"
    )
    loaded = profiles.load(str(child), ["train.seed=3"])
    assert (
        loaded.model_name,
        loaded.train.steps,
        loaded.train.warmup_steps,
        loaded.train.seed,
    ) == ("other", 50, 10, 3)
    child.write_text('extends = "child"\n', encoding="utf-8")
    assert "back to itself" in error(str(child))


def test_extends_with_suffix_is_relative_to_its_file(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "child.toml"
    child.write_text('extends = "base.toml"\nmodel_name = "other"\n', encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = profiles.load("../child.toml")
    assert (loaded.model_name, loaded.train.steps) == ("other", 100)


def test_new_source_drops_digest_and_size_of_the_former(tmp_path: Path) -> None:
    given = ["tokenizer.vocab_size=900", "tokenizer.source=train", "tokenizer.lowercase=true"]
    tokenizer = profiles.load("spanish-demo", given).tokenizer
    assert (tokenizer.source, tokenizer.sha256, tokenizer.vocab_size, tokenizer.lowercase) == (
        "train",
        None,
        900,
        True,
    )
    tokenizer = profiles.load(
        "spanish-tiny", ["tokenizer.source=/v.txt", "tokenizer.sha256=" + "a" * 64]
    ).tokenizer
    assert (tokenizer.source, tokenizer.sha256, tokenizer.vocab_size) == ("/v.txt", "a" * 64, None)


def test_last_override_wins() -> None:
    given = [
        "tokenizer={source='hf://a'}",
        "tokenizer.sha256=" + "a" * 64,
        "tokenizer.source=hf://b",
    ]
    tokenizer = profiles.load("spanish-tiny", given).tokenizer
    assert (tokenizer.source, tokenizer.sha256) == ("hf://b", "a" * 64)
    assert (
        profiles.load(
            "spanish-tiny", ["train=5", "train={steps=90,warmup_steps=1}", "train.steps=80"]
        ).train.steps
        == 80
    )


def test_relative_paths_start_from_the_file_that_sets_them(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert profiles.load(base).corpus.source == str(tmp_path / "text.txt")
    loaded = profiles.load(
        base, ['corpus.source=["a.txt", "hf://x", "/b.txt"]', "tokenizer.source=v.txt"]
    )
    assert loaded.corpus.source == [str(elsewhere / "a.txt"), "hf://x", "/b.txt"]
    assert loaded.tokenizer.source == str(elsewhere / "v.txt")


def test_unknown_and_broken_profiles(tmp_path: Path) -> None:
    assert "did you mean spanish-tiny?" in error("spanish-tyni")
    assert "no profile file" in error("./nowhere.toml")
    assert "no profile file" in error("~nobody-of-that-name/nowhere.toml")
    assert (
        profiles.load("spanish-tiny", ["corpus.source=~nobody-of-that-name"]).corpus.source[0]
        == "/"
    )
    broken = tmp_path / "broken.toml"
    broken.write_text("steps = = 3", encoding="utf-8")
    assert "not valid TOML" in error(str(broken))
    broken.write_bytes(b"description = '\xff'")
    assert "not valid TOML" in error(str(broken))
    broken.write_text('description = "d"', encoding="utf-8")
    assert "language is missing" in error(str(broken))


@given(st.text(max_size=40))
def test_any_override_is_valid_or_one_line(text: str) -> None:
    try:
        profiles.load("spanish-tiny", [text])
    except UsageError as raised:
        assert "\n" not in str(raised)


SOME_KEYS = [
    "train.steps",
    "corpus.source",
    "model",
    "tokenizer.source",
    "train.seed",
    "x",
    "corpus.a.b",
]


@given(
    st.sampled_from(SOME_KEYS),
    st.recursive(st.integers() | st.booleans() | st.floats() | st.text(), st.lists, max_leaves=5),
)
def test_any_value_is_valid_or_one_line(key: str, value: object) -> None:
    try:
        profiles.load("spanish-tiny", [f"{key}={json.dumps(value)}"])
    except UsageError as raised:
        assert "\n" not in str(raised)


NAMES = "extends description language model_name engine corpus tokenizer model train source size"
NAMES += " corpus.source tokenizer.source steps train.steps sha256 vocab_size"
KEYS = st.sampled_from(NAMES.split()) | st.from_regex(r"[a-z_]{1,6}", fullmatch=True)
VALUES = st.recursive(
    st.integers() | st.booleans() | st.floats(allow_nan=False) | st.text(), st.lists, max_leaves=4
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(KEYS, VALUES)), st.lists(st.tuples(KEYS, st.lists(st.tuples(KEYS, VALUES))))
)
def test_any_file_is_valid_or_one_line(
    tmp_path: Path,
    top: list[tuple[str, object]],
    sections: list[tuple[str, list[tuple[str, object]]]],
) -> None:
    lines = [f"{key} = {json.dumps(value, ensure_ascii=True)}" for key, value in top]
    for section, keys in sections:
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in keys)]
    path = tmp_path / "strange.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    load_or_refuse(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_is_valid_or_one_line(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray((paths.CONFIGS / "spanish-tiny.toml").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=5))
    path = tmp_path / "damaged.toml"
    path.write_bytes(content)
    load_or_refuse(path)


def load_or_refuse(path: Path) -> None:
    try:
        loaded = profiles.load(str(path))
    except UsageError as raised:
        assert "\n" not in str(raised)
    else:
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", loaded.model_name), (
            "model_name must not be a path"
        )


@pytest.mark.parametrize(
    ("source", "secret"),
    [
        ("https://me:hunter2@example.org/es.txt", True),
        ("https://me:${A}hunter2@example.org/es.txt", True),
        ("https://${USER}:${PASSWORD}@example.org/es.txt", False),
        ("https://${TOKEN}@example.org/es.txt", False),
        ("abfs://container@account.example.org/es.txt", False),
        ("https://me:${PASSWORD}@example.org/es.txt?sig=${SIG}", False),
        ("https://example.org/es.txt?monkey=1", False),
        ("https://example.org/es.txt?lines=1", False),
        ("https://hunter2@example.org/es.txt", True),
        ("sftp://me@example.org/es.txt", False),
        ("s3://bucket/es.txt", False),
    ],
)
def test_secret_in_a_url_is_refused_and_not_printed(base: str, source: str, secret: bool) -> None:
    try:
        profiles.load(base, [f'corpus.source="{source}"'])
    except UsageError as raised:
        assert (
            secret
            and "write an environment variable: ${NAME}" in str(raised)
            and "hunter2" not in str(raised)
        )
    else:
        assert not secret
