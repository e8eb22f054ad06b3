"""Train as electra_wrap.native.train does, without dropout: RUN_DIR.

Dropout differs between two divisions of a batch.
"""

import sys
from pathlib import Path

from electra_wrap import profile
from electra_wrap.native import train

original_config = profile.hf_config
no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
profile.hf_config = lambda *arguments: original_config(*arguments) | no_dropout
if __name__ == "__main__":
    assert train.train(Path(sys.argv[1]))
