"""Additive patches of upstream codebases: what a git checkout is, and applying all or none.

Each patch names, in its ``index`` lines, the exact content of the files before and after it. That
decides where it fits: patches without context lines would apply anywhere.
"""

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.files import patches_folder
from hstu_xd.plugins.host import Codebase, hosts

APPLICABLE, APPLIED, REFUSED = "applicable", "applied", "refused"

_INDEX = re.compile(r"^diff --git a/(\S+) b/\1\nindex (\w{40})\.\.(\w{40})(?: \d+)?$", re.MULTILINE)
_COMMITS = re.compile(r"^Commits: (.+)$", re.MULTILINE)
_OPTIONAL = re.compile(r"^Optional: ", re.MULTILINE)
# A git hook's variables would lead git away from the checkout that was asked about.
_REDIRECTS = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_PREFIX")


@dataclass(frozen=True)
class SourcePatch:
    """One patch file: ``<name>.<first commit>.patch``.

    Attributes:
        name: what it does; patches of one name are the same change for different versions.
        text: the file's content.
        commits: the range of upstream commits whose files it fits.
        blobs: touched file -> git's hash of its content before and after.
        optional: a checkout with another version of its files does without it.
    """

    name: str
    text: str
    commits: str
    blobs: dict[str, tuple[str, str]]
    optional: bool = False


@dataclass(frozen=True)
class TreeState:
    """Which patches are in a checkout, and which of the others fit it.

    Attributes:
        state: "applicable", "applied" or "refused".
        reason: why it is refused; empty otherwise.
        codebase: folder of patches/ that it belongs to; empty when it belongs to none.
        commit: HEAD of the checkout; empty when it is none.
        applied: patches that are in the tree.
        missing: patches that are not, and fit.
    """

    state: str
    reason: str = ""
    codebase: str = ""
    commit: str = ""
    applied: tuple[SourcePatch, ...] = ()
    missing: tuple[SourcePatch, ...] = ()


def codebases() -> dict[str, Codebase]:
    """Return the codebases of all hosts by name. Of those that fit a checkout the first counts."""
    found: dict[str, Codebase] = {}
    for codebase in (each for host in hosts() for each in host.codebases):
        found.setdefault(codebase.name, codebase)
    return found


def patches_of(codebase: Codebase) -> Path:
    """Return the folder of a codebase's patches."""
    return codebase.patches or patches_folder() / codebase.name


def read_patches(folder: Path) -> tuple[SourcePatch, ...]:
    """Read the patches of one codebase, in the order of their file names."""
    patches = []
    for file in sorted(folder.glob("*.patch")):
        text = file.read_text(encoding="utf-8")
        blobs = {path: (before, after) for path, before, after in _INDEX.findall(text)}
        commits = _COMMITS.search(text)
        assert blobs, f"{file}: no index line with full hashes"
        assert commits, f"{file}: no line 'Commits: ...'"
        is_optional = _OPTIONAL.search(text) is not None
        name = file.name.split(".")[0]
        patches.append(SourcePatch(name, text, commits[1], blobs, is_optional))
    return tuple(patches)


def inspect_tree(root: Path, *, patches: Path | None = None) -> TreeState:
    """Tell whether the patches are in a checkout, would fit, or are refused; writes nothing.

    Args:
        root: top folder of a git checkout of a known codebase.
        patches: folder with one subfolder a codebase; default: the patches of the hosts.
    """
    if not root.is_dir():
        return TreeState(REFUSED, "no such folder; give the top folder of a checkout")
    lacks = {
        name: [marker for marker in codebase.markers if not (root / marker).is_file()]
        for name, codebase in codebases().items()
    }
    codebase = next((name for name, missing in lacks.items() if not missing), "")
    if not codebase:
        text = "; ".join(f"{name} has {', '.join(missing)}" for name, missing in lacks.items())
        return TreeState(REFUSED, f"not a codebase with patches ({text})")
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root.resolve():
        reason = "not the top folder of a git checkout; patches need git to tell the version"
        return TreeState(REFUSED, reason, codebase)
    commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD") or ""
    known = read_patches(patches / codebase if patches else patches_of(codebases()[codebase]))
    return _fit(root, known, codebase, commit)


