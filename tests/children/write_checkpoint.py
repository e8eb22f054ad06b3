"""Write each DIRECTORY/values.npz as the TensorFlow checkpoint DIRECTORY/model.ckpt-3."""

import sys

import numpy as np
import tensorflow.compat.v1 as tf

tf.disable_v2_behavior()
for directory in sys.argv[1:]:
    with tf.Graph().as_default(), tf.Session() as session:
        for name, value in np.load(f"{directory}/values.npz").items():
            tf.get_variable(name, initializer=value)
        session.run(tf.global_variables_initializer())
        saver = tf.train.Saver(save_relative_paths=True)
        saver.save(session, f"{directory}/model.ckpt-3", write_meta_graph=False)
