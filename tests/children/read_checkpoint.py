"""Write the variables of each directory's latest TensorFlow checkpoint as DIRECTORY/values.npz."""

import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

for directory in sys.argv[1:]:
    prefixes = [path.with_suffix("") for path in Path(directory).glob("*.index")]
    latest = max(prefixes, key=lambda prefix: int(prefix.name.rpartition("-")[2]))
    reader = tf.train.load_checkpoint(str(latest))
    names = reader.get_variable_to_shape_map()
    np.savez(f"{directory}/values.npz", **{name: reader.get_tensor(name) for name in names})
