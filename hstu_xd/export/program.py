"""What exported programs of all kinds share: the checks that a graph keeps, and no paths in it."""

import torch
from torch import Tensor
from torch.export import ExportedProgram


def check(holds: Tensor, message: str) -> None:
    """Refuse the inputs of a traced program.

    Args:
        holds: () bool.
        message: of the RuntimeError that is raised where it does not hold.
    """
    # The one check that an exported program keeps; torch has no public name for it.
    torch._assert_async(holds, message)  # noqa: SLF001


def check_sizes(*pairs: tuple[int | torch.SymInt, int | torch.SymInt]) -> None:
    """Tell a traced program which sizes of its inputs are the same ones."""
    for size, other in pairs:
        torch._check(size == other)  # noqa: SLF001


def known_items(item_domains: Tensor, item_ids: Tensor) -> Tensor:
    """Tell whether every id is padding or an item of the catalogue: () bool.

    Args:
        item_domains: (I + 1,) int64 domain of every id, -1 of those that no item bears.
        item_ids: of any shape, int64.
    """
    nearest = item_ids.clamp(0, len(item_domains) - 1)
    in_use = (item_domains[nearest] >= 0) | (nearest == 0)
    return ((nearest == item_ids) & in_use).all()


def without_paths(program: ExportedProgram) -> ExportedProgram:
    """Take out of a program the paths of the machine that traced it."""
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program
