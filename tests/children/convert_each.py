"""Convert each checkpoint directory with its keys, as JSON on stdin; print the error of each, null for none."""

import json
import sys

from electra_wrap import weights
from electra_wrap.errors import ElectraWrapError, from_os

errors = []
for directory, keys in json.load(sys.stdin):
    try:
        weights.convert(directory, f"{directory}/hf", **keys)
        errors.append(None)
    except OSError as error:
        errors.append(str(from_os(error)))
    except ElectraWrapError as error:
        errors.append(str(error))
print(json.dumps(errors))
