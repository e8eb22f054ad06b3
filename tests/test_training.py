"""What is known of a training: metrics, scalars for TensorBoard, evaluation, the best checkpoint, the report."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import child, tiny

from electra_wrap import corpus, metrics, report, scalars, stages, training
from electra_wrap.errors import UsageError
from electra_wrap.profile import Profile, toml
from electra_wrap.rundir import RunDir, whole
from electra_wrap.stages import Run

MakeRun = Callable[..., Run]

#: What every logged step tells, whichever engine trains; but the first of a session has no speed.
TAGS = {
    *("loss/total", "loss/generator", "loss/discriminator", "train/learning_rate", "train/gradient_norm"),
    *("generator/accuracy", "discriminator/accuracy", "discriminator/precision", "discriminator/recall"),
    *("discriminator/auc", "discriminator/replaced", "memory/gigabytes", "cost/hours"),
    *("progress/examples", "progress/epochs"),
    *("speed/steps_per_second", "speed/sequences_per_second", "speed/tokens_per_second"),
}


def test_metrics_are_tensorflows(tmp_path: Path) -> None:
    """In batches and in parts that are added up, with logits at the ends and at 0, and with padding."""
    random = np.random.default_rng(0)
    batches = {
        "logits": random.normal(0, 4, (5, 8, 32)).astype(np.float32),
        "inside": np.arange(32) < random.integers(4, 33, (5, 8, 1)),
        "weights": (random.random((5, 8, 6)) < 0.8).astype(np.float32),
        "losses": random.exponential(3, (5, 8, 6)).astype(np.float32),
        **{name: (random.random((5, 8, 6)) < 0.3).astype(np.float32) for name in ("right", "sampled")},
    }
    batches["replaced"] = (random.random((5, 8, 32)) < 0.15) & batches["inside"]
    batches["logits"][batches["replaced"]] += 2  # it has learned something
    batches["logits"][:, :, 1], batches["logits"][:, :, 2] = 0, 90
    np.savez(tmp_path / "batches.npz", **batches)
    expected = json.loads(child("tf_metrics.py", tmp_path / "batches.npz"))
    tallies = [metrics.Tally(), metrics.Tally()]
    for i in range(5):
        batch = {name: values[i] for name, values in batches.items()}
        for tally, rows in zip(tallies, (slice(0, 3), slice(3, 8)), strict=True):
            tally.add_generator(*(batch[name][rows] for name in ("right", "sampled", "losses", "weights")))
            tally.add_discriminator(*(batch[name][rows] for name in ("logits", "replaced", "inside")))
    tallies[0].sums += tallies[1].sums
    assert tallies[0].values() == pytest.approx(expected, rel=1e-5)
    assert set(metrics.UPSTREAM.values()) - {"loss/total"} < set(expected)


def test_metrics_of_a_network_that_finds_nothing_are_numbers() -> None:
    tally = metrics.Tally()
    tally.add_generator(*np.zeros((3, 2, 4)), np.ones((2, 4)))
    tally.add_discriminator(np.full((2, 9), -1.0), np.zeros((2, 9)), np.ones((2, 9)))
    values = tally.values()
    assert values["discriminator/precision"] == values["discriminator/recall"] == values["discriminator/replaced"] == 0
    assert values["discriminator/accuracy"] == 1 and all(np.isfinite(list(values.values())))


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, corpus_text: Path) -> Run:
    """A whole run of the native engine, evaluated on its way, of whose checkpoints the last is kept."""
    keys = ('engine="native"', "train.evaluate_every=2", "train.save_every=100", "train.keep=1", "model_name=m")
    run = Run(tiny(corpus_text, *keys, steps=6), RunDir(tmp_path_factory.mktemp("learned") / "run"))
    stages.execute(run)
    return run


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.log("train").read_text().splitlines() if line.startswith('{"')]


def test_tensorboards_own_reader_finds_every_scalar(learned: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(learned.model_dir / "train")).Reload()
    assert set(found.Tags()["scalars"]) == TAGS
    told = [line for line in lines(learned) if "step" in line]
    assert len(told) == 6
    for line in told:
        for tag in line.keys() - {"step", "clock"}:
            (event,) = (event for event in found.Scalars(tag) if event.step == line["step"])
            assert event.value == pytest.approx(line[tag], rel=1e-6)
    assert [event.value for event in found.Scalars("progress/examples")] == [4, 8, 12, 16, 20, 24]
    texts = {tag: found.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in found.Tags()["tensors"]}
    assert "| num_train_steps | 6 |" in texts["hparams"] and "| model.max_seq_length | 32 |" in texts["profile"]


def test_evaluations_are_kept_and_the_same_each_time(learned: Run) -> None:
    kept = training.evaluations(stages.open_run(learned.directory.path))
    assert set(kept) == {"2", "4", "6"}
    for tag in {*metrics.UPSTREAM.values()}:
        found = scalars.read(learned.model_dir / "eval")[tag]
        assert [(step, value) for step, _, value in found] == [
            (int(step), pytest.approx(values[tag], rel=1e-6)) for step, values in kept.items()
        ]
    before = (learned.directory / "profile.json").read_bytes()
    other = learned.profile.model_copy(update={"engine": "upstream", "description": "other"})
    again = stages.evaluate(Run(other, RunDir(learned.directory.path)), None)
    assert (learned.directory / "profile.json").read_bytes() == before
    assert again == {"step": 6, **kept["6"]}
    assert learned.recorded("evaluate")["facts"] == again and again["examples"] > 8


def test_the_best_checkpoint_outlives_the_others(learned: Run, tmp_path: Path) -> None:
    best = min((2, 4, 6), key=lambda step: training.evaluations(learned)[str(step)]["loss/total"])
    assert learned.engine.steps(learned.model_dir) == [6]
    assert [path.name for path in learned.model_dir.glob("best-*")] == [f"best-{best}"]
    assert whole(learned.engine.sums(learned.model_dir / f"best-{best}", best))
    stages.convert(learned.directory.path, "best", tmp_path / "out", force=False)
    assert f"{best} steps" in re.sub(r"[*|`]", "", (tmp_path / "out" / "generator" / "README.md").read_text())
    with pytest.raises(UsageError, match="exists; choose another --out"):
        stages.convert(learned.directory.path, None, tmp_path / "out", force=False)
    (tmp_path / "out" / "mine.txt").touch()
    stages.convert(learned.directory.path, None, tmp_path / "out", force=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"mine.txt", "discriminator", "generator"}
    ours, theirs = (path / "discriminator/model.safetensors" for path in (tmp_path / "out", learned.directory / "hf"))
    assert ours.read_bytes() == theirs.read_bytes()
    with pytest.raises(UsageError, match="no whole checkpoint of step 5"):
        stages.convert(learned.directory.path, 5, tmp_path / "other", force=False)


def test_the_best_is_that_with_the_lowest_loss(make_run: MakeRun, fake_upstream: Path) -> None:
    """The fake's loss is 100 at step 4, and more before and after."""
    stages.execute(make_run("train.evaluate_every=2", steps=7), "evaluate")
    run = make_run(steps=7)
    assert {step: values["loss/total"] for step, values in training.evaluations(run).items()} == {
        **{"2": 102, "4": 100, "6": 102, "7": 103}
    }
    assert training.best(run) == 4 and [path.name for path in run.model_dir.glob("best-*")] == ["best-4"]
    assert sorted(path.suffix for path in (run.model_dir / "best-4").iterdir()) == [
        *(".data-00000-of-00001", ".index", ".sha256")
    ]


