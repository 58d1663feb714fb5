"""What ``bench suite`` measures on a GPU and on a CPU, and the goals it is held against."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hstu_xd.bench.suite import Goal, Part, Results, Suite, cell, column, ratio

_UPSTREAM = "times_faster_than_upstream"


def gpu_suite(stores: Sequence[Path]) -> Suite:
    """Return the parts for one H100 or H200: 8 heads of 64, bfloat16."""
    heads = {"heads": 8, "dqk": 64, "dv": 64, "device": "cuda"}
    encoder = Part(
        "encoder-1024-5",
        "encoder",
        heads
        | {"seq_len": 1024, "num_domains": 5, "batch_size": 128, "width": 512}
        | {"dtype": "bfloat16", "provider": ["triton", "upstream"], "against": "upstream"},
    )

    def attention(name: str, seq_len: int, num_domains: int, *rivals: str, **more: Any) -> Part:
        own = {"provider": ["triton", "triton-unbiased", *rivals]}
        against = {"against": [*rivals, "triton-unbiased"]}
        sizes = {"seq_len": seq_len, "num_domains": num_domains, "batch_size": 32}
        fixed = {"dtype": "bfloat16", "plan": "once", "repeats": 20}
        return Part(name, "attention", heads | sizes | fixed | own | against | more)

    mixed = "cutlass-mixed", "upstream-cuda-mixed", "upstream-triton-mixed"
    grouped = tuple(name.replace("mixed", "grouped") for name in mixed)
    steps = _drawn_step("train-step-500-7", 500, 7, 32, device="cuda")
    parts = [
        encoder,
        attention("attention-1024-5", 1024, 5, *mixed[:1], *grouped[:1], "flex"),
        attention("attention-4096-8", 4096, 8, *mixed[:1], *grouped[:1], "flex"),
        attention("attention-1024-1", 1024, 1, *mixed[:1]),
        attention("attention-2048-1", 2048, 1, *mixed[:1]),
        attention("attention-4096-1", 4096, 1, *mixed[:1]),
        attention("attention-4096-5-skew", 4096, 5, skew=0.8),
        *_store_steps(stores, device="cuda"),
        steps,
        # Upstream's kernels tune themselves at the first call of a shape, which takes minutes.
        attention("upstream-1024-5", 1024, 5, *mixed[1:], *grouped[1:]),
        attention("upstream-4096-8", 4096, 8, *mixed[1:], *grouped[1:]),
        *(attention(f"attention-{n}-8", n, 8, "flex") for n in (256, 512, 1024, 2048, 8192)),
    ]
    one = column("attention-4096-1", "triton", "ms_median")

    def skewed(found: Results) -> float | None:
        share = cell(found, "attention-4096-5-skew", "triton", "delta")
        whole, part = one(found), cell(found, "attention-4096-5-skew", "triton", "ms_median")
        return None if None in (share, whole, part) else part / (share * whole)

    def cutlass(part: str) -> Callable[[Results], Any]:
        return column(part, "triton", "times_faster_than_cutlass-mixed")

    peak = ratio(
        column(encoder.name, "triton", "peak_bytes"), column(encoder.name, "upstream", "peak_bytes")
    )
    goals = [
        Goal(
            "encoder against upstream, N=1024, D=5", 15, column(encoder.name, "triton", _UPSTREAM)
        ),
        Goal("its memory as a share of upstream's", 0.1, peak, at_most=True),
        *(
            Goal(f"attention with bias against CUTLASS without, N={n}, one domain", 0.8, cutlass(p))
            for n in (1024, 2048, 4096)
            for p in [f"attention-{n}-1"]
        ),
        Goal(
            "regrouped with bias against CUTLASS mixed, N=4096, D=8", 3, cutlass("attention-4096-8")
        ),
        Goal("the same, N=1024, D=5", 2.5, cutlass("attention-1024-5")),
        Goal(
            "against FlexAttention's block mask, N=4096, D=8",
            4,
            column("attention-4096-8", "triton", "times_faster_than_flex"),
        ),
        Goal(
            "80 % in one of 5 domains, of delta times one domain's time", 1.2, skewed, at_most=True
        ),
        *_step_goals(stores, steps.name, {"kuairand7": 1.0}),
    ]
    return Suite(parts, goals)


def cpu_suite(stores: Sequence[Path]) -> Suite:
    """Return the parts for two threads of a CPU."""
    encoder = Part(
        "encoder-1000",
        "encoder",
        {"seq_len": 1000, "num_domains": [5, 10], "provider": ["native", "eager", "upstream"]}
        | {"against": "upstream", "repeats": 5},
    )
    steps = _drawn_step("train-step-500-7", 500, 7, 32)
    few, many = _drawn_step("train-step-5", 500, 5, 8), _drawn_step("train-step-500", 500, 500, 8)
    dense = Part(
        "train-step-2000",
        "train-step",
        {"seq_len": 2000, "num_domains": 5, "batch_size": 4, "provider": ["all", "dense"]}
        | {"repeats": 3},
    )
    serving = Part("serving-1000", "serving", {"seq_len": 1000, "repeats": 5})
    parts = [*_store_steps(stores), steps, encoder, dense, few, many, serving]

    def domains(name: str) -> Callable[[Results], float | None]:
        return ratio(column(many.name, "all", name), column(few.name, "all", name))

    goals = [
        *_step_goals(stores, steps.name, {"kuairand7": 1.0, "amazon4": 1.15, "fk": 1.15}),
        *(
            Goal(
                f"encoder against upstream's dense layers, N=1000, D={d}",
                bound,
                column(encoder.name, "native", _UPSTREAM, num_domains=d),
            )
            for d, bound in ((5, 12), (10, 18))
        ),
        Goal(
            "step of all against dense full attention, N=2000, D=5",
            15,
            column(dense.name, "all", "times_faster_than_dense"),
        ),
        Goal(
            "time of a step with 500 domains, of that with 5",
            1.5,
            domains("ms_median"),
            at_most=True,
        ),
        Goal("its peak memory, of that with 5", 1.5, domains("peak_bytes"), at_most=True),
        Goal(
            "an event and ten recommendations against upstream's layers, N=1000",
            60,
            column(serving.name, "append", _UPSTREAM),
        ),
        Goal(
            "64 users' events and answers together against one after the other, N=1000",
            6,
            column(serving.name, "together", "times_faster_than_in_turn"),
        ),
    ]
    return Suite(parts, goals)


def _drawn_step(name: str, seq_len: int, num_domains: int, batch_size: int, **more: Any) -> Part:
    sizes = {"seq_len": seq_len, "num_domains": num_domains, "batch_size": batch_size}
    providers = {"provider": ["hstu", "all"], "against": "hstu", "repeats": 5}
    return Part(name, "train-step", sizes | providers | more)


def _store_steps(stores: Sequence[Path], **more: Any) -> list[Part]:
    return [
        Part(
            f"train-step-{store.name}",
            "train-step",
            {"data": store, "variants": "hstu,all", "repeats": 7} | more,
        )
        for store in stores
    ]


def _step_goals(stores: Sequence[Path], drawn: str, bounds: dict[str, float]) -> list[Goal]:
    """Return the goals for whole steps: of stores by name, and of drawn batches."""
    goals = [
        Goal(
            f"step of all, of hstu's time, on {name}",
            bound,
            column(f"train-step-{name}", "all", "times_hstu"),
            at_most=True,
        )
        for name, bound in bounds.items()
    ]
    times = ratio(column(drawn, "all", "ms_median"), column(drawn, "hstu", "ms_median"))
    text = "step of all, of hstu's time, drawn batches, N=500, D=7"
    return [*goals, Goal(text, bounds["kuairand7"], times, at_most=True)]


SUITES = {"cuda": gpu_suite, "cpu": cpu_suite}
