"""The part of `tf.estimator` that run_pretraining.py uses, on tf.compat.v1.train.

TensorFlow 2.16 dropped Estimator. What the script needs of it is small: build one graph, run it in a
MonitoredTrainingSession with the script's own hooks, save checkpoints and summaries, or evaluate the latest
checkpoint. Names and arguments are Estimator's, because the script calls them.

What the scripts have no argument for (seed, precision, XLA, the step to stop at, the checkpoint to evaluate) comes
from the environment: see engine.py. What a step or an evaluation gave is printed as a line of JSON.
"""

from __future__ import annotations

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

from electra_wrap import metrics, process
from electra_wrap.errors import EnvironmentLacks, StageFailed, diverged
from electra_wrap.process import INTERRUPTED
from electra_wrap.rundir import write_sums
from electra_wrap.upstream import engine

SessionRunHook = tf.train.SessionRunHook
SessionRunArgs = tf.train.SessionRunArgs


#: Tensors of the graph, under upstream's names.
_watched: dict[str, Any] = {}


def watch(**tensors: Any) -> None:
    """Remember tensors of the graph that is being built, for the lines that are printed (patches/0010)."""
    _watched.update(tensors)


class ModeKeys:
    TRAIN = "train"
    EVAL = "eval"


class _TPU:
    """`tf.estimator.tpu`: the scripts go through it on every device. A TPU itself is refused."""

    class InputPipelineConfig:
        PER_HOST_V2 = 3

    #: Whatever the script names, it finds again.
    TPUConfig = RunConfig = TPUEstimatorSpec = types.SimpleNamespace

    class TPUEstimator:
        """Trains and evaluates the model that `model_fn` builds."""

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
            """Continue from the latest checkpoint of model_dir, if any, until the global step is `max_steps`.

            SIGINT and SIGTERM end training after the current step; like the regular end, that saves a
            checkpoint, and the process then exits with `INTERRUPTED`. What goes wrong is told (process.py).
            """
            with _telling():
                self._train(input_fn, max_steps)

        def _train(self, input_fn: Callable[..., Any], max_steps: int) -> None:
            config = self._config
            start = self._latest_step()
            if start >= max_steps:
                return
            with tf.Graph().as_default():
                # The start step is part of the seed: with the seed alone, every continued run would see the
                # first batches and the first masks again.
                spec = self._build(ModeKeys.TRAIN, input_fn, self._runtime["seed"] + start)
                stop = min(max_steps, self._runtime.get("stop") or max_steps)
                watch = _Watch(spec.loss, config.tpu_config.iterations_per_loop)
                saver = tf.train.Saver(
                    max_to_keep=config.keep_checkpoint_max or 0, save_relative_paths=True, defer_build=False
                )
                scaffold = tf.train.Scaffold(saver=saver)
                save = tf.train.CheckpointSaverHook(
                    config.model_dir,
                    save_steps=config.save_checkpoints_steps,
                    scaffold=scaffold,
                    listeners=[_Sealed(config.model_dir)],
                )
                with tf.train.MonitoredTrainingSession(
                    checkpoint_dir=config.model_dir,
                    scaffold=scaffold,
                    hooks=[watch, tf.train.StopAtStepHook(last_step=stop), *spec.training_hooks],
                    chief_only_hooks=[save],
                    save_checkpoint_steps=None,
                    save_checkpoint_secs=None,
                    save_summaries_steps=None,
                    save_summaries_secs=None,
                    log_step_count_steps=None,
                    config=self._session_config(),
                ) as session:
                    while not session.should_stop():
                        session.run(spec.train_op)
            if watch.signal is not None:
                sys.exit(INTERRUPTED)

        def evaluate(self, input_fn: Callable[..., Any], steps: int) -> dict[str, Any]:
            """Return the metrics, `loss` and `global_step` of the checkpoint that is asked for, over `steps` batches.

            The graph's seed is always the same, and with it masks and samples.
            """
            with _telling(), tf.Graph().as_default():
                spec = self._build(ModeKeys.EVAL, input_fn, self._runtime["seed"])
                metric_fn, tensors = spec.eval_metrics
                found = {**metric_fn(*tensors), "loss": tf.metrics.mean(spec.loss)}
                values = {name: value for name, (value, _) in found.items()}
                updates = [update for _, update in found.values()]
                global_step = tf.train.get_or_create_global_step()
                with tf.train.MonitoredSession(
                    tf.train.ChiefSessionCreator(
                        checkpoint_filename_with_path=self._runtime["checkpoint"], config=self._session_config()
                    ),
                    hooks=spec.evaluation_hooks,
                ) as session:
                    for _ in range(steps):
                        session.run(updates)
                    # Without the hooks, which would ask for one more batch.
                    results, step = session.run_step_fn(
                        lambda step_context: step_context.session.run([values, global_step])
                    )
            told = {ours: float(results[name]) for name, ours in metrics.UPSTREAM.items()}
            examples = steps * self._batch_size[ModeKeys.EVAL]
            print(json.dumps({"evaluated": int(step), "examples": examples, **told}), flush=True)
            return {**results, "global_step": step}

        def _build(self, mode: str, input_fn: Callable[..., Any], seed: int) -> Any:
            _watched.clear()
            tf.set_random_seed(seed)
            # The optimizer reads the step for the learning rate and also advances it. One cached read for each
            # session.run() keeps the learning rate from seeing the step already advanced.
            tf.get_variable(
                tf.GraphKeys.GLOBAL_STEP,
                shape=[],
                dtype=tf.int64,
                initializer=tf.zeros_initializer(),
                trainable=False,
                caching_device=lambda op: op.device,
                collections=[tf.GraphKeys.GLOBAL_VARIABLES, tf.GraphKeys.GLOBAL_STEP],
            )
            params = {"batch_size": self._batch_size[mode]}
            features = tf.data.make_one_shot_iterator(input_fn(params)).get_next()
            return self._model_fn(features, None, mode, params)

        def _latest_step(self) -> int:
            checkpoint = tf.train.latest_checkpoint(self._config.model_dir)
            return int(tf.train.load_variable(checkpoint, "global_step")) if checkpoint else 0

        def _session_config(self) -> Any:
            tf.config.experimental.enable_tensor_float_32_execution(self._runtime.get("precision") == "tf32")
            config = tf.ConfigProto(allow_soft_placement=True)
            config.gpu_options.allow_growth = True
            if self._runtime.get("xla"):
                config.graph_options.optimizer_options.global_jit_level = tf.OptimizerOptions.ON_1
            return config


