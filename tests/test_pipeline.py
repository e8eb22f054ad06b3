"""The pipeline, with scripts that have upstream's arguments and need no TensorFlow."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from electra_wrap import subprocesses
from electra_wrap.engines import find_checkpoint
from electra_wrap.errors import EnvironmentProblem, StageFailed, UsageError
from electra_wrap.files import is_intact, new_directory, write_json
from electra_wrap.monitor import evaluation, scalars, training
from electra_wrap.pipeline import convert
from electra_wrap.pipeline.evaluate import evaluate
from electra_wrap.pipeline.examples import build_shard
from electra_wrap.pipeline.execute import execute
from electra_wrap.pipeline.plan import plan, select
from electra_wrap.pipeline.stages import STAGES
from electra_wrap.run import MANIFEST, Run
from electra_wrap.upstream import engine, records

pytestmark = pytest.mark.usefixtures("fake_upstream")

MakeRun = Callable[..., Run]


def todo(run: Run, until: str = "train") -> dict[str, str]:
    return {step.stage.name: step.reason for step in plan(run, select(run, STAGES, until))}


def latest_step(run: Run) -> int | None:
    checkpoint = find_checkpoint(run)
    return checkpoint.step if checkpoint else None


def stderr_of(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def snapshot(run: Run) -> dict[Path, bytes]:
    """Return all files but those that each run writes."""
    written = {MANIFEST, "profile.json", ".lock"}
    files = (path for path in run.directory.rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files if path.name not in written}


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def trained(make_run: MakeRun) -> Run:
    run = make_run()
    execute(run, until="train")
    return run


def test_run_writes_the_documented_files(trained: Run) -> None:
    paths = (path for path in trained.directory.rglob("*") if path.is_file())
    found = {str(path.relative_to(trained.directory)) for path in paths}
    expected = """profile.json manifest.json hparams.json vocab.txt corpus/part-00000.txt
        corpus/part-00001.txt heldout/part-00000.txt logs/examples.log logs/train.log
        models/electra-tiny-spanish/checkpoint"""
    assert found >= set(expected.split())
    assert any(name.startswith("pretrain_tfrecords/pretrain_data.tfrecord-0-of-") for name in found)
    assert any(name.startswith("heldout_tfrecords/") for name in found)
    assert not [name for name in found if "partial" in name or ".old-" in name]
    hparams = json.loads((trained.directory / "hparams.json").read_text(encoding="utf-8"))
    assert hparams["vocab_size"] == trained.vocabulary.read_bytes().count(b"\n")


def test_held_out_text_is_not_in_the_records(trained: Run) -> None:
    def documents(name: str) -> set[str]:
        text = "".join(p.read_text(encoding="utf-8") for p in (trained.directory / name).iterdir())
        return set(text.split("\n\n")) - {""}

    assert documents("heldout") and not documents("heldout") & documents("corpus")
    trained_on = b"".join(
        p.read_bytes() for p in (trained.directory / "pretrain_tfrecords").iterdir()
    )
    for document in documents("heldout"):
        assert b"/" + document.split("\n")[0].encode() not in trained_on


def test_second_run_changes_nothing(
    trained: Run, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(trained)
    execute(make_run(), until="train")
    assert "nothing to do" in stderr_of(capsys)
    assert snapshot(trained) == before


def test_moved_run_directory_is_up_to_date(trained: Run, make_run: MakeRun, tmp_path: Path) -> None:
    trained.directory.rename(tmp_path / "moved")
    assert todo(Run(make_run().profile, tmp_path / "moved")) == {}


def test_raising_steps_continues_training(trained: Run, make_run: MakeRun) -> None:
    more = make_run(steps=6)
    assert todo(more) == {"train": "at step 4 of 6"}
    execute(more, until="train")
    log = trained.log_file("train").read_text(encoding="utf-8")
    steps = [json.loads(line)["step"] for line in log.splitlines() if "loss/total" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert more.results("train electra-tiny-spanish")["from_step"] == 4
    with pytest.raises(UsageError, match=r"at step 6, train.steps = 5"):
        todo(make_run(steps=5))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.learning_rate=0.5", "learning_rate was 0.001 and is 0.5"),
        ("train.batch_size=5", "train.batch_size was 4 and is 5"),
        ("model.num_hidden_layers=3", "num_hidden_layers was 2 and is 3"),
        ("train.seed=1", "train.seed was 0 and is 1"),
        ("model.max_seq_length=16", "model.max_seq_length was 32 and is 16"),
        ("tokenizer.vocab_size=250", "tokenizer.vocab_size was 300 and is 250"),
        ("tokenizer.lowercase=true", "tokenizer.lowercase was False and is True"),
        ("corpus.max_lines=100", "corpus.max_lines was None and is 100"),
    ],
)
def test_continuing_with_other_settings_is_refused(
    trained: Run, make_run: MakeRun, override: str, says: str
) -> None:
    before = snapshot(trained)
    with pytest.raises(UsageError) as raised:
        execute(make_run(override), until="train")
    assert says in str(raised.value) and "--run-dir" in str(raised.value)
    assert snapshot(trained) == before


def test_model_of_unknown_origin_is_refused(make_run: MakeRun) -> None:
    run = make_run()
    execute(run, until="examples")
    run.model_dir.mkdir(parents=True)
    (run.model_dir / "model.ckpt-7.index").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match="has a model of another run"):
        execute(run, until="train")


def test_another_model_name_trains_beside_the_first(trained: Run, make_run: MakeRun) -> None:
    other = make_run("model_name=other", "train.learning_rate=0.5")
    execute(other, until="train")
    assert latest_step(other) == latest_step(trained) == 4
    assert todo(other) == {} == todo(make_run()), "and the first can still be continued"
    assert todo(make_run(steps=5)) == {"train": "at step 4 of 5"}


@pytest.mark.parametrize(
    ("override", "first", "says"),
    [
        ("corpus.max_lines=100", "corpus", "corpus.max_lines was None and is 100"),
        ("tokenizer.vocab_size=250", "vocab", "tokenizer.vocab_size was 300 and is 250"),
        ("model.max_seq_length=16", "examples", "model.max_seq_length was 32 and is 16"),
        ("train.seed=3", "examples", "train.seed was 0 and is 3"),
    ],
)
def test_changed_keys_redo_stages_and_archive_outputs(
    make_run: MakeRun, override: str, first: str, says: str
) -> None:
    execute(make_run(), until="examples")
    changed = make_run(override)
    plan = todo(changed, "examples")
    assert next(iter(plan.items())) == (first, says)
    execute(changed, until="examples")
    # The stand-in for the script ignores the vocabulary, and identical records are not archived.
    archived = (changed.directory / "pretrain_tfrecords.old-1").is_dir()
    assert archived == (first != "vocab")
    assert (changed.directory / "corpus.old-1").exists() == (first == "corpus")
    assert todo(changed, "examples") == {}


@pytest.mark.parametrize(
    "name", ["corpus/part-00000.txt", "vocab.txt", "pretrain_tfrecords", "heldout/part-00000.txt"]
)
def test_changed_byte_makes_a_stage_stale(make_run: MakeRun, name: str) -> None:
    run = make_run()
    execute(run, until="examples")
    path = run.directory / name
    path = next(iter(path.iterdir())) if path.is_dir() else path
    damage(path)
    reason = next(iter(todo(make_run(), "examples").values()))
    assert "has changed since this stage wrote it" in reason
    execute(make_run(), until="examples")
    assert todo(make_run(), "examples") == {}


def test_lost_records_are_rebuilt_and_the_model_kept(trained: Run, make_run: MakeRun) -> None:
    shutil.rmtree(trained.directory / "pretrain_tfrecords")
    execute(make_run(), until="train")
    assert todo(make_run()) == {}
    assert make_run().results(trained.train_record)["from_step"] == 0


def test_failed_stage_leaves_no_output(make_run: MakeRun, text: Path) -> None:
    text.write_text("una frase\n\n" + "CRASH\n", encoding="utf-8")
    run = make_run("corpus.held_out=0")
    with pytest.raises(StageFailed, match="ended with code 1") as raised:
        execute(run, until="examples")
    assert raised.value.log_tail.endswith("job 1 failed") and "examples.log" in str(raised.value)
    assert not (run.directory / "pretrain_tfrecords").exists()
    assert run.record("examples upstream")["outcome"] == "failed"
    text.write_text("una frase\n\n" + "otra\n", encoding="utf-8")
    execute(make_run("corpus.held_out=0"), until="examples")


def built(run: Run) -> set[str]:
    return {p.name for p in (run.directory / "pretrain_tfrecords.parts").glob("[0-9]" * 5)}


def test_build_continues_with_missing_parts(make_run: MakeRun, text: Path) -> None:
    text.write_text("una frase\n\n" + "CRASH\n", encoding="utf-8")
    keys = ("corpus.held_out=0", "corpus.shards=2")
    run = make_run(*keys)
    with pytest.raises(StageFailed):
        execute(run, until="examples")
    assert built(run) == {"00000"}
    before = run.log_file("examples").read_text(encoding="utf-8").count("job 0 begins")
    (run.directory / "fixed").touch()
    execute(make_run(*keys), until="examples")
    assert make_run(*keys).results("examples upstream") == {"examples": 4, "held_out_examples": 0}
    assert run.log_file("examples").read_text(encoding="utf-8").count("job 0 begins") == before == 1
    assert not built(run), "what was worked in is gone when all is done"


def test_machines_build_shards_in_one_run_directory(make_run: MakeRun, tmp_path: Path) -> None:
    keys = ("corpus.shards=5",)
    with pytest.raises(UsageError, match="needs the stage corpus; first, once: run --until vocab"):
        build_shard(make_run(*keys), 0, 2)
    execute(make_run(*keys), until="vocab")
    before = (tmp_path / "run" / "manifest.json").read_bytes()
    build_shard(make_run(*keys), 1, 2)
    assert built(make_run()) == {"00001", "00003"}
    with pytest.raises(UsageError, match=r"parts with other settings: train.seed was 0 and is 1"):
        build_shard(make_run(*keys, "train.seed=1"), 0, 2)
    with make_run().lock(shared=True):  # as another one of them has it
        build_shard(make_run(*keys), 0, 2)
        with pytest.raises(UsageError, match="is in use"):
            execute(make_run(*keys), until="examples")
    assert built(make_run()) == {f"{number:05d}" for number in range(5)}
    assert (tmp_path / "run" / "manifest.json").read_bytes() == before
    execute(make_run(*keys), until="examples")
    assert not make_run().log_file("examples").exists(), "no part was left to build"
    alone = Run(make_run(*keys).profile, tmp_path / "alone")
    execute(alone, until="examples")
    for name in ("pretrain_tfrecords", "heldout_tfrecords"):
        digests = [run.digest(run.directory / name) for run in (alone, make_run())]
        assert digests[0] == digests[1]


def test_shards_need_only_the_run_directory(make_run: MakeRun, text: Path) -> None:
    execute(make_run(), until="vocab")
    text.rename(text.with_name("elsewhere"))
    for number in range(2):
        build_shard(make_run(), number, 2)
    assert len(built(make_run())) == 2


@pytest.mark.parametrize("lost", ["part.json", "corpus", "both"])
def test_lost_outputs_and_parts_are_rebuilt(make_run: MakeRun, lost: str) -> None:
    undisturbed = make_run()
    execute(undisturbed, until="examples")
    names = ("corpus", "heldout", "pretrain_tfrecords")
    expected = {name: undisturbed.digest(undisturbed.directory / name) for name in names}
    results = undisturbed.results("examples upstream")
    shutil.rmtree(undisturbed.directory)
    execute(make_run(), until="vocab")
    directory = make_run().directory
    if lost == "part.json":
        build_shard(make_run(), 0, 2)
        (directory / "pretrain_tfrecords.parts" / "00000" / "part.json").unlink()
    else:
        for name in ("corpus", "heldout") if lost == "both" else ("corpus",):
            shutil.rmtree(directory / name)
    execute(make_run(), until="examples")
    assert {name: make_run().digest(directory / name) for name in expected} == expected
    assert make_run().results("examples upstream") == results
    assert todo(make_run(), "examples") == {}


def test_file_that_a_user_put_in_place_is_archived(make_run: MakeRun) -> None:
    """A vocabulary, say, that could not be fetched."""
    failing = ("tokenizer.source=hf://nobody/nothing at all",)
    for _ in range(2):
        with pytest.raises(UsageError, match="correct the name"):
            execute(make_run(*failing), until="vocab")
        (make_run().directory / "vocab.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match="correct the name"):
        execute(make_run(*failing), until="vocab")
    archived = sorted(make_run().directory.glob("vocab.txt.old-*"))
    assert [path.read_text(encoding="utf-8") for path in archived] == ["mine", "mine"]


def limit_files() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))


@pytest.mark.parametrize("engine", ["native", "upstream"])
def test_full_disk_while_building_is_one_error(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    run = make_run(f'engine="{engine}"')
    execute(run, until="vocab")
    with monkeypatch.context() as patch, pytest.raises(EnvironmentProblem, match="File too large"):
        patch.setattr(subprocesses, "die_with_parent", lambda parent: limit_files())
        execute(make_run(f'engine="{engine}"'), until="examples")
    execute(make_run(f'engine="{engine}"'), until="examples")


def test_parts_with_other_settings_are_archived(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    execute(make_run(), until="vocab")
    build_shard(make_run(), 0, 2)
    assert built(make_run()) == {"00000"}
    execute(make_run("train.seed=1"), until="examples")
    assert "parts with other settings (train.seed was 0 and is 1); it is now" in stderr_of(capsys)
    other = Run(make_run("train.seed=1").profile, make_run().directory.with_name("other"))
    execute(other, until="examples")
    digests = [run.digest(run.directory / "pretrain_tfrecords") for run in (other, make_run())]
    assert digests[0] == digests[1]


def test_outputs_in_place_survive_a_kill_before_the_manifest(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves: list[Run] = []

    def save(self: Run) -> None:
        if saves:
            raise KeyboardInterrupt
        saves.append(self)
        write_json(self.directory / MANIFEST, self.manifest)

    execute(make_run(), until="vocab")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "save", save)
        execute(make_run(), until="examples")
    assert make_run().record("examples upstream")["outcome"] == "interrupted"
    output = make_run().directory / "pretrain_tfrecords"
    before = {path: path.stat().st_ino for path in output.iterdir()}
    execute(make_run(), until="examples")
    assert {path: path.stat().st_ino for path in output.iterdir()} == before
    assert make_run().record("examples upstream")["outcome"] == "done"
    assert make_run().results("examples upstream")
    names = [path.name for path in make_run().directory.iterdir()]
    assert not [name for name in names if ".old" in name or ".part" in name]


def test_failed_script_shows_its_last_lines(make_run: MakeRun) -> None:
    with pytest.raises(StageFailed, match="ended with code 1") as raised:
        execute(make_run("train.learning_rate=0.666"), until="train")
    assert raised.value.log_tail.endswith("loss was NaN")


def test_scripts_get_a_cleaned_environment(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("PYTHONSTARTUP", "/tmp/evil.py")
    run = make_run("train.seed=5", "train.precision=tf32")
    execute(run, until="train")
    log = run.log_file("train").read_text(encoding="utf-8")
    assert "\nclean\n" in log
    assert '{"seed": 5, "precision": "tf32", "stop": 4} -1' in log
    everything = b"".join(p.read_bytes() for p in run.directory.rglob("*") if p.is_file())
    assert b"secret" not in everything


def test_records_of_two_directories_are_refused(make_run: MakeRun, tmp_path: Path) -> None:
    """Two of them have the same names, and text beside them would be read as records."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pretrain_data.tfrecord-0-of-1").write_bytes(b"x")
    for sources in (["a", "b"], ["a", "text.txt"]):
        names = json.dumps([str(tmp_path / source) for source in sources])
        run = make_run(f"corpus.source={names}")
        with pytest.raises(UsageError, match="give one directory"):
            execute(run, until="corpus")
    assert not (run.directory / "corpus").exists()


