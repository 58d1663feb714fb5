"""The preset of ``--sweep``: one size at a time around a base, so that a curve has one cause."""

from collections.abc import Iterator
from dataclasses import replace

from hstu_xd.bench.cases import INTERLEAVINGS, Case

SEQ_LENS = (256, 512, 1024, 2048, 4096, 8192, 16384)
NUM_DOMAINS = (1, 2, 4, 8, 16, 32, 64)
SKEWS = (0.0, 0.4, 0.6, 0.8)


def sweep(case: Case) -> Iterator[Case]:
    """Cases of the preset, each once; everything else is as in ``case``."""
    base = replace(case, seq_len=4096, num_domains=8)
    yield from dict.fromkeys(
        [
            *(replace(base, seq_len=n) for n in SEQ_LENS),
            *(replace(base, num_domains=d) for d in NUM_DOMAINS),
            *(replace(base, skew=s) for s in SKEWS),
            *(replace(base, interleaving=name) for name in INTERLEAVINGS),
        ]
    )
