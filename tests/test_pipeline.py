"""The pipeline: what is done, redone and refused, with scripts that need no TensorFlow."""

import io
import json
import os
import re
import resource
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr
from pathlib import Path

import pytest

from electra_wrap import checkpoints, files, stages
from electra_wrap.data.tokenization import SPECIAL_TOKENS
from electra_wrap.errors import EnvironmentProblem, StageFailed, UsageError, convert
from electra_wrap.monitor import Scalars
from electra_wrap.pipeline import execute
from electra_wrap.run import MANIFEST, Run
from electra_wrap.stages import STAGES
from electra_wrap.upstream import checkout, records

pytestmark = pytest.mark.usefixtures("fake_upstream")

MakeRun = Callable[..., Run]
Capture = pytest.CaptureFixture[str]
NAME = "electra-tiny-spanish"


def todo(run: Run, until: str | None = "evaluate") -> dict[str, str]:
    """Return the stages that have to be done, each with the reason."""
    with redirect_stderr(io.StringIO()) as printed:
        execute(run, until, dry_run=True)
    return dict(re.findall(r"would do: (\w+) \((.*)\)", printed.getvalue()))


def steps(run: Run) -> list[int]:
    return checkpoints.steps(run.model_dir)


def trained_from(run: Run) -> int:
    return int(run.results(f"train {run.profile.model_name}")["from_step"])


def logged_steps(run: Run) -> list[int]:
    log = run.log_file("train").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["step"] for line in log if line.startswith('{"event": "step"')]


def snapshot(directory: Path) -> dict[str, tuple[bytes, int]]:
    """Return name, content and time of all files of a run directory but its lock."""
    found = (path for path in directory.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(p.relative_to(directory)): (p.read_bytes(), p.stat().st_mtime_ns) for p in found}


def damage(path: Path) -> None:
    """Flip a bit and keep size and time, as a disk does."""
    content, before = bytearray(path.read_bytes()), path.stat()
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_run_writes_the_documented_files(trained: Run) -> None:
    found = set(snapshot(trained.directory))
    expected = f"""profile.json manifest.json hparams.json vocab.txt corpus/part-00000.txt
        corpus/part-00001.txt heldout/part-00000.txt logs/examples.log logs/train.log
        logs/evaluate.log pretrain_tfrecords/pretrain_data.tfrecord-1-of-2
        heldout_tfrecords/pretrain_data.tfrecord-0-of-1 models/{NAME}/step-4.sha256"""
    assert found >= set(expected.split())
    assert not [name for name in found if "partial" in name or ".old-" in name]
    hparams = json.loads((trained.directory / "hparams.json").read_text(encoding="utf-8"))
    assert hparams["vocab_size"] == trained.vocabulary.read_bytes().count(b"\n")


def test_manifest_says_what_each_stage_was_made_from(trained: Run) -> None:
    manifest = json.loads((trained.directory / MANIFEST).read_text(encoding="utf-8"))
    assert manifest["format"] == 3
    train = manifest["stages"][f"train {NAME}"]
    assert train["done"] and train["seconds"] >= 0 and train["started"].endswith("+00:00")
    assert train["results"] == {"from_step": 0, "step": 4, "final_loss": 12.5}
    assert train["inputs"]["engine"] == "upstream" and train["inputs"]["train.seed"] == 0
    assert train["inputs"]["content of corpus.source"].startswith("1 files, ")
    model = manifest["models"][NAME]
    assert model["setup"] == {"device": "1 × CPU", "threads": "2"}
    losses = {step: scalars["loss/total"] for step, scalars in model["evaluations"].items()}
    assert losses == {"2": 102, "4": 104}


def test_held_out_text_is_not_in_the_records(trained: Run) -> None:
    def documents(directory: Path) -> set[str]:
        text = "".join(path.read_text(encoding="utf-8") for path in directory.iterdir())
        return set(text.split("\n\n")) - {""}

    held_out = documents(trained.held_out)
    assert held_out and not held_out & documents(trained.corpus)
    trained_on = b"".join(path.read_bytes() for path in trained.examples[0].iterdir())
    for document in held_out:
        assert b"/" + document.split("\n")[0].encode() not in trained_on