def apply_patches(root: Path, *, patches: Path | None = None) -> TreeState:
    """Apply every patch that fits and is not in the checkout yet: all of them or none.

    Returns:
        The state before; its ``missing`` are the patches that were applied.

    Raises:
        InputError: the checkout is refused; nothing is written.
        HstuXdError: git could not write the files; they are as before.
    """
    before = inspect_tree(root, patches=patches)
    if before.state == REFUSED:
        raise InputError(f"{root}: {before.reason}")
    if before.state == APPLIED:
        return before
    wanted = {path: ids[1] for patch in before.missing for path, ids in patch.blobs.items()}
    originals = {path: (root / path).read_bytes() for path in wanted}
    # One input for all: git applies the patches of one input together or not at all.
    text = "".join(patch.text for patch in before.missing)
    done = _run(root, "apply", "--unidiff-zero", "--whitespace=nowarn", "-", text=text)
    if done.returncode != 0 or _worktree_ids(root, list(wanted)) != wanted:
        for path, content in originals.items():
            if (root / path).read_bytes() != content:
                (root / path).write_bytes(content)
        cause = done.stderr.strip() or "the patched files are not the expected ones"
        raise HstuXdError(f"{root}: {cause}; the files are as before")
    return before


def _fit(root: Path, known: tuple[SourcePatch, ...], codebase: str, commit: str) -> TreeState:
    paths = sorted({path for patch in known for path in patch.blobs})
    now = _worktree_ids(root, paths)
    head = {path: _git(root, "rev-parse", "-q", "--verify", f"HEAD:{path}") for path in paths}
    applied, missing = [], []
    for name in dict.fromkeys(patch.name for patch in known):
        versions = [patch for patch in known if patch.name == name]
        inside = [p for p in versions if all(now[f] == ids[1] for f, ids in p.blobs.items())]
        fitting = [
            p for p in versions if all(now[f] == head[f] == ids[0] for f, ids in p.blobs.items())
        ]
        applied += inside
        missing += fitting
        if inside or fitting:
            continue
        touched = sorted({path for patch in versions for path in patch.blobs})
        changed = [path for path in touched if now[path] != head[path]]
        if changed:
            reason = f"uncommitted changes in {', '.join(changed)}; commit or stash them"
        elif all(patch.optional for patch in versions):
            continue
        else:
            ranges = ", ".join(patch.commits for patch in versions)
            reason = (
                f"{', '.join(touched)} at commit {commit[:7] or 'unknown'} not of a known version; "
                f"the patches fit {codebase} {ranges}"
            )
        return TreeState(REFUSED, reason, codebase, commit)
    if missing and _run(root, "diff", "--cached", "--quiet").returncode != 0:
        reason = "staged changes; commit or unstage them"
        return TreeState(REFUSED, reason, codebase, commit)
    state = APPLICABLE if missing else APPLIED
    return TreeState(state, "", codebase, commit, tuple(applied), tuple(missing))


def _worktree_ids(root: Path, paths: list[str]) -> dict[str, str | None]:
    return {path: _git(root, "hash-object", "--", path) for path in paths}


def _git(root: Path, *arguments: str) -> str | None:
    done = _run(root, *arguments)
    return done.stdout.strip() if done.returncode == 0 else None


def _run(root: Path, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in _REDIRECTS}
    command = ["git", "-C", str(root), *arguments]
    try:
        return subprocess.run(
            command, input=text, capture_output=True, encoding="utf-8", env=environment, check=False
        )
    except FileNotFoundError as error:
        raise HstuXdError("git is not on the PATH; patches need it") from error
