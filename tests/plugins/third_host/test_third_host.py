"""One more codebase takes one folder and one line: a stand-in for it, and a plug-in into that."""

import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hstu_xd import doctor
from hstu_xd.cli.app import run
from hstu_xd.errors import HstuXdError
from hstu_xd.plugins import host as hosts_module
from hstu_xd.plugins.host import (
    OVERRIDE,
    activate,
    declared_host,
    hosts,
    inspect_host,
    stand_in_for_absent,
)
from hstu_xd.subprocess_checks import ask

HERE = Path(__file__).parent
FOLDER = "toy_plugin"


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(root), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A checkout on the path, and the plug-in registered by its one line."""
    root = tmp_path / "checkout"
    shutil.copytree(HERE / "checkout", root, ignore=shutil.ignore_patterns("__pycache__"))
    git(tmp_path, "init", "-q", str(root))
    git(root, "add", ".")
    git(root, "commit", "-qm", "first")
    monkeypatch.setattr(hosts_module, "REGISTERED", [*hosts_module.REGISTERED, FOLDER])
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.syspath_prepend(str(root))
    monkeypatch.delenv(OVERRIDE, raising=False)
    before = set(sys.modules)
    yield root
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("toy_upstream", "toy_accelerator"):
            del sys.modules[name]


def change(root: Path) -> None:
    file = root / "toy_upstream" / "trainer.py"
    text = file.read_text(encoding="utf-8").replace('f"model {name}"', 'f"a model {name}"')
    file.write_text(text, encoding="utf-8")


def test_the_package_is_found_and_verified_without_being_imported(checkout: Path) -> None:
    assert [host.name for host in hosts()] == ["generative_recommenders", "rec", "dlrm_v3", "toy"]
    status = inspect_host(declared_host(FOLDER))
    assert (status.path, status.verified) == (str(checkout / "toy_upstream"), True)
    assert status.commit == git(checkout, "rev-parse", "HEAD").strip()
    assert "toy_upstream" not in sys.modules


@pytest.mark.parametrize("has_gpu", [True, False])
def test_names_are_rebound_and_put_back(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, has_gpu: bool
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    host = declared_host(FOLDER)
    assert stand_in_for_absent(host) == ["toy_accelerator"]
    from toy_upstream import trainer

    originals = trainer.build_model, trainer.pick_device
    handle = activate(host)
    assert activate(host) is handle
    device = "cuda:0" if has_gpu else "cpu"
    assert trainer.train("TOY_XD") == f"our model on {device}"
    assert trainer.train("theirs") == f"model theirs on {device}"
    handle.revert()
    assert (trainer.build_model, trainer.pick_device) == originals
    assert trainer.train("TOY_XD") == "model TOY_XD on cuda:0"


def test_a_stage_that_fails_leaves_nothing_rebound(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    file = checkout / "toy_upstream" / "trainer.py"
    file.write_text(file.read_text(encoding="utf-8").replace("pick_device", "device_of"))
    monkeypatch.setenv(OVERRIDE, "1")
    host = declared_host(FOLDER)
    stand_in_for_absent(host)
    from toy_upstream import trainer

    original = trainer.build_model
    with pytest.raises(HstuXdError, match=r"toy_upstream\.trainer\.pick_device is not there"):
        activate(host)
    assert trainer.build_model is original


def test_an_unverified_version_is_refused_unless_the_variable_says_otherwise(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    change(checkout)
    host = declared_host(FOLDER)
    stand_in_for_absent(host)
    said = (
        r"differs from the versions that hstu-xd was verified with \(somebody/toy-upstream "
        r"1234567\): trainer\.py: the source of build_model is not a verified one\. Check out a "
        r"verified one, or set HSTU_XD_ALLOW_UNVERIFIED=1 to go on anyway"
    )
    with pytest.raises(HstuXdError, match=said):
        activate(host)
    monkeypatch.setenv(OVERRIDE, "1")
    with caplog.at_level(logging.WARNING), activate(host):
        assert "going on because HSTU_XD_ALLOW_UNVERIFIED=1" in caplog.text


def test_a_checkout_that_is_not_there_says_where_to_look(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [part for part in sys.path if part != str(checkout)])
    with pytest.raises(HstuXdError, match=r"no module named toy_upstream.*or put the checkout on"):
        activate(declared_host(FOLDER))


def test_it_is_asked_in_a_process_of_its_own(checkout: Path) -> None:
    found = ask("plugin", FOLDER, timeout_s=60, path=sys.path)
    assert found["error"] == ""
    assert found["without"] == ["toy_accelerator"]
    assert found["rebinds"][0] == "toy_upstream.trainer.build_model"


def test_doctor_reports_it(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def only_toy(question: str, *arguments: str, **others: Any) -> dict[str, Any]:
        asked = arguments == (FOLDER,)
        return ask(question, *arguments, **others) if asked else {"error": "not asked here"}

    monkeypatch.setattr(doctor, "ask", only_toy)
    report = doctor.examine()
    assert report["toy"]["verified"]
    assert report["toy"]["patches"] == {"state": "applicable", "reason": ""}
    lines = doctor.render(report).splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("Toy "))
    assert lines[at].split()[1:3] == [f"{checkout / 'toy_upstream'},", "commit"]
    assert lines[at + 1].split()[:2] == ["without", "toy_accelerator,"]
    assert "works; rebinds build_model" in lines[at + 2]
    assert lines[at + 3].split() == ["source", "patches", "applicable"]
    assert any(line.startswith("verdict, toy") for line in lines)


def test_patches_are_checked_and_applied(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["patch", "--check", str(checkout)]) == 0
    assert "codebase: toy-upstream" in capsys.readouterr().out
    assert run(["patch", "--apply", str(checkout)]) == 0
    assert (checkout / "start.py").read_text().splitlines()[-1] == "import toy_plugin"
    assert run(["patch", "--check", str(checkout)]) == 0
    assert "state: applied" in capsys.readouterr().out
