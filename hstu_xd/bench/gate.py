"""The gate: every provider is compared with the float64 reference before it is timed."""

import torch
from torch import Tensor

from hstu_xd.bench import providers
from hstu_xd.bench.cases import Case, Draw

# Largest relative error of a row in float32.
FORWARD_BUDGET = 1e-5
GRADIENT_BUDGET = 2e-5


def largest_error(provider: str, case: Case) -> float:
    """Largest row error of output and gradients, as a fraction of the budget.

    The provider runs the small version of the case through the code that is timed. One that knows
    no domains is compared with full attention.

    Returns:
        A fraction; above 1 the provider is wrong.
    """
    draw = Draw.of(case.small)
    found = providers.build(provider, draw, torch.float32)()
    masked = providers.knows_domains(provider)
    truth = providers.build("reference", draw, torch.float64, masked=masked)()
    fractions = [
        row_error(found[name], truth[name]) / (FORWARD_BUDGET if name == "out" else GRADIENT_BUDGET)
        for name in truth
    ]
    return max(fractions)


def row_error(found: Tensor, truth: Tensor) -> float:
    """Largest ``|found - truth| / |truth|`` of a row; a vector counts as one row.

    Rows far shorter than the average are measured against a thousandth of it.
    """
    rows = truth.flatten(1) if truth.ndim > 1 else truth.unsqueeze(0)
    difference = (found.to(truth.dtype).reshape(rows.shape) - rows).norm(dim=1)
    size = rows.norm(dim=1)
    error = (difference / torch.maximum(size, size.mean() / 1000)).max()
    return float(error) if error.isfinite() else float("inf")
