"""Run as a module: a store of examples from upstream's TFRecords. Imports TensorFlow, which reads them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from electra_wrap import process
from electra_wrap.errors import UsageError
from electra_wrap.native import examples


def read(directory: Path, length: int, vocab_size: int) -> Iterator[examples.Example]:
    """Yield the examples, one of each file in turn: the order in which one process writes them.

    UsageError if one is not of `length` or has an id beyond the vocabulary.
    """
    import tensorflow as tf

    found = {
        int(m[1]): path for path in directory.iterdir() if (m := re.search(r"\.tfrecord-(\d+)-of-\d+$", path.name))
    }
    files = [iter(tf.compat.v1.io.tf_record_iterator(str(found[number]))) for number in sorted(found)]
    while files:
        for file in list(files):
            record = next(file, None)
            if record is None:
                files.remove(file)
                continue
            features = tf.train.Example.FromString(record).features.feature
            names = ("input_ids", "input_mask", "segment_ids")
            ids, mask, segments = (features[name].int64_list.value for name in names)
            if len(ids) != length or max(ids) >= vocab_size:
                largest = max(ids, default=-1)
                raise UsageError(
                    f"{directory} has examples of {len(ids)} tokens up to id {largest}, the profile says "
                    f"{length} tokens and the vocabulary has {vocab_size}; correct the profile"
                )
            size = sum(mask)
            if size <= 2 + (1 in segments):  # [CLS], and a [SEP] for each segment
                raise UsageError(f"{directory} has examples without a token to predict; build them again")
            yield examples.Example(ids[:size], size - sum(segments))


def convert(directory: str, length: int, vocab_size: int, out: str | None) -> int:
    """Read the records in `directory`, into the store `out` if that is given; return the number of examples."""
    import tensorflow as tf

    try:
        found = read(Path(directory), length, vocab_size)
        return examples.write(Path(out), found, vocab_size) if out else sum(1 for _ in found)
    except tf.errors.OpError as error:
        raise UsageError(f"{directory}: not whole records ({error.message}); build them again") from None


if __name__ == "__main__":
    process.serve(convert)
