"""What a codebase that this package plugs into declares, and what is then done for all of them.

A host is one folder whose ``__init__.py`` holds a :class:`Host` called ``HOST``, and one line in
:data:`REGISTERED`. ``hstu-xd doctor`` reports it, ``hstu-xd patch`` knows its checkouts, and
:func:`activate` rebinds its names.

One policy holds for versions: a host's package counts as verified when the source of every object
that the plug-in rebinds or builds on equals that of a verified commit. Comments and white space do
not count, so that a reformatted checkout, or a later commit that leaves these objects alone, stays
verified. Any other version is refused, by :func:`check_version`, unless the environment variable
``HSTU_XD_ALLOW_UNVERIFIED`` is 1; then a warning says what differs.
"""

import ast
import hashlib
import importlib.util
import io
import logging
import os
import re
import subprocess
import sys
import textwrap
import tokenize
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module, metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from hstu_xd.errors import HstuXdError
from hstu_xd.plugins.rebinding import Patch, Rebinding

_logger = logging.getLogger(__name__)

OVERRIDE = "HSTU_XD_ALLOW_UNVERIFIED"
# Among the hashes of an object's verified sources: some verified versions do without it.
NOT_THERE = ""

# The folders of the hosts, one line each. Reports list them in this order.
REGISTERED = [
    "hstu_xd.plugins.gr.research",
    "hstu_xd.plugins.rec",
    "hstu_xd.plugins.dlrm_v3",
]


@dataclass(frozen=True)
class Codebase:
    """A repository whose checkouts hold a host's package.

    Attributes:
        name: what reports call it, and its folder in ``patches/``.
        repository: owner and name at GitHub.
        commits: abbreviations of the verified commits, oldest first.
        markers: files by which a checkout is known, relative to its top folder.
        patches: folder of its patches; None: the one of its name in ``patches/``.
    """

    name: str
    repository: str
    commits: tuple[str, ...]
    markers: tuple[str, ...]
    patches: Path | None = None


@dataclass(frozen=True)
class Library:
    """A library that a host runs with in some of its versions only.

    Attributes:
        name: of its distribution.
        at_least: the first version that fits; empty: not known.
        below: the first later one that does not; empty: none is known.
        why: what is known of versions that do not fit.
        on_gpu: it matters only where there is a GPU.
    """

    name: str
    why: str
    at_least: str = ""
    below: str = ""
    on_gpu: bool = False

    @property
    def version(self) -> str:
        """The version that is installed; empty: none is."""
        try:
            return metadata.version(self.name)
        except metadata.PackageNotFoundError:
            return ""

    @property
    def problem(self) -> str:
        """What does not fit, in words; empty where the library does."""
        bounds = (">=", self.at_least), ("<", self.below)
        needed = self.name + ",".join(f"{sign}{bound}" for sign, bound in bounds if bound)
        version = self.version
        if not version:
            return f"{self.name} is not installed; {needed} is needed"
        is_later = self.below and _numbers(version) >= _numbers(self.below)
        if is_later or _numbers(version) < _numbers(self.at_least):
            return f"{self.name} {version} does not fit: {needed} is needed; {self.why}"
        return ""


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]