tpu = _TPU


@contextlib.contextmanager
def _telling() -> Iterator[None]:
    with process.telling():
        try:
            yield
        except tf.errors.OpError as error:
            if lacks := process.lacking(error.message):
                raise lacks from None
            if isinstance(error, tf.errors.ResourceExhaustedError):
                raise EnvironmentLacks("memory is too small; lower train.batch_size") from None
            # Of a page about the graph, what went wrong in which node.
            reason = re.search(r"^Node: (.*\n.*)", error.message, re.M)
            raise StageFailed(" ".join((reason[1] if reason else error.message).split())) from None


class _Sealed(tf.train.CheckpointSaverListener):  # type: ignore[misc]
    """Keeps weights that are not finite from being saved, and writes down what a checkpoint's files are."""

    def __init__(self, model_dir: str) -> None:
        self._model_dir = Path(model_dir)

    def begin(self) -> None:
        finite = [tf.reduce_all(tf.math.is_finite(variable)) for variable in tf.trainable_variables()]
        self._finite = tf.reduce_all(tf.stack(finite))

    def before_save(self, session: Any, global_step_value: int) -> None:
        if not session.run(self._finite):
            raise diverged(int(global_step_value), float("nan"))

    def after_save(self, session: Any, global_step_value: int) -> None:
        step = int(global_step_value)
        write_sums(engine.sums(self._model_dir, step), engine.files(self._model_dir, step))
        kept = {engine.sums(self._model_dir, step) for step in engine.steps(self._model_dir)}
        for sums in set(self._model_dir.glob("model.ckpt-*.sha256")) - kept:
            sums.unlink()


class _Watch(tf.train.SessionRunHook):  # type: ignore[misc]
    """Requests a regular stop at SIGINT or SIGTERM, so that the session saves a checkpoint; looks at every loss.

    After every `log_every`th step it prints the scalars of that step.
    """

    def __init__(self, loss: Any, log_every: int) -> None:
        self.signal: int | None = None
        self._loss, self._log_every = loss, log_every
        self._scalars = {**_watched, "logits": _watched["disc_probs"].op.inputs[0]}
        del self._scalars["sampled_tokids"]  # a pass over one-hot vectors of the whole vocabulary

    def begin(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def after_create_session(self, session: Any, coord: Any) -> None:
        self._step = int(session.run(tf.train.get_global_step()))

    def _note(self, number: int, _frame: Any) -> None:
        self.signal = number

    def before_run(self, run_context: Any) -> Any:
        self._step += 1
        logged = self._step % self._log_every == 0
        return tf.train.SessionRunArgs([self._loss, self._scalars if logged else {}])

    def after_run(self, run_context: Any, run_values: Any) -> None:
        loss, found = run_values.results
        if not math.isfinite(loss):
            raise diverged(self._step, float(loss))
        if found:
            told = {"step": self._step, "clock": time.monotonic(), "loss/total": float(loss), **_values(found)}
            print(json.dumps(told), flush=True)
        if self.signal is not None:
            run_context.request_stop()


def _values(found: dict[str, Any]) -> dict[str, float]:
    """The scalars that follow from what a step computed, under TensorBoard's names."""
    tally = metrics.Tally()
    right = found["masked_lm_preds"] == found["masked_lm_ids"]
    tally.add_generator(right, np.zeros_like(right), found["mlm_loss"], found["masked_lm_weights"])
    tally.add_discriminator(found["logits"], found["disc_labels"], found["input_mask"])
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    values = tally.values()
    del values["generator/sampled_accuracy"]
    return {
        **values,
        "loss/generator": float(found["generator"]),
        "loss/discriminator": float(found["discriminator"]),
        "train/learning_rate": float(found["learning_rate"]),
        "train/gradient_norm": float(found["gradient_norm"]),
        # A GPU's memory is told by its driver (training.py).
        **({"memory/gigabytes": rss * 1024 / 1e9} if os.environ.get("CUDA_VISIBLE_DEVICES") == "-1" else {}),
    }
