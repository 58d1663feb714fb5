"""``hstu-xd patch``: fits, is there, or is refused; all patches or none; nothing in between."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

from hstu_xd.cli.app import run
from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.files import patches_folder
from hstu_xd.plugins.gr import GENERATIVE_RECOMMENDERS
from hstu_xd.plugins.source_patches import (
    APPLICABLE,
    APPLIED,
    REFUSED,
    apply_patches,
    codebases,
    inspect_tree,
    read_patches,
)

MARKERS = GENERATIVE_RECOMMENDERS.markers
MAIN, TRAIN = MARKERS
RANKER = "generative_recommenders/dlrm_v3/train/train_ranker.py"
NAME = GENERATIVE_RECOMMENDERS.name


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(root), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def content(root: Path) -> dict[str, bytes]:
    return {marker: (root / marker).read_bytes() for marker in MARKERS}


@pytest.fixture
def upstream(tmp_path: Path) -> Path:
    """A stand-in: a git checkout with upstream's marker files."""
    root = tmp_path / "upstream"
    for marker, text in ((MAIN, "one\ntwo\nthree\n"), (TRAIN, "def setup():\n    pass\n")):
        (root / marker).parent.mkdir(parents=True, exist_ok=True)
        (root / marker).write_text(text)
    git(root.parent, "init", "-q", str(root))
    git(root, "add", ".")
    git(root, "commit", "-qm", "first")
    return root


@pytest.fixture
def patches(tmp_path: Path, upstream: Path) -> Path:
    """Two patches for the stand-in, written the way patches/README.md says."""
    folder = tmp_path / "patches"
    (folder / NAME).mkdir(parents=True)
    for name, marker, after in (("a", MAIN, "one\ntwo\nnew\nthree\n"), ("b", TRAIN, None)):
        path = upstream / marker
        path.write_text(after or path.read_text() + "import plugin\n")
        diff = git(upstream, "diff", "-U0", "--full-index")
        diff = re.sub(r"^(@@ .* @@).*$", r"\1", diff, flags=re.MULTILINE)
        (folder / NAME / f"{name}.1234567.patch").write_text(
            f"Commits: 1234567 .. 89abcde\n\n{diff}"
        )
        git(upstream, "checkout", "--", ".")
    return folder


def test_applies_everything_and_says_so(upstream: Path, patches: Path) -> None:
    before = inspect_tree(upstream, patches=patches)
    assert (before.state, before.codebase) == (APPLICABLE, NAME)
    assert before.commit == git(upstream, "rev-parse", "HEAD").strip()
    assert [patch.name for patch in before.missing] == ["a", "b"]
    apply_patches(upstream, patches=patches)
    assert (upstream / MAIN).read_text() == "one\ntwo\nnew\nthree\n"
    assert (upstream / TRAIN).read_text().endswith("pass\nimport plugin\n")
    after = inspect_tree(upstream, patches=patches)
    assert (after.state, after.missing) == (APPLIED, ())
    done = content(upstream)
    assert apply_patches(upstream, patches=patches).state == APPLIED
    assert content(upstream) == done
    git(upstream, "commit", "-qam", "patched")
    assert inspect_tree(upstream, patches=patches).state == APPLIED


def test_one_patch_there_already_is_kept(upstream: Path, patches: Path) -> None:
    (upstream / MAIN).write_text("one\ntwo\nnew\nthree\n")
    before = apply_patches(upstream, patches=patches)
    assert ([p.name for p in before.applied], [p.name for p in before.missing]) == (["a"], ["b"])
    assert inspect_tree(upstream, patches=patches).state == APPLIED


@pytest.mark.parametrize("marker", MARKERS)
def test_refuses_uncommitted_changes(upstream: Path, patches: Path, marker: str) -> None:
    (upstream / marker).write_text("mine\n")
    before = content(upstream)
    with pytest.raises(InputError, match=f"uncommitted changes in {marker}; commit or stash"):
        apply_patches(upstream, patches=patches)
    assert content(upstream) == before


def test_refuses_an_unknown_version(upstream: Path, patches: Path) -> None:
    (upstream / TRAIN).write_text("later\n")
    git(upstream, "commit", "-qam", "later")
    before = content(upstream)
    with pytest.raises(InputError, match=f"{TRAIN} at commit .* fit {NAME} 1234567 .. 89abcde"):
        apply_patches(upstream, patches=patches)
    assert content(upstream) == before


def test_does_without_an_optional_patch_of_another_version(upstream: Path, patches: Path) -> None:
    optional = patches / NAME / "b.1234567.patch"
    optional.write_text(optional.read_text().replace("89abcde", "89abcde\nOptional: yes", 1))
    assert [p.name for p in inspect_tree(upstream, patches=patches).missing] == ["a", "b"]
    (upstream / TRAIN).write_text("mine\n")
    assert "uncommitted changes" in inspect_tree(upstream, patches=patches).reason
    git(upstream, "commit", "-qam", "another version")
    assert [p.name for p in apply_patches(upstream, patches=patches).missing] == ["a"]
    assert (upstream / TRAIN).read_text() == "mine\n"
    assert inspect_tree(upstream, patches=patches).state == APPLIED


