"""The part of `tf.estimator` that run_pretraining.py uses, on tf.compat.v1.train.

TensorFlow 2.16 dropped Estimator. What the script needs of it is small: build one graph, run it in a
MonitoredTrainingSession with the script's own hooks, save checkpoints and summaries, or evaluate the latest
checkpoint. Names and arguments are Estimator's, because the script calls them.

What the scripts have no argument for (seed, precision, XLA) comes from the environment: see engine.train.
"""

from __future__ import annotations

import collections
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import tensorflow.compat.v1 as tf

from electra_wrap.process import INTERRUPTED

SessionRunHook = tf.train.SessionRunHook
SessionRunArgs = tf.train.SessionRunArgs


class ModeKeys:
    TRAIN = "train"
    EVAL = "eval"


class _TPU:
    """`tf.estimator.tpu`: the scripts go through it on every device. A TPU itself is refused."""

    class InputPipelineConfig:
        PER_HOST_V2 = 3

    TPUConfig = collections.namedtuple(
        "TPUConfig", ["iterations_per_loop", "num_shards", "tpu_job_name", "per_host_input_for_training"]
    )
    RunConfig = collections.namedtuple(
        "RunConfig", ["cluster", "model_dir", "save_checkpoints_steps", "keep_checkpoint_max", "tpu_config"]
    )
    TPUEstimatorSpec = collections.namedtuple(
        "TPUEstimatorSpec",
        ["mode", "loss", "train_op", "training_hooks", "eval_metrics", "evaluation_hooks"],
        defaults=(None, None, None, None),
    )

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
            checkpoint, and the process then exits with `INTERRUPTED`.
            """
            config = self._config
            start = self._latest_step()
            if start >= max_steps:
                return
            with tf.Graph().as_default():
                # The start step is part of the seed: with the seed alone, every continued run would see the
                # first batches and the first masks again.
                spec = self._build(ModeKeys.TRAIN, input_fn, self._runtime["seed"] + start)
                tf.summary.scalar("loss", spec.loss)
                stop = _StopOnSignal()
                saver = tf.train.Saver(
                    max_to_keep=config.keep_checkpoint_max or 0, save_relative_paths=True, defer_build=False
                )
                with tf.train.MonitoredTrainingSession(
                    checkpoint_dir=config.model_dir,
                    scaffold=tf.train.Scaffold(saver=saver),
                    hooks=[
                        tf.train.NanTensorHook(spec.loss),
                        tf.train.StopAtStepHook(last_step=max_steps),
                        stop,
                        *spec.training_hooks,
                    ],
                    save_checkpoint_steps=config.save_checkpoints_steps,
                    save_summaries_steps=config.tpu_config.iterations_per_loop,
                    log_step_count_steps=config.tpu_config.iterations_per_loop,
                    config=self._session_config(),
                ) as session:
                    while not session.should_stop():
                        session.run(spec.train_op)
            if stop.signal is not None:
                sys.exit(INTERRUPTED)

        def evaluate(self, input_fn: Callable[..., Any], steps: int) -> dict[str, Any]:
            """Return the metrics, `loss` and `global_step` of the latest checkpoint over `steps` batches.

            Also written as summaries to model_dir/eval. ValueError if there is no checkpoint.
            """
            checkpoint = tf.train.latest_checkpoint(self._config.model_dir)
            if checkpoint is None:
                raise ValueError(f"no checkpoint in {self._config.model_dir}")
            with tf.Graph().as_default():
                spec = self._build(ModeKeys.EVAL, input_fn, self._runtime["seed"])
                metric_fn, tensors = spec.eval_metrics
                metrics = {**metric_fn(*tensors), "loss": tf.metrics.mean(spec.loss)}
                values = {name: value for name, (value, _) in metrics.items()}
                updates = [update for _, update in metrics.values()]
                global_step = tf.train.get_or_create_global_step()
                with tf.train.MonitoredSession(
                    tf.train.ChiefSessionCreator(
                        checkpoint_filename_with_path=checkpoint, config=self._session_config()
                    ),
                    hooks=spec.evaluation_hooks,
                ) as session:
                    for _ in range(steps):
                        session.run(updates)
                    results, step = session.run([values, global_step])
            summary = tf.Summary(
                value=[tf.Summary.Value(tag=name, simple_value=float(value)) for name, value in results.items()]
            )
            # The file writer belongs to graph mode, which disable_v2_behavior() has made the default.
            with tf.summary.FileWriter(f"{self._config.model_dir}/eval") as writer:
                writer.add_summary(summary, step)
            return {**results, "global_step": step}

        def _build(self, mode: str, input_fn: Callable[..., Any], seed: int) -> Any:
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
            if checkpoint is None:
                return 0
            return int(tf.train.load_variable(checkpoint, "global_step"))

        def _session_config(self) -> Any:
            tf.config.experimental.enable_tensor_float_32_execution(self._runtime.get("precision") == "tf32")
            config = tf.ConfigProto(allow_soft_placement=True)
            config.gpu_options.allow_growth = True
            if self._runtime.get("xla"):
                config.graph_options.optimizer_options.global_jit_level = tf.OptimizerOptions.ON_1
            return config


tpu = _TPU


class _StopOnSignal(tf.train.SessionRunHook):  # type: ignore[misc]
    """Requests a regular stop at SIGINT or SIGTERM, so that the session saves a checkpoint."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def begin(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: Any) -> None:
        self.signal = number

    def after_run(self, run_context: Any, run_values: Any) -> None:
        if self.signal is not None:
            run_context.request_stop()
