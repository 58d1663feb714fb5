"""Attention over (user, domain) runs: one public function, a reference that defines it, fast paths.

``domain_attention`` is the function; ``reference`` is the definition; ``eager`` is the regrouped
implementation in plain PyTorch; ``fused`` leads to Triton kernels, ``flex`` to FlexAttention.
"""

from hstu_xd.ops.domain_attention.api import available_impls, domain_attention
from hstu_xd.ops.relative_bias import RelativeBias

__all__ = ["RelativeBias", "available_impls", "domain_attention"]
