"""What the fused kernels are held to, small enough to interpret every program of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from attention_cases import Spec, draw, errors_against_oracle, implementation

from hstu_xd.ops import RelativeBias
from hstu_xd.ops.grouping import DomainGrouping
from hstu_xd.ops.relative_bias import bucket_edges

# Two heads; a tile and more in a group; in the target view queries of a domain without keys.
SPEC = Spec((0, 1, 40, 5), num_domains=3, visited=2, dqk=6, dv=6)
OWN, TARGET = SPEC, replace(SPEC, target_view=True)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every buffer begins as NaN, so that what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check_against_oracle(spec: Spec) -> None:
    """Output and gradients within the budget of float32."""
    with poisoned_memory():
        errors_against_oracle(implementation("triton"), draw(spec), torch.float32).check()


def check_bucket_edges(impl: str = "triton") -> None:
    """Time differences on, before and after the edge of every bucket find their rows."""
    edges = bucket_edges(torch.device("cpu"))[2:80].view(torch.float32).long()
    differences = torch.cat([edges - 1, edges, edges + 1])
    length = len(differences)
    grouping = DomainGrouping.single(torch.tensor([0, length]), length)
    # One feature of 1: a score is its bias. Values are a code of the key's place.
    one = torch.ones(length, 1, 1)
    bias = RelativeBias(
        torch.zeros(2 * length - 1),
        torch.from_numpy(np.random.default_rng(0).standard_normal(129, dtype=np.float32)),
        torch.arange(length),
        timestamps=-differences,
        next_timestamps=torch.zeros(length, dtype=torch.int64),
    )
    found, expected = (
        implementation(impl)(one, one, one, grouping, norm_length=1, bias=bias)
        for impl in (impl, "reference")
    )
    error = (found - expected).diff(dim=0).abs().max()
    assert error <= 1e-4, f"error of a key's weight: {error}"
