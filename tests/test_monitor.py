"""TensorBoard scalars, evaluations, the best checkpoint and the report."""

from __future__ import annotations

import html
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny

from electra_wrap import events, files, metrics, profiles
from electra_wrap.data import corpus
from electra_wrap.engines import checkpoints, is_checkpoint_intact
from electra_wrap.errors import StageFailed, UsageError
from electra_wrap.monitor import evaluation, report, scalars, training
from electra_wrap.pipeline.convert import convert
from electra_wrap.pipeline.evaluate import evaluate
from electra_wrap.pipeline.execute import execute
from electra_wrap.run import MANIFEST, Run

MakeRun = Callable[..., Run]

#: The scalars of a logged step, for either engine. The first step of a session has no speed.
TAGS = {*metrics.UPSTREAM.values()} - {"generator/sampled_accuracy"}
TAGS |= {"train/learning_rate", "train/gradient_norm", "discriminator/replaced"}
TAGS |= {"memory/gigabytes", "cost/hours", "progress/examples", "progress/epochs"}
TAGS |= {f"speed/{unit}_per_second" for unit in ("steps", "sequences", "tokens")}


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, corpus_text: Path) -> Run:
    """A complete run of the native engine with three evaluations. It keeps the last checkpoint."""
    keys = ("train.evaluate_every=2", "train.save_every=100", "train.keep=1", "model_name=m")
    profile = tiny(corpus_text, 'engine="native"', *keys, steps=6)
    run = Run(profile, tmp_path_factory.mktemp("learned") / "run")
    execute(run)
    return run


def test_tensorboard_reads_every_scalar(learned: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(learned.model_dir / "train")).Reload()
    assert set(reader.Tags()["scalars"]) == TAGS
    lines = learned.log_file("train").read_text(encoding="utf-8").splitlines()
    steps = [event for line in lines if isinstance(event := events.parse(line), events.Step)]
    assert len(steps) == 6
    for step in steps:
        for tag, value in step.scalars.items():
            (event,) = (event for event in reader.Scalars(tag) if event.step == step.step)
            assert event.value == pytest.approx(value, rel=1e-6)
    examples = [event.value for event in reader.Scalars("progress/examples")]
    assert examples == [4, 8, 12, 16, 20, 24]
    for tag, row in (("hparams", "num_train_steps | 6"), ("profile", "model.max_seq_length | 32")):
        (text,) = reader.Tensors(tag)[0].tensor_proto.string_val
        assert f"| {row} |" in text.decode()


def test_evaluations_are_recorded_and_repeatable(learned: Run) -> None:
    recorded = evaluation.evaluations(Run.open(learned.directory))
    assert list(recorded) == [2, 4, 6]
    for tag in metrics.UPSTREAM.values():
        assert scalars.read(learned.model_dir / "eval")[tag][:3] == [
            (step, pytest.approx(values[tag], rel=1e-6)) for step, values in recorded.items()
        ]
    before = (learned.directory / "profile.json").read_bytes()
    again = evaluate(Run.open(learned.directory), None)
    assert (learned.directory / "profile.json").read_bytes() == before
    assert again == {"step": 6, **recorded[6]}
    assert learned.results("evaluate m") == again and again["examples"] > 8


def test_best_checkpoint_outlives_the_others(learned: Run, tmp_path: Path) -> None:
    by_step = evaluation.evaluations(learned)
    step = min(by_step, key=lambda step: by_step[step]["loss/total"])
    assert [checkpoint.step for checkpoint in checkpoints(learned)] == [6]
    assert [path.name for path in learned.model_dir.glob("best-*")] == [f"best-{step}"]
    best = evaluation.best(learned)
    assert best and best.step == step and is_checkpoint_intact(learned, best)
    out = tmp_path / "out"
    convert(learned, "best", out, replace=False)
    card = (out / "generator" / "README.md").read_text(encoding="utf-8")
    assert f"trained for {step} steps" in card
    with pytest.raises(UsageError, match="exists; choose another --out"):
        convert(learned, None, out, replace=False)
    (out / "mine.txt").touch()
    convert(learned, None, out, replace=True)
    assert {path.name for path in out.iterdir()} == {"mine.txt", "discriminator", "generator"}
    name = "discriminator/model.safetensors"
    assert (out / name).read_bytes() == (learned.exported / name).read_bytes()
    with pytest.raises(UsageError, match="no intact checkpoint of step 5"):
        convert(learned, 5, tmp_path / "other", replace=False)


