"""Stand-ins for packages that REC imports and does without."""

import importlib.util
import logging
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_logger = logging.getLogger(__name__)

# Imported by REC's trainer, HLLM's HSTU and HLLM's LLMs -> module and names that are asked of it.
PACKAGES: dict[str, dict[str, tuple[str, ...]]] = {
    "deepspeed": {},
    "fbgemm_gpu": {},
    "flash_attn": {"bert_padding": ("index_first_axis", "pad_input", "unpad_input")},
}


class _Absent(ModuleType):
    """A module that can be imported and nothing else."""

    def __getattr__(self, name: str) -> Any:
        package = self.__name__.partition(".")[0]
        raise AttributeError(
            f"{self.__name__}.{name}: {package} is not installed (hstu-xd let REC import it, as "
            "most of REC does without); pip install it"
        )


def stand_in_for_absent() -> list[str]:
    """Let REC import packages that are not installed; returns their names."""
    absent = [
        name
        for name in PACKAGES
        if name not in sys.modules and importlib.util.find_spec(name) is None
    ]
    for name in absent:
        _stand_in(name)
        for module, names in PACKAGES[name].items():
            _stand_in(f"{name}.{module}").__dict__.update(dict.fromkeys(names))
        _logger.info("%s is not installed; REC runs without", name)
    return absent


def _stand_in(name: str) -> ModuleType:
    module = _Absent(name)
    module.__spec__ = ModuleSpec(name, loader=None)
    sys.modules[name] = module
    return module
