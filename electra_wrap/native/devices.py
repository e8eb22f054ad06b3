"""Run as a module: which GPUs PyTorch sees."""

from __future__ import annotations

from electra_wrap import process


def names() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


if __name__ == "__main__":
    process.serve(names)
