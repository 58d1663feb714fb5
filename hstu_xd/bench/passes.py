"""``bench encoder`` and ``bench attention``: gate, interleaved timing, memory, one row each."""

from collections.abc import Iterable, Iterator, Sequence

import torch

from hstu_xd.bench import correctness, memory
from hstu_xd.bench.cases import Case, Draw
from hstu_xd.bench.providers import PROVIDERS
from hstu_xd.bench.roofline import Ceilings, Work, delta, visible_pairs
from hstu_xd.bench.rows import Row, empty_row, speed_columns, time_columns, times_faster
from hstu_xd.bench.timing import noting_failure, take_turns


def measure(
    cases: Iterable[Case],
    names: Iterable[str],
    *,
    threads: int,
    repeats: int,
    against: Sequence[str] = ("reference",),
) -> Iterator[Row]:
    """Rows of all cases, one a provider.

    Providers take turns (A B A B ...) in this process, so that what disturbs the machine disturbs
    all of them and ratios hold. A provider that disagrees with the definition of what it computes
    has ``correct`` false and no time; one that cannot run here says why under ``absent``, one that
    raised (out of memory, say) under ``failed``.

    Args:
        cases: what to measure.
        names: providers.
        threads: of PyTorch.
        repeats: timed passes of each provider.
        against: providers that the others' times are compared with.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for case in cases:
            yield from _rows(case, list(names), threads, repeats, against)
    finally:
        torch.set_num_threads(before)


def _rows(
    case: Case, names: list[str], threads: int, repeats: int, against: Sequence[str]
) -> Iterator[Row]:
    known = {name: PROVIDERS[case.what][name] for name in names}
    absent = {name: why for name, one in known.items() if (why := one.missing(case))}
    failed: dict[str, str] = {}
    errors: dict[str, float] = {}
    for name in (name for name in known if name not in absent):
        with noting_failure(name, failed):
            errors[name] = correctness.largest_error(name, case)
    draw, runs = Draw.of(case), {}
    for name, one in known.items():
        if errors.get(name, 2) <= 1:
            with noting_failure(name, failed):
                runs[name] = one.build(draw, case.torch_dtype, one.computation(case))
    times = take_turns(runs, failed, device=case.device, repeats=repeats)
    peaks: dict[str, int] = {}
    for name in times:
        with noting_failure(name, failed):
            peaks[name] = memory.peak_bytes(name, case, threads, runs[name])
    for name, one in known.items():
        computes = one.computation(case)
        row = empty_row(name, case, threads=threads, repeats=repeats)
        row |= {
            "inside_domains": case.num_domains > 1 and computes.masked,
            "normalization": computes.normalization,
            "biased": computes.biased,
            "delta": delta(draw),
            "visible_pairs": visible_pairs(draw, masked=computes.masked),
            "absent": absent.get(name),
            "failed": failed.get(name),
        }
        if name in errors:
            row |= {"correct": errors[name] <= 1, "error_of_budget": errors[name]}
        if name in times:
            work = Work.of(draw, masked=computes.masked)
            row |= time_columns(times[name])
            for rival in against:
                row |= times_faster(times, name, rival)
            row |= speed_columns(work, row, Ceilings.of(case))
            row["peak_bytes"] = peaks.get(name)
        yield row
