"""Stage `vocab`: a WordPiece vocabulary from a file or a hub, or trained on the corpus."""

from __future__ import annotations

from electra_wrap import hub, packages
from electra_wrap.data import vocab
from electra_wrap.pipeline.stage import Digest, Stage, Values
from electra_wrap.progress import log, warn
from electra_wrap.run import Run

#: Share of tokens beyond the longest example from which a warning is worth it.
CUT_SHARE = 0.01


def _inputs(run: Run, digest: Digest) -> Values:
    settings = run.profile.tokenizer
    if settings.source == "train":
        inputs = {f"tokenizer.{key}": value for key, value in settings.model_dump().items()}
        return {**inputs, "corpus": digest(run.corpus)}
    source = settings.source
    if not source.startswith(hub.SCHEME):
        source = run.digest(vocab.locate(source))
    return {"tokenizer.source": source, "tokenizer.sha256": settings.sha256}


def _execute(run: Run) -> Values:
    settings = run.profile.tokenizer
    if settings.vocab_size is not None:
        log(f"vocab: training {settings.vocab_size:,} tokens")
        vocab.train(
            run.corpus,
            run.vocabulary,
            vocab_size=settings.vocab_size,
            sample_bytes=settings.sample_bytes,
            **settings.normalization,
        )
    else:
        log(f"vocab: from {settings.source}")
        vocab.fetch(settings.source, run.vocabulary, settings.sha256)
        if settings.source.startswith(hub.SCHEME) and settings.sha256 is None:
            log(f'vocab: to pin it, set tokenizer.sha256 = "{run.digest(run.vocabulary)}"')
    tokens = vocab.read(run.vocabulary)
    fit = vocab.measure(
        run.corpus,
        tokens,
        max_seq_length=run.profile.model.max_seq_length,
        **settings.normalization,
    )
    _log_fit(len(tokens), settings.vocab_size, fit)
    return {"vocab_size": len(tokens), **fit}


def _log_fit(size: int, requested: int | None, fit: dict[str, float]) -> None:
    if requested and size < requested:
        warn(f"the text gives a vocabulary of {size:,} tokens, not of {requested:,}")
    log(f"vocab: {size:,} tokens")
    if not fit:
        return
    unknown = f"{fit['unknown_share']:.3%} of them [UNK]"
    log(f"vocab: {fit['tokens_per_word']:.3f} tokens per word, {unknown}")
    if fit["cut_share"] > CUT_SHARE:
        share = f"{fit['cut_share']:.0%} of the tokens"
        warn(f"lines are longer than model.max_seq_length, which cuts {share}; use shorter lines")


STAGE = Stage(
    name="vocab",
    inputs=_inputs,
    execute=_execute,
    outputs=lambda run: ("vocab.txt",),
    versions=lambda run: packages.versions("tokenizers"),
    depends_on=("corpus",),
)
