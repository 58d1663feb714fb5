"""What a run drops while it trains, from the names in its gin file to the numbers in its steps."""

from pathlib import Path
from typing import Any

import pytest
from quick_runs import QUICK
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from hstu_xd.model.inputs import PositionalInput
from hstu_xd.training.run import train
from hstu_xd.training.settings import load_settings

INPUT, LAYERS = 0.3, 0.6


class Zeros:
    """How many of the numbers that modules were given or gave were zeros."""

    def __init__(self) -> None:
        self._zeros, self._numbers = 0, 0

    def count(self, x: Tensor) -> None:
        self._zeros += int((x == 0).sum())
        self._numbers += x.numel()

    @property
    def share(self) -> float:
        assert self._numbers >= 10_000
        return self._zeros / self._numbers


def test_a_run_drops_what_its_gin_file_says(store_path: Path, tmp_path: Path) -> None:
    features, layers, asked = Zeros(), Zeros(), Zeros()

    def given(module: nn.Module, inputs: Any) -> None:
        # Plain HSTU projects with one linear map a layer, and with no other.
        if isinstance(module, nn.Linear):
            (layers if module.training else asked).count(inputs[0])

    def gave(module: nn.Module, _inputs: Any, out: Any) -> None:
        if isinstance(module, PositionalInput):
            (features if module.training else asked).count(out)

    hooks = register_module_forward_pre_hook(given), register_module_forward_hook(gave)
    rates = f"xd_train.dropout_rate = {INPUT}", f"xd_encoder.linear_dropout_rate = {LAYERS}"
    try:
        train(store_path, load_settings([], [*QUICK, *rates]), tmp_path / "run")
    finally:
        for hook in hooks:
            hook.remove()
    assert features.share == pytest.approx(INPUT, abs=0.02)
    assert layers.share == pytest.approx(LAYERS, abs=0.02)
    assert asked.share == 0
