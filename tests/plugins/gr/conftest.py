"""A small synthetic store that the plug-in's tests share, and the upstream that they run on."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import upstream_choice

from hstu_xd.data.synthetic import SynthOptions, synthesize


# Not pytest_report_header: quiet runs print none, and pytest asks only the outermost conftest.py.
def pytest_report_collectionfinish() -> str:
    return upstream_choice.report()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand the line to tests/conftest.py: one of several processes prints nothing itself."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["ran_on"] = upstream_choice.report()


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    """Modules of this folder are imported with the stand-in in force; it calls none of others."""
    with upstream_choice.in_force():
        return (yield)


@pytest.fixture(scope="module", autouse=True)
def upstream_in_force() -> Iterator[None]:
    with upstream_choice.in_force():
        yield


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("synth") / "store"
    synthesize(path, SynthOptions(users=160, domains=3, items_per_domain=40, mean_length=14))
    return path
