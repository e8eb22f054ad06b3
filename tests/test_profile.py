"""Profiles: strict, with errors that name the file, the key and the value."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize("name", [name for name, _ in profiles.shipped()])
def test_shipped_profiles_load_are_shown_and_round_trip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = profiles.load(name)
    values = loaded.known_values()
    (tmp_path / "copy.toml").write_text(profile.toml(values), encoding="utf-8")
    assert profiles.load("copy.toml") == loaded
    assert profile.Profile.model_validate_json(loaded.model_dump_json()) == loaded
    assert json.loads(cli("show", "--profile", name).stdout) == values
    # What follows from the weights of the first phase is not known before they are read.
    sizes = {"model.size", "model.generator_hidden_size", "tokenizer.source", "tokenizer.lowercase"}
    shown = {f"{section}.{key}" for section in ("model", "tokenizer") for key in values[section]}
    assert sizes & shown == (set() if name == "spanish-base" else sizes)
    assert name != "spanish-base" or loaded.model.init_from == f"{tmp_path}/runs/spanish-base-128"


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
    for network, sizes in zip(profile.NETWORKS, expected, strict=True):
        config = loaded.hf_config(network, 1000)
        assert tuple(config[field.name] for field in dataclasses.fields(profile.Shape)) == sizes
        assert config["vocab_size"] == 1000 and config["layer_norm_eps"] == 1e-12


#: A value, and the error after the name of the file.
ERRORS = """
train.step=5 | unknown key train.step (did you mean steps?); remove or rename it
trian.steps=5 | unknown key trian (did you mean train?); remove or rename it
corpus.similarity=0.9 | unknown key corpus.similarity; remove or rename it
train.steps=soon | train.steps = 'soon': input should be a valid integer; correct it
train.steps=true | train.steps = True: input should be a valid integer; correct it
train.steps=0 | train.steps = 0: input should be greater than 0; correct it
train.seed=[ | train.seed = '[': input should be a valid integer; correct it
train=5 | train = 5: input should be a valid dictionary or instance of Train; correct it
train.warmup_steps=100 | train.warmup_steps = 100: it does not end in 100 steps; choose about a
train.evaluate_every=5 | train.evaluate_every = 5: no text is held out; set corpus.held_out, e.g.
engine=tpu | engine = 'tpu': input should be 'native' or 'upstream'; correct it
train.precision=bfloat16 | train.precision = 'bfloat16': upstream does not support it; set engine =
train.compile=true | train.compile = True: upstream does not support it; set engine = "native"
train.micro_batches=2 | train.micro_batches = 2: upstream does not support it; set engine = "nativ
model.generator_num_attention_heads=2 | model.generator_num_attention_heads = 2: upstream does not
model.hidden_size=200 | model.hidden_size = 200: the discriminator's hidden size 200 does not fit 3
model.generator_hidden_size=0.7 | model.generator_hidden_size = 0.7: the generator's hidden size 179
model.generator_layers=0.01 | model.generator_layers = 0.01: the generator has no layers; choose a
model.max_seq_length=513 | model.max_seq_length = 513: it is larger than model.max_position_embedd
model.size=tiny | model.size = 'tiny': input should be 'small', 'base' or 'large'; correct it
tokenizer.strip_accents=true | tokenizer.strip_accents = True: it needs lowercased text; set tokeni
tokenizer.vocab_size=9 | tokenizer.vocab_size = 9: it needs a trained vocabulary; remove it, or set
tokenizer.sample_bytes=9 | tokenizer.sample_bytes = 9: it needs a trained vocabulary; remove it, or
tokenizer.source=train | tokenizer.vocab_size: source = "train" needs it; set it, for example 32000
tokenizer.source='' | tokenizer.source = '': it is missing; give a file, hf://NAME or "train"
tokenizer.sha256=abc | tokenizer.sha256 = 'abc': string should match pattern '^[0-9a-f]{64}$'; corr
corpus={deduplicate='documents',blank_lines_separate_documents=false} | corpus.deduplicate = 'docum
corpus={source=['a','b'],sha256='DIGEST'} | corpus.sha256 = 'DIGEST': it is the digest of one file;
corpus.source=[] | corpus.source = []: it names nothing; give files, globs, URLs or directories
corpus.source=[1] | corpus.source = [1]: input should be a valid string; correct it
corpus.bad_lines=ignore | corpus.bad_lines = 'ignore': input should be 'repair', 'skip' or 'stop'; c
corpus.held_out=1.5 | corpus.held_out = 1.5: input should be less than 1; correct it
model_name=../../etc | model_name = '../../etc': string should match pattern '^[A-Za-z0-9][A-Za-z0-
""".replace("DIGEST", "0" * 64)


@pytest.mark.parametrize("line", ERRORS.strip().splitlines())
def test_error_names_file_key_value_and_fix(base: str, line: str) -> None:
    override, _, message = line.partition(" | ")
    assert error(base, override).startswith(f"{base}: {message}")


def test_value_that_is_no_toml_is_a_string(base: str) -> None:
    for text in ("un modelo: nuevo", "hf://a/b", '"a', "1.5.2", "1\nb = 2", "{", "2026-01-32"):
        assert profiles.load(base, [f"description={text}"]).description == text
    assert profiles.load(base, ['description="un \\u00f1"', "train.seed = 3 "]).train.seed == 3


def test_extends_inherits_and_refuses_cycles(tmp_path: Path, base: str) -> None:
    child = tmp_path / "child.toml"
    child.write_text('extends = "base"\nmodel_name = "b"\n[train]\nsteps = 50\n', encoding="utf-8")
    train = (loaded := profiles.load(str(child), ["train.seed=3"])).train
    assert (loaded.model_name, train.steps, train.warmup_steps, train.seed) == ("b", 50, 10, 3)
    child.write_text('extends = "child"\n', encoding="utf-8")
    assert "back to itself" in error(str(child))


def test_new_source_drops_what_was_inherited_of_the_former(tmp_path: Path) -> None:
    digest = "a" * 64
    given = ["tokenizer.vocab_size=900", "tokenizer.source=train", "tokenizer.lowercase=true"]
    tokenizer = profiles.load("spanish-demo", given).tokenizer
    assert (tokenizer.sha256, tokenizer.vocab_size, tokenizer.lowercase) == (None, 900, True)
    given = [f"tokenizer.sha256={digest}", "tokenizer.source=/v.txt"]
    tokenizer = profiles.load("spanish-small-32k", given).tokenizer
    assert (tokenizer.sha256, tokenizer.vocab_size, tokenizer.sample_bytes) == (digest, None, None)
    (tmp_path / "a.toml").write_text(f'{BASE}\n[model]\nsize = "base"', encoding="utf-8")
    (tmp_path / "b.toml").write_text('extends = "a"\n[corpus]\nsource = "b"', encoding="utf-8")
    assert profiles.load(f"{tmp_path}/a.toml", [f"corpus.sha256={digest}"]).corpus.sha256 == digest
    loaded = profiles.load(f"{tmp_path}/b.toml", ["model={init_from='w',num_attention_heads=12}"])
    assert loaded.explicit() == {"model.num_attention_heads": 12}, "new weights have other sizes"
    assert loaded.model.init_from == str(Path.cwd() / "w")


def test_last_override_wins() -> None:
    given = ["train={steps=90,warmup_steps=1}", "train.steps=80", "train.steps=70"]
    assert profiles.load("spanish-tiny", given).train.steps == 70
    assert "train is a value, not a section" in error("spanish-tiny", "train=5", "train.steps=80")
    assert "'train.steps' is not KEY=VALUE; write" in error("spanish-tiny", "train.steps")


def test_relative_paths_start_from_the_file_that_sets_them(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (elsewhere := tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    (tmp_path / "child.toml").write_text('extends = "base.toml"', encoding="utf-8")
    assert profiles.load("../child.toml").corpus.source == str(tmp_path / "text.txt")
    given = ['corpus.source=["a.txt", "hf://x", "/b.txt"]', "tokenizer.source=v.txt"]
    loaded = profiles.load(base, given)
    assert loaded.corpus.source == [str(elsewhere / "a.txt"), "hf://x", "/b.txt"]
    assert loaded.tokenizer.source == str(elsewhere / "v.txt")
    unknown = profiles.load(base, ["corpus.source=~nobody-of-that-name"]).corpus.source
    assert unknown == str(elsewhere / "~nobody-of-that-name")


def test_unknown_and_broken_profiles(tmp_path: Path) -> None:
    assert "did you mean spanish-tiny?" in error("spanish-tyni")
    assert "no profile file" in error("./nowhere.toml")
    assert "no profile file" in error("~nobody-of-that-name/nowhere.toml")
    broken = tmp_path / "broken.toml"
    for content in (b"steps = = 3", b"description = '\xff'"):
        broken.write_bytes(content)
        assert "not valid TOML" in error(str(broken))
    broken.write_text('description = "d"', encoding="utf-8")
    assert "language: field required" in error(str(broken))


def load_or_refuse(name: str, *overrides: str) -> None:
    try:
        loaded = profiles.load(name, overrides)
    except UsageError as raised:
        assert "\n" not in str(raised)
    else:  # model_name must not be a path
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", loaded.model_name)


NAMES = "extends description language model_name engine corpus tokenizer model train source size"
NAMES += " corpus.source tokenizer.source steps train.steps train.seed corpus.a.b sha256 vocab_size"
KEYS = st.sampled_from(NAMES.split()) | st.from_regex(r"[a-z_]{1,6}", fullmatch=True)
SCALARS = st.integers() | st.booleans() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(SCALARS, st.lists, max_leaves=4).map(json.dumps)


@given(st.text(max_size=40) | st.builds("{}={}".format, KEYS, VALUES))
def test_any_override_is_valid_or_one_line(text: str) -> None:
    load_or_refuse("spanish-tiny", text)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.builds("{} = {}".format, KEYS, VALUES) | KEYS.map("[{}]".format)))
def test_any_file_is_valid_or_one_line(tmp_path: Path, lines: list[str]) -> None:
    path = tmp_path / "strange.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    load_or_refuse(str(path))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_is_valid_or_one_line(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray((paths.CONFIGS / "spanish-tiny.toml").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=5))
    path = tmp_path / "damaged.toml"
    path.write_bytes(content)
    load_or_refuse(str(path))
