"""Writes a synthetic cross-domain log in which one domain truly tells about another."""

from pathlib import Path
from typing import Any

from hstu_xd.data import layout
from hstu_xd.data.filters import Filters
from hstu_xd.data.folder import check_output, replaced_folder
from hstu_xd.data.prepare import build_log
from hstu_xd.data.simulate import simulate
from hstu_xd.data.store import is_store
from hstu_xd.data.world import SynthOptions
from hstu_xd.data.writer import write_store


def synthesize(out: Path, options: SynthOptions, *, force: bool = False) -> dict[str, Any]:
    """Simulate users and write a prepared store marked as synthetic.

    Args:
        out: the folder to write; appears whole or not at all.
        options: size and shape.
        force: replace an existing prepared store.

    Returns:
        The manifest.

    Raises:
        InputError: an option out of range, or an output folder that may not be written.
        HstuXdError: the store cannot be written.
    """
    options.check()
    check_output(out, force=force, ours=is_store, kind="prepared store", parts=layout.ALL_FILES)
    log, facts = build_log(simulate(options), Filters())
    facts |= {"synthetic": True, "synth": vars(options)}
    with replaced_folder(out) as partial:
        return write_store(partial, log, facts)
