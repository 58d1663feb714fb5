"""When the tests of the loops in C can run, and copies of the C files with one change."""

import shutil
from pathlib import Path

import pytest

import hstu_xd
from hstu_xd.ops.domain_attention.native import LIBRARY
from hstu_xd.ops.native_library import NativeLibrary

problem = LIBRARY.problem()
needs_compiler = pytest.mark.skipif(
    problem is not None, reason=f"{problem}: the loops in C are NOT covered"
)

_OPS = Path(hstu_xd.__file__).parent / "ops"


def mutated(folder: Path, file: str, text: str, instead: str) -> Path:
    """The folder, with copies of all C files, ``instead`` wherever ``text`` stood in one."""
    for each in _OPS.rglob("*.[ch]"):
        copied = folder / each.relative_to(_OPS)
        copied.parent.mkdir(exist_ok=True)
        shutil.copyfile(each, copied)
    source = (folder / file).read_text()
    assert text in source
    (folder / file).write_text(source.replace(text, instead))
    return folder


def copied(library: NativeLibrary, folder: Path) -> NativeLibrary:
    """The library of the copy in a folder of :func:`mutated`."""
    source = folder / library.source.parent.name / library.source.name
    return NativeLibrary(source, library.pointers, library.numbers)
