"""Stand-ins for packages that REC imports without need on the ID path."""

import importlib.util
import logging
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_logger = logging.getLogger(__name__)

# Imported at the top of REC's trainer (deepspeed) and of HLLM's HSTU (fbgemm_gpu).
PACKAGES = ("deepspeed", "fbgemm_gpu")


class _Absent(ModuleType):
    """A module that can be imported and nothing else."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{self.__name__}.{name}: {self.__name__} is not installed (hstu-xd let REC import it, "
            "as the ID path does without); pip install it"
        )


def stand_in_for_absent() -> list[str]:
    """Let REC import packages that are not installed; returns their names."""
    absent = [
        name
        for name in PACKAGES
        if name not in sys.modules and importlib.util.find_spec(name) is None
    ]
    for name in absent:
        module = _Absent(name)
        module.__spec__ = ModuleSpec(name, loader=None)
        sys.modules[name] = module
        _logger.info("%s is not installed; REC's ID models do without it", name)
    return absent
