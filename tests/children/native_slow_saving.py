"""Train as electra_wrap.native.train does, with a slow disk: RUN_DIR SECONDS.

A negative number of seconds is a disk that fails.
"""

import errno
import os
import sys
import time
from pathlib import Path
from typing import Any

from electra_wrap.native import saving, setup, train

seconds, save_file = float(sys.argv[2]), saving.save_file


def save_slowly(*arguments: Any) -> None:
    if seconds < 0:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    time.sleep(seconds)
    save_file(*arguments)
    print("saved", flush=True)


saving.save_file = save_slowly
if __name__ == "__main__":
    with setup.report_errors():
        train.train(Path(sys.argv[1]))