def test_script_gets_seed_precision_and_device(make_run: MakeRun) -> None:
    run = make_run("train.seed=5", "train.precision=tf32")
    execute(run, until="train")
    log = run.log_file("train").read_text(encoding="utf-8")
    assert '{"seed": 5, "precision": "tf32", "stop": 4, "devices": []} -1\n' in log


def test_second_run_changes_nothing(trained: Run, make_run: MakeRun, capsys: Capture) -> None:
    before = snapshot(trained.directory)
    assert execute(make_run(), until="evaluate") == 0
    assert "nothing to do" in capsys.readouterr().err
    assert snapshot(trained.directory) == before


def test_moved_run_directory_is_up_to_date(trained: Run, text: Path, tmp_path: Path) -> None:
    """With its text, which is told from another one by name, size and time."""
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    trained.directory.rename(moved / "run")
    text.rename(moved / "text.txt")
    profile = trained.profile.with_values({"corpus.source": str(moved / "text.txt")})
    assert todo(Run(profile, moved / "run")) == {}


def test_raising_steps_continues_training(trained: Run, make_run: MakeRun) -> None:
    more = make_run(steps=6)
    assert todo(more) == {"train": "at step 4 of 6", "evaluate": "train.steps was 4 and is 6"}
    execute(more, until="evaluate")
    assert logged_steps(more) == [1, 2, 3, 4, 5, 6] and trained_from(more) == 4
    assert steps(more) == list(make_run().model.evaluations) == [2, 4, 6]
    with pytest.raises(UsageError, match=r"at step 6, train.steps = 5; set train.steps=6 or more"):
        execute(make_run(steps=5), until="train")


def test_two_models_in_a_run_directory_stay_up_to_date(trained: Run, make_run: MakeRun) -> None:
    other = make_run("model_name=other", "train.learning_rate=0.5")
    assert list(todo(other)) == ["train", "evaluate"]
    execute(other, until="evaluate")
    assert steps(other) == list(other.model.evaluations) == [4] and steps(trained) == [2, 4]
    assert todo(make_run("model_name=other", "train.learning_rate=0.5")) == {} == todo(make_run())
    assert todo(make_run(steps=5), "train") == {"train": "at step 4 of 5"}


def test_dry_run_prints_the_plan_and_writes_nothing(make_run: MakeRun) -> None:
    assert todo(make_run(), None) == {stage.name: "not done yet" for stage in STAGES}
    assert not make_run().directory.exists()


@pytest.mark.parametrize(
    ("override", "redone", "says"),
    [
        ("corpus.max_lines=100", ["corpus", "heldout"], "corpus.max_lines was None and is 100"),
        ("tokenizer.vocab_size=250", ["vocab.txt"], "tokenizer.vocab_size was 300 and is 250"),
        ("model.max_seq_length=16", [], "model.max_seq_length was 32 and is 16"),
        ("train.seed=3", [], "train.seed was 0 and is 3"),
    ],
)
def test_changed_keys_redo_stages_and_archive_outputs(
    trained: Run, make_run: MakeRun, override: str, redone: list[str], says: str
) -> None:
    before = snapshot(trained.directory)
    changed = make_run(override, "model_name=other")
    assert next(iter(todo(changed, "examples").values())) == says
    execute(changed, until="examples")
    archived = {path.name.removesuffix(".old-1") for path in changed.directory.glob("*.old-1")}
    assert archived >= {*redone, "pretrain_tfrecords", "heldout_tfrecords"}
    assert ("corpus" in archived) == ("corpus" in redone)
    after = snapshot(changed.directory)
    for name, content in before.items():
        first, slash, rest = name.partition("/")
        assert first not in archived or after[f"{first}.old-1{slash}{rest}"] == content
    assert todo(make_run(override, "model_name=other"), "examples") == {}
    execute(make_run(), until="train")
    assert trained_from(make_run()) == 0, "the data is built again, but the model is as it was"


