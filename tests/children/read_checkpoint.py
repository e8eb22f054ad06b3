"""Write the variables of each directory's latest TensorFlow checkpoint as DIRECTORY/values.npz."""

import sys

import numpy as np
import tensorflow as tf

for directory in sys.argv[1:]:
    reader = tf.train.load_checkpoint(directory)
    np.savez(
        f"{directory}/values.npz", **{name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    )
