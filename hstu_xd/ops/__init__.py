"""Operators over jagged batches, one folder each, and what they share.

``domain_attention`` is causal attention inside (user, domain) runs, ``state_attention`` the
attention to the latest states of all domains (DDSR). In a folder ``api`` is the public function,
``reference`` the definition, ``eager`` an implementation in plain PyTorch, ``native`` leads to
loops in C and ``fused`` to Triton kernels; ``grouping`` says who sees whom.
"""

from hstu_xd.ops.domain_attention.api import available_impls, domain_attention
from hstu_xd.ops.relative_bias import RelativeBias
from hstu_xd.ops.state_attention.api import available_state_impls, state_attention
from hstu_xd.ops.state_attention.state_reads import StateReads

__all__ = [
    "RelativeBias",
    "StateReads",
    "available_impls",
    "available_state_impls",
    "domain_attention",
    "state_attention",
]
