"""`tensorboard`: serves TensorBoard for runs, in this process and without TensorFlow."""

from __future__ import annotations

import contextlib
import socket
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from tensorboard import program

import electra_wrap.monitor.scalars  # noqa: F401 - keeps TensorBoard from importing TensorFlow
from electra_wrap.errors import EnvironmentProblem, UsageError


def serve(directories: Sequence[Path], host: str, port: int | None) -> None:
    """Serve run directories until a signal; without `port`, at the first free one from 6006.

    UsageError if one holds no model, or if there is no such host or port.
    """
    for directory in directories:
        if not (directory / "models").is_dir():
            raise UsageError(f"{directory} has not trained yet; first `run`")

    if port is not None and not 0 <= port < 2**16:
        raise UsageError(f"--port {port} does not exist; choose one below 65,536")
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise UsageError(
            f"--host {host}: {error.strerror}; give an address of this machine"
        ) from None

    names = [directory.name for directory in directories]
    if len(set(names)) < len(names):
        names = [str(directory).strip("/").replace("/", " ") for directory in directories]
    with tempfile.TemporaryDirectory(prefix="electra_wrap-tensorboard-") as tree:
        for name, directory in zip(names, directories, strict=True):
            Path(tree, name).symlink_to(directory / "models")
        tensorboard = program.TensorBoard()
        tensorboard.configure(logdir=tree, host=host, port=port, load_fast="false")
        try:
            url = tensorboard.launch()  # main() has its own signal handler, which writes to stderr
        except program.TensorBoardServerException as error:
            message = " ".join(error.msg.split())
            raise EnvironmentProblem(f"{message}; choose another --port or --host") from None
        with contextlib.suppress(KeyboardInterrupt):
            print(f"TensorBoard at {url} (Ctrl+C to stop)", flush=True)
            threading.Event().wait()
