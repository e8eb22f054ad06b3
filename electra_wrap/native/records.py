"""Run as a module: a store of examples from upstream's TFRecords. Imports TensorFlow, which reads them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from electra_wrap import process
from electra_wrap.errors import UsageError
from electra_wrap.native import examples


def read(directory: Path, jobs: int) -> Iterator[examples.Example]:
    """Yield the examples in the order in which `jobs` processes wrote them: each went round its files."""
    import tensorflow as tf

    found = {int(m[1]): path for path in directory.iterdir() if (m := re.search(r"\.tfrecord-(\d+)-of-\d+$", path.name))}
    for job in range(jobs):
        files = [iter(tf.compat.v1.io.tf_record_iterator(str(found[i]))) for i in sorted(found) if i % jobs == job]
        while files:
            for file in list(files):
                record = next(file, None)
                if record is None:
                    files.remove(file)
                    continue
                features = tf.train.Example.FromString(record).features.feature
                ids, mask, segments = (
                    features[name].int64_list.value for name in ("input_ids", "input_mask", "segment_ids")
                )
                length = sum(mask)
                yield examples.Example(ids[:length], length - sum(segments))


def convert(directory: str, jobs: int, out: str, vocab_size: int) -> int:
    """Write the store `out` from the records in `directory`; return the number of examples."""
    import tensorflow as tf

    try:
        return examples.write(Path(out), read(Path(directory), jobs), vocab_size)
    except (tf.errors.OpError, OverflowError) as error:
        raise UsageError(f"{directory}: not whole records of this vocabulary ({error}); build them again") from None


if __name__ == "__main__":
    process.serve(convert)
