"""The part of `tf.estimator` that run_pretraining.py uses, built on tf.compat.v1.train.

TensorFlow 2.16 removed Estimator. The script needs little of it: build one graph, run it in a
MonitoredTrainingSession with the script's own hooks, save checkpoints, or evaluate a checkpoint.
Names and arguments are Estimator's, because the script calls them.

The environment variable ELECTRA_WRAP_RUNTIME has what the scripts have no argument for (engine.py):
seed, precision, the step to stop at, the checkpoint to evaluate. Logged steps and evaluations are
reported as events.
"""

import contextlib
import json
import math
import os
import re
import resource
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow.compat.v1 as tf

from electra_wrap import checkpoints, events, metrics, subprocesses
from electra_wrap.errors import EnvironmentProblem, StageFailed, diverged, find_disk_error
from electra_wrap.upstream import engine

SessionRunHook = tf.train.SessionRunHook
SessionRunArgs = tf.train.SessionRunArgs
ModeKeys = types.SimpleNamespace(TRAIN="train", EVAL="eval")


class _NoEvents:
    """Ignores CheckpointSaverHook's graph, which TensorBoard shows as a run without scalars."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None


tf.summary.FileWriterCache.get = lambda directory: _NoEvents()

#: Tensors of the graph, by upstream's names.
_watched: dict[str, Any] = {}


def watch(**tensors: Any) -> None:
    """Register tensors of the graph that is being built, for the scalars of logged steps."""
    _watched.update(tensors)


class TPUEstimator:
    """Trains and evaluates the model that `model_fn` builds, on a CPU or a GPU."""

    def __init__(
        self,
        model_fn: Callable[..., Any],
        config: Any,
        train_batch_size: int,
        eval_batch_size: int,
        use_tpu: bool = False,
    ) -> None:
        if use_tpu or config.cluster is not None:
            raise ValueError("TPUs are not supported: set use_tpu to false")
        self._model_fn = model_fn
        self._config = config
        self._batch_size = {ModeKeys.TRAIN: train_batch_size, ModeKeys.EVAL: eval_batch_size}
        self._runtime = json.loads(os.environ["ELECTRA_WRAP_RUNTIME"])

    def train(self, input_fn: Callable[..., Any], max_steps: int) -> None:
        """Train from the latest checkpoint of model_dir, or from scratch, to `max_steps`.

        SIGINT and SIGTERM end training after the current step. As at the regular end, a checkpoint
        is saved; the process then exits with `subprocesses.INTERRUPTED`. Errors are reported to the
        parent process.
        """
        with _report_errors():
            checkpoint = tf.train.latest_checkpoint(self._config.model_dir)
            start = int(tf.train.load_variable(checkpoint, "global_step")) if checkpoint else 0
            if start < max_steps:
                self._train(input_fn, start, self._runtime.get("stop", max_steps))

    def _train(self, input_fn: Callable[..., Any], start: int, stop: int) -> None:
        config = self._config
        with tf.Graph().as_default():
            # With the same seed after each start, a resumed training would see the first batches
            # and masks again.
            spec = self._build(ModeKeys.TRAIN, input_fn, self._runtime["seed"] + start)
            monitor = _Monitor(spec.loss, config.tpu_config.iterations_per_loop)
            keep = config.keep_checkpoint_max or 0
            scaffold = tf.train.Scaffold(
                saver=tf.train.Saver(max_to_keep=keep, save_relative_paths=True)
            )
            save = tf.train.CheckpointSaverHook(
                config.model_dir,
                save_steps=config.save_checkpoints_steps,
                scaffold=scaffold,
                listeners=[_CheckpointListener(config.model_dir)],
            )
            creator = tf.train.ChiefSessionCreator(
                scaffold, config=self._session_config(), checkpoint_dir=config.model_dir
            )
            stop_hook = tf.train.StopAtStepHook(last_step=stop)
            hooks = [save, monitor, stop_hook, *spec.training_hooks]
            self._report_setup()
            Path(config.model_dir).stat()  # else TensorFlow makes it anew where its disk is gone
            with tf.train.MonitoredSession(creator, hooks) as session:
                while not session.should_stop():
                    session.run(spec.train_op)
        if monitor.interrupted:
            sys.exit(subprocesses.INTERRUPTED)

    def _report_setup(self) -> None:
        precision, gpus = self._runtime["precision"], self._runtime["devices"]
        values = {
            "device": f"1 × {gpus[0]}" if gpus else "1 × CPU",
            "precision": "float32" if precision == "auto" else precision,
            "threads": str(len(os.sched_getaffinity(0))),
            "tensorflow": tf.__version__,
        }
        events.emit(events.Setup(values))

    def evaluate(self, input_fn: Callable[..., Any], steps: int) -> dict[str, Any]:
        """Return a checkpoint's metrics over `steps` batches, `loss` and `global_step`.

        The seed is always the same, and with it masks and samples.
        """
        with _report_errors(), tf.Graph().as_default():
            spec = self._build(ModeKeys.EVAL, input_fn, self._runtime["seed"])
            metric_fn, tensors = spec.eval_metrics
            streaming = {**metric_fn(*tensors), "loss": tf.metrics.mean(spec.loss)}
            # Upstream's AUC counts padding, too, as easy tokens.
            labels, found = _watched["disc_labels"], _watched["disc_probs"]
            streaming["disc_token_auc"] = tf.metrics.auc(labels, found, _watched["input_mask"])
            values = {name: value for name, (value, _) in streaming.items()}
            values["global_step"] = tf.train.get_global_step()
            updates = [update for _, update in streaming.values()]
            creator = tf.train.ChiefSessionCreator(
                checkpoint_filename_with_path=self._runtime["checkpoint"],
                config=self._session_config(),
            )
            with tf.train.MonitoredSession(creator, hooks=spec.evaluation_hooks) as session:
                for _ in range(steps):
                    session.run(updates)
                # Without the hooks, which would read another batch.
                results: dict[str, Any] = session.run_step_fn(
                    lambda step_context: step_context.session.run(values)
                )
        scalars = {ours: float(results[name]) for name, ours in metrics.UPSTREAM.items()}
        examples = steps * self._batch_size[ModeKeys.EVAL]
        events.emit(events.Evaluation(int(results["global_step"]), examples, scalars))
        return results

    def _build(self, mode: str, input_fn: Callable[..., Any], seed: int) -> Any:
        _watched.clear()
        tf.set_random_seed(seed)
        # The optimizer reads the step for the learning rate and advances it. With one cached read
        # per session.run(), the learning rate never sees the advanced step.
        with tf.variable_scope(tf.get_variable_scope(), caching_device=lambda op: op.device):
            tf.train.create_global_step()
        params = {"batch_size": self._batch_size[mode]}
        features = tf.data.make_one_shot_iterator(input_fn(params)).get_next()
        return self._model_fn(features, None, mode, params)

    def _session_config(self) -> Any:
        tf32 = self._runtime.get("precision") == "tf32"
        tf.config.experimental.enable_tensor_float_32_execution(tf32)
        config = tf.ConfigProto(allow_soft_placement=True)
        config.gpu_options.allow_growth = True
        return config


#: `tf.estimator.tpu`, through which the scripts go on every device. They read back the attributes
#: of a configuration that they set, and nothing else.
tpu = types.SimpleNamespace(
    InputPipelineConfig=types.SimpleNamespace(PER_HOST_V2=3),
    RunConfig=types.SimpleNamespace,
    TPUConfig=types.SimpleNamespace,
    TPUEstimator=TPUEstimator,
    TPUEstimatorSpec=types.SimpleNamespace,
)


@contextlib.contextmanager
def _report_errors() -> Iterator[None]:
    """Report exceptions to the parent process, TensorFlow's as one line."""
    with subprocesses.report_errors():
        try:
            yield
        except tf.errors.OpError as error:
            if disk_error := find_disk_error(error.message):
                raise disk_error from None
            if isinstance(error, tf.errors.ResourceExhaustedError):
                raise EnvironmentProblem("out of memory; lower train.batch_size") from None
            # The message describes the graph. Keep the failed node and its error.
            reason = re.search(r"^Node: (.*\n.*)", error.message, re.M)
            message = reason[1] if reason else error.message
            raise StageFailed(" ".join(message.split())) from None


