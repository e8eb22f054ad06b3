"""TensorBoard scalars, evaluations, exported checkpoints and the report of a run."""

import html
import json
import re
import shutil
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard import program

from electra_wrap import checkpoints, events, files, metrics, monitor, profiles, report, stages
from electra_wrap.data import corpus
from electra_wrap.errors import EnvironmentProblem, UsageError
from electra_wrap.pipeline import execute
from electra_wrap.run import Run

MakeRun = Callable[..., Run]

#: The scalars of a logged step, for either engine. The first step of a session has no speed.
TAGS = {*metrics.UPSTREAM.values()} - {"generator/sampled_accuracy"}
TAGS |= {"train/learning_rate", "train/gradient_norm", "discriminator/replaced"}
TAGS |= {"memory/gigabytes", "cost/hours", "progress/epochs"}
TAGS |= {"speed/steps_per_second", "speed/tokens_per_second"}


@pytest.fixture
def copied(learned: Run, tmp_path: Path) -> Run:
    return Run.open(Path(shutil.copytree(learned.directory, tmp_path / "run")))


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
    epochs = [event.value for event in reader.Scalars("progress/epochs")]
    examples = learned.results(learned.examples_record)["examples"]
    assert epochs == pytest.approx([4 * step / examples for step in range(1, 7)])


class Server:
    """TensorBoard's server, which reads the logs every second."""

    def __init__(self, logdir: Path) -> None:
        tensorboard = program.TensorBoard()
        options = ["--logdir", str(logdir), "--port", "0", "--reload_interval", "1"]
        tensorboard.configure(["tensorboard", *options, "--load_fast", "false"])
        self._url = tensorboard.launch()

    def get(self, path: str, **values: Any) -> Any:
        body = json.dumps(values).encode() if values else None
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self._url}data/{path}", body, headers)
        return json.load(urllib.request.urlopen(request))

    def wait_for_rows(self, number: int, auc: float) -> dict[str, dict[str, Any]]:
        """Return the rows of the HParams tab when there are so many and one has this AUC."""
        query = {"startIndex": 0, "sliceSize": 9, "allowedStatuses": ["STATUS_UNKNOWN"]}
        for _ in range(300):
            groups = self.get("plugin/hparams/session_groups", **query, colParams=[])
            rows = {group["name"]: group for group in groups["sessionGroups"]}
            metrics = [metric for row in rows.values() for metric in row["metricValues"]]
            found = [m["value"] for m in metrics if m["name"]["tag"] == "discriminator/auc"]
            if len(rows) == number and pytest.approx(auc) in found:
                return rows
            time.sleep(0.2)
        raise AssertionError(rows)


def test_tensorboard_compares_runs(copied: Run) -> None:
    """Also runs with equal settings, while they train, and after they trained longer."""
    shutil.copytree(copied.directory, copied.directory.with_name("twin"))
    server = Server(copied.directory.parent)
    rows = server.wait_for_rows(2, copied.model.evaluations[6]["discriminator/auc"])
    name, twin = "run/models/m/eval", "twin/models/m/eval"
    assert set(rows) == {name, twin} and rows[name]["hparams"] == rows[twin]["hparams"]
    hparams = rows[name]["hparams"]
    assert hparams["engine"] == "native" and hparams["discriminator.hidden_size"] == 64
    assert hparams["train.steps"] == 6 and hparams["train.learning_rate"] == 1e-3
    run = Run(copied.profile.with_values({"train.steps": 7}), copied.directory)
    scalars = {**run.model.evaluations[6], "discriminator/auc": 0.25}
    monitor.record_evaluation(run, events.Evaluation(7, 8, scalars))
    server.wait_for_rows(2, 0.25)
    longer = Server(copied.directory.parent).wait_for_rows(2, 0.25)
    assert [longer[run]["hparams"]["train.steps"] for run in (name, twin)] == [7, 6]
    assert set(server.get("runs")) == set(server.get("plugin/scalars/tags")), "none without scalars"


