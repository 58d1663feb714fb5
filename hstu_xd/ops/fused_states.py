"""DDSR's attention by fused Triton kernels: memory in proportion to the tokens, no host wait.

``hstu_xd.ops.triton_state_kernels`` describes the kernels, ``state_table`` what they walk over,
``triton_state_ops`` the operators that PyTorch sees.
"""

from torch import Tensor

from hstu_xd.ops import fused, triton_state_ops
from hstu_xd.ops.state_table import StateTable


def fused_state_attention(
    q: Tensor, k: Tensor, v: Tensor, table: StateTable, *, bias: Tensor | None = None
) -> Tensor:
    """Attend head by head: ``softmax_s(<q_i, k_s> + bias[age_is]) v_s`` over the states seen.

    Args:
        q: (L, H, dqk) float, scaled.
        k: (L + D, H, dqk) float, of the tokens' states, then of the domains' initial ones.
        v: (L + D, H, dv) float, likewise.
        table: which states each token reads.
        bias: (C, H) float by the log bucket of the time from a state's writing to the event to
            predict, its last row for initial states; or None.

    Returns:
        (L, H, dv) of the type of ``v``.

    Raises:
        InputError: a dtype or a head width that the kernels do not have, or tensors on a CPU
            without the interpreter.
    """
    fused.check_kernels_take(q, v)
    out, _ = triton_state_ops.state_attention(
        q, k, v, bias, table.tensors(), table.tile, table.states_per_domain
    )
    return out
