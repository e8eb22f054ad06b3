"""Stages with scripts of upstream's command line that need no TensorFlow: what is done, redone, refused, kept."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from electra_wrap import paths, process, stages, storage, training
from electra_wrap.errors import EnvironmentLacks, StageFailed, UsageError
from electra_wrap.rundir import MANIFESTS, RunDir, write_json
from electra_wrap.stages import Run
from electra_wrap.upstream import engine

pytestmark = pytest.mark.usefixtures("fake_upstream")

MakeRun = Callable[..., Run]


def todo(run: Run, until: str = "train") -> dict[str, str]:
    return {stage.name: why for stage, why in stages.plan(run, until)}


@pytest.fixture
def trained(make_run: MakeRun) -> Run:
    run = make_run()
    stages.execute(run, "train")
    return run


def test_a_run_leaves_what_the_design_says(trained: Run) -> None:
    found = {str(p.relative_to(trained.directory.path)) for p in trained.directory.path.rglob("*") if p.is_file()}
    assert found >= {
        *("profile.json", "manifest.json", "hparams.json", "vocab.txt"),
        *("corpus/part-00000.txt", "corpus/part-00001.txt", "heldout/part-00000.txt"),
        *("logs/tfrecords.log", "logs/train.log", "models/electra-tiny-spanish/checkpoint"),
    }
    assert any(name.startswith("pretrain_tfrecords/pretrain_data.tfrecord-0-of-") for name in found)
    assert any(name.startswith("heldout_tfrecords/") for name in found)
    assert not [name for name in found if "partial" in name or ".old-" in name]
    hparams = json.loads((trained.directory / "hparams.json").read_text(encoding="utf-8"))
    assert hparams["vocab_size"] == len((trained.directory / "vocab.txt").read_text(encoding="utf-8").splitlines())


def test_held_out_text_is_not_trained_on(trained: Run) -> None:
    def documents(name: str) -> set[str]:
        text = "".join(p.read_text(encoding="utf-8") for p in (trained.directory / name).iterdir())
        return set(text.split("\n\n")) - {""}

    assert documents("heldout") and not documents("heldout") & documents("corpus")
    trained_on = b"".join(p.read_bytes() for p in (trained.directory / "pretrain_tfrecords").iterdir())
    for document in documents("heldout"):
        assert b"/" + document.split("\n")[0].encode() not in trained_on


def test_a_second_run_does_nothing(trained: Run, make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in trained.directory.path.rglob("*") if p.name not in MANIFESTS}
    began = time.monotonic()
    stages.execute(make_run(), "train")
    assert time.monotonic() - began < 5
    assert "nothing to do" in capsys.readouterr().err
    after = {p: p.stat().st_mtime_ns for p in trained.directory.path.rglob("*") if p.name not in MANIFESTS}
    ignored = {trained.directory.path, trained.directory / "profile.json", trained.directory / ".lock"}
    assert {k: v for k, v in before.items() if k not in ignored} == {k: v for k, v in after.items() if k not in ignored}


def test_a_run_can_be_moved(trained: Run, make_run: MakeRun, tmp_path: Path) -> None:
    trained.directory.path.rename(tmp_path / "moved")
    assert todo(Run(make_run().profile, RunDir(tmp_path / "moved"))) == {}


def test_more_steps_continue_the_training(trained: Run, make_run: MakeRun) -> None:
    more = make_run(steps=6)
    assert todo(more) == {"train": "at step 4 of 6"}
    stages.execute(more, "train")
    log = (trained.directory / "logs" / "train.log").read_text(encoding="utf-8")
    assert [json.loads(line)["step"] for line in log.splitlines() if "loss/total" in line] == [1, 2, 3, 4, 5, 6]
    assert more.recorded("train")["facts"]["from_step"] == 4
    with pytest.raises(UsageError, match=r"at step 6, train.steps = 5"):
        stages.plan(make_run(steps=5), "train")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.learning_rate=0.5", "learning_rate was 0.001 and is 0.5"),
        ("train.batch_size=5", "train_batch_size was 4 and is 5"),
        ("model.num_hidden_layers=3", "model_hparam_overrides was"),
        ("train.seed=1", "train.seed was 0 and is 1"),
        ("model.max_seq_length=16", "model.max_seq_length was 32 and is 16"),
        ("tokenizer.vocab_size=250", "tokenizer.vocab_size was 300 and is 250"),
        ("tokenizer.lowercase=true", "tokenizer.lowercase was False and is True"),
        ("corpus.max_lines=100", "corpus.max_lines was None and is 100"),
    ],
)
def test_a_model_is_never_continued_as_another(trained: Run, make_run: MakeRun, override: str, says: str) -> None:
    before = {p: p.stat().st_mtime_ns for p in trained.directory.path.rglob("*")}
    with pytest.raises(UsageError) as raised:
        stages.execute(make_run(override), "train")
    assert says in str(raised.value) and "--run-dir" in str(raised.value)
    after = {p: p.stat().st_mtime_ns for p in trained.directory.path.rglob("*")}
    lock = trained.directory / ".lock"
    assert {k: v for k, v in before.items() if k != lock} == {k: v for k, v in after.items() if k != lock}


def test_a_model_of_unknown_origin_is_refused(make_run: MakeRun) -> None:
    run = make_run()
    stages.execute(run, "tfrecords")
    run.model_dir.mkdir(parents=True)
    (run.model_dir / "model.ckpt-7.index").write_text("", encoding="utf-8")
    (run.model_dir / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-7"\n', encoding="utf-8")
    with pytest.raises(UsageError, match="did not train"):
        stages.execute(run, "train")


def test_another_model_name_is_another_model(trained: Run, make_run: MakeRun) -> None:
    other = make_run("model_name=other", "train.learning_rate=0.5")
    stages.execute(other, "train")
    assert (other.model_dir / "checkpoint").is_file() and (trained.model_dir / "checkpoint").is_file()
    assert todo(other) == {} == todo(make_run()), "and the first can still be continued"
    assert todo(make_run(steps=5)) == {"train": "at step 4 of 5"}


@pytest.mark.parametrize(
    ("override", "first", "says"),
    [
        ("corpus.max_lines=100", "corpus", "corpus.max_lines was None and is 100"),
        ("tokenizer.vocab_size=250", "vocab", "tokenizer.vocab_size was 300 and is 250"),
        ("model.max_seq_length=16", "tfrecords", "model.max_seq_length was 32 and is 16"),
        ("train.seed=3", "tfrecords", "train.seed was 0 and is 3"),
    ],
)
def test_what_changed_is_redone_and_the_former_set_aside(
    make_run: MakeRun, override: str, first: str, says: str
) -> None:
    stages.execute(make_run(), "tfrecords")
    changed = make_run(override)
    plan = todo(changed, "tfrecords")
    assert next(iter(plan.items())) == (first, says)
    stages.execute(changed, "tfrecords")
    assert (changed.directory / "pretrain_tfrecords.old-1").is_dir()
    assert (changed.directory / "corpus.old-1").exists() == (first == "corpus")
    assert todo(changed, "tfrecords") == {}


@pytest.mark.parametrize("name", ["corpus/part-00000.txt", "vocab.txt", "pretrain_tfrecords", "heldout/part-00000.txt"])
def test_one_changed_byte_is_noticed(make_run: MakeRun, name: str) -> None:
    run = make_run()
    stages.execute(run, "tfrecords")
    path = run.directory / name
    path = next(iter(path.iterdir())) if path.is_dir() else path
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "is not as this stage left it" in next(iter(todo(make_run(), "tfrecords").values()))
    stages.execute(make_run(), "tfrecords")
    assert todo(make_run(), "tfrecords") == {}


def test_data_lost_under_a_model_is_rebuilt_and_the_model_kept(trained: Run, make_run: MakeRun) -> None:
    shutil.rmtree(trained.directory / "pretrain_tfrecords")
    stages.execute(make_run(), "train")
    assert todo(make_run()) == {}
    assert make_run().recorded("train")["facts"]["from_step"] == 0, "same records: the model stays up to date"


def test_a_failed_stage_leaves_nothing_that_looks_finished(make_run: MakeRun, text: Path) -> None:
    text.write_text("una frase\n\n" + "CRASH\n", encoding="utf-8")
    run = make_run("corpus.held_out=0")
    with pytest.raises(StageFailed, match="ended with code 1") as raised:
        stages.execute(run, "tfrecords")
    assert raised.value.tail.endswith("job 1 failed") and "tfrecords.log" in str(raised.value)
    assert not (run.directory / "pretrain_tfrecords").exists()
    assert run.recorded("tfrecords")["outcome"] == "failed"
    text.write_text("una frase\n\n" + "otra\n", encoding="utf-8")
    stages.execute(make_run("corpus.held_out=0"), "tfrecords")


def built(run: Run) -> set[str]:
    return {p.name for p in (run.directory / "pretrain_tfrecords.parts").glob("[0-9]" * 5)}


def test_a_build_goes_on_with_the_parts_that_are_missing(make_run: MakeRun, text: Path) -> None:
    text.write_text("una frase\n\n" + "CRASH\n", encoding="utf-8")
    keys = ("corpus.held_out=0", "corpus.shards=2")
    run = make_run(*keys)
    with pytest.raises(StageFailed):
        stages.execute(run, "tfrecords")
    assert built(run) == {"00000"}
    before = run.log("tfrecords").read_text(encoding="utf-8").count("job 0 begins")
    (run.directory / "mended").touch()
    stages.execute(make_run(*keys), "tfrecords")
    assert make_run(*keys).recorded("tfrecords")["facts"] == {"examples": 4, "held_out_examples": 0}
    assert run.log("tfrecords").read_text(encoding="utf-8").count("job 0 begins") == before == 1
    assert not built(run), "what was worked in is gone when all is done"


def test_machines_that_share_a_run_directory_build_a_part_each(make_run: MakeRun, tmp_path: Path) -> None:
    keys = ("corpus.shards=5",)
    with pytest.raises(UsageError, match="corpus has to be done first, by one process: run --until vocab"):
        stages.build_nth(make_run(*keys), 0, 2)
    stages.execute(make_run(*keys), "vocab")
    before = (tmp_path / "run" / "manifest.json").read_bytes()
    stages.build_nth(make_run(*keys), 1, 2)
    assert built(make_run()) == {"00001", "00003"}
    with pytest.raises(UsageError, match=r"parts of other settings: train.seed was 0 and is 1"):
        stages.build_nth(make_run(*keys, "train.seed=1"), 0, 2)
    with make_run().directory.lock(shared=True):  # as another one of them has it
        stages.build_nth(make_run(*keys), 0, 2)
        with pytest.raises(UsageError, match="is in use"):
            stages.execute(make_run(*keys), "tfrecords")
    assert built(make_run()) == {f"{number:05d}" for number in range(5)}
    assert (tmp_path / "run" / "manifest.json").read_bytes() == before, "which they would overwrite for each other"
    stages.execute(make_run(*keys), "tfrecords")
    log = make_run().log("tfrecords")
    assert not log.exists() or "job" not in log.read_text(encoding="utf-8"), "nothing was left to build"
    alone = Run(make_run(*keys).profile, RunDir(tmp_path / "alone"))
    stages.execute(alone, "tfrecords")
    for name in ("pretrain_tfrecords", "heldout_tfrecords"):
        assert alone.digest(name) == make_run().digest(name)


def test_machines_need_nothing_but_the_run_directory(make_run: MakeRun, text: Path) -> None:
    stages.execute(make_run(), "vocab")
    text.rename(text.with_name("elsewhere"))
    for number in range(2):
        stages.build_nth(make_run(), number, 2)
    assert len(built(make_run())) == 2


@pytest.mark.parametrize("lost", ["part.json", "corpus", "both"])
def test_what_is_taken_away_is_made_again(make_run: MakeRun, lost: str) -> None:
    """A part that is half there, and shards that the state of sharding says are made."""
    undisturbed = make_run()
    stages.execute(undisturbed, "tfrecords")
    expected = {name: undisturbed.digest(name) for name in ("corpus", "heldout", "pretrain_tfrecords")}
    facts = undisturbed.recorded("tfrecords")["facts"]
    shutil.rmtree(undisturbed.directory.path)
    stages.execute(make_run(), "vocab")
    if lost == "part.json":
        stages.build_nth(make_run(), 0, 2)
        (make_run().directory / "pretrain_tfrecords.parts" / "00000" / "part.json").unlink()
    else:
        work = make_run().directory / "corpus.partial"
        work.mkdir()
        state = {"identity": stages._corpus_inputs(make_run()), "names": [], "sizes": [9, 9, 9], "complete": True}
        write_json(work / "state.json", {**state, "counts": {}})
        for name in ("corpus", "heldout") if lost == "both" else ("corpus",):
            shutil.rmtree(make_run().directory / name)
    stages.execute(make_run(), "tfrecords")
    assert {name: make_run().digest(name) for name in expected} == expected
    assert make_run().recorded("tfrecords")["facts"] == facts
    assert todo(make_run(), "tfrecords") == {}


def test_what_a_person_put_in_place_after_a_failure_is_kept(make_run: MakeRun) -> None:
    """A vocabulary, say, that could not be fetched."""
    failing = ("tokenizer.source=hf://nobody/nothing at all",)
    for _ in range(2):
        with pytest.raises(UsageError, match=r"correct tokenizer\.source"):
            stages.execute(make_run(*failing), "vocab")
        (make_run().directory / "vocab.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match=r"correct tokenizer\.source"):
        stages.execute(make_run(*failing), "vocab")
    for number in (1, 2):
        assert (make_run().directory / f"vocab.txt.old-{number}").read_text(encoding="utf-8") == "mine"


def limit_files() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))


@pytest.mark.parametrize("engine", ["native", "upstream"])
def test_a_full_disk_is_said_by_the_process_that_builds(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    run = make_run(f'engine="{engine}"')
    stages.execute(run, "vocab")
    with monkeypatch.context() as patch, pytest.raises(EnvironmentLacks, match="File too large"):
        patch.setattr(process, "die_with_parent", lambda parent: limit_files())
        stages.execute(make_run(f'engine="{engine}"'), run.engine.DATA)
    stages.execute(make_run(f'engine="{engine}"'), run.engine.DATA)


def test_parts_of_other_settings_are_not_joined(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    stages.execute(make_run(), "vocab")
    stages.build_nth(make_run(), 0, 2)
    assert built(make_run()) == {"00000"}
    stages.execute(make_run("train.seed=1"), "tfrecords")
    assert "has parts of other settings (train.seed was 0 and is 1); they are now" in " ".join(
        capsys.readouterr().err.split()
    )
    other = Run(make_run("train.seed=1").profile, RunDir(make_run().directory.path.with_name("other")))
    stages.execute(other, "tfrecords")
    assert other.digest("pretrain_tfrecords") == make_run().digest("pretrain_tfrecords")


@pytest.mark.parametrize("stage", ["corpus", "tfrecords"])
def test_a_stage_killed_at_its_very_end_is_not_done_again(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Its outputs are in place, and the manifest does not say so yet: hours of work stay where they are."""
    saves: list[RunDir] = []

    def save(self: RunDir) -> None:
        if saves:
            raise KeyboardInterrupt
        saves.append(self)
        write_json(self.path / "manifest.json", self.manifest)

    if stage != "corpus":
        stages.execute(make_run(), "vocab")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunDir, "save", save)
        stages.execute(make_run(), stage)
    assert make_run().recorded(stage)["outcome"] == "interrupted"
    output = make_run().directory / {"corpus": "corpus", "tfrecords": "pretrain_tfrecords"}[stage]
    before = {path: path.stat().st_ino for path in output.iterdir()}
    stages.execute(make_run(), stage)
    assert {path: path.stat().st_ino for path in output.iterdir()} == before
    assert make_run().recorded(stage)["outcome"] == "done" and make_run().recorded(stage)["facts"]
    assert not [p.name for p in make_run().directory.path.iterdir() if ".old" in p.name or ".part" in p.name]


