"""The GPUs that PyTorch sees, and their speed. Runs as a child process: it imports PyTorch."""

from __future__ import annotations

import time

import torch

from electra_wrap import subprocesses


def list_gpus() -> list[str]:
    """Return the names of the GPUs."""
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def measure_matmul(precision: str) -> float:
    """Return the floating-point operations per second of a large matrix product on one device."""
    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
    gpu = torch.cuda.is_available()
    size, best = (8192 if gpu else 2048), float("inf")
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    matrix = torch.ones(size, size, dtype=dtype, device="cuda" if gpu else "cpu")
    for _ in range(10):
        start = time.perf_counter()
        matrix @ matrix
        if gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


if __name__ == "__main__":
    subprocesses.serve(list_gpus, measure_matmul)
