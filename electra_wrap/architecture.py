"""The two networks: their names and sizes, and config.json as transformers has it."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from electra_wrap.errors import UsageError

Network = Literal["discriminator", "generator"]
NETWORKS: tuple[Network, Network] = ("discriminator", "generator")

#: Hidden size and layers of upstream's model sizes (util/training_utils.py of the pin).
SIZES = {"small": (256, 12), "base": (768, 12), "large": (1024, 24)}

#: Rows of the position embeddings, whatever the training length (BertConfig's default in the pin).
POSITIONS = 512


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one network under transformers' names."""

    embedding_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int

    @property
    def matrix_parameters(self) -> int:
        """Weights of the layers' matrices and of the embedding projection, without biases."""
        layer = 4 * self.hidden_size**2 + 2 * self.hidden_size * self.intermediate_size
        return self.num_hidden_layers * layer + self.embedding_size * self.hidden_size


def hf_config(
    network: Network, shape: Shape, vocab_size: int, positions: int = POSITIONS
) -> dict[str, Any]:
    """Return transformers' config.json of a network of this shape.

    Dropout, activation and the other constants are those of upstream's BertConfig.
    """
    architecture = {"discriminator": "ElectraForPreTraining", "generator": "ElectraForMaskedLM"}
    return {
        "architectures": [architecture[network]],
        "model_type": "electra",
        "vocab_size": vocab_size,
        **dataclasses.asdict(shape),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": positions,
        "type_vocab_size": 2,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }


def read_hf_config(directory: Path) -> dict[str, Any]:
    """Return the sizes and constants in the config.json of an ELECTRA of any origin.

    Its other keys are left out: some have transformers fetch and run code. UsageError if a size is
    missing or no number.
    """
    example = hf_config("generator", Shape(1, 1, 1, 1, 1), vocab_size=1)
    sizes = ["vocab_size", *(field.name for field in dataclasses.fields(Shape))]
    try:
        config = json.loads((directory / "config.json").read_text("utf-8"))
        selected = {key: config[key] for key in example if key in config}
        return selected | {name: int(config[name]) for name in sizes}
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{directory} has no ELECTRA for transformers ({error!r})"
        raise UsageError(f"{message}; give a directory with it") from None