def test_a_script_that_fails_shows_its_last_lines(make_run: MakeRun) -> None:
    with pytest.raises(StageFailed, match="ended with code 1") as raised:
        stages.execute(make_run("train.learning_rate=0.666"), "train")
    assert raised.value.tail.endswith("loss was NaN")


def test_scripts_get_a_clean_environment(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("PYTHONSTARTUP", "/tmp/evil.py")
    run = make_run("train.seed=5", "train.precision=tf32", "train.compile=true")
    stages.execute(run, "train")
    log = run.log("train").read_text(encoding="utf-8")
    assert "\nclean\n" in log
    assert '{"seed": 5, "precision": "tf32", "xla": true, "stop": 4} -1 --tf_xla_cpu_global_jit' in log
    everything = b"".join(p.read_bytes() for p in run.directory.path.rglob("*") if p.is_file())
    assert b"secret" not in everything


def test_records_are_of_one_directory(make_run: MakeRun, tmp_path: Path) -> None:
    """Two of them have the same names, and text beside them would be read as records."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pretrain_data.tfrecord-0-of-1").write_bytes(b"x")
    for sources in (["a", "b"], ["a", "text.txt"]):
        run = make_run("corpus.source=" + json.dumps([str(tmp_path / source) for source in sources]))
        with pytest.raises(UsageError, match="give one directory"):
            stages.execute(run, "corpus")
    assert not (run.directory / "corpus").exists()


def test_the_plan_is_told_and_a_dry_run_touches_nothing(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run()
    stages.execute(run, "check", dry_run=True)
    said = capsys.readouterr().err
    assert "would do: corpus (not done yet)" in said and "would do: check (follows convert)" in said
    assert not run.directory.path.exists()


def test_one_run_at_a_time(make_run: MakeRun) -> None:
    with make_run().directory.lock(), pytest.raises(UsageError, match=f"in use by process {os.getpid()}"):
        stages.execute(make_run(), "corpus")


def test_a_damaged_manifest_has_a_copy(trained: Run, make_run: MakeRun) -> None:
    for name in MANIFESTS:
        for damaged in ("{", '{"stages": 3, "digests": {}}', "[]", '{"stages": {"corpus": {}}, "digests": {}}'):
            (trained.directory / name).write_text(damaged, encoding="utf-8")
            assert todo(make_run()) == {}
        make_run().directory.save()
    for name in MANIFESTS:
        (trained.directory / name).write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match="is damaged"):
        make_run()


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "how", [damage, Path.unlink, lambda path: path.write_bytes(b"")], ids=["one bit", "missing", "empty"]
)
@pytest.mark.parametrize("part", ["index", "data-00000-of-00001", "sha256"])
def test_a_checkpoint_that_is_not_whole_is_stepped_over(
    trained: Run, make_run: MakeRun, part: str, how: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    stages.execute(make_run("train.steps=6"), "train")
    run = make_run("train.steps=8")
    how(run.model_dir / f"model.ckpt-6.{part}")
    assert todo(run)["train"] == "at step 4 of 8"
    stages.execute(run, "train")
    gone = part == "index" and how is Path.unlink  # a checkpoint without it is none, to TensorFlow too
    assert gone or "warning: the checkpoint of step 6 is not whole" in " ".join(capsys.readouterr().err.split())
    assert run.recorded("train")["facts"]["from_step"] == 4 and run.step == 8
    assert gone or [path for path in run.model_dir.iterdir() if path.name.endswith(".old-1")]
    assert (
        (run.model_dir / "checkpoint").read_text(encoding="utf-8").startswith('model_checkpoint_path: "model.ckpt-8"')
    )


def test_a_bit_that_rots_without_a_trace_is_seen_before_training_goes_on(trained: Run, make_run: MakeRun) -> None:
    stages.execute(make_run("train.steps=6"), "train")
    path = trained.model_dir / "model.ckpt-6.data-00000-of-00001"
    before = path.stat()
    damage(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    stages.execute(make_run("train.steps=8"), "train")
    assert make_run().recorded("train")["facts"]["from_step"] == 4


def test_another_engines_checkpoint_that_is_not_whole_is_stepped_over_too(trained: Run, make_run: MakeRun) -> None:
    """It is of the same step, and the engine whose it is would go on from it by its name."""
    (trained.model_dir / "step-4").mkdir()
    stages.execute(make_run("train.steps=6"), "train")
    assert not (trained.model_dir / "step-4").exists() and (trained.model_dir / "step-4.old-1").is_dir()


def test_without_a_whole_checkpoint_training_begins_anew(trained: Run, make_run: MakeRun) -> None:
    damage(trained.model_dir / "model.ckpt-4.data-00000-of-00001")
    (trained.model_dir / "model.ckpt-9_temp").mkdir()
    assert todo(make_run())["train"] == "not done yet"
    stages.execute(make_run(), "train")
    assert make_run().recorded("train")["facts"]["from_step"] == 0 and make_run().step == 4
    assert (trained.model_dir / "model.ckpt-4.index.old-1").is_file()
    assert not (trained.model_dir / "model.ckpt-9_temp").exists()


@pytest.mark.parametrize(
    ("name", "version", "says"),
    [
        ("tensorflow", "2.0.0", None),
        ("tensorflow", "3.0.0", r"trained for 4 steps with tensorflow 3\.0\.0, and here is 2\..*engine=native"),
        ("patched upstream", "0" * 40, "with patched upstream 000000000000, and here is"),
    ],
)
def test_a_model_half_way_goes_on_with_what_trained_it(
    trained: Run, make_run: MakeRun, name: str, version: str, says: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = trained.directory.manifest["stages"]["train electra-tiny-spanish"]
    recorded["versions"][name] = version
    trained.directory.save()
    assert todo(make_run()) == {}, "what is done is done"
    if says is None:
        stages.execute(make_run("train.steps=6"), "train")
        assert f"continues with other versions: {name} was '{version}'" in " ".join(capsys.readouterr().err.split())
        return
    with pytest.raises(UsageError, match=says):
        stages.execute(make_run("train.steps=6"), "train")
    assert todo(make_run("train.steps=6", "engine=native"))["train"], "which takes it over as numbers"


def test_room_is_asked_for_before_the_work(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    stages.execute(run, "tfrecords")
    one = storage.estimate(make_run())["train"] / 2  # of 4 steps: a checkpoint, and one while it is written
    for keys, kept in ((["train.keep=0"], 5), (["train.keep=3"], 3), (["train.keep=30"], 5)):
        assert storage.estimate(make_run("train.save_every=1", *keys))["train"] == one * (kept + 1)
    free = sum(storage.estimate(run)[name] for name in ("train", "convert"))
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free - 1))
    with pytest.raises(EnvironmentLacks, match=r"GB free, and this run will write about .*\(train .*make room"):
        stages.execute(run)
    assert not run.model_dir.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    stages.execute(run, "train")
    with (run.model_dir / "a checkpoint that is there").open("wb") as file:
        file.truncate(storage.estimate(run)["train"])
    left = storage.estimate(run)["convert"]
    left_to_do = [stage for stage in stages.stages(run) if stage.name in ("train", "convert")]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=left - 1))
    with pytest.raises(EnvironmentLacks, match="make room"):
        storage.check(run.directory.path, run, left_to_do)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=left))
    assert storage.check(run.directory.path, run, left_to_do) == left


def test_what_a_killed_stage_left_needs_no_room_again(make_run: MakeRun, text: Path) -> None:
    run = make_run()
    (stage,) = (stage for stage in stages.stages(run) if stage.name == "corpus")
    (run.directory / "corpus.partial").mkdir(parents=True)
    (run.directory / "corpus.partial" / "part-00000.txt").write_bytes(bytes(1000))
    assert storage.check(run.directory.path, run, [stage]) == text.stat().st_size - 1000
    for source in (text.parent, text.with_suffix(".*")):
        assert storage.estimate(make_run(f'corpus.source="{source}"'))["corpus"] >= text.stat().st_size


def test_a_loss_that_does_not_move_ends_training(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake's losses are 50, 25, 17 … at step 1, 2, 3; untrained guessing is 40."""
    monkeypatch.setattr(training, "PATIENCE", 0)
    stages.execute(make_run("train.warmup_steps=2"), "train")
    with pytest.raises(StageFailed, match=r"the loss is 50.00 at step 1, as before training \(4\d\.\d\d\)"):
        stages.execute(make_run("model_name=other", "train.warmup_steps=1"), "train")
    monkeypatch.setattr(training, "PATIENCE", 1000)
    stuck = ("model_name=stuck", "train.learning_rate=0.777")
    stages.execute(make_run(*stuck), "train")
    monkeypatch.setattr(training, "PATIENCE", 0)
    stages.execute(make_run(*stuck, "train.steps=6"), "train")  # nobody knows what its loss was at first


@pytest.mark.parametrize(("megabytes", "files"), [(0, 1), (5, 5), (100, 100), (5400, 1000)])
def test_record_files_fit_the_text(megabytes: int, files: int) -> None:
    assert engine.record_files(megabytes * 2**20) == files


def interruptible(tmp_path: Path, script: str) -> subprocess.Popen[str]:
    """A process that runs `script` through process.run, as the wrapper runs upstream's."""
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    code = (
        "import sys\nfrom pathlib import Path\nfrom electra_wrap import process, cli, errors\n"
        "class A: debug = False\n"
        "def go(a): process.run([sys.executable, '-u', 'script.py'], cwd=Path.cwd(), env={}, log=Path('log'), "
        "on_line=lambda l: print(l, flush=True))\n"
        "A.function = staticmethod(go)\ncli.main(A)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(paths.PACKAGE.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


WAITS = """
import signal, sys, time
def stop(number, frame):
    print("saving", flush=True)
    if "{stubborn}" == "no":
        sys.exit(75)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
while True:
    time.sleep(0.05)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_the_script_save(tmp_path: Path, number: signal.Signals) -> None:
    process = interruptible(tmp_path, WAITS.format(stubborn="no"))
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    output, error = process.communicate(timeout=20)
    assert (process.returncode, output) == (130, "saving\n")
    assert error.strip() == "electra_wrap: error: interrupted; the same command resumes"


def test_a_second_signal_ends_a_script_that_does_not_stop(tmp_path: Path) -> None:
    process = interruptible(tmp_path, WAITS.format(stubborn="yes"))
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130


def test_a_script_does_not_outlive_the_command(tmp_path: Path) -> None:
    command = interruptible(tmp_path, "import os\nprint(os.getpid(), flush=True)\n" + WAITS.format(stubborn="yes"))
    assert command.stdout
    script = Path("/proc") / command.stdout.readline().strip()
    assert script.exists()
    command.kill()
    command.communicate(timeout=20)
    for _ in range(400):
        if not script.exists():
            return
        time.sleep(0.05)
    raise AssertionError("it is still there")


def test_a_process_whose_command_has_ended_does_not_begin() -> None:
    """torchrun's, say, if that was killed while it started them."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    code = "from electra_wrap import process; process.die_with_command()"
    here = platform.node()
    for machine, command, expected in ((here, os.getpid(), 0), (here, ended.pid, -9), ("elsewhere", ended.pid, 0)):
        environment = process.environment({"ELECTRA_WRAP_COMMAND": f"{machine} {command}"})
        assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == expected


def test_what_the_machine_lacks_is_said_whoever_notices(tmp_path: Path) -> None:
    fails = "raise SystemExit('library: writing failed: No space left on device')"
    command = interruptible(tmp_path, fails)
    error = command.communicate(timeout=20)[1]
    assert (
        command.returncode == 3 and error == "electra_wrap: error: No space left on device; mend that and run again\n"
    )


def test_a_script_that_is_killed_is_said_to_be(tmp_path: Path) -> None:
    command = interruptible(tmp_path, "import os\nos.kill(os.getpid(), 9)")
    error = command.communicate(timeout=20)[1]
    assert command.returncode == 4 and "ended by SIGKILL (which the system sends when memory is short)" in error


def test_manifest_says_what_each_stage_was_made_from(trained: Run) -> None:
    manifest: dict[str, Any] = json.loads((trained.directory / "manifest.json").read_text(encoding="utf-8"))
    train = manifest["stages"]["train electra-tiny-spanish"]
    assert train["outcome"] == "done" and train["seconds"] >= 0
    assert set(train["versions"]) == {"tensorflow", "upstream", "patched upstream"}
    assert train["facts"]["step"] == 4 and train["facts"]["final_loss"] == 12.5
    assert len(train["inputs"]["corpus"]) == 64