def test_refuses_staged_changes(upstream: Path, patches: Path) -> None:
    (upstream / "other.py").write_text("")
    assert inspect_tree(upstream, patches=patches).state == APPLICABLE
    git(upstream, "add", "other.py")
    state = inspect_tree(upstream, patches=patches)
    assert (state.state, state.reason) == (REFUSED, "staged changes; commit or unstage them")


def test_refuses_what_is_no_checkout_of_its_own(
    upstream: Path, patches: Path, tmp_path: Path
) -> None:
    assert "no such folder" in inspect_tree(tmp_path / "none", patches=patches).reason
    assert MAIN in inspect_tree(tmp_path, patches=patches).reason
    (upstream / ".git").rename(tmp_path / "gone")
    assert "not the top folder of a git checkout" in inspect_tree(upstream, patches=patches).reason
    # A vendored copy inside another repository: git would skip every path without a word.
    git(tmp_path, "init", "-q", ".")
    assert "not the top folder of a git checkout" in inspect_tree(upstream, patches=patches).reason


def test_a_git_hooks_variables_do_not_mislead(
    upstream: Path, patches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "init", "-q", "elsewhere")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere/.git"))
    assert inspect_tree(upstream, patches=patches).state == APPLICABLE


def test_all_or_none(upstream: Path, patches: Path) -> None:
    """A patch whose lines do not give the content it promises leaves every file as it was."""
    bad = patches / NAME / "b.1234567.patch"
    bad.write_text(bad.read_text().replace("+import plugin", "+import something"))
    before = content(upstream)
    with pytest.raises(HstuXdError, match="not the expected ones; the files are as before"):
        apply_patches(upstream, patches=patches)
    assert content(upstream) == before
    bad.write_text(bad.read_text().replace("@@ -", "@@ x"))
    with pytest.raises(HstuXdError, match="the files are as before"):
        apply_patches(upstream, patches=patches)
    assert content(upstream) == before


def test_command_wants_one_of_the_two(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["patch"]) == 2
    assert run(["patch", "--check", str(tmp_path), "--apply", str(tmp_path)]) == 2
    assert "one of the two" in capsys.readouterr().err


def test_command_refuses_with_exit_code_2(
    upstream: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stand-in is no version that the patches of this package know."""
    before = content(upstream)
    for option in ("--check", "--apply"):
        assert run(["patch", option, str(upstream)]) == 2
        printed = capsys.readouterr()
        assert "the patches fit generative-recommenders 44b62c6 (2025-02-06)" in printed.err
        assert ("state: refused" in printed.out) == (option == "--check")
    assert content(upstream) == before


@pytest.mark.parametrize("codebase", codebases())
def test_our_patches_add_lines_only(codebase: str) -> None:
    patches = read_patches(patches_folder() / codebase)
    names_of = {}
    for patch in patches:
        body = patch.text[patch.text.index("diff --git") :].splitlines()
        for line in body:
            assert re.match(r"diff --git |index |--- a/|\+|@@ -\d+,0 \+\d+(,\d+)? @@$", line), line
        for path in patch.blobs:
            names_of.setdefault(path, set()).add(patch.name)
    # The hashes tell a file's state only while patches of one name touch it.
    assert {len(names) for names in names_of.values()} == {1}


def test_a_folder_of_patches_is_a_known_codebase() -> None:
    assert {path.name for path in patches_folder().iterdir() if path.is_dir()} == set(codebases())


def real_checkout() -> Path | None:
    spec = importlib.util.find_spec("generative_recommenders")
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations))).parent
    return root if (root / ".git").exists() else None


def _lacks(root: Path | None, commit: str) -> bool:
    command = ["git", "-C", str(root), "cat-file", "-e", f"{commit}^{{commit}}"]
    return subprocess.run(command, capture_output=True, check=False).returncode != 0


@pytest.mark.skipif(
    real_checkout() is None,
    reason="no git checkout of generative-recommenders is importable: NOT covered: patches on it",
)
@pytest.mark.parametrize("commit", ["44b62c6", "2e81fab", "36a0f07", "db1bf8f"])
def test_the_real_upstream(commit: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "clone"
    if _lacks(real_checkout(), commit):
        pytest.skip(f"the checkout's history lacks {commit}: NOT covered: patches on that version")
    git(tmp_path, "clone", "-qn", str(real_checkout()), str(root))
    git(root, "checkout", "-q", commit, "--", ".")
    git(root, "reset", "-q", "--soft", commit)
    assert run(["patch", "--check", str(root)]) == 0
    assert "state: applicable" in capsys.readouterr().out
    assert run(["patch", "--apply", str(root)]) == 0
    undo = re.search(r"^undo: (.*)$", capsys.readouterr().out, re.MULTILINE)
    changed = ["4", "0", TRAIN, "2", "0", MAIN]
    if commit in ("36a0f07", "db1bf8f"):  # earlier ones have another production path, or none
        changed = ["5", "0", RANKER, *changed]
    assert git(root, "diff", "--numstat").split() == changed
    assert (root / TRAIN).read_text().splitlines()[-1].startswith("import hstu_xd.plugins.")
    lines = (root / MAIN).read_text().splitlines()
    at = lines.index("    if world_size == 0:")
    assert "world_size = torch.cuda.device_count()" in lines[at - 1]
    assert run(["patch", "--check", str(root)]) == 0
    assert "state: applied" in capsys.readouterr().out
    assert undo
    subprocess.run(undo[1].split(), check=True)
    assert git(root, "status", "--porcelain") == ""
