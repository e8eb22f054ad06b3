"""Train as electra_wrap.native.train does, without dropout, which no two divisions of a batch can share."""

import sys
from pathlib import Path

from electra_wrap import profile
from electra_wrap.native import train

with_dropout = profile.hf_config
off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
profile.hf_config = lambda *arguments: {**with_dropout(*arguments), **off}
assert train.train(Path(sys.argv[1]))