def test_dry_run_prints_the_plan_and_writes_nothing(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run()
    execute(run, until="check", dry_run=True)
    printed = capsys.readouterr().err
    assert "would do: corpus (not done yet)" in printed
    assert "would do: check (depends on convert)" in printed
    assert not run.directory.exists()


@pytest.mark.parametrize(
    "write",
    [
        lambda gone: new_directory(gone / "hf", replace=True).__enter__(),
        lambda gone: scalars.Writer(gone / "models" / "m" / "eval"),
        lambda gone: records.tf.io.gfile.makedirs(str(gone / "models" / "m")),
    ],
)
def test_run_directory_whose_disk_is_gone_is_not_made_anew(
    tmp_path: Path, write: Callable[[Path], object]
) -> None:
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "gone")
    assert not (tmp_path / "gone").exists()


def test_locked_run_directory_names_the_holder(make_run: MakeRun) -> None:
    with make_run().lock(), pytest.raises(UsageError, match=f"in use by process {os.getpid()}"):
        execute(make_run(), until="corpus")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"format": 2, "stages": 3, "digests": {}, "models": {}}',
        '{"format": 2, "stages": {"corpus": {}}, "digests": {}, "models": {}}',
        '{"format": 2, "stages": {}, "digests": {}, "models": {"m": {"evaluations": {"x": 1}}}}',
        '{"format": 2, "stages": {}, "digests": {}, "models": {"m": {"trained_by": [{}]}}}',
    ],
    ids=["empty", "cut", "list", "no stages", "no outcome", "evaluations", "engines"],
)
def test_damaged_manifest_is_one_error(trained: Run, make_run: MakeRun, content: str) -> None:
    (trained.directory / MANIFEST).write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match="is damaged; restore it"):
        make_run()


