"""Run as a module: which GPUs PyTorch sees, or how fast it multiplies matrices."""

from __future__ import annotations

import time

from electra_wrap import process


def ask(precision: str | None = None) -> list[str] | float:
    """Return the GPUs' names; or, for a precision, the measured operations a second of a large matrix product."""
    import torch

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    if precision is None:
        return gpus
    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
    n, best = (8192 if gpus else 2048), float("inf")
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    matrix = torch.ones(n, n, dtype=dtype, device="cuda" if gpus else "cpu")
    for _ in range(10):
        began = time.perf_counter()
        matrix @ matrix
        if gpus:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


if __name__ == "__main__":
    process.serve(ask)