@pytest.mark.parametrize("appended", ["", "\nOtra frase.\n"])
def test_source_of_another_size_or_time_is_another_one(
    trained: Run, make_run: MakeRun, text: Path, appended: str
) -> None:
    status = text.stat()
    text.write_text(text.read_text(encoding="utf-8") + appended, encoding="utf-8")
    os.utime(text, (status.st_atime, status.st_mtime) if appended else (0, 0))
    before = snapshot(trained.directory)
    changed = r"content of corpus\.source was '1 files, .*' and is '1 files, .*'"
    with pytest.raises(UsageError, match=f"has a model trained for 4 steps, and {changed};"):
        execute(make_run("train.steps=6"))
    assert snapshot(trained.directory) == before
    assert list(todo(make_run("model_name=other"), "train")) == [s.name for s in STAGES[:4]]
    execute(make_run("model_name=other"), until="corpus")
    assert (trained.directory / "corpus.old-1").is_dir()
    assert "corpus" not in todo(make_run("model_name=other"))


@pytest.mark.parametrize("name", ["corpus", "heldout", "vocab.txt", "pretrain_tfrecords"])
def test_lost_output_is_built_again_and_the_model_kept(
    trained: Run, make_run: MakeRun, name: str
) -> None:
    before = snapshot(trained.directory)
    files.remove(trained.directory / name)
    assert list(todo(make_run()).values()) == [f"{name} is missing"]
    assert execute(make_run(), until="evaluate") == 1
    after = snapshot(trained.directory)
    assert all(after[file][0] == before[file][0] for file in before if file.startswith(name))
    assert todo(make_run()) == {} and trained_from(make_run()) == 0


def test_failed_stage_leaves_no_output_and_is_repeated(make_run: MakeRun, text: Path) -> None:
    text.write_text("una frase\n\nCRASH\n", encoding="utf-8")
    run = make_run("corpus.held_out=0")
    with pytest.raises(StageFailed, match=r"ended with code 1; .*examples\.log") as raised:
        execute(run, until="examples")
    assert raised.value.log_tail.endswith("job 1 failed")
    assert not run.examples[0].exists() and not list(run.directory.glob("*.partial"))
    assert todo(make_run("corpus.held_out=0"), "examples") == {"examples": "interrupted"}
    text.write_text("una frase\n\notra\n", encoding="utf-8")
    with pytest.raises(StageFailed, match="train ended with code 1") as raised:
        execute(make_run("corpus.held_out=0", "train.learning_rate=0.666"), until="train")
    assert raised.value.log_tail.endswith("loss was NaN")


def test_file_that_a_user_put_in_place_is_archived(make_run: MakeRun) -> None:
    """A vocabulary, say, that could not be fetched."""
    for number in range(3):
        with pytest.raises(EnvironmentProblem, match="correct the name"):
            execute(make_run("tokenizer.source=hf://nobody/nothing at all"), until="vocab")
        archived = sorted(make_run().directory.glob("vocab.txt.old-*"))
        assert [path.read_text(encoding="utf-8") for path in archived] == ["mine"] * number
        make_run().vocabulary.write_text("mine", encoding="utf-8")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("corpus.held_out=0.3", "corpus.held_out was 0.2 and is 0.3"),
        ("corpus.max_lines=100", "corpus.max_lines was None and is 100"),
        ("tokenizer.vocab_size=250", "tokenizer.vocab_size was 300 and is 250"),
        ("tokenizer.lowercase=true", "tokenizer.lowercase was False and is True"),
        ("model.max_seq_length=16", "model.max_seq_length was 32 and is 16"),
        ("model.num_hidden_layers=3", "the discriminator's num_hidden_layers was 2 and is 3"),
        ("train.learning_rate=0.5", "train.learning_rate was 0.001 and is 0.5"),
        ("train.batch_size=5", "train.batch_size was 4 and is 5"),
        ("train.seed=1", "train.seed was 0 and is 1"),
        ("engine=native", "engine was 'upstream' and is 'native'"),
    ],
)
def test_continuing_with_other_settings_is_refused(
    trained: Run, make_run: MakeRun, override: str, says: str
) -> None:
    before = snapshot(trained.directory)
    for until in ("corpus", "train", None):
        with pytest.raises(UsageError) as raised:
            execute(make_run(override, steps=6), until)
        assert f"4 steps, and {says}; restore that" in str(raised.value)
    assert snapshot(trained.directory) == before


def test_model_of_unknown_origin_is_refused(make_run: MakeRun) -> None:
    run = make_run()
    execute(run, until="examples")
    run.model_dir.mkdir(parents=True)
    checkpoints.checksums(run.model_dir, 7).touch()
    with pytest.raises(UsageError, match="has a model of another run; choose another model_name"):
        execute(make_run(), until="train")


