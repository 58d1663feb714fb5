"""Shared by all tests: one thread, the same draws every time, no deadline for hypothesis."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import settings

# One thread here and in the processes that tests start: two workers share the cores.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Without a GPU the fused kernels run under Triton's interpreter, which has to be told before it
# loads, whoever loads it first. It makes impl="triton" available; "auto" never takes it on a CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


_RAN_ON = pytest.StashKey[set[str]]()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """What a process of pytest-xdist has to say of the code that its tests ran on."""
    if said := getattr(node, "workeroutput", {}).get("ran_on"):
        node.config.stash.setdefault(_RAN_ON, set()).add(said)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for line in sorted(config.stash.get(_RAN_ON, ())):
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def reader() -> dict[str, str]:
    """The environment of who types a documented command: the installed command comes first.

    Checkouts are found because the reader sits in them: none of those on PYTHONPATH is left there.
    """
    commands = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    folders = [x for x in os.environ.get("PYTHONPATH", "").split(os.pathsep) if x]
    left = [x for x in folders if not (Path(x) / "generative_recommenders").is_dir()]
    return os.environ | {"PATH": commands, "PYTHONPATH": os.pathsep.join(left)}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    # Upstream's train_fn switches it on for the whole process, and for the tests after it.
    torch.autograd.set_detect_anomaly(False)


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run the command line in this process; it gives exit code, stdout and stderr."""

    # Only here: what is set above has to come before it.
    from hstu_xd.cli.app import run

    def call(*args: object) -> Outcome:
        capsys.readouterr()
        code = run([str(arg) for arg in args])
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture
def call(cli: Callable[..., Outcome]) -> Callable[..., str]:
    """Run a command that ends with an exit code; it gives what was printed, errors included."""

    def said(*words: object, code: int = 0) -> str:
        outcome = cli(*words)
        assert outcome.code == code, outcome.err
        return outcome.out + outcome.err

    return said