def test_an_evaluation_that_a_killed_attempt_missed_is_made_up_for(make_run: MakeRun, fake_upstream: Path) -> None:
    stages.execute(make_run("train.evaluate_every=2", steps=4), "evaluate")
    run = make_run("train.evaluate_every=2", steps=6)
    del run.model["evaluations"]["4"]
    run.directory.save()
    stages.execute(run, "train")
    assert set(training.evaluations(make_run())) == {"2", "4"}


def test_another_training_has_evaluations_of_its_own(make_run: MakeRun, fake_upstream: Path) -> None:
    """Begun anew, or gone on with at an earlier step: what was evaluated after it were other weights."""
    stages.execute(make_run("train.evaluate_every=2", steps=7), "evaluate")
    run = make_run()
    for step in (6, 7):
        for file in run.model_dir.glob(f"model.ckpt-{step}.*"):
            file.unlink()
    training.forget(run, 5)
    run = make_run()
    assert set(training.evaluations(run)) == {"2", "4"} and training.best(run) == 4
    assert (run.model_dir / "best-4").is_dir()
    assert [step for step, _, _ in scalars.read(run.model_dir / "eval")["loss/total"]] == [2, 4]
    for file in run.model_dir.glob("model.ckpt-*"):
        file.unlink()
    stages.execute(make_run(), "train")
    run = make_run()
    assert training.evaluations(run) == {} and training.best(run) is None
    assert [path.name for path in run.model_dir.glob("best-*")] == ["best-4.old-1"]
    assert not any(scalars.read(run.model_dir / "eval").values())


def test_hours_add_up_over_attempts(make_run: MakeRun, fake_upstream: Path) -> None:
    def hours() -> list[float]:
        return [value for _, _, value in scalars.read(make_run().model_dir / "train")["cost/hours"]]

    stages.execute(make_run(steps=2), "train")
    before = hours()
    stages.execute(make_run(steps=5), "train")
    assert len(hours()) == 5 and hours() == sorted(hours()) and hours()[2] > before[-1] == hours()[1]