@pytest.fixture
def evaluated(make_run: MakeRun, fake_upstream: Path) -> Run:
    """A run of upstream, evaluated at steps 2, 4, 6 and 7. The fake's loss is lowest at step 4."""
    execute(make_run("train.evaluate_every=2", steps=7), until="evaluate")
    return make_run(steps=7)


def record(run: Run, engine: str, step: int, loss: float) -> None:
    values = {"loss/total": loss, "discriminator/auc": 0.5}
    evaluation.record(run, engine, events.Evaluation(step, 20, values))


def best_step(run: Run, engine: str | None = None) -> int | None:
    best = evaluation.best(run, engine)
    return best.step if best else None


def kept(run: Run) -> list[str]:
    return sorted(path.name for path in run.model_dir.glob("best-*"))


def test_best_checkpoint_has_the_lowest_loss(evaluated: Run) -> None:
    losses = {step: m["loss/total"] for step, m in evaluation.evaluations(evaluated).items()}
    assert losses == {2: 102, 4: 100, 6: 102, 7: 103}
    assert best_step(evaluated) == 4 and kept(evaluated) == ["best-4"]
    suffixes = sorted(path.suffix for path in (evaluated.model_dir / "best-4").iterdir())
    assert suffixes == [".data-00000-of-00001", ".index", ".sha256"]


def test_engines_are_ranked_apart(evaluated: Run, make_run: MakeRun) -> None:
    """A lower loss by the other engine says nothing: it masks other tokens."""
    record(evaluated, "native", 6, 50.0)
    record(evaluated, "native", 7, 60.0)
    native = make_run('engine="native"', steps=7)
    for run in (evaluated, make_run(), native):
        assert best_step(run, "upstream") == 4 and best_step(run, "native") == 6
    assert best_step(make_run()) == 4 and best_step(native) == 6
    assert list(evaluation.evaluations(native)) == [6, 7]
    assert kept(native) == ["best-4", "best-6"]
    record(native, "native", 7, 40.0)
    assert kept(native) == ["best-4", "best-7"]
    del native.model["evaluations"]["native"]
    assert best_step(native) == 4, "without evaluations of its own, by the other engine's"


def test_new_best_checkpoint_is_kept_when_later_evaluations_are_discarded(evaluated: Run) -> None:
    record(evaluated, "upstream", 6, 90.0)
    assert kept(evaluated) == ["best-6"]
    evaluation.discard_after(evaluated, 5)
    assert kept(evaluated) == ["best-4", "best-6.old-1"]
    for file in evaluated.model_dir.glob("model.ckpt-4.*"):
        file.unlink()
    assert best_step(Run.open(evaluated.directory)) == 4


@pytest.mark.parametrize(
    ("function", "name", "step"),
    [
        ("write_checksums", "model.ckpt-7.sha256", 4),
        ("move_into_place", "best-7.partial", 4),
        ("write_json", MANIFEST, 4),
        ("remove", "best-4", 7),
    ],
)
def test_interruption_leaves_a_best_checkpoint(
    evaluated: Run, monkeypatch: pytest.MonkeyPatch, function: str, name: str, step: int
) -> None:
    for file in evaluated.model_dir.glob("model.ckpt-4.*"):
        file.unlink()  # its weights are in best-4 alone
    original = getattr(files, function)

    def interrupt(path: Path, *arguments: Any) -> None:
        if path.name == name:
            raise KeyboardInterrupt
        original(path, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, function, interrupt)
        record(evaluated, "upstream", 7, 1.0)
    run = Run.open(evaluated.directory)
    assert best_step(run) == step
    record(run, "upstream", 7, 1.0)
    assert best_step(run) == 7 and kept(run) == ["best-7"]


