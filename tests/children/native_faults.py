"""Train as electra_wrap.native.train does, with faults: FAULT… [-m MODULE] RUN_DIR.

FAULTS: `slow` takes three seconds to write a checkpoint; `workers` prepares batches in processes,
as for a GPU; `batch` fails to prepare a batch of step 7.
"""

import sys
import time
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from electra_wrap.errors import StageFailed
from electra_wrap.native import batches, saving, setup, train

faults, save_file, get = sys.argv[1:], saving.save_file, batches.Batches.__getitem__


def save_slowly(tensors: Any, path: Path, *rest: Any) -> None:
    if path.name == "optimizer.safetensors":
        time.sleep(3)
    save_file(tensors, path, *rest)
    print(f"saved {path.name}", flush=True)


def fail(self: batches.Batches, number: int) -> Any:
    if number == 6:
        raise StageFailed("a fault; run again")
    return get(self, number)


if "slow" in faults:
    saving.save_file = save_slowly
if "workers" in faults:
    train.DataLoader = lambda *arguments, **options: DataLoader(
        *arguments, **options | {"num_workers": 2, "prefetch_factor": 8}
    )
if "batch" in faults:
    batches.Batches.__getitem__ = fail
if __name__ == "__main__":
    with setup.report_errors():
        train.train(Path(sys.argv[-1]))
