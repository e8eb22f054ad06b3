"""Run as a module: which GPUs TensorFlow sees."""

from __future__ import annotations

from electra_wrap import process


def names() -> list[str]:
    import tensorflow as tf

    return [
        str(tf.config.experimental.get_device_details(device).get("device_name", device.name))
        for device in tf.config.list_physical_devices("GPU")
    ]


if __name__ == "__main__":
    process.serve(names)
