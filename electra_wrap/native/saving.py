"""Saving checkpoints while training goes on, and resuming from them.

A checkpoint is a directory step-N with three kinds of files: model.safetensors, the weights;
optimizer.safetensors, Adam's two slots of each; random-N.safetensors, the states of the random
number generators of process N. Its checksums are in step-N.sha256 (checkpoints.py).
"""

import concurrent.futures
import contextlib
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import save_file
from torch import Tensor

from electra_wrap import checkpoints, files
from electra_wrap.architecture import NETWORKS
from electra_wrap.native import model, setup
from electra_wrap.native.engine import checkpoint_path
from electra_wrap.profile import Train

SLOTS = ("exp_avg", "exp_avg_sq")


class Saver(contextlib.AbstractContextManager["Saver"]):
    """Saves checkpoints of one training: copies the state, and writes the copy in a thread.

    Writing and hashing would stop a GPU for about half a second. One checkpoint is written at a
    time. If the process is killed meanwhile, the one before is the latest.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        network: model.Electra,
        adam: AcceleratedOptimizer,
        directory: Path,
    ) -> None:
        self._accelerator, self._network, self._adam = accelerator, network, adam
        self._directory = directory
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._written: concurrent.futures.Future[None] | None = None

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()  # after the checkpoint that is being written

    def _weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self._network.named_parameters()}

    def _slots(self) -> dict[str, Tensor]:
        return {
            f"{slot}.{name}": self._adam.state[parameter][slot]
            for name, parameter in self._network.named_parameters()
            for slot in SLOTS
        }

    def resume(self, initial: Path) -> int:
        """Load the latest checkpoint and return its step.

        Without one, load the two models in the directory `initial`, if it exists, and return 0.
        """
        start = max(checkpoints.steps(self._directory), default=0)
        if start:
            path = checkpoint_path(self._directory, start)
            setup.load(path / "model.safetensors", self._weights())
            setup.load(path / "optimizer.safetensors", self._slots())
            self._restore_random_states(self._random_file(path))
        elif initial.is_dir():
            for name in NETWORKS:
                parameters = dict(getattr(self._network, name).named_parameters())
                setup.load(initial / name / "model.safetensors", parameters)
        return start

    def _restore_random_states(self, path: Path) -> None:
        if not path.is_file():
            print(f"{path.name} is missing: dropout of this process starts with a new state")
            return
        states = {name: state.cpu() for name, state in self._random_states().items()}
        setup.load(path, states)
        torch.set_rng_state(states["cpu"])
        if "gpu" in states:
            torch.cuda.set_rng_state(states["gpu"])

    def _random_states(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self._accelerator.device.type == "cuda":
            states["gpu"] = torch.cuda.get_rng_state()
        return states

    def _random_file(self, checkpoint: Path) -> Path:
        return checkpoint / f"random-{self._accelerator.process_index}.safetensors"

    def save(self, step: int, settings: Train) -> None:
        """Save a checkpoint, and remove all but the latest `keep`, if that is not 0."""
        self.wait()
        temporary = self._directory / f"step-{step}.partial"
        if self._accelerator.is_main_process:
            temporary.mkdir()  # an error if the model's directory is gone, say with its file system
        self._accelerator.wait_for_everyone()
        save_file(self._random_states(), self._random_file(temporary))
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            state = {"model": self._weights(), "optimizer": self._slots()}
            for tensors in state.values():
                tensors.update({name: t.to("cpu", copy=True) for name, t in tensors.items()})
            self._written = self._thread.submit(self._write, temporary, step, settings, state)

    def _write(
        self, temporary: Path, step: int, settings: Train, state: dict[str, dict[str, Tensor]]
    ) -> None:
        for name, tensors in state.items():
            save_file(tensors, temporary / f"{name}.safetensors", {"format": "pt"})
        path = checkpoint_path(self._directory, step)
        files.remove(path)  # without checksums, it is no checkpoint
        files.move_into_place(temporary, path)
        checkpoints.finish(self._directory, step, path.iterdir())
        for old in checkpoints.steps(self._directory)[: -settings.keep if settings.keep else 0]:
            files.remove(checkpoints.checksums(self._directory, old))
            shutil.rmtree(checkpoint_path(self._directory, old))

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, and raise the error if that failed."""
        if self._written:
            self._written.result()
        self._accelerator.wait_for_everyone()
