"""Train a run: ENGINE RUN_DIR CHECKOUT. Print what training prints, and when each step ended.

The last line is `times [seconds, …]`, by a monotonic clock.
"""

import json
import runpy
import sys
import time
from pathlib import Path

engine, directory, checkout = sys.argv[1:]
times = []


def timed(method):
    def call(*arguments):
        result = method(*arguments)
        times.append(time.perf_counter())
        return result

    return call


if engine == "native":
    from electra_wrap.native import train

    train.StopRequest.is_requested = timed(train.StopRequest.is_requested)
    train.train(Path(directory))
else:
    import os

    sys.path.insert(0, checkout)
    os.environ["ELECTRA_WRAP_RUNTIME"] = '{"seed": 0}'
    from electra_wrap.upstream import estimator

    estimator._Monitor.after_run = timed(estimator._Monitor.after_run)
    model_name = json.loads((Path(directory) / "profile.json").read_text())["model_name"]
    arguments = [f"--data-dir={directory}", f"--model-name={model_name}"]
    sys.argv = ["run_pretraining.py", *arguments, f"--hparams={directory}/hparams.json"]
    runpy.run_path(f"{checkout}/run_pretraining.py", run_name="__main__")
print("times", json.dumps(times), flush=True)
