"""Write the variables of each directory's latest TensorFlow checkpoint as DIRECTORY/values.npz."""

import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

for directory in sys.argv[1:]:
    latest = max(
        Path(directory).glob("*.index"), key=lambda path: int(path.stem.rpartition("-")[2])
    )
    reader = tf.train.load_checkpoint(str(latest.with_suffix("")))
    names = reader.get_variable_to_shape_map()
    np.savez(f"{directory}/values.npz", **{name: reader.get_tensor(name) for name in names})