def test_pipes_in_a_run_directory_are_not_read(trained: Run, make_run: MakeRun) -> None:
    for path in (trained.vocabulary, trained.directory / MANIFEST):
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(UsageError, match=f"{path.name} is a link, a pipe or a device"):
            make_run()
        path.unlink()


def test_run_directory_of_another_version_is_refused(trained: Run, make_run: MakeRun) -> None:
    former = {"stages": {"corpus": {"outcome": "done", "facts": {}}}, "digests": {}, "models": {}}
    (trained.directory / MANIFEST).write_text(json.dumps(former), encoding="utf-8")
    with pytest.raises(UsageError, match="another version of electra_wrap; continue it with that"):
        make_run()
    with pytest.raises(UsageError, match="another version of electra_wrap"):
        Run.open(trained.directory)


@pytest.mark.parametrize(
    "how",
    [damage, Path.unlink, lambda path: path.write_bytes(b"")],
    ids=["one bit", "missing", "empty"],
)
@pytest.mark.parametrize("part", ["index", "data-00000-of-00001", "sha256"])
def test_damaged_checkpoint_is_skipped(
    trained: Run,
    make_run: MakeRun,
    part: str,
    how: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    execute(make_run("train.steps=6"), until="train")
    run = make_run("train.steps=8")
    how(run.model_dir / f"model.ckpt-6.{part}")
    assert todo(run)["train"] == "at step 4 of 8"
    execute(run, until="train")
    gone = part == "index" and how is Path.unlink  # then the checkpoint is not discovered
    assert gone or "warning: the checkpoint of step 6 is damaged" in stderr_of(capsys)
    assert run.results(run.train_record)["from_step"] == 4 and latest_step(run) == 8
    assert gone or [path for path in run.model_dir.iterdir() if path.name.endswith(".old-1")]
    latest = (run.model_dir / "checkpoint").read_text(encoding="utf-8")
    assert latest.startswith('model_checkpoint_path: "model.ckpt-8"')


def test_silent_damage_is_found_before_training_resumes(trained: Run, make_run: MakeRun) -> None:
    execute(make_run("train.steps=6"), until="train")
    path = trained.model_dir / "model.ckpt-6.data-00000-of-00001"
    before = path.stat()
    damage(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    execute(make_run("train.steps=8"), until="train")
    assert make_run().results("train electra-tiny-spanish")["from_step"] == 4


def damage_silently(path: Path) -> None:
    """Damage a file and keep its size and its modification time."""
    before = path.stat()
    damage(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "name", ["corpus/part-00000.txt", "heldout/part-00000.txt", "vocab.txt", "pretrain_tfrecords"]
)
def test_silent_damage_of_inputs_is_found_before_they_are_used(
    trained: Run, make_run: MakeRun, name: str
) -> None:
    path = trained.directory / name
    path = next(iter(path.iterdir())) if path.is_dir() else path
    intact = path.read_bytes()
    damage_silently(path)
    assert todo(make_run()) == {}
    execute(make_run("train.steps=6"), until="train")
    assert path.read_bytes() == intact


def test_verify_finds_silent_damage_where_nothing_has_to_be_done(
    trained: Run, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    intact = trained.vocabulary.read_bytes()
    damage_silently(trained.vocabulary)
    assert execute(make_run(), until="train") == 0
    execute(make_run("train.steps=6"), until="train", dry_run=True)
    assert "would do: vocab" not in stderr_of(capsys), "a plan alone does not read gigabytes"
    execute(make_run(), until="train", dry_run=True, verify=True)
    assert "would do: vocab" in stderr_of(capsys)
    assert execute(make_run(), until="train", verify=True) == 1
    assert trained.vocabulary.read_bytes() == intact
    assert execute(make_run(), until="train", verify=True) == 0


def test_shard_is_not_built_from_damaged_text(make_run: MakeRun) -> None:
    execute(make_run(), until="vocab")
    damage_silently(make_run().corpus / "part-00000.txt")
    with pytest.raises(UsageError, match="--shard needs the stage corpus"):
        build_shard(make_run(), 0, 2)


def test_evaluation_refuses_damaged_examples(make_run: MakeRun) -> None:
    execute(make_run(), until="evaluate")
    damage_silently(next(iter((make_run().directory / "heldout_tfrecords").iterdir())))
    with pytest.raises(UsageError, match="heldout_tfrecords is damaged; `run` builds it again"):
        evaluate(make_run(), None)


def test_convert_refuses_damaged_checkpoint_and_vocabulary(
    make_run: MakeRun, tmp_path: Path
) -> None:
    execute(make_run(), until="train")
    execute(make_run("train.steps=6"), until="train")
    run = make_run("train.steps=6")
    damage_silently(run.model_dir / "model.ckpt-4.data-00000-of-00001")
    with pytest.raises(UsageError, match="no intact checkpoint of step 4"):
        convert.convert(run, 4, tmp_path / "out", replace=False)
    damage_silently(run.vocabulary)
    with pytest.raises(UsageError, match=r"vocab\.txt has changed"):
        convert.convert(run, 6, tmp_path / "out", replace=False)


@pytest.mark.parametrize(
    "name", [".lock", "logs", "logs/train.log", "models", "models/electra-tiny-spanish/checkpoint"]
)
def test_run_directory_with_a_symbolic_link_is_refused(
    make_run: MakeRun, tmp_path: Path, name: str
) -> None:
    outside = tmp_path / "outside"
    if name in ("logs", "models"):
        outside.mkdir()
    else:
        outside.write_text("mine", encoding="utf-8")
    link = tmp_path / "run" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    with pytest.raises(UsageError, match=f"{name} is a link, a pipe or a device in a run dir"):
        execute(make_run(), until="train")
    assert list(outside.iterdir()) == [] if outside.is_dir() else outside.read_text() == "mine"


def test_replacing_a_linked_directory_leaves_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine").touch()
    (tmp_path / "out").symlink_to(tmp_path / "target")
    for _ in range(2):
        with new_directory(tmp_path / "out", replace=True) as directory:
            (directory / "new").touch()
    assert (tmp_path / "out" / "new").exists() and (tmp_path / "target" / "mine").exists()
    assert not list(tmp_path.glob("*.removed")) and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("name", ["pipe", "/dev/zero"])
def test_checksums_of_pipes_and_devices_do_not_match(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "SHA256").write_text(f"{'0' * 64}  {name}\n", encoding="utf-8")
    assert not is_intact(tmp_path / "SHA256")


def test_checkout_that_a_script_changes_is_refused(make_run: MakeRun) -> None:
    """Also by something else, between the verification and the script's end."""
    execute(make_run(), until="examples")
    source, follow = engine.checkout.ensure(), subprocesses.follow

    def change(*arguments: Any, **options: Any) -> None:
        follow(*arguments, **options)
        (source / "run_pretraining.py").write_text("# other\n", encoding="utf-8")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(EnvironmentProblem, match="changed"):
        patch.setattr(subprocesses, "follow", change)
        execute(make_run(), until="train")


def test_damaged_checkpoint_of_the_other_engine_is_skipped(trained: Run, make_run: MakeRun) -> None:
    """It has the same step, and its engine would resume from it by its name."""
    (trained.model_dir / "step-4").mkdir()
    execute(make_run("train.steps=6"), until="train")
    assert not (trained.model_dir / "step-4").exists()
    assert (trained.model_dir / "step-4.old-1").is_dir()


def test_without_intact_checkpoint_training_starts_again(trained: Run, make_run: MakeRun) -> None:
    damage(trained.model_dir / "model.ckpt-4.data-00000-of-00001")
    (trained.model_dir / "model.ckpt-9_temp").mkdir()
    assert todo(make_run())["train"] == "not done yet"
    execute(make_run(), until="train")
    assert make_run().results(trained.train_record)["from_step"] == 0
    assert latest_step(make_run()) == 4
    assert (trained.model_dir / "model.ckpt-4.index.old-1").is_file()
    assert not (trained.model_dir / "model.ckpt-9_temp").exists()


@pytest.mark.parametrize(
    ("name", "version", "says"),
    [
        ("tensorflow", "2.0.0", None),
        ("tensorflow", "3.0.0", r"4 steps with tensorflow 3\.0\.0, but 2\..* is .*engine=native"),
        ("patched upstream", "0" * 40, "with patched upstream 000000000000, but"),
    ],
)
def test_major_version_change_in_mid_training_is_refused(
    trained: Run,
    make_run: MakeRun,
    name: str,
    version: str,
    says: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recorded = trained.manifest["stages"]["train electra-tiny-spanish"]
    recorded["versions"][name] = version
    trained.save()
    assert todo(make_run()) == {}, "a finished training stays up to date"
    if says is None:
        execute(make_run("train.steps=6"), until="train")
        assert f"continues with other versions: {name} was '{version}'" in stderr_of(capsys)
        return
    with pytest.raises(UsageError, match=says):
        execute(make_run("train.steps=6"), until="train")
    assert todo(make_run("train.steps=6", "engine=native"))["train"] == "at step 4 of 6"


def test_training_needs_disk_space_for_its_checkpoints(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("train.save_every=1", "train.keep=3")
    execute(run, until="examples")
    usage = shutil.disk_usage("/")

    def free(number: float) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=number))

    parameters = [
        run.profile.parameters(network, run.vocab_size)
        for network in ("discriminator", "generator")
    ]
    shared = 64 * run.vocab_size
    checkpoint = 3 * 4 * (sum(parameters) - shared) + 3_000_000  # weights and two slots of Adam
    needed = 4 * checkpoint + 4 * sum(parameters)  # three are kept, and one is being written
    free(needed - 1)
    with pytest.raises(EnvironmentProblem, match=r"GB free, but training will write about .* make"):
        execute(run, until="train")
    assert not list(run.model_dir.glob("model.ckpt-*"))
    free(needed)
    execute(make_run("train.save_every=1", "train.keep=3"), until="train")
    existing = sum(p.stat().st_size for p in run.model_dir.rglob("*") if p.is_file())
    free(needed - existing)
    execute(make_run("train.save_every=1", "train.keep=3", steps=5), until="train")


def test_training_that_does_not_learn_is_stopped(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fake's losses are 50, 25, 17 … at step 1, 2, 3; untrained guessing is 40."""
    monkeypatch.setattr(training, "PATIENCE", 0)
    execute(make_run("train.warmup_steps=2"), until="train")
    with pytest.raises(StageFailed, match=r"at step 1 the loss is 50\.00"):
        execute(make_run("model_name=other", "train.warmup_steps=1"), until="train")
    monkeypatch.setattr(training, "PATIENCE", 1000)
    stuck = ("model_name=stuck", "train.learning_rate=0.777")
    execute(make_run(*stuck), until="train")
    monkeypatch.setattr(training, "PATIENCE", 0)
    # A resumed training does not know its first loss.
    execute(make_run(*stuck, "train.steps=6"), until="train")


@pytest.mark.parametrize(("megabytes", "files"), [(0, 1), (5, 5), (100, 100), (5400, 1000)])
def test_number_of_record_files_fits_the_text(tmp_path: Path, megabytes: int, files: int) -> None:
    with (tmp_path / "part-00000.txt").open("wb") as file:
        file.truncate(megabytes * 2**20)
    assert engine._record_files(tmp_path) == files


def test_manifest_says_what_each_stage_was_made_from(trained: Run) -> None:
    manifest: dict[str, Any] = json.loads(
        (trained.directory / "manifest.json").read_text(encoding="utf-8")
    )
    train = manifest["stages"]["train electra-tiny-spanish"]
    assert train["outcome"] == "done" and train["seconds"] >= 0
    assert set(train["versions"]) == {"tensorflow", "upstream", "patched upstream"}
    assert train["results"]["step"] == 4 and train["results"]["final_loss"] == 12.5
    assert len(train["inputs"]["corpus"]) == 64


def test_directory_of_another_profile_is_not_taken_over(
    trained: Run, make_run: MakeRun, tmp_path: Path
) -> None:
    other_text = tmp_path / "other.txt"
    other_text.write_text("Otra frase.\n\nY otra más.\n", encoding="utf-8")
    before = snapshot(trained)
    other = make_run("model_name=other", corpus=other_text)
    with pytest.raises(UsageError, match="belongs to electra-tiny-spanish, and its data would"):
        execute(other)
    assert snapshot(trained) == before
    assert todo(make_run()) == {}


def test_model_continues_when_its_data_is_rebuilt_identically(
    trained: Run, make_run: MakeRun, text: Path, tmp_path: Path
) -> None:
    """Another profile replaced the records of the data, and the user moved the data back."""
    for name in ("corpus", "vocab", "examples upstream"):
        record = trained.manifest["stages"][name]
        record["inputs"] = {"corpus.source": ["0" * 64]}
        record["outputs"] = dict.fromkeys(record["outputs"], "0" * 64)
    trained.save()
    profile = json.loads((trained.directory / "profile.json").read_text(encoding="utf-8"))
    write_json(trained.directory / "profile.json", profile | {"model_name": "other"})
    execute(make_run("train.steps=6"), until="train")
    assert latest_step(make_run()) == 6
    assert not list(trained.directory.glob("*.old-*")), "identical data is not archived"


def test_changed_data_under_a_model_is_refused_after_a_rebuild(
    trained: Run, make_run: MakeRun, text: Path
) -> None:
    record = trained.manifest["stages"]["corpus"]
    record["outputs"] = dict.fromkeys(record["outputs"], "0" * 64)
    trained.save()
    text.write_text("Otra frase.\n\nY otra más.\n\nLa tercera.\n", encoding="utf-8")
    with pytest.raises(UsageError, match="has a model trained for 4 steps, and corpus was"):
        execute(make_run("train.steps=6"), until="train")


def test_second_model_in_a_directory_is_evaluated(trained: Run, make_run: MakeRun) -> None:
    execute(make_run(), until="evaluate")
    other = make_run("model_name=other")
    assert "evaluate" in todo(other, "evaluate")
    execute(other, until="evaluate")
    assert evaluation.evaluations(other).keys() == {4}
    assert evaluation.best(other) is not None


def test_plan_does_not_announce_what_a_repeated_stage_leaves_alone(
    trained: Run, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    execute(make_run(), until="train", dry_run=True)
    assert "nothing to do: everything is up to date" in stderr_of(capsys)
    trained.vocabulary.unlink()
    assert todo(make_run()) == {"vocab": "vocab.txt is missing"}
    execute(make_run(), until="train")
    assert "1 of 4 stages done" in stderr_of(capsys)


def test_switching_the_engine_plans_examples_but_no_training(
    trained: Run, make_run: MakeRun
) -> None:
    assert list(todo(make_run("engine=native"))) == ["examples"]
    with pytest.raises(UsageError, match=r"learning_rate was 0\.001 and is 0\.5"):
        todo(make_run("engine=native", "train.learning_rate=0.5"))


def test_text_that_cannot_be_evaluated_is_trained_all_the_same(
    make_run: MakeRun, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text.write_text("Un solo documento.\n" * 40, encoding="utf-8")
    run = make_run("train.evaluate_every=2")
    execute(run, until="evaluate")
    printed = stderr_of(capsys)
    assert "warning: the model cannot be evaluated: no text is held out" in printed
    assert "warning: train.evaluate_every has no effect" in printed
    assert latest_step(run) == 4 and run.record("evaluate electra-tiny-spanish")["results"] == {}
    with pytest.raises(UsageError, match="cannot be evaluated: no text is held out"):
        evaluate(make_run(), None)


def test_held_out_text_that_training_has_too_is_not_evaluated(
    make_run: MakeRun, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text.write_text("".join(f"La misma frase.\n{i}\n\n" for i in range(40)), encoding="utf-8")
    run = make_run("corpus.held_out=0.5")
    execute(run, until="evaluate")
    assert "held-out text are lines that the training text has, too" in stderr_of(capsys)
    assert run.results("examples upstream")["held_out_examples"] == 0
    assert latest_step(run) == 4


def test_vocabulary_smaller_than_requested_is_a_warning(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    execute(make_run("tokenizer.vocab_size=5000"), until="vocab")
    assert re.search(r"gives a vocabulary of \d+ tokens, not of 5,000", stderr_of(capsys))


def test_changed_versions_are_logged_for_common_packages_only(
    trained: Run, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    record = trained.manifest["stages"]["train electra-tiny-spanish"]
    record["versions"] = {"torch": "2.0.0", "accelerate": "1.0.0"}
    trained.save()
    execute(make_run("train.steps=6"), until="train")
    assert "continues with other versions" not in stderr_of(capsys)


@pytest.mark.slow
def test_untouched_export_is_replaced_and_a_changed_one_archived(make_run: MakeRun) -> None:
    keys = ("engine=native", "corpus.held_out=0")
    for steps in (2, 3):
        execute(make_run(*keys, steps=steps), until="convert")
    run = make_run(*keys)
    assert run.results("convert")["step"] == 3 and not list(run.directory.glob("hf.old-*"))
    card = run.exported / "discriminator" / "README.md"
    card.write_text("Mine.\n", encoding="utf-8")
    execute(make_run(*keys, steps=4), until="convert")
    archived = run.directory / "hf.old-1" / "discriminator" / "README.md"
    assert archived.read_text(encoding="utf-8") == "Mine.\n"


@pytest.mark.slow
def test_evaluation_needs_no_gpu(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    execute(make_run("engine=native", steps=2), until="train")
    run = make_run("engine=native", "train.device=gpu", steps=2)
    write_json(run.directory / "profile.json", run.profile.model_dump())
    assert evaluate(run, None)["step"] == 2
