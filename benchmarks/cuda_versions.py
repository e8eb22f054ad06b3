"""Print which CUDA a framework's cuDNN and NCCL were built for. No GPU is needed.

    PYTHON benchmarks/cuda_versions.py tensorflow|torch

The libraries are the ones that the framework of the interpreter PYTHON would load: those that come
first where the dynamic linker searches on its behalf. The exit code is 1 if they are not for the
CUDA of the framework's wheels, 12 for TensorFlow 2.21 and 13 for PyTorch. tensorflow and torch
overwrite each other's libraries when one environment has both with CUDA.
"""

import ctypes
import importlib.util
import re
import sys
from pathlib import Path

#: The file, in the framework's package, that loads cuDNN and NCCL; and the CUDA of its wheels.
FRAMEWORKS = {
    "tensorflow": ("libtensorflow_framework.so.2", 12),
    "torch": ("lib/libtorch_cuda.so", 13),
}


class _SearchPath(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("flags", ctypes.c_uint))


class _SearchInfo(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("count", ctypes.c_uint), ("paths", _SearchPath * 1))


def search_paths(library: Path) -> list[Path]:
    """Return the directories where the linker looks for what `library` loads (man 3 dlinfo)."""
    handle = ctypes.c_void_p(ctypes.CDLL(str(library))._handle)
    libc, serinfo, serinfosize = ctypes.CDLL(None), 4, 5
    info = _SearchInfo()
    assert libc.dlinfo(handle, serinfosize, ctypes.byref(info)) == 0
    buffer = ctypes.create_string_buffer(info.size)
    ctypes.memmove(buffer, ctypes.byref(info), 16)  # dlinfo wants size and count as it gave them
    assert libc.dlinfo(handle, serinfo, buffer) == 0
    filled = _SearchInfo.from_buffer(buffer)
    paths = (_SearchPath * filled.count).from_buffer(buffer, _SearchInfo.paths.offset)
    return [Path(path.name.decode()) for path in paths]


def main() -> int:
    framework = sys.argv[1]
    file, expected = FRAMEWORKS[framework]
    spec = importlib.util.find_spec(framework)
    assert spec is not None and spec.origin is not None, f"{framework} is not installed"
    paths = search_paths(Path(spec.origin).parent / file)
    found = []
    for name in ("libcudnn.so.9", "libnccl.so.2"):
        path = next((path / name for path in paths if (path / name).is_file()), None)
        if path is None:
            print(f"{framework}: no {name}")
            return 2
        library = ctypes.CDLL(str(path))
        if name == "libcudnn.so.9":
            library.cudnnGetCudartVersion.restype = ctypes.c_size_t
            cuda = library.cudnnGetCudartVersion() // 1000
            version = ctypes.c_size_t(ctypes.CDLL(str(path)).cudnnGetVersion()).value
        else:
            number = ctypes.c_int()
            library.ncclGetVersion(ctypes.byref(number))
            version = number.value
            built = re.search(rb"NCCL version [\d.]+\+cuda(\d+)", path.read_bytes())
            assert built is not None
            cuda = int(built[1])
        print(f"{framework}: {path.resolve()} {version} is for CUDA {cuda}")
        found.append(cuda)
    return int(found != [expected, expected])


if __name__ == "__main__":
    sys.exit(main())
