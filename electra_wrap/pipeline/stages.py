"""The stages, in order."""

from __future__ import annotations

from electra_wrap.pipeline import check, convert, corpus, evaluate, examples, train, vocab
from electra_wrap.pipeline.stage import Stage

STAGES: tuple[Stage, ...] = (
    corpus.STAGE,
    vocab.STAGE,
    examples.STAGE,
    train.STAGE,
    evaluate.STAGE,
    convert.STAGE,
    check.STAGE,
)
