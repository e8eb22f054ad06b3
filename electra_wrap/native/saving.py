"""Saving checkpoints while training goes on, and resuming from them.

A checkpoint has model.safetensors, optimizer.bin, and for each process random_states_N.pt. Another
engine's has the format of exchange.py instead.
"""

from __future__ import annotations

import concurrent.futures
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from electra_wrap.errors import UsageError
from electra_wrap.native import exchange, model
from electra_wrap.native.checkpoints import (
    checkpoint_path,
    checkpoint_steps,
    finish_checkpoint,
    is_exchanged,
)
from electra_wrap.profile import Train


class Saver:
    """Saves checkpoints of one training: copies the state, and writes the copy in a thread.

    Writing and hashing would stop a GPU for about half a second. One checkpoint is written at a
    time. If the process is killed meanwhile, the one before is the latest.
    """

    def __init__(
        self, accelerator: Accelerator, network: model.Electra, adam: Any, directory: Path
    ) -> None:
        self._accelerator, self._network, self._adam = accelerator, network, adam
        self._directory = directory
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._written: concurrent.futures.Future[None] | None = None

    def resume(self) -> int:
        """Load the latest checkpoint, if there is one. Return its step, or 0.

        UsageError if the random states of this process cannot be restored.
        """
        steps = checkpoint_steps(self._directory)
        if not steps:
            return 0
        start = steps[-1]
        checkpoint = checkpoint_path(self._directory, start)
        exchange.restore(checkpoint, self._network, self._adam)
        if not is_exchanged(checkpoint):
            self._restore_random_states(self._random_states(checkpoint))
        return start

    def _restore_random_states(self, path: Path) -> None:
        if not path.is_file():
            message = f"{path.name} is missing: the former training had fewer processes or another"
            print(f"{message} version of electra_wrap; dropout starts with new random states")
            return
        try:
            states = torch.load(path, weights_only=True)
            torch.set_rng_state(states["cpu"])
            if "gpu" in states and self._accelerator.device.type == "cuda":
                torch.cuda.set_rng_state(states["gpu"])
        except Exception as error:  # what torch.load raises is not documented
            fix = f"move {path.parent} away and run again"
            raise UsageError(f"{path} cannot be read ({error}); {fix}") from None

    def save(self, step: int, settings: Train) -> None:
        """Save a checkpoint, and remove all but the latest `keep`, if that is not 0.

        The latest evaluated one stays: the parent process may not have copied it as the best yet.
        """
        self.wait()
        temporary = self._directory / f"step-{step}.partial"
        if self._accelerator.is_main_process:
            temporary.mkdir()  # an error if the model's directory is gone, say with its file system
        self._accelerator.wait_for_everyone()
        states = {"cpu": torch.get_rng_state()}
        if self._accelerator.device.type == "cuda":
            states["gpu"] = torch.cuda.get_rng_state()
        torch.save(states, self._random_states(temporary))
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            weights = {name: _copy(value) for name, value in self._network.named_parameters()}
            slots = _copy(self._adam.state_dict())
            self._written = self._thread.submit(
                self._write, temporary, step, settings, weights, slots
            )

    def _write(
        self, temporary: Path, step: int, settings: Train, weights: dict[str, Any], slots: Any
    ) -> None:
        save_file(weights, temporary / "model.safetensors", {"format": "pt"})
        torch.save(slots, temporary / "optimizer.bin")
        finish_checkpoint(temporary, self._directory, step)
        evaluated = step - step % settings.evaluate_every if settings.evaluate_every else None
        for old in checkpoint_steps(self._directory)[: -settings.keep if settings.keep else 0]:
            if old != evaluated:
                shutil.rmtree(checkpoint_path(self._directory, old))

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, and raise the error if that failed."""
        if self._written:
            self._written.result()
        self._accelerator.wait_for_everyone()

    def _random_states(self, checkpoint: Path) -> Path:
        return checkpoint / f"random_states_{self._accelerator.process_index}.pt"


def _copy(value: Any) -> Any:
    """Return a copy in the host's memory of a tensor, or of a structure with tensors."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value
