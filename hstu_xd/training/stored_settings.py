"""The settings that a run folder holds, read without importing what is not allowed."""

import logging
from collections.abc import Collection, Sequence
from pathlib import Path

from hstu_xd.errors import InputError
from hstu_xd.evaluation.protocol import RETRIEVAL
from hstu_xd.files import sha256_of
from hstu_xd.parts import (
    ALLOW_IMPORTS,
    import_foreign,
    importable_from,
    imports_allowed,
    module_file,
)
from hstu_xd.training.extension import foreign_names
from hstu_xd.training.gin_files import gin_library
from hstu_xd.training.run_facts import CONFIG_FILE, read_run_of
from hstu_xd.training.settings import RunSettings, load_settings

_logger = logging.getLogger(__name__)
# A run's file names all settings of its time; what later ones are where they have another default.
_UNNAMED = ("xd_train.average_decay = 0.0",)


def allowed_imports(run: Path, *, allow_imports: bool, trusted: Collection[str] = ()) -> list[str]:
    """Name what a run would import from outside this package, if that is allowed.

    Args:
        run: the run folder.
        allow_imports: whether the user has allowed it to name modules.
        trusted: modules that the user has named otherwise.

    Raises:
        InputError: not the folder of a retrieval run, or it names modules that may not be imported.
    """
    config = run / CONFIG_FILE
    read_run_of(RETRIEVAL, run)
    try:
        foreign = foreign_names(gin_library(), config.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise InputError(f"{config}: {' '.join(str(error).split())}; restore the file") from error
    asking = [name for name in foreign if name not in trusted]
    if asking and not imports_allowed(allow_imports):
        raise InputError(
            f"{run} needs code from outside hstu-xd, which loading it would execute: "
            f"{', '.join(asking)}; if you trust it, add --allow-imports or set {ALLOW_IMPORTS}=1"
        )
    return foreign


def stored_settings(
    run: Path,
    *,
    allow_imports: bool,
    trusted: Collection[str] = (),
    files: Sequence[Path] = (),
    bindings: Sequence[str] = (),
) -> RunSettings:
    """Read a run's own settings, importing nothing that is not allowed.

    Modules are looked for as Python does, then in the working folder and where the run had them.

    Args:
        run: the run folder.
        allow_imports: whether the user has allowed it to name modules.
        trusted: modules that the user has named otherwise.
        files: gin files on top of them.
        bindings: gin bindings on top of both.

    Raises:
        InputError: not the folder of a retrieval run, or it names modules that may not or cannot
            be imported.
    """
    facts, config = read_run_of(RETRIEVAL, run), run / CONFIG_FILE
    foreign = allowed_imports(run, allow_imports=allow_imports, trusted=trusted)
    recorded = facts.get("modules") or {}
    with importable_from([Path.cwd(), *(Path(x["folder"]) for x in recorded.values())]):
        for name in foreign:
            if not name.startswith(("file ", "__gin__.")):
                import_foreign(name, str(run))
        settings = load_settings([config, *files], bindings, before=_UNNAMED)
    for name, known in recorded.items():
        file = module_file(name)
        if file is not None and sha256_of(file) != known["sha256"]:
            _logger.warning(
                "%s was trained with another version of module %s than %s", run, name, file
            )
    return settings