def test_missed_evaluation_is_made_up_for(make_run: MakeRun, fake_upstream: Path) -> None:
    execute(make_run("train.evaluate_every=2", steps=4), until="evaluate")
    run = make_run("train.evaluate_every=2", steps=6)
    del run.model["evaluations"]["upstream"]["4"]
    run.save()
    execute(run, until="train")
    assert list(evaluation.evaluations(make_run())) == [2, 4]


def test_evaluations_of_discarded_steps_are_discarded(evaluated: Run, make_run: MakeRun) -> None:
    """Training that continues at an earlier step, or starts again, makes other weights."""
    for step in (6, 7):
        for file in evaluated.model_dir.glob(f"model.ckpt-{step}.*"):
            file.unlink()
    evaluation.discard_after(evaluated, 5)
    run = make_run()
    assert list(evaluation.evaluations(run)) == [2, 4] and best_step(run) == 4
    assert (run.model_dir / "best-4").is_dir()
    assert [step for step, _ in scalars.read(run.model_dir / "eval")["loss/total"]] == [2, 4]
    for file in run.model_dir.glob("model.ckpt-*"):
        file.unlink()
    execute(make_run(), until="train")
    run = make_run()
    assert evaluation.evaluations(run) == {} and best_step(run) is None
    assert kept(run) == ["best-4.old-1"]
    assert not any(scalars.read(run.model_dir / "eval").values())


def test_hours_add_up_over_attempts(make_run: MakeRun, fake_upstream: Path) -> None:
    def hours() -> list[float]:
        curve = scalars.read(make_run().model_dir / "train")["cost/hours"]
        return [value for _, value in curve]

    execute(make_run(steps=2), until="train")
    before = hours()
    execute(make_run(steps=5), until="train")
    assert len(hours()) == 5 and hours() == sorted(hours())
    assert hours()[2] > before[-1] == hours()[1]


def test_model_that_does_not_learn_is_stopped(evaluated: Run) -> None:
    with training.TrainingMonitor(evaluated, 0) as monitor:
        monitor(events.Step(training.PATIENCE, 0.0, {"loss/total": 50.0}))
        with pytest.raises(StageFailed, match=r"does not learn: at step 1,001 the loss is 50\.00"):
            monitor(events.Step(training.PATIENCE + 1, 1.0, {"loss/total": 50.0}))