def test_text_that_training_has_is_no_held_out_text(
    make_run: MakeRun, fake_upstream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, lines in (("training", "una\ndos\n"), ("held", "dos\n\ntres cuatro\n\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part-0.txt").write_text(lines, encoding="utf-8")
    assert corpus.seen_share(tmp_path / "training", tmp_path / "held") == pytest.approx(4 / (4 + 12))
    assert corpus.seen_share(tmp_path / "held", tmp_path / "held") == 1
    (tmp_path / "twice.txt").write_text("".join(f"{i}\nla misma frase larga, otra vez\n\n" for i in range(99)))
    run = make_run(corpus=tmp_path / "twice.txt")
    stages.execute(run, "evaluate")
    assert "of the held-out text are lines that training has too" in capsys.readouterr().err
    assert run.recorded("evaluate") | {"facts": {}} == run.recorded("evaluate"), "the run goes on without"
    with pytest.raises(UsageError, match=r'set corpus.deduplicate = "lines"'):
        stages.evaluate(run, None)
    with pytest.raises(UsageError, match=r'set corpus.deduplicate = "lines"'):
        stages.execute(make_run("train.evaluate_every=2", corpus=tmp_path / "twice.txt", steps=5), "train")


def test_evaluations_on_the_way_need_held_out_text(make_run: MakeRun) -> None:
    with pytest.raises(UsageError, match=r"train.evaluate_every.*no text is held out"):
        make_run("train.evaluate_every=2", "corpus.held_out=0")


def test_what_the_driver_tells_of_all_gpus_is_added_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert training.driver() == {}
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\ncase "$*" in *--id=0,2*) echo 250.5, 1000; echo 100, 24;; *) echo "[N/A], 3";; esac\n')
    smi.chmod(0o755)
    assert training.driver() == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    assert training.driver() == {"cost/watts": 350.5, "memory/gigabytes": pytest.approx(1024 * 2**20 / 1e9)}


def test_a_report_needs_nothing_else_and_says_what_was_measured(learned: Run, tmp_path: Path) -> None:
    page = (learned.directory / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!#)|url\((?!#)|@import|<script', page.replace('xlink:href="#', ""))
    assert page.count("<svg") == len(report.FIGURES) == page.count("<figcaption>")
    for step, values in training.evaluations(learned).items():
        assert re.search(rf">{step}( ★)?</td>", page) and f"{values['discriminator/auc']:.4f}</td>" in page
    assert page.count('class="token changed') >= 2, "two sentences, of which tokens were replaced"
    strange = learned.profile.model_copy(update={"description": "<script>alert(1)</script> & ñ"})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile.json").write_text(strange.model_dump_json(), encoding="utf-8")
    page = report.write([tmp_path / "run"]).read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; ñ" in page and "<script" not in page


def test_reports_compare_runs_and_overwrite_reports_only(learned: Run, tmp_path: Path) -> None:
    both = [learned.directory.path, learned.directory.path]
    with pytest.raises(UsageError, match="--out FILE"):
        report.write(both)
    page = report.write(both, tmp_path / "both.html").read_text(encoding="utf-8")
    assert page.count(f'<th class="number">{learned.directory.path}</th>') == 2
    strange = shutil.copytree(learned.directory.path, tmp_path / "_a$\\frac$語")
    page = report.write([both[0], strange], tmp_path / "both.html").read_text(encoding="utf-8")
    drawn = page.partition("<svg")[2].partition("</svg>")[0]
    assert "\u200b_a$\\frac$語</text>" in drawn
    (tmp_path / "mine.html").write_text("mine")
    with pytest.raises(UsageError, match="is no report of ours"):
        report.write(both, tmp_path / "mine.html")
    with pytest.raises(UsageError, match="is no run directory"):
        report.write([tmp_path])


def test_the_profile_in_a_report_is_the_runs(learned: Run, tmp_path: Path) -> None:
    (tmp_path / "again.toml").write_text(toml(learned.profile.model_dump()), encoding="utf-8")
    assert Profile.load(str(tmp_path / "again.toml")) == learned.profile


def test_long_curves_become_means() -> None:
    curve = np.stack([np.arange(1000.0), np.arange(1000.0) % 2], 1)
    assert len(report.thinned(curve, 100)) == 100 and report.thinned(curve, 100)[:, 1] == pytest.approx(0.5)
    assert report.thinned(curve[:50], 100).tolist() == curve[:50].tolist()


def test_tensorboard_shows_runs_side_by_side(learned: Run, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [sys.executable, "-m", "electra_wrap", "tensorboard", str(learned.directory.path), str(tmp_path / "two")]
    (tmp_path / "two" / "models").mkdir(parents=True)
    (tmp_path / "two" / "models" / "m").symlink_to(learned.model_dir)
    server = subprocess.Popen([*argv, "--port", str(port)], stderr=subprocess.DEVNULL)
    try:
        for _ in range(240):
            time.sleep(0.5)
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/plugin/scalars/tags") as answer:
                    tags = json.load(answer)
            except OSError:
                assert server.poll() is None
                continue
            if len(tags) == 4:
                break
        assert set(tags) == {f"{name}/m/{kind}" for name in ("run", "two") for kind in ("train", "eval")}
        assert set(tags["run/m/train"]) == TAGS
    finally:
        server.kill()
        server.wait()
