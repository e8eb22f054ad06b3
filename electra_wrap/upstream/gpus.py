"""List the GPUs that TensorFlow sees. Run as a module (`subprocesses.call`)."""

from __future__ import annotations

from electra_wrap import subprocesses


def names() -> list[str]:
    import tensorflow as tf

    return [
        str(tf.config.experimental.get_device_details(device).get("device_name", device.name))
        for device in tf.config.list_physical_devices("GPU")
    ]


if __name__ == "__main__":
    subprocesses.serve(names)
