"""How many modules of the package one forward pass leads through: what a reader has to open."""

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tiny_models import EVERYTHING, draw_histories, tiny_model, to_batch

import hstu_xd

PACKAGE = Path(hstu_xd.__file__).parent
# Those of the operators include the net under their first use.
AT_MOST = 15


def modules_of_a_forward_pass() -> list[str]:
    """Files of the package whose code runs in ``model(batch)`` with every switch on."""
    model, batch = tiny_model(**EVERYTHING), to_batch(draw_histories([20, 1, 24, 7], seed=3))
    found: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            found.add(frame.f_code.co_filename)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        with torch.no_grad():
            model(batch)
    finally:
        sys.setprofile(before)
    return sorted(
        str(Path(name).relative_to(PACKAGE)) for name in found if PACKAGE in Path(name).parents
    )


def test_a_forward_pass_leads_through_few_modules() -> None:
    modules = modules_of_a_forward_pass()
    print(*modules, sep="\n")
    assert len(modules) <= AT_MOST, modules
