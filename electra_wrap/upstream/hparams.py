"""What upstream's scripts read of a profile."""

from __future__ import annotations

from typing import Any

from electra_wrap.profile import Profile


def hparams(profile: Profile, vocab_size: int) -> dict[str, Any]:
    """Return hparams.json for run_pretraining.py, with the keys of configure_pretraining.py."""
    model, train = profile.model, profile.train
    shape = model.shape("discriminator")
    return {
        "model_size": model.size,
        "model_hparam_overrides": {
            "hidden_size": shape.hidden_size,
            "num_hidden_layers": shape.num_hidden_layers,
        },
        "embedding_size": shape.embedding_size,
        "vocab_size": vocab_size,
        "do_lower_case": profile.tokenizer.lowercase,
        "generator_hidden_size": model.generator_hidden_size,
        "generator_layers": model.generator_layers,
        "mask_prob": model.mask_prob,
        "max_seq_length": model.max_seq_length,
        "num_train_steps": train.steps,
        "train_batch_size": train.batch_size,
        "eval_batch_size": train.batch_size,
        "learning_rate": train.learning_rate,
        "num_warmup_steps": train.warmup_steps,
        "weight_decay_rate": train.weight_decay,
        "save_checkpoints_steps": train.save_every,
        "keep_checkpoint_max": train.keep,
        "iterations_per_loop": train.log_every,
        "do_train": True,
        "do_eval": False,
        "use_tpu": False,
    }
