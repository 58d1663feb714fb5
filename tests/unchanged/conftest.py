"""Whether a repetition has to equal what was recorded to the bit."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from recordings import CONDITIONS, RUNS, conditions

from hstu_xd.ops import native_library


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train on the CPU, as it was recorded, also where there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def plain_pytorch() -> Iterator[None]:
    """Compute without the loops in C, as it was recorded: they round as the compiler has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CC", "no-such-compiler")
        native_library.forget()
        yield
    native_library.forget()


@pytest.fixture(scope="session")
def foreign_arithmetic() -> str:
    """What rounds otherwise here than where it was recorded; empty where nothing does."""
    recorded, here = json.loads(CONDITIONS.read_text()), conditions()
    return ", ".join(
        f"{name} {here[name]} for {recorded[name]}" for name in here if here[name] != recorded[name]
    )


@pytest.fixture
def exact(foreign_arithmetic: str, record_property: Callable[[str, object], None]) -> bool:
    """Whether to compare to the bit; which way it was is noted with the test and printed."""
    how = f"within a tolerance: {foreign_arithmetic}" if foreign_arithmetic else "to the bit"
    record_property("compared", how)
    print(f"compared {how}")
    return not foreign_arithmetic


@pytest.fixture
def writable_run(tmp_path: Path) -> Callable[[str], Path]:
    """Copy a recorded run to where a command may write into it."""

    def copied(name: str) -> Path:
        return shutil.copytree(RUNS / name, tmp_path / name)

    return copied
