"""How much a run will write, and whether there is room for it."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from electra_wrap import corpus, sources
from electra_wrap.errors import EnvironmentLacks
from electra_wrap.profile import NETWORKS

if TYPE_CHECKING:
    from electra_wrap.stages import Run, Stage

#: Bytes of Spanish text for a token, where nobody has counted yet.
BYTES_PER_TOKEN = 4

#: Bytes of a checkpoint that are not its numbers: the graph, and what is logged meanwhile.
GRAPH = 3_000_000


def estimate(run: Run) -> dict[str, int]:
    """Return about how many bytes the outputs of each stage of a run take, as far as that can be known by now.

    Of text that is remote or compressed nothing, or no more than that, is known before the corpus is there.
    """
    keys, facts = run.profile, run.recorded("corpus").get("facts", {})
    text = facts.get("bytes", 0)
    if not facts and keys.corpus.max_lines is None:
        names = corpus.find(keys.corpus.sources, run.directory.path)
        text = sum(Path(name).stat().st_size for name in names if not sources.is_remote(name))
    per_word = run.recorded("vocab").get("facts", {}).get("tokens_per_word")
    tokens = facts["words"] * per_word if facts and per_word else text // BYTES_PER_TOKEN
    size = run.recorded("vocab").get("facts", {}).get("vocab_size") or keys.tokenizer.vocab_size or 0
    weights = {network: 4 * keys.parameters(network, size) for network in NETWORKS}
    shared = 4 * size * keys.model.shape("discriminator").embedding_size
    most = keys.train.steps // keys.train.save_every + keys.train.steps // (keys.train.evaluate_every or 2**40) + 1
    return {
        "corpus": text,
        run.engine.DATA: int(tokens * run.engine.bytes_per_token(size)),
        # Weights and the two slots of Adam; both networks have the same embeddings. One more while it is written, and
        # the best.
        "train": (3 * (sum(weights.values()) - shared) + GRAPH)
        * (min(keys.train.keep or most, most) + 1 + bool(keys.train.evaluate_every)),
        "convert": sum(weights.values()),
    }


def check(where: Path, run: Run, stages: Collection[Stage]) -> int:
    """Return about how many bytes stages will write, beside what they left there when they were interrupted.

    EnvironmentLacks if `where` has no room for them.
    """
    sizes, needed = estimate(run), {}
    for stage in stages:
        there = [run.directory / name for name in stage.scratch]
        if run.recorded(stage.name).get("outcome") == "interrupted":
            there += [run.directory / name for name in stage.outputs]
        if stage.name == "train":
            there.append(run.model_dir)
        done = sum(path.stat().st_size for top in there for path in top.rglob("*") if path.is_file())
        needed[stage.name] = max(0, sizes.get(stage.name, 0) - done)
    free, total = shutil.disk_usage(where).free, sum(needed.values())
    if total > free:
        parts = ", ".join(f"{name} {size / 1e9:.2g}" for name, size in needed.items() if size > total / 100)
        raise EnvironmentLacks(
            f"{where} has {free / 1e9:.2g} GB free, and this run will write about {total / 1e9:.2g} GB "
            f"({parts}); make room, lower train.keep, or choose another --run-dir"
        )
    return total
