"""Convert random checkpoints of all sizes: time, memory, and distance from the oracle.

    python tests/measure_conversion.py [DIRECTORY]

It takes minutes, and 9 GB in DIRECTORY (default: a temporary one). tests/test_weights.py has small
models.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import test_weights as t
from conftest import child

from electra_wrap.profile import NETWORKS, SIZES

VOCABULARY = 30_522
GENERATOR = {"small": 64, "base": 256, "large": 256}


def measure(size: str, directory: Path) -> dict[str, object]:
    hidden, layers = SIZES[size]
    embedding = 128 if size == "small" else hidden
    values = t.variables(
        hidden, GENERATOR[size], embedding, layers, vocabulary=VOCABULARY, deviation=0.05
    )
    t.checkpoints({directory: values})
    measured = json.loads(child("convert_measured.py", directory))
    weights = sum(v.nbytes for n, v in values.items() if not t.weights.NOT_WEIGHTS.search(n))
    arrays = t.inputs(directory / "in.npz", VOCABULARY, batch=3, length=64)
    out = directory / "out.npz"
    child("hf_logits.py", directory / "hf", directory / "in.npz", out, HF_HUB_OFFLINE="1")
    results = np.load(out)
    differences = t.largest_differences(values, arrays, results)
    return {
        "size": size,
        "weights_mb": round(weights / 1e6),
        **measured,
        **{network: f"{differences[network]:.1e}" for network in NETWORKS},
        "logits": [round(float(results[network].std()), 2) for network in NETWORKS],
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as temporary:
        for name in SIZES:
            print(json.dumps(measure(name, Path(temporary) / name)), flush=True)