@dataclass(frozen=True)
class Host:
    """A codebase that this package plugs into.

    Nothing of the host, nor torch, is imported to read a declaration: what needs them is named by
    ``"module:attribute"``.

    Attributes:
        name: its key in the report of ``hstu-xd doctor``.
        title: what messages and the lines of that report call it.
        verdict_title: what the report's last lines call it.
        declared_in: dotted name of the folder that holds this declaration.
        package: the package that holds the rebound names.
        codebases: where the package comes from. Of several that fit a checkout the first counts,
            so that a fork stands before its origin.
        sources: file below the package's folder -> object -> hashes of its verified sources, as
            :func:`source_hashes` gives them; :data:`NOT_THERE` for a version without the object.
        rebindings: names a sequence of stages of rebindings, each of which is applied with those
            before it in force.
        cpu_rebindings: names a function that returns further ones, for a machine without a GPU.
        cpu_command: the command that applies ``cpu_rebindings`` while it runs; empty:
            :func:`activate` applies them where no GPU is visible.
        markers: files by which the folder is known that the host is started in.
        start_folder: that folder, relative to the top of a checkout.
        in_place: whether the package is found in the start folder and nowhere else.
        needs: libraries that are to be imported before the package.
        libraries: those of which only some versions will do.
        dispensable: packages that the host imports and mostly does without -> their modules ->
            names that are imported from these, see :func:`stand_in_for_absent`.
    """

    name: str
    title: str
    verdict_title: str
    declared_in: str
    package: str
    codebases: tuple[Codebase, ...]
    sources: Mapping[str, Mapping[str, tuple[str, ...]]]
    rebindings: str
    cpu_rebindings: str
    markers: tuple[str, ...]
    cpu_command: str = ""
    start_folder: str = ""
    in_place: bool = False
    needs: tuple[str, ...] = ()
    libraries: tuple[Library, ...] = ()
    dispensable: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)

    @property
    def repositories(self) -> str:
        """The repositories that it comes from, as a message names them."""
        return " or ".join(sorted(codebase.repository for codebase in self.codebases))

    @property
    def verified_commits(self) -> str:
        """The verified commits of every repository, as a message names them."""
        return "; ".join(
            f"{codebase.repository} {', '.join(codebase.commits)}" for codebase in self.codebases
        )

    @property
    def where_to_run(self) -> str:
        """What a user is told to do so that the package is found."""
        if self.in_place:
            return (
                f"run it from the {self.start_folder}/ folder of a checkout of {self.repositories}"
            )
        return "run from inside its checkout or put the checkout on PYTHONPATH"

    def missing_markers(self, folder: Path) -> list[str]:
        """Return the files of a start folder that are not in this one."""
        return [marker for marker in self.markers if not (folder / marker).is_file()]

    def checkout_of(self, package_folder: Path) -> Path:
        """Return the top folder of the checkout that the package's folder would lie in."""
        return package_folder.parents[len(Path(self.start_folder).parts)]


def hosts() -> tuple[Host, ...]:
    """Return the declarations of all registered hosts."""
    return tuple(declared_host(folder) for folder in REGISTERED)


def declared_host(folder: str) -> Host:
    """Return the declaration that a folder, named as a module, holds."""
    return import_module(folder).HOST


@dataclass(frozen=True)
class HostStatus:
    """What is known of the package of a host that Python would import here.

    Attributes:
        importable: a package of that name is on the path.
        error: why it is not; empty when it is.
        path: folder of the package.
        commit: of the git checkout that it lies in; empty when it lies in none.
        verified: every object that the plug-in touches is as in a verified commit.
        problems: one line for each object that is not.
    """

    importable: bool
    error: str = ""
    path: str = ""
    commit: str = ""
    verified: bool = False
    problems: tuple[str, ...] = ()


def inspect_host(host: Host) -> HostStatus:
    """Look at the package of a host without importing it."""
    try:
        spec = importlib.util.find_spec(host.package)
    except (ImportError, ValueError) as error:
        return HostStatus(importable=False, error=str(error))
    if spec is None or not spec.submodule_search_locations:
        return HostStatus(importable=False, error=f"no module named {host.package}")
    folder = Path(next(iter(spec.submodule_search_locations)))
    problems = source_problems(host, folder)
    return HostStatus(
        importable=True,
        path=str(folder),
        commit=_commit(host, folder),
        verified=not problems,
        problems=problems,
    )


def source_problems(host: Host, folder: Path) -> tuple[str, ...]:
    """Return the objects below a folder of the host's package that differ from verified ones."""
    problems = []
    for name, objects in host.sources.items():
        file = folder / name
        if not file.is_file():
            problems.append(f"{name}: no such file")
            continue
        found = source_hashes(file.read_text(encoding="utf-8"))
        for key, known in objects.items():
            if found.get(key, NOT_THERE) in known:
                continue
            if key not in found:
                problems.append(f"{name}: {key} is not there")
            else:
                problems.append(f"{name}: the source of {key} is not a verified one")
    return tuple(problems)


