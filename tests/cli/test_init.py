"""``hstu-xd init``, and that the files it copies are found however the package is installed."""

import subprocess
import sys
from pathlib import Path

import pytest

from hstu_xd import files
from hstu_xd.cli.app import run
from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.plugins.gr.research import HOST, gin_files
from hstu_xd.plugins.gr.research.gin_files import copy_gin_files

ROOT = Path(__file__).parents[2]


@pytest.fixture
def upstream(tmp_path: Path) -> Path:
    root = tmp_path / "upstream"
    for marker in HOST.markers:
        (root / marker).parent.mkdir(parents=True, exist_ok=True)
        (root / marker).write_text("")
    return root


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "source"
    for name in ("amazon_xd.gin", "ml/hstu.gin", "standalone/xd.gin"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"# {name}\n")
    monkeypatch.setattr(gin_files, "gin_folder", lambda: folder)
    return folder


def tree(folder: Path) -> dict[str, str]:
    return {
        file.relative_to(folder).as_posix(): file.read_text()
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_copies_the_files_for_upstream(
    upstream: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["init", str(upstream)]) == 0
    assert tree(upstream / "gin") == {
        "amazon_xd.gin": "# amazon_xd.gin\n",
        "ml/hstu.gin": "# ml/hstu.gin\n",
    }
    printed = capsys.readouterr().out
    assert f"wrote {upstream}/gin/amazon_xd.gin\n" in printed
    assert "--gin_config_file=gin/amazon_xd.gin" in printed
    assert run(["init", str(upstream)]) == 0
    assert "wrote" not in capsys.readouterr().out


def test_other_content_is_kept_unless_forced(
    upstream: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("amazon_xd.gin", "ml/hstu.gin"):
        (upstream / "gin" / name).parent.mkdir(parents=True, exist_ok=True)
    (upstream / "gin/ml/hstu.gin").write_text("mine\n")
    before = tree(upstream)
    assert run(["init", str(upstream)]) == 2
    assert "gin/ml/hstu.gin there with other content; add --force" in capsys.readouterr().err
    assert tree(upstream) == before
    assert run(["init", str(upstream), "--force"]) == 0
    assert (upstream / "gin/ml/hstu.gin").read_text() == "# ml/hstu.gin\n"


def test_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["init", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert all(marker in message for marker in HOST.markers)
    assert list(tmp_path.iterdir()) == []
    assert run(["init", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_file_in_the_way_of_a_folder(upstream: Path, source: Path) -> None:
    (upstream / "gin").write_text("")
    with pytest.raises(InputError, match="gin in the way"):
        copy_gin_files(upstream, force=True)
    (upstream / "gin").unlink()
    (upstream / "gin/amazon_xd.gin").mkdir(parents=True)
    with pytest.raises(InputError, match=r"gin/amazon_xd\.gin in the way"):
        copy_gin_files(upstream, force=True)


def test_no_file_for_upstream_is_an_error(upstream: Path, tmp_path: Path) -> None:
    with pytest.raises(HstuXdError, match="holds no gin file"):
        copy_gin_files(upstream, source=tmp_path / "empty")


def test_the_copied_folder_does_not_hide_gin_config(upstream: Path, source: Path) -> None:
    copy_gin_files(upstream)
    code = "import sys, gin; assert sys.path[0] == ''; gin.parse_config('')"
    subprocess.run([sys.executable, "-c", code], cwd=upstream, check=True)


def test_folders_of_a_source_checkout() -> None:
    assert files.gin_folder() == ROOT / "gin"
    assert files.patches_folder() == ROOT / "patches"


def test_folders_of_an_installed_package(tmp_path: Path) -> None:
    package = tmp_path / "hstu_xd"
    (package / "_files/gin").mkdir(parents=True)
    assert files._folder("gin", package) == package / "_files/gin"


def test_gin_config_beside_the_package_is_not_taken_for_ours(tmp_path: Path) -> None:
    (tmp_path / "gin").mkdir()
    with pytest.raises(HstuXdError, match="install hstu-xd again"):
        files._folder("gin", tmp_path / "hstu_xd")


def test_the_wheel_carries_both_folders() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    section = text.split("[tool.hatch.build.targets.wheel.force-include]\n")[1].split("\n\n")[0]
    names = ["gin", "patches", "constraints.txt"]
    names += [
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "examples").iterdir()
        if file.name not in ("results", "__pycache__")
    ]
    for name in names:
        assert f'"{name}" = "hstu_xd/_files/{name}"' in section.splitlines()


def test_examples_go_into_any_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "folder"
    assert run(["init", "--examples", str(folder)]) == 0
    assert f"wrote {folder}/examples/own_model.py\n" in capsys.readouterr().out
    for name in (
        "constraints.txt",
        "examples/own_parts/mine.gin",
        "examples/daily_retraining.py",
        "examples/serving/Dockerfile",
        "gin/standalone/xd.gin",
    ):
        assert (folder / name).read_bytes() == (ROOT / name).read_bytes()
    assert not (folder / "examples" / "results").exists()
    assert run(["init", str(folder), "--examples"]) == 0
    assert "wrote" not in capsys.readouterr().out


def test_examples_replace_nothing_unless_forced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "constraints.txt").write_text("mine\n")
    assert run(["init", str(tmp_path), "--examples"]) == 2
    assert "constraints.txt there with other content; add --force" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["constraints.txt"]
    assert run(["init", str(tmp_path), "--examples", "--force"]) == 0
    file = tmp_path / "constraints.txt"
    assert run(["init", str(file), "--examples"]) == 2
    assert "not a folder; give one to copy the examples into" in capsys.readouterr().err
