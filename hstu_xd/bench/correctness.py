"""The gate: every provider is compared with the reference in float64 before it is timed."""

import torch
from torch import Tensor

from hstu_xd.bench.cases import Case, Draw
from hstu_xd.bench.providers import PROVIDERS, definition
from hstu_xd.bench.timing import unmarked

# Largest relative error of a row in float32.
FORWARD_BUDGET = 1e-5
GRADIENT_BUDGET = 2e-5
# A row shorter than this share of the average row is compared with that share instead of its own
# length, because its terms cancel. Where softmax sees a single key, the exact gradient of the query
# is zero, the difference of two equal terms.
_SHORT_ROW = {"silu": 1e-3, "softmax": 0.1}
# The budget as a multiple of the error that the definition itself has in the same precision. It
# holds for half precisions, and in float32 for rows that no implementation can compute better:
# where a query sees a single key and SiLU is flat there, its gradient is the rest of terms that
# cancel.
SAME_PRECISION_BUDGET = 2.0


def largest_error(provider: str, case: Case) -> float:
    """Return the largest error of output and gradients, as a fraction of the budget.

    The provider runs the small version of the case through the code that is timed, and is compared
    with the definition of what it computes: with or without bias, inside domains or not, SiLU or
    softmax. In float32 every row is compared, in half precisions whole tensors are; see
    :data:`SAME_PRECISION_BUDGET`.

    Returns:
        A fraction; above 1 the provider is wrong.
    """
    draw, dtype = Draw.from_case(case.small), case.torch_dtype
    one = PROVIDERS[case.what][provider]
    computes = one.computation(case)
    found = one.build(draw, dtype, computes)(unmarked)
    truth = definition(draw, torch.float64, computes)(unmarked)
    if dtype == torch.float32:
        budgets = dict.fromkeys(truth, GRADIENT_BUDGET) | {"out": FORWARD_BUDGET}
        short = _SHORT_ROW[computes.normalization]
        errors = {name: row_error(found[name], truth[name], short) for name in truth}
        if any(errors[name] > budgets[name] for name in truth):
            alike = definition(draw, dtype, computes)(unmarked)
            for name, budget in budgets.items():
                own = SAME_PRECISION_BUDGET * row_error(alike[name], truth[name], short)
                budgets[name] = max(budget, own)
        return max(errors[name] / budgets[name] for name in truth)
    alike = definition(draw, dtype, computes)(unmarked)
    smallest = torch.finfo(dtype).eps / 4  # the definition may hit the truth by chance
    return max(
        _tensor_error(found[name], truth[name])
        / (SAME_PRECISION_BUDGET * max(_tensor_error(alike[name], truth[name]), smallest))
        for name in truth
    )


def row_error(found: Tensor, truth: Tensor, short: float = _SHORT_ROW["silu"]) -> float:
    """Return the largest ``|found - truth| / |truth|`` of a row; a vector counts as one row.

    Args:
        found: tensor to judge.
        truth: the right tensor, of the same shape.
        short: rows shorter than this share of the average row are compared with that share.
    """
    rows = truth.flatten(1) if truth.ndim > 1 else truth.unsqueeze(0)
    difference = (found.to(truth.dtype).reshape(rows.shape) - rows).norm(dim=1)
    size = rows.norm(dim=1)
    error = (difference / torch.maximum(size, short * size.mean())).max()
    return float(error) if error.isfinite() else float("inf")


def _tensor_error(found: Tensor, truth: Tensor) -> float:
    error = (found.to(truth.dtype) - truth).norm() / truth.norm()
    return float(error) if error.isfinite() else float("inf")