def test_evaluations_are_recorded_and_repeatable_without_a_gpu(
    copied: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only training requires the GPU that a profile names."""
    recorded = copied.model.evaluations
    assert list(recorded) == [2, 4, 6] and recorded[6]["examples"] > 8
    assert copied.results("evaluate m") == {"step": 6, **recorded[6]}
    for tag in metrics.UPSTREAM.values():
        assert monitor.read_scalars(copied.model_dir / "eval")[tag] == [
            (step, pytest.approx(values[tag], rel=1e-6)) for step, values in recorded.items()
        ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    profile = copied.profile.with_values({"train.device": "gpu", "train.steps": 7})
    files.write_json(copied.directory / "profile.json", profile.model_dump())
    assert stages.evaluate(Run.open(copied.directory), 6) == recorded[6]
    with pytest.raises(EnvironmentProblem, match="the native engine sees none"):
        execute(Run.open(copied.directory))


def test_convert_exports_the_latest_intact_checkpoint(copied: Run, cli: Callable) -> None:
    assert checkpoints.steps(copied.model_dir) == [4, 6]
    done = cli("convert", "run", "--out", "six\x1b[31m")
    assert (done.returncode, done.stdout, done.stderr) == (0, "six\ufffd[31m\n", "")
    name = Path("discriminator", "model.safetensors")
    exported, out = (copied.exported / name).read_bytes(), copied.directory.parent
    assert (out / "six\x1b[31m" / name).read_bytes() == exported
    weights = copied.model_dir / "step-6" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    done = cli("convert", "run", "--out", "four")
    assert done.returncode == 0 and "the checkpoint of step 6 is damaged" in done.stderr
    assert (copied.model_dir / "step-6.old-1").is_dir() and not weights.exists()
    assert (out / "four" / name).read_bytes() != exported
    assert "trained for 4 steps" in (out / "four/generator/README.md").read_text(encoding="utf-8")
    for arguments, message in (
        (("--out", "four"), "four exists; choose another --out"),
        (("--out", "other", "--step", "6"), "no checkpoint of step 6; choose another --step"),
    ):
        done = cli("convert", "run", *arguments)
        assert done.returncode == 2 and message in done.stderr and not (out / "other").exists()


def test_former_export_is_archived(copied: Run) -> None:
    card = Path("discriminator", "README.md")
    (copied.exported / card).write_text("Mine.\n", encoding="utf-8")
    run = Run(copied.profile.model_copy(update={"description": "Otra"}), copied.directory)
    assert execute(run) == 1
    assert (run.directory / "hf.old-1" / card).read_text(encoding="utf-8") == "Mine.\n"
    assert "\nOtra.\n" in (run.exported / card).read_text(encoding="utf-8")


def test_evaluations_of_discarded_steps_are_discarded(trained: Run, make_run: MakeRun) -> None:
    """Training that continues at an earlier step makes other weights."""
    assert list(trained.model.evaluations) == [2, 4]
    (trained.model_dir / "step-4.sha256").unlink()
    execute(make_run(), until="train")
    assert list(make_run().model.evaluations) == [2]
    evaluated = monitor.read_scalars(trained.model_dir / "eval")["loss/total"]
    assert [step for step, _ in evaluated] == [2]


def test_held_out_text_that_the_training_text_has_is_measured(tmp_path: Path) -> None:
    for name, lines in (("training", "una\ndos\n"), ("held", "dos\n\ntres cuatro\n\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part-0.txt").write_text(lines, encoding="utf-8")
    assert corpus.seen_share(tmp_path / "training", tmp_path / "held") == 4 / (4 + 12)


def test_hours_add_up_over_attempts(trained: Run, make_run: MakeRun) -> None:
    def hours() -> list[float]:
        curve = monitor.read_scalars(trained.model_dir / "train")["cost/hours"]
        return [value for _, value in curve]

    before = hours()
    execute(make_run(steps=6), until="train")
    assert len(hours()) == 6 and hours() == sorted(hours())
    assert hours()[4] > before[-1] == hours()[3]
    assert monitor.total_hours(make_run()) == hours()[-1]


def test_report_is_one_file_with_all_results(copied: Run, tmp_path: Path) -> None:
    page = report.write(copied).read_text(encoding="utf-8")
    external = r'(src|href)="(?!#)|url\((?!#)|@import|<script'
    assert not re.search(external, page.replace('xlink:href="#', ""))
    assert page.count("<svg") == len(report.FIGURES) == page.count("<figcaption>")
    for step, values in copied.model.evaluations.items():
        assert f'<td class="number">{step}</td>' in page
        assert f"{values['discriminator/auc']:.4f}</td>" in page
    assert page.count('<p class="sentence">') == 2
    assert page.count('class="token changed') >= 2, "two sentences, with replaced tokens"
    assert "python -m electra_wrap run --profile m.toml" in page
    (profile,) = re.findall("m.toml</summary><pre>(.*?)</pre>", page, re.DOTALL)
    (tmp_path / "m.toml").write_text(html.unescape(profile), encoding="utf-8")
    assert profiles.load(str(tmp_path / "m.toml")) == copied.profile
    other = Run(copied.profile.model_copy(update={"model_name": "other"}), copied.directory)
    page = report.write(other).read_text(encoding="utf-8")
    assert '<p class="sentence">' not in page, "the exported models are another's"


def test_report_escapes_text_and_replaces_only_reports(learned: Run, tmp_path: Path) -> None:
    strange = {"description": "<script>alert(1)</script> & ñ"}
    run = Run(learned.profile.model_copy(update=strange), tmp_path)
    page = report.write(run).read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; ñ" in page and "<script" not in page
    report.write(run)
    (tmp_path / "report.html").write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match="is not a report"):
        report.write(run)


def test_report_has_no_curve_of_discarded_steps(trained: Run) -> None:
    assert "<figcaption>Speed" in report.write(trained).read_text(encoding="utf-8")
    with monitor.TrainingMonitor(trained, 0):
        pass  # training starts again and ends before its first step
    page = report.write(trained).read_text(encoding="utf-8")
    assert "<figcaption>Total loss" in page and "<figcaption>Speed" not in page


def test_long_curves_are_shortened_to_means() -> None:
    curve = np.stack([np.arange(1000.0), np.arange(1000.0) % 2], 1)
    short = report._shorten(curve)
    assert len(short) == 100 and short[:, 1] == pytest.approx(0.5)
    assert report._shorten(curve[:50]).tolist() == curve[:50].tolist()
