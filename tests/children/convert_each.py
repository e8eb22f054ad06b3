"""Convert each checkpoint directory with the options given as JSON on stdin; print the errors.

The list has null for each that was converted. All in this process: importing TensorFlow is slow.
"""

import json
import sys
from pathlib import Path

from electra_wrap import convert, subprocesses, weights
from electra_wrap.errors import ElectraWrapError

subprocesses.call = lambda module, function, arguments: getattr(weights, function)(**arguments)

errors: list[str | None] = []
for directory, options in json.load(sys.stdin):
    paths = {name: Path(directory, options[name]) for name in {"vocabulary"} & options.keys()}
    try:
        convert.from_tensorflow(Path(directory), Path(directory, "hf"), **options | paths)
        errors.append(None)
    except (OSError, ElectraWrapError) as error:
        errors.append(str(error))
print(json.dumps(errors))
