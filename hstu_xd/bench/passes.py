"""``bench encoder`` and ``bench attention``: the gate, timing in turns, peak memory, one row each.

The gate compares every provider with the reference in float64 before it is timed. Peak memory is
what one pass adds. On a CPU it is the growth of the resident set over one pass in a process of its
own, after inputs, parameters and a tiny warm-up are in memory; on CUDA it is the allocator's own
count.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from hstu_xd.bench.cases import Case, Draw
from hstu_xd.bench.memory import allocated, growth, growth_elsewhere
from hstu_xd.bench.providers import PROVIDERS, Provider, definition
from hstu_xd.bench.roofline import Ceilings, Work, delta, visible_pairs
from hstu_xd.bench.rows import Row, empty_row, speed_columns, time_columns, times_faster
from hstu_xd.bench.timing import Pass, noting_failure, take_turns, torch_threads, unmarked

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
# Of the budget of half precisions, what another's code may need that is right in float32.
# Upstream's layers needed 2.6 on a GPU in bfloat16.
FOREIGN_ROUNDING = 4.0


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


def judge(provider: str, case: Case) -> Row:
    """Return the columns of the gate: whether a provider is right, its error, and judged in what.

    Another's code may round to half precision between its operators, where the definition does not.
    It then is right where it is within the budgets of float32, and in halves within
    :data:`FOREIGN_ROUNDING` of them; its error in halves stands in the row all the same. Where it
    has no float32 it is wrong.
    """
    error = largest_error(provider, case)
    right, more = error <= 1, {}
    is_foreign = PROVIDERS[case.what][provider].foreign and case.dtype != "float32"
    if 1 < error <= FOREIGN_ROUNDING and is_foreign:
        with noting_failure(provider, {}):
            right = largest_error(provider, replace(case, dtype="float32")) <= 1
            more = {"judged_in": "float32"}
    return {"correct": right, "error_of_budget": error, **more}


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


def measure(
    cases: Iterable[Case],
    names: Iterable[str],
    *,
    threads: int,
    repeats: int,
    against: Sequence[str] = ("reference",),
) -> Iterator[Row]:
    """Yield the rows of all cases, one for each provider.

    Providers take turns (A B A B ...) in this process, so that what disturbs the machine disturbs
    all of them and ratios hold. A provider that disagrees with the definition of what it computes
    has ``correct`` false and no time; one that cannot run here says why under ``absent``, one that
    raised (out of memory, say) under ``failed``.

    Args:
        cases: the cases to measure.
        names: names of the providers.
        threads: threads of PyTorch.
        repeats: timed passes of each provider.
        against: providers that the others' times are compared with.
    """
    with torch_threads(threads):
        for case in cases:
            yield from _rows(case, list(names), threads, repeats, against)


def _rows(
    case: Case, names: list[str], threads: int, repeats: int, against: Sequence[str]
) -> Iterator[Row]:
    known = {name: PROVIDERS[case.what][name] for name in names}
    absent = {name: why for name, one in known.items() if (why := one.missing(case))}
    failed: dict[str, str] = {}
    verdicts: dict[str, Row] = {}
    for name in (name for name in known if name not in absent):
        with noting_failure(name, failed):
            verdicts[name] = judge(name, case)
    draw, runs = Draw.from_case(case), {}
    for name, one in known.items():
        if verdicts.get(name, {}).get("correct"):
            with noting_failure(name, failed):
                runs[name] = one.build(draw, case.torch_dtype, one.computation(case))
    times = take_turns(runs, failed, device=case.device, repeats=repeats)
    peaks: dict[str, int] = {}
    for name in times:
        with noting_failure(name, failed):
            peaks[name] = peak_bytes(name, case, threads, runs[name])
    for name, one in known.items():
        row = empty_row(name, case, threads=threads, repeats=repeats)
        row |= _computation_columns(one, draw)
        row |= {"absent": absent.get(name), "failed": failed.get(name)}
        row |= verdicts.get(name, {})
        if name in times:
            row |= time_columns(times[name])
            for rival in against:
                row |= times_faster(times, name, rival)
            work = Work.from_draw(draw, masked=one.computation(case).masked)
            row |= speed_columns(work, row, Ceilings.measure(case))
            row["peak_bytes"] = peaks.get(name)
        yield row


def _computation_columns(provider: Provider, draw: Draw) -> Row:
    """Return the columns that say what a provider computes, and over how many pairs."""
    computes = provider.computation(draw.case)
    return {
        "inside_domains": draw.case.num_domains > 1 and computes.masked,
        "normalization": computes.normalization,
        "biased": computes.biased,
        "delta": delta(draw),
        "visible_pairs": visible_pairs(draw, masked=computes.masked),
    }


def peak_bytes(provider: str, case: Case, threads: int, run: Pass) -> int:
    """Return the bytes that one forward and backward pass adds.

    Args:
        provider: its name.
        case: the case that is measured.
        threads: threads of PyTorch.
        run: the provider's pass, warmed up; it is called on CUDA only, where no process of its own
            is needed.

    Raises:
        HstuXdError: the process failed; with the last line it wrote.
    """
    if case.device != "cpu":
        return allocated(lambda: run(unmarked))
    job = {"provider": provider, "case": asdict(case), "threads": threads}
    return growth_elsewhere("hstu_xd.bench.passes", provider, job)


def _growth(provider: str, case: Case, threads: int) -> int:
    """Return the growth of this process's resident set over one pass."""
    torch.set_num_threads(threads)
    one = PROVIDERS[case.what][provider]
    computes = one.computation(case)
    one.build(Draw.from_case(case.small), case.torch_dtype, computes)(unmarked)
    run = one.build(Draw.from_case(case), case.torch_dtype, computes)
    return growth(lambda: run(unmarked))


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    print(_growth(job["provider"], Case(**job["case"]), job["threads"]))
