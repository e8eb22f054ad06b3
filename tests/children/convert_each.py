"""Convert each checkpoint directory with the options given as JSON on stdin; print the errors.

The list has null for each that was converted. All in this process, because importing TensorFlow
takes seconds.
"""

import json
import sys
from pathlib import Path

from electra_wrap import subprocesses, weights
from electra_wrap.errors import ElectraWrapError
from electra_wrap.tools import convert

subprocesses.call = lambda module, function, arguments: getattr(weights, function)(**arguments)

errors = []
for directory, options in json.load(sys.stdin):
    if "vocabulary" in options:
        options["vocabulary"] = Path(directory) / options["vocabulary"]
    try:
        convert.from_tensorflow(Path(directory), Path(directory) / "hf", **options)
        errors.append(None)
    except (OSError, ElectraWrapError) as error:
        errors.append(str(error))
print(json.dumps(errors))
