"""What a case costs at least: visible pairs, arithmetic and memory traffic of one pass."""

from dataclasses import dataclass

from hstu_xd.bench.cases import Case, Draw
from hstu_xd.ops.pairs import num_pairs

# The backward pass of attention computes the scores again and four more products: 5 for 2.
_BACKWARD_OF_ATTENTION = 2.5
# That of a matrix product computes two.
_BACKWARD_OF_PRODUCT = 2.0


@dataclass(frozen=True)
class Work:
    """Floating-point operations of matrix products, and bytes that must move, of both passes.

    Bytes count every input and output of attention and of the projections once, as if all in
    between stayed on the chip.
    """

    forward_flops: float
    backward_flops: float
    forward_bytes: float
    backward_bytes: float

    @classmethod
    def of(cls, draw: Draw, *, masked: bool) -> "Work":
        """The work of an attention or an encoder case.

        ``2 H (dqk + dv)`` operations forward for each visible pair, whether or not a provider
        computes others too, and 2.5 times as many backward.

        Args:
            draw: the batch.
            masked: pairs inside domains only are visible.
        """
        case = draw.case
        attention = _attention(case, draw.num_tokens, visible_pairs(draw, masked=masked))
        if case.what == "attention":
            return attention
        layer = _layer(case, draw.num_tokens, attention)
        return cls(
            forward_flops=case.layers * layer.forward_flops,
            backward_flops=case.layers * layer.backward_flops,
            forward_bytes=case.layers * layer.forward_bytes,
            backward_bytes=case.layers * layer.backward_bytes,
        )


def visible_pairs(draw: Draw, *, masked: bool) -> int:
    """Pairs of a query and a key that it may see, itself included, over the whole batch."""
    return num_pairs(draw.grouping(masked=masked))


def delta(draw: Draw) -> float:
    """Mean over users of ``sum_d (s_d / S)^2``: what the mask leaves of the pairs."""
    lengths = draw.grouping(masked=True).lengths.view(draw.case.batch_size, -1)
    return float((lengths / draw.case.seq_len).double().square().sum(1).mean())


def _attention(case: Case, tokens: int, pairs: int) -> Work:
    flops = 2 * case.heads * (case.dqk + case.dv) * pairs
    numbers = tokens * case.heads * case.torch_dtype.itemsize
    return Work(
        forward_flops=flops,
        backward_flops=_BACKWARD_OF_ATTENTION * flops,
        # q, k, v, out; then q, k, v, the gradient of out, and three gradients.
        forward_bytes=numbers * (2 * case.dqk + 2 * case.dv),
        backward_bytes=numbers * (4 * case.dqk + 3 * case.dv),
    )


def _layer(case: Case, tokens: int, attention: Work) -> Work:
    """Attention between the input's projection to u, v, q, k and the output's projection."""
    projected, gated = 2 * case.heads * (case.dqk + case.dv), case.heads * case.dv
    flops = 2 * tokens * case.width * (projected + gated)
    numbers = tokens * (2 * case.width + projected + gated) + case.width * (projected + gated)
    moved = numbers * case.torch_dtype.itemsize
    return Work(
        forward_flops=attention.forward_flops + flops,
        backward_flops=attention.backward_flops + _BACKWARD_OF_PRODUCT * flops,
        forward_bytes=attention.forward_bytes + moved,
        backward_bytes=attention.backward_bytes + 2 * moved,
    )