def source_hashes(source: str) -> dict[str, str]:
    """Hash every top-level function and class of a module, without comments and white space."""
    lines = source.splitlines(keepends=True)
    hashes = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
            text = _bare(textwrap.dedent("".join(lines[first : node.end_lineno])))
            hashes[node.name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return hashes


def _bare(source: str) -> str:
    """Return a source without comments and white space; the same for every version of Python."""
    lines = source.splitlines(keepends=True)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column] + "\n"
    return "".join("".join(lines).split())


def _commit(host: Host, folder: Path) -> str:
    """Return the commit of the checkout that holds the package, of no repository around that."""
    command = ["git", "-C", str(folder), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    lines = done.stdout.split("\n")[:-1] if done.returncode == 0 else []
    if len(lines) != 2 or Path(lines[0]).resolve() != host.checkout_of(folder.resolve()):
        return ""
    return lines[1]


def check_version(host: Host) -> None:
    """Refuse, or with the override warn about, a version that differs from the verified ones.

    Raises:
        HstuXdError: the package is not importable, or it differs and the environment variable
            HSTU_XD_ALLOW_UNVERIFIED is not 1.
    """
    status = inspect_host(host)
    if not status.importable:
        raise HstuXdError(f"{host.package} is not importable ({status.error}); {host.where_to_run}")
    if status.verified:
        return
    text = (
        f"{status.path} (commit {status.commit or 'unknown'}) differs from the versions that "
        f"hstu-xd was verified with ({host.verified_commits}): {'; '.join(status.problems)}"
    )
    if os.environ.get(OVERRIDE) != "1":
        raise HstuXdError(f"{text}. Check out a verified one, or set {OVERRIDE}=1 to go on anyway")
    _logger.warning("%s; going on because %s=1", text, OVERRIDE)


_in_force: dict[str, Patch] = {}


def activate(host: Host) -> Patch:
    """Rebind the names of a host, so that it knows this package; a second call changes nothing.

    Returns:
        The handle; its ``revert()`` puts the identical originals back.

    Raises:
        HstuXdError: a version that :func:`check_version` refuses, or a name that is missing or
            whose object lacks a parameter that is relied on. Nothing is rebound then.
    """
    patch = _in_force.get(host.name)
    if patch is not None and patch.originals:
        return patch
    check_version(host)
    patch = Patch()
    try:
        stages: Sequence[Sequence[Rebinding]] = _named(host.rebindings)
        for stage in stages:
            patch.add(stage)
        if not host.cpu_command and not _sees_gpu():
            _logger.warning("no GPU is visible: %s runs on CPU", host.title)
            cpu_rebindings: Callable[[], Sequence[Rebinding]] = _named(host.cpu_rebindings)
            patch.add(cpu_rebindings())
    except HstuXdError:
        patch.revert()
        raise
    _in_force[host.name] = patch
    return patch


def _named(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(import_module(module), attribute)


def _sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


class _Absent(ModuleType):
    """A module that can be imported and nothing else."""

    def __getattr__(self, name: str) -> Any:
        package = self.__name__.partition(".")[0]
        raise AttributeError(
            f"{self.__name__}.{name}: {package} is not installed (hstu-xd let its import succeed, "
            "as most of the code does without); pip install it"
        )


def stand_in_for_absent(host: Host) -> list[str]:
    """Let a host import the dispensable packages that are not installed; return their names."""
    absent = [
        name
        for name in host.dispensable
        if name not in sys.modules and importlib.util.find_spec(name) is None
    ]
    for name in absent:
        _stand_in(name)
        for module, names in host.dispensable[name].items():
            _stand_in(f"{name}.{module}").__dict__.update(dict.fromkeys(names))
        _logger.info("%s is not installed; %s runs without", name, host.title)
    return absent


def _stand_in(name: str) -> ModuleType:
    module = _Absent(name)
    module.__spec__ = ModuleSpec(name, loader=None)
    sys.modules[name] = module
    return module
