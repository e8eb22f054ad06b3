"""Convert a checkpoint directory; print seconds and peak memory without TensorFlow's import."""

import json
import re
import sys
import time
from pathlib import Path

import tensorflow  # noqa: F401

from electra_wrap import weights


def peak_megabytes() -> float:
    # getrusage's maximum would start with the parent's.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1e3


directory = sys.argv[1]
before, started = peak_megabytes(), time.perf_counter()
weights.to_transformers(weights.find_prefix(directory), f"{directory}/hf")
results = {
    "seconds": round(time.perf_counter() - started, 1),
    "import_mb": round(before),
    "peak_mb_over_import": round(peak_megabytes() - before),
}
print(json.dumps(results))