def test_run_directory_in_use_is_refused(make_run: MakeRun) -> None:
    with make_run().lock(), pytest.raises(UsageError, match="is in use by another process"):
        execute(make_run(), until="corpus")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is damaged; restore it"),
        ("[]", "is damaged; restore it"),
        ('{"format": 3, "stages": {"corpus": {}}}', "is damaged; restore it"),
        ('{"format": 3, "models": {"m": {"evaluations": {"x": {}}}}}', "is damaged; restore it"),
        (
            '{"format": 3, "stages": {"vocab": {"inputs": {}, "started": "", "results": '
            '{"vocab_size": "many"}}}}',
            "is damaged; restore it",
        ),
        ('{"format": 2, "stages": {}, "digests": {}}', "made by another version of electra_wrap"),
        ('{"stages": {"corpus": {"outcome": "done"}}}', "made by another version of electra_wrap"),
    ],
)
def test_manifest_that_cannot_be_read_is_one_error(
    trained: Run, make_run: MakeRun, content: str, says: str
) -> None:
    (trained.directory / MANIFEST).write_text(content, encoding="utf-8")
    for read in (make_run, lambda: Run.open(trained.directory)):
        with pytest.raises(UsageError, match=says) as raised:
            read()
        assert "\n" not in str(raised.value)


def test_changed_checkout_is_not_executed(make_run: MakeRun) -> None:
    execute(make_run(), until="examples")
    (checkout.ensure() / "run_pretraining.py").write_text("# other\n", encoding="utf-8")
    with pytest.raises(EnvironmentProblem, match=r"was changed: run_pretraining\.py"):
        execute(make_run(), until="train")
    assert not make_run().log_file("train").exists()


@pytest.mark.parametrize(
    ("part", "how"),
    [
        ("model.ckpt-4.index", damage),
        ("model.ckpt-4.data-00000-of-00001", Path.unlink),
        ("step-4.sha256", damage),
        ("step-4.sha256", lambda path: path.write_bytes(b"")),
    ],
)
def test_damaged_checkpoint_is_renamed_and_the_one_before_is_used(
    trained: Run, make_run: MakeRun, part: str, how: Callable[[Path], None], capsys: Capture
) -> None:
    how(trained.model_dir / part)
    names = {path.name for path in trained.model_dir.glob("*-4*")}
    run = make_run(steps=6)
    execute(run, until="train")
    assert "warning: the checkpoint of step 4 is damaged" in capsys.readouterr().err
    assert {path.name.removesuffix(".old-1") for path in run.model_dir.glob("*.old-1")} == names
    assert trained_from(run) == 2 and steps(run) == [2, 6]
    assert list(run.model.evaluations) == [2], "other weights will be at step 4"
    assert logged_steps(run) == [1, 2, 3, 4, 3, 4, 5, 6]


def test_checkpoint_without_checksums_is_none(trained: Run, make_run: MakeRun) -> None:
    (trained.model_dir / "step-4.sha256").unlink()
    (trained.model_dir / "step-9").mkdir()
    assert todo(make_run()) == {"train": "at step 2 of 4", "evaluate": "depends on train"}
    execute(make_run(), until="evaluate")
    assert trained_from(make_run()) == 2
    assert steps(trained) == list(make_run().model.evaluations) == [2, 4]


def test_damaged_checkpoint_is_not_converted_or_evaluated(trained: Run) -> None:
    damage(trained.model_dir / "model.ckpt-4.index")
    with pytest.raises(UsageError, match="no checkpoint of step 3; choose another --step"):
        checkpoints.require(trained.model_dir, 3)
    assert checkpoints.require(trained.model_dir, 2) == 2
    assert checkpoints.require(trained.model_dir, None) == 2
    assert (trained.model_dir / "model.ckpt-4.index.old-1").is_file()
    damage(trained.model_dir / "model.ckpt-2.index")
    for step in (2, None):
        with pytest.raises(UsageError, match=r"no (intact )?checkpoint"):
            checkpoints.require(trained.model_dir, step)


