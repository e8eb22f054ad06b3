"""Train a run with ENGINE RUN_DIR CHECKOUT; print, besides what training prints, when each step was done."""

import json
import runpy
import sys
import time

engine, directory, checkout = sys.argv[1:]
times = []


def timed(method, before):
    def call(*arguments):
        if before:
            times.append(time.perf_counter())
        result = method(*arguments)
        if not before:
            times.append(time.perf_counter())
        return result

    return call


if engine == "native":
    from pathlib import Path

    from electra_wrap.native import train

    train._Stop.asked = timed(train._Stop.asked, before=True)
    train.train(Path(directory))
else:
    import os

    sys.path.insert(0, checkout)
    os.environ["ELECTRA_WRAP_RUNTIME"] = '{"seed": 0}'
    from electra_wrap.upstream import estimator

    estimator._Watch.after_run = timed(estimator._Watch.after_run, before=False)
    profile = json.loads((estimator.Path(directory) / "profile.json").read_text())
    arguments = [f"--data-dir={directory}", f"--model-name={profile['model_name']}"]
    sys.argv = ["run_pretraining.py", *arguments, f"--hparams={directory}/hparams.json"]
    runpy.run_path(f"{checkout}/run_pretraining.py", run_name="__main__")
print("times", json.dumps(times), flush=True)
