"""Evaluation on the held-out examples: `python -m electra_wrap.native.evaluate RUN_DIR STEP`.

`run` and `evaluate` start it; `train` evaluates in its own processes.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from electra_wrap import events, metrics
from electra_wrap.data import vocab
from electra_wrap.native import model, setup
from electra_wrap.native.batches import Batches
from electra_wrap.native.engine import checkpoint_path
from electra_wrap.native.examples import Store
from electra_wrap.run import Run

#: The kernels of training. Without dropout, PyTorch would prefer cuDNN's, which round differently.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

#: TensorBoard's name of each loss.
LOSSES = {
    "loss": "loss/total",
    "generator": "loss/generator",
    "discriminator": "loss/discriminator",
}


class Accumulator:
    """Adds up losses and counts over batches, and in the end over processes."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._losses = torch.zeros(len(LOSSES), device=accelerator.device)
        self._tally = metrics.Tally()

    def add(self, batch: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        """Add this process's part of a batch, and what the networks made of it."""
        self._losses += torch.stack([outputs[name].detach() for name in LOSSES])
        arrays = {name: value.detach().cpu().numpy() for name, value in (batch | outputs).items()}
        masked = ("correct", "sampled_correct", "masked_losses", "weights")
        self._tally.add_generator(*(arrays[name] for name in masked))
        inside = np.arange(arrays["ids"].shape[1]) < arrays["sizes"][:, None]
        self._tally.add_discriminator(arrays["logits"], arrays["replaced"], inside)

    def reduce(self, batches: int = 1) -> tuple[dict[str, float], dict[str, float]]:
        """Return the losses of all processes, divided by `batches`, and the metrics."""
        losses = self._losses / batches
        if self._accelerator.num_processes > 1:
            losses = self._accelerator.reduce(losses, "sum")
            sums = torch.from_numpy(self._tally.sums).to(self._accelerator.device)
            self._tally.sums = self._accelerator.reduce(sums, "sum").cpu().numpy()
        return dict(zip(LOSSES.values(), losses.tolist(), strict=True)), self._tally.values()


@torch.no_grad()
def evaluate(
    run: Run, tokens: list[str], accelerator: Accelerator, network: model.Electra, step: int
) -> None:
    """Evaluate a network on the held-out examples and report its metrics, if there are examples.

    Masks and samples are the same at each step. Each example is read once, except those that do not
    fill a batch. Processes take batches in turn, so the result does not depend on their number.
    """
    settings, store = run.profile.train, Store(run.examples[1])
    batch_size = min(settings.batch_size // settings.micro_batches, len(store))
    if not batch_size:
        return
    number = len(store) // batch_size
    batches = Batches(
        store, run.profile.model, tokens, batch_size=batch_size, seed=settings.seed, shuffle=False
    )
    accumulator = Accumulator(accelerator)
    network.eval()
    with sdpa_kernel(ATTENTION):
        for i in range(accelerator.process_index, number, accelerator.num_processes):
            batch = setup.to_device(batches[i], accelerator.device)
            accumulator.add(batch, network(batch))
    network.train()
    losses, scalars = accumulator.reduce(number)
    # As upstream: the total is a mean over batches, the others over masked tokens and examples.
    scalars["loss/total"] = losses["loss/total"]
    if accelerator.is_main_process:
        events.emit(events.Evaluation(step, number * batch_size, scalars))


def evaluate_checkpoint(directory: Path, step: int) -> None:
    """Evaluate the checkpoint of a step of the run in `directory`."""
    run = Run.open(directory)
    tokens = vocab.read(run.vocabulary)
    settings = run.profile.train
    if settings.device == "gpu":  # only training requires it
        settings = settings.model_copy(update={"device": "auto"})
    accelerator = setup.make_accelerator(settings)
    network = setup.make_network(run.profile, run.vocab_size)
    path = checkpoint_path(run.model_dir, step) / "model.safetensors"
    setup.load(path, dict(network.named_parameters()))
    accelerator.prepare(network)
    evaluate(run, tokens, accelerator, network, step)


if __name__ == "__main__":
    with setup.report_errors():
        evaluate_checkpoint(Path(sys.argv[1]), int(sys.argv[2]))