def test_without_intact_checkpoint_training_starts_again(trained: Run, make_run: MakeRun) -> None:
    for step in (2, 4):
        damage(trained.model_dir / f"model.ckpt-{step}.data-00000-of-00001")
    (trained.model_dir / "model.ckpt-9_temp").mkdir()
    execute(make_run(steps=5), until="evaluate")
    assert trained_from(make_run()) == 0
    assert steps(trained) == list(make_run().model.evaluations) == [5]
    assert not (trained.model_dir / "model.ckpt-9_temp").exists()


def test_training_on_another_machine_is_logged(
    trained: Run, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("THREADS", "8")
    execute(make_run(steps=6), until="train")
    assert "train: continues with threads 8; it was 2" in capsys.readouterr().err
    assert make_run().model.setup == {"device": "1 × CPU", "threads": "8"}
    execute(make_run(steps=8), until="train")
    assert "continues with" not in capsys.readouterr().err


def test_text_that_cannot_be_evaluated_is_trained_all_the_same(
    make_run: MakeRun, text: Path, capsys: Capture
) -> None:
    text.write_text("Un solo documento.\n" * 40, encoding="utf-8")
    run = make_run("train.evaluate_every=2")
    execute(run, until="evaluate")
    printed = capsys.readouterr().err
    assert "warning: no text is held out, so the model is not evaluated" in printed
    assert "warning: train.evaluate_every has no effect" in printed
    assert steps(run) == [4] and run.results(f"evaluate {NAME}") == {}
    with pytest.raises(UsageError, match="has no held-out examples"):
        stages.evaluate(make_run(), 4)


def test_repetitive_text_and_small_vocabulary_are_warnings(
    make_run: MakeRun, text: Path, capsys: Capture
) -> None:
    text.write_text("".join(f"La misma frase.\n{i}\n\n" for i in range(40)), encoding="utf-8")
    execute(make_run("corpus.held_out=0.5", "tokenizer.vocab_size=5000"), until="vocab")
    printed = capsys.readouterr().err
    assert "held-out text are lines that the training text has, too; set corpus.ded" in printed
    assert "the text gives a vocabulary of less than 5,000 tokens" in printed


@pytest.mark.parametrize(
    ("token", "line", "is_refused", "message"),
    [
        ("X", "X b c", True, r"67% of the text's tokens are \[UNK\]; the vocabulary does not fit"),
        ("X", "X " * 20 + "b", False, r"warning: 5% of the text's tokens are \[UNK\]; the voc"),
        ("a", "a " * 20 + "B", False, "no upper-case letters; set tokenizer.lowercase = true"),
        ("X", "X" * 250, True, "100% .* words of more than 200 characters become one"),
    ],
)
def test_text_that_the_vocabulary_does_not_know(
    make_run: MakeRun,
    text: Path,
    capsys: Capture,
    token: str,
    line: str,
    is_refused: bool,
    message: str,
) -> None:
    text.write_text(f"{line}\n\n" * 40, encoding="utf-8")
    (source := text.with_name("v.txt")).write_text("\n".join([*SPECIAL_TOKENS, token]), "utf-8")
    run = make_run(f"tokenizer.source={source}", "corpus.held_out=0")
    with pytest.raises(UsageError, match=message) if is_refused else nullcontext():
        execute(run, until="vocab")
    assert is_refused or re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("engine", ["native", "upstream"])
def test_full_disk_while_building_is_one_error(make_run: MakeRun, engine: str) -> None:
    run = make_run(f"engine={engine}")
    execute(run, until="vocab")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, before[1]))
    try:
        with pytest.raises((EnvironmentProblem, OSError)) as raised:
            execute(make_run(f"engine={engine}"), until="examples")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    failure = convert(raised.value)
    assert isinstance(failure, EnvironmentProblem) and "File too large" in str(failure)
    execute(make_run(f"engine={engine}"), until="examples")


@pytest.mark.parametrize(
    "write",
    [
        lambda gone: files.atomic(gone / "hf", directory=True).__enter__(),
        lambda gone: Scalars(gone / "models" / "m" / "eval"),
        lambda gone: records.tf.io.gfile.makedirs(str(gone / "models" / "m")),
    ],
)
def test_run_directory_whose_disk_is_gone_is_not_made_anew(
    tmp_path: Path, write: Callable[[Path], object]
) -> None:
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "gone")
    assert not (tmp_path / "gone").exists()