def test_text_that_is_in_the_training_text_is_not_used_for_evaluation(
    make_run: MakeRun, fake_upstream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, lines in (("training", "una\ndos\n"), ("held", "dos\n\ntres cuatro\n\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part-0.txt").write_text(lines, encoding="utf-8")
    share = corpus.seen_share(tmp_path / "training", tmp_path / "held")
    assert share == pytest.approx(4 / (4 + 12))
    assert corpus.seen_share(tmp_path / "held", tmp_path / "held") == 1
    twice = tmp_path / "twice.txt"
    twice.write_text("".join(f"{i}\nla misma frase larga, otra vez\n\n" for i in range(99)))
    run = make_run("train.evaluate_every=2", corpus=twice)
    execute(run, until="evaluate")
    assert "lines that the training text has, too" in capsys.readouterr().err
    assert run.results(run.train_record)["step"] == 4, "it is trained all the same"
    with pytest.raises(UsageError, match=r'set corpus.deduplicate = "lines"'):
        evaluate(run, None)


def test_report_is_one_file_with_all_results(learned: Run, tmp_path: Path) -> None:
    page = report.write([learned.directory]).read_text(encoding="utf-8")
    external = r'(src|href)="(?!#)|url\((?!#)|@import|<script'
    assert not re.search(external, page.replace('xlink:href="#', ""))
    assert page.count("<svg") == len(report.FIGURES) == page.count("<figcaption>")
    best = best_step(learned)
    for step, values in evaluation.evaluations(learned).items():
        star = " ★" if step == best else ""
        assert f'<td>native</td><td class="number">{step}{star}</td>' in page
        assert f"{values['discriminator/auc']:.4f}</td>" in page
    assert page.count('<p class="sentence">') == 2
    assert page.count('class="token changed') >= 2, "two sentences, with replaced tokens"
    assert "python -m electra_wrap run --profile m.toml" in page and "pip install" not in page
    (profile,) = re.findall("m.toml</summary><pre>(.*?)</pre>", page, re.DOTALL)
    (tmp_path / "m.toml").write_text(html.unescape(profile), encoding="utf-8")
    assert profiles.load(str(tmp_path / "m.toml")) == learned.profile


def test_report_escapes_text(learned: Run, tmp_path: Path) -> None:
    strange = {"description": "<script>alert(1)</script> & ñ"}
    profile = learned.profile.model_copy(update=strange)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile.json").write_text(profile.model_dump_json(), encoding="utf-8")
    page = report.write([tmp_path / "run"]).read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; ñ" in page and "<script" not in page


def test_report_has_no_curve_of_discarded_steps(evaluated: Run) -> None:
    with training.TrainingMonitor(evaluated, 0):
        pass  # training starts again and ends before its first step
    page = report.write([evaluated.directory]).read_text(encoding="utf-8")
    assert "<figcaption>Total loss" in page and "<figcaption>Speed" not in page


def test_report_shows_the_engine_of_each_evaluation(learned: Run, tmp_path: Path) -> None:
    run = Run.open(shutil.copytree(learned.directory, tmp_path / "run"))
    by_engine = run.model["evaluations"]
    by_engine["upstream"] = {"6": by_engine["native"]["6"] | {"loss/total": 1.0}}
    run.manifest["stages"]["convert"]["results"]["model_name"] = "another"
    run.save()
    page = report.write([run.directory]).read_text(encoding="utf-8")
    assert page.count("★</td>") == 2, "one for each engine"
    assert '<td>upstream</td><td class="number">6 ★</td>' in page
    assert f'<td>native</td><td class="number">{best_step(learned)} ★</td>' in page
    assert "two engines mask different tokens" in page
    assert '<p class="sentence">' not in page, "the exported models are another's"


def test_reports_compare_runs_and_replace_only_reports(learned: Run, tmp_path: Path) -> None:
    both, out = [learned.directory, learned.directory], tmp_path / "both.html"
    with pytest.raises(UsageError, match="--out FILE"):
        report.write(both)
    page = report.write(both, out).read_text(encoding="utf-8")
    assert page.count(f'<th class="number">{learned.directory}</th>') == 2
    strange = shutil.copytree(learned.directory, tmp_path / "_a$\\frac$語")
    page = report.write([both[0], strange], out).read_text(encoding="utf-8")
    figure = page.partition("<svg")[2].partition("</svg>")[0]
    assert "\u200b_a$\\frac$語</text>" in figure
    (tmp_path / "mine.html").write_text("mine")
    with pytest.raises(UsageError, match="is not a report"):
        report.write(both, tmp_path / "mine.html")
    with pytest.raises(UsageError, match="is not a run directory"):
        report.write([tmp_path])


def test_long_curves_are_shortened_to_means() -> None:
    curve = np.stack([np.arange(1000.0), np.arange(1000.0) % 2], 1)
    short = report.shorten(curve)
    assert len(short) == 100 and short[:, 1] == pytest.approx(0.5)
    assert report.shorten(curve[:50]).tolist() == curve[:50].tolist()
