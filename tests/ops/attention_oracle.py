"""Domain attention and its gradients in float64 numpy, straight from the formulas.

Nothing of the library is used here: keys are chosen by a loop over positions, so that a mistake
in the grouping, in the masks or in the bias cannot hide in both.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

BUCKET_WIDTH = 0.301


@dataclass
class OracleBias:
    position_weights: np.ndarray  # (2 N - 1,)
    time_weights: np.ndarray  # (num_buckets + 1,)
    times: np.ndarray  # (L,)
    next_times: np.ndarray  # (L,)

    def rows(self, query: int, key: int, query_position: int, key_position: int) -> tuple[int, int]:
        """Row of each table for one pair."""
        longest = (len(self.position_weights) + 1) // 2
        difference = abs(int(self.next_times[query]) - int(self.times[key]))
        bucket = math.floor(math.log(max(1, difference)) / BUCKET_WIDTH)
        return longest - 1 + key_position - query_position, min(bucket, len(self.time_weights) - 1)


@dataclass
class OracleResult:
    """Output and gradients; ``mass`` is the sum of absolute terms behind each table gradient."""

    out: np.ndarray
    gradients: dict[str, np.ndarray]
    mass: dict[str, np.ndarray]


def oracle_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    domains: np.ndarray,
    read_domains: np.ndarray,
    offsets: np.ndarray,
    norm_length: int,
    bias: OracleBias | None,
    grad_out: np.ndarray,
    softmax: bool = False,
) -> OracleResult:
    """``out_i = sum_j SiLU(<q_i, k_j> + bias_ij) v_j / N`` over ``j <= i`` with ``d_j = read_i``.

    With ``softmax``: ``out_i = sum_j softmax_j(<q_i, k_j> / sqrt(dqk) + bias_ij) v_j``.

    ``read_domains`` is ``domains`` for the own view and the next event's domain for the target
    view. Arrays are (L, H, d) float64, domains (L,), offsets (B + 1,).
    """
    out = np.zeros_like(v)
    gradients = {"q": np.zeros_like(q), "k": np.zeros_like(k), "v": np.zeros_like(v)}
    mass: dict[str, np.ndarray] = {}
    scale = 1 / math.sqrt(q.shape[2]) if softmax else 1.0
    if bias is not None:
        for name in ("position_weights", "time_weights"):
            gradients[name] = np.zeros(len(getattr(bias, name)))
            mass[name] = np.zeros(len(getattr(bias, name)))
    for start, end in pairwise(offsets):
        for i in range(start, end):
            keys = [j for j in range(start, i + 1) if domains[j] == read_domains[i]]
            if not keys:
                continue
            scores = scale * np.einsum("hd,jhd->jh", q[i], k[keys])
            rows = []
            if bias is not None:
                rows = [bias.rows(i, j, i - start, j - start) for j in keys]
                added = [bias.position_weights[p] + bias.time_weights[t] for p, t in rows]
                scores += np.array(added)[:, None]
            if softmax:
                weights = np.exp(scores - scores.max(axis=0))
                weights /= weights.sum(axis=0)
            else:
                gate = 1 / (1 + np.exp(-scores))
                weights = scores * gate / norm_length
            out[i] = np.einsum("jh,jhd->hd", weights, v[keys])
            gradients["v"][keys] += np.einsum("jh,hd->jhd", weights, grad_out[i])
            grad_weights = np.einsum("hd,jhd->jh", grad_out[i], v[keys])
            if softmax:
                grad_scores = weights * (grad_weights - (weights * grad_weights).sum(axis=0))
            else:
                slope = gate * (1 + scores * (1 - gate)) / norm_length
                grad_scores = grad_weights * slope
            gradients["q"][i] = scale * np.einsum("jh,jhd->hd", grad_scores, k[keys])
            gradients["k"][keys] += scale * np.einsum("jh,hd->jhd", grad_scores, q[i])
            for pair, (position, time) in enumerate(rows):
                for name, row in (("position_weights", position), ("time_weights", time)):
                    gradients[name][row] += grad_scores[pair].sum()
                    mass[name][row] += np.abs(grad_scores[pair]).sum()
    return OracleResult(out, gradients, mass)
