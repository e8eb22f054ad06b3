"""Convert a checkpoint directory; print seconds without TensorFlow's import, and peak memory over that before it."""

import json
import re
import sys
import time
from pathlib import Path

import tensorflow  # noqa: F401

from electra_wrap import weights


def peak() -> float:
    # Not getrusage: its maximum begins with the parent's.
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1]) / 1e3


before, began = peak(), time.perf_counter()
weights.convert(sys.argv[1], f"{sys.argv[1]}/hf")
seconds = time.perf_counter() - began
facts = {"seconds": round(seconds, 1), "import_mb": round(before), "peak_mb_over_import": round(peak() - before)}
print(json.dumps(facts))
