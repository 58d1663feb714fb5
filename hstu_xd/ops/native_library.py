"""Compile the package's C files on this machine, once, and load them.

The native operators are C files beside their Python callers. The first use of one calls the
system's compiler, as triton does, and keeps the library in the user's cache. Where there is no
compiler or it fails, "auto" goes on with plain PyTorch; who insists on "native" is told why.
"""

import atexit
import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hstu_xd.errors import InputError

# Any compiler of these takes the C files as they are.
_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fPIC", "-shared")
_SECONDS = 120


class NativeLibrary:
    """A C file of an operator, compiled on its first use in a process.

    Its functions take a pointer to a structure of eight bytes a field, pointers first, and return
    nothing.

    Args:
        source: the C file.
        pointers: names of the structure's pointers, in order.
        numbers: names of its int64 numbers, in order; of rows of heads there is a ``NAME_stride``.
    """

    def __init__(self, source: Path, pointers: str, numbers: str) -> None:
        self.source, self.pointers, self.numbers = source, pointers, numbers
        fields = [(x, ctypes.c_void_p) for x in pointers.split()]
        fields += [(x, ctypes.c_int64) for x in numbers.split()]
        self._structure = type("Arguments", (ctypes.Structure,), {"_fields_": fields})

    def problem(self) -> str | None:
        """Return why the library cannot be used here, in a sentence; None where it can."""
        found = _loaded(self.source)
        return found if isinstance(found, str) else None

    def call(
        self,
        function: str,
        rows: Mapping[str, Tensor],
        others: Mapping[str, Tensor],
        written: Mapping[str, Tensor],
        **numbers: int,
    ) -> None:
        """Hand tensors over to a function; all stay alive while it runs.

        Args:
            function: its name.
            rows: (L, H, d) float32 tensors that are read; their strides go with them.
            others: tensors that are read otherwise.
            written: contiguous tensors that it fills.
            **numbers: sizes.

        Raises:
            InputError: the library cannot be used here.
        """
        found = _loaded(self.source)
        if isinstance(found, str):
            raise InputError(f"impl 'native' cannot be used here: {found}; use impl='eager'")
        rows = {name: _rows_of(x) for name, x in rows.items()}
        tensors = {**rows, **{name: x.contiguous() for name, x in others.items()}, **written}
        arguments = self.arguments(
            **{name: x.data_ptr() for name, x in tensors.items()},
            **{f"{name}_stride": x.stride(0) for name, x in rows.items()},
            **numbers,
            threads=torch.get_num_threads(),
        )
        found[function](ctypes.byref(arguments))

    def arguments(self, **fields: int) -> Any:
        """Return the structure that its functions take, with some fields set; others are 0."""
        return self._structure(**fields)

    def run(self, function: str, arguments: Any) -> None:
        """Call a function with a structure, whose tensors the caller keeps alive.

        It is for calls of a few microseconds; the caller has asked :meth:`problem` before.
        """
        getattr(_loaded(self.source), function)(ctypes.byref(arguments))


# Types that the C files take; halves are computed in float32, which holds them exactly.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fits(*tensors: Tensor) -> bool:
    """Return whether the C files can compute with tensors: in memory of the host, float32 or less.

    Not in a graph that is being compiled, where they have no memory.
    """
    if torch.compiler.is_compiling():
        return False
    return all(x.device.type == "cpu" and x.dtype in _DTYPES for x in tensors)


def check_fits(**tensors: Tensor | None) -> None:
    """Refuse tensors that do not fit.

    Raises:
        InputError: the message names the tensor and what to do.
    """
    for name, x in tensors.items():
        if x is not None and not fits(x):
            raise InputError(
                f"{name} is {x.dtype} on {x.device}; impl 'native' needs float32, bfloat16 or "
                "float16 on cpu, outside of compiled graphs: use impl='eager'"
            )


def compiler() -> str | None:
    """Return the path of the C compiler that is used: the one that CC names, or the system's."""
    names = (os.environ["CC"],) if os.environ.get("CC") else _COMPILERS
    return next(filter(None, map(shutil.which, names)), None)


def _rows_of(x: Tensor) -> Tensor:
    """Return (L, H, d) with each row's heads side by side in memory; rows may lie apart."""
    heads, width = x.shape[1:]
    side_by_side = (x.stride(1) == width or heads == 1) and (x.stride(2) == 1 or width == 1)
    return x if side_by_side and x.stride(0) >= heads * width else x.contiguous()


@cache
def _loaded(source: Path) -> ctypes.CDLL | str:
    """Return the library, or why there is none."""
    if sys.platform == "win32":
        return "the C files need a compiler with GCC's vector extensions, which Windows lacks"
    path = compiler()
    if path is None:
        return f"no C compiler was found ({', '.join(_COMPILERS)}, or the one that CC names)"
    try:
        return ctypes.CDLL(str(_compiled(source, path)))
    except subprocess.CalledProcessError as error:
        return f"{path} failed: {_first_line(error.stderr)}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path}: {_first_line(str(error))}"


def _compiled(source: Path, path: str) -> Path:
    """Return the compiled file, from the cache where this machine has compiled it before."""
    files = [source, *sorted(source.parent.parent.glob("*.h"))]
    # What "native" means differs between machines that share a home folder.
    described = _run(path, "-march=native", "-E", "-v", "-x", "c", os.devnull).stderr
    texts = [described, *_FLAGS, *(x.read_text() for x in files)]
    key = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    name = f"{source.parent.name}-{key[:16]}{sysconfig.get_config_var('SHLIB_SUFFIX') or '.so'}"
    folder = _cache_folder()
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="hstu-xd-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    elif (folder / name).exists():
        return folder / name
    # Another process may compile the same file: each writes its own, and the last one stays.
    with tempfile.TemporaryDirectory(dir=folder) as work:
        built = Path(work) / name
        try:
            _run(path, *_FLAGS, "-fopenmp", "-o", str(built), str(source))
        except subprocess.CalledProcessError:
            # Apple's compiler has no OpenMP: one thread is what it gives.
            _run(path, *_FLAGS, "-o", str(built), str(source))
        built.replace(folder / name)
    return folder / name


def _cache_folder() -> Path | None:
    """Return the folder of compiled files, made where it is missing; None where none can be."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = base / "hstu-xd"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError):  # the latter: who runs this has no home
        return None
    # What others can write is not loaded.
    status = folder.stat()
    is_own = status.st_uid == os.getuid() and not status.st_mode & 0o022
    return folder if is_own and os.access(folder, os.W_OK) else None


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    said = {"text": True, "errors": "replace", "env": {**os.environ, "LC_ALL": "C"}}
    return subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS, **said)


def _first_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if "error" in line] or text.splitlines()
    return next(iter(lines), "it gave no reason").strip()


def forget() -> None:
    """Ask for the compiler and the compiled files anew: for tests that take them away."""
    _loaded.cache_clear()