class _CheckpointListener(tf.train.CheckpointSaverListener):  # type: ignore[misc]
    """Prevents saving weights that are not finite, and writes checksums of saved checkpoints."""

    def __init__(self, model_dir: str) -> None:
        self._model_dir = Path(model_dir)

    def begin(self) -> None:
        finite = [tf.reduce_all(tf.math.is_finite(v)) for v in tf.trainable_variables()]
        self._finite = tf.reduce_all(tf.stack(finite))

    def before_save(self, session: Any, global_step_value: int) -> None:
        if not session.run(self._finite):
            raise diverged(int(global_step_value), float("nan"))

    def after_save(self, session: Any, global_step_value: int) -> None:
        step, directory = int(global_step_value), self._model_dir
        checkpoints.finish(directory, step, engine.checkpoint_files(directory, step))
        for old in checkpoints.steps(directory):
            if not engine.checkpoint_files(directory, old)[0].exists():  # the saver removed it
                checkpoints.checksums(directory, old).unlink()


class _Monitor(tf.train.SessionRunHook):  # type: ignore[misc]
    """Checks every loss, reports every `log_every`th step, and stops at SIGINT and SIGTERM."""

    def __init__(self, loss: Any, log_every: int) -> None:
        self.interrupted = False
        self._loss, self._log_every = loss, log_every
        self._tensors = {**_watched, "logits": _watched["disc_probs"].op.inputs[0]}
        del self._tensors["sampled_tokids"]  # costs a pass over one-hot vectors of the vocabulary

    def begin(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._interrupt)

    def _interrupt(self, number: int, frame: Any) -> None:
        self.interrupted = True

    def after_create_session(self, session: Any, coord: Any) -> None:
        self._step = int(session.run(tf.train.get_global_step()))

    def before_run(self, run_context: Any) -> Any:
        self._step += 1
        logged = self._step % self._log_every == 0
        return tf.train.SessionRunArgs([self._loss, self._tensors if logged else {}])

    def after_run(self, run_context: Any, run_values: Any) -> None:
        loss, values = run_values.results
        if not math.isfinite(loss):
            raise diverged(self._step, float(loss))
        if values:
            scalars = {"loss/total": float(loss), **_scalars(values)}
            events.emit(events.Step(self._step, time.monotonic(), scalars))
        if self.interrupted:
            run_context.request_stop()


def _scalars(values: dict[str, Any]) -> dict[str, float]:
    """Return the scalars of a step, by their names in TensorBoard, from the watched tensors."""
    tally = metrics.Tally()
    correct = values["masked_lm_preds"] == values["masked_lm_ids"]
    not_sampled = np.zeros_like(correct)
    tally.add_generator(correct, not_sampled, values["mlm_loss"], values["masked_lm_weights"])
    tally.add_discriminator(values["logits"], values["disc_labels"], values["input_mask"])
    scalars = tally.values() | {
        "loss/generator": float(values["generator"]),
        "loss/discriminator": float(values["discriminator"]),
        "train/learning_rate": float(values["learning_rate"]),
        "train/gradient_norm": float(values["gradient_norm"]),
    }
    del scalars["generator/sampled_accuracy"]
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "-1":  # a GPU's memory is not the process's
        kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        scalars["memory/gigabytes"] = kibibytes * 1024 / 1e9
    return scalars
