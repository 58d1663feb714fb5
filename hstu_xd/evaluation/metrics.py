"""HR, NDCG and MRR of ranks, overall, per domain, and for targets after a domain switch or not."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from hstu_xd.errors import InputError, did_you_mean
from hstu_xd.evaluation.protocol import COLD, DEFAULTS, Protocol

# The rank of a target that is no candidate: every metric counts it as a miss.
UNREACHABLE = torch.iinfo(torch.int64).max

# Further functions of (Q,) ranks by name, each to (Q,) numbers.
Metrics = Mapping[str, Callable[[Tensor], Tensor]]


# Shares of places that are in memory at once (float64: 64 MB).
_BLOCK_SHARES = 8_000_000


@dataclass(frozen=True)
class RankedTargets:
    """One entry a user.

    Attributes:
        ranks: (Q,) int64 from 1 among all candidates, or UNREACHABLE.
        domains: (Q,) int64, domain of the target.
        switched: (Q,) bool, whether it differs from that of the event before the target.
        others: (Q,) int64, number of candidates beside the target.
        cold: (Q,) bool, whether training never met the target; None where nothing is known of it.
    """

    ranks: Tensor
    domains: Tensor
    switched: Tensor
    others: Tensor
    cold: Tensor | None = None

    @classmethod
    def joined(cls, parts: Sequence["RankedTargets"]) -> "RankedTargets":
        """Put targets one after the other."""
        tensors = [part.tensors for part in parts]
        return cls(**{name: torch.cat([each[name] for each in tensors]) for name in tensors[0]})

    @property
    def tensors(self) -> dict[str, Any]:
        """Return all that is known, by name."""
        known = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in known.items() if value is not None}

    def to(self, device: torch.device | str) -> "RankedTargets":
        """Move all tensors."""
        return RankedTargets(**{name: value.to(device) for name, value in self.tensors.items()})

    def right_by_necessity(self, k: int, protocol: Protocol) -> Tensor:
        """Tell targets with no more than k candidates, whose rank is at most k: (Q,) bool."""
        others = self.others.clamp(max=protocol.sampled) if protocol.sampled else self.others
        return (others < k) & (self.ranks != UNREACHABLE)

    def counts(self, protocol: Protocol) -> dict[str, float]:
        """Count targets, the unreachable ones, and those that are right by necessity at each k."""
        unreachable = int((self.ranks == UNREACHABLE).sum())
        trivial = {k: int(self.right_by_necessity(k, protocol).sum()) for k in protocol.ks}
        counts: dict[str, float] = {"count": self.ranks.numel(), "count_unreachable": unreachable}
        return counts | {f"count_trivial@{k}": number for k, number in trivial.items() if number}


def user_metrics(
    ranked: RankedTargets, protocol: Protocol = DEFAULTS, more: Metrics | None = None
) -> dict[str, Tensor]:
    """Compute metrics of each target by itself, as fractions in 0..1.

    ``hr@k`` is 1 where the rank is at most k, ``ndcg@k`` is ``1 / log2(rank + 1)`` there (one
    relevant item a query), both 0 elsewhere; ``mrr`` is ``1 / rank``. All are 0 for a target
    without a rank. Under a protocol with sampled candidates they are expectations of that, see
    :func:`sampled_ranks`.

    Args:
        ranked: the targets.
        protocol: which k, and whether candidates are sampled.
        more: further metrics, beside those of the protocol; they see one rank a number.

    Returns:
        (Q,) float64 for every name.

    Raises:
        InputError: one of the further metrics does not return a number for each rank.
    """
    if not protocol.sampled:
        return _metrics_of_ranks(ranked.ranks, protocol, more)
    num_sampled = min(protocol.sampled, int(ranked.others.max()))
    places = torch.arange(1, num_sampled + 2, device=ranked.ranks.device)
    miss = places.new_tensor([UNREACHABLE])
    at_place = _metrics_of_ranks(torch.cat([places, miss]), protocol, more)
    *table, of_miss = torch.stack(list(at_place.values()), 1)
    values = of_miss.repeat(ranked.ranks.numel(), 1)
    reached = torch.nonzero(ranked.ranks != UNREACHABLE).squeeze(1)
    for rows in reached.split(max(1, _BLOCK_SHARES // places.numel())):
        shares = sampled_ranks(ranked.ranks[rows], ranked.others[rows], num_sampled)
        values[rows] = shares @ torch.stack(table)
    return dict(zip(at_place, values.unbind(1)))


def sampled_ranks(ranks: Tensor, others: Tensor, num_sampled: int) -> Tensor:
    """Tell how likely each rank is among random candidates, given the rank among all.

    Of ``M`` other candidates ``b = rank - 1`` are before the target. Among ``n`` of the others
    drawn without replacement the number of those is hypergeometric:
    ``P(k) = C(b, k) C(M - b, n - k) / C(M, n)``, and the target's rank is ``k + 1``. Where there
    are fewer than ``n`` others, all are taken.

    Args:
        ranks: (Q,) int64 from 1, the rank among all candidates.
        others: (Q,) int64, ``M``.
        num_sampled: ``n``.

    Returns:
        (Q, n + 1) float64, shares of the ranks 1..n + 1.

    Example:
        >>> sampled_ranks(torch.tensor([2]), torch.tensor([3]), 1)  # one of three is before it
        tensor([[0.6667, 0.3333]], dtype=torch.float64)
    """
    size = int(others.max()) + 1
    log_factorials = torch.arange(1, size + 1, device=ranks.device, dtype=torch.float64).lgamma()
    k = torch.arange(num_sampled + 1, device=ranks.device)
    before, behind = (ranks - 1)[:, None], (others - ranks + 1)[:, None]
    rest = others.clamp(max=num_sampled)[:, None] - k

    def log_choose(n: Tensor, k: Tensor) -> Tensor:
        inside = (k >= 0) & (k <= n)
        k = torch.where(inside, k, 0)
        chosen = log_factorials[n] - log_factorials[k] - log_factorials[n - k]
        return chosen.masked_fill(~inside, -torch.inf)

    # The shares of a row add up to one, so C(M, n) need not be known.
    return (log_choose(before, k.expand_as(rest)) + log_choose(behind, rest)).softmax(1)


def _metrics_of_ranks(ranks: Tensor, protocol: Protocol, more: Metrics | None) -> dict[str, Tensor]:
    """Compute every metric of (Q,) int64 ranks: (Q,) float64 each."""
    rank = ranks.double().masked_fill(ranks == UNREACHABLE, torch.inf)
    gain = 1 / torch.log2(rank + 1)
    values = {f"hr@{k}": (rank <= k).double() for k in protocol.ks}
    values |= {f"ndcg@{k}": gain * (rank <= k) for k in protocol.ks}
    values |= {"mrr": 1 / rank}
    return {name: values[name] for name in protocol.metrics} | {
        name: _numbers(name, metric(ranks), ranks) for name, metric in (more or {}).items()
    }


def _numbers(name: str, found: object, ranks: Tensor) -> Tensor:
    """Return what a user's metric returned as float64, or say what is wrong with it."""
    if isinstance(found, Tensor) and found.shape == ranks.shape and not found.is_complex():
        return found.detach().to(ranks.device, torch.float64)
    given = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"{found!r:.40}"
    raise InputError(
        f"the metric {name} returned {given} for {len(ranks)} ranks; a tensor of shape "
        f"{tuple(ranks.shape)} is needed, a number for each rank: 1 / ranks, (ranks <= 5).double()"
    )


def check_selected(setting: str, value: str, names: Sequence[str], group: str) -> None:
    """Refuse what names no metric, ``ndcg@100``, and none of a group, ``ndcg@100[books]``.

    Args:
        setting: full name of the setting, for the message.
        value: of it.
        names: of the metrics.
        group: that the message takes for an example; which there are depends on the data.

    Raises:
        InputError: it names neither.
    """
    metric, bracket, rest = value.partition("[")
    if metric not in names or (bracket and (len(rest) < 2 or not rest.endswith("]"))):
        raise InputError(
            f"{setting} = {value!r}; it must be one of {', '.join(names)}, or one of a group, "
            f"{names[0]}[{group}]"
        )


def check_group_is_there(setting: str, value: str, found: Sequence[str], what: str) -> None:
    """Refuse a metric of a group that nothing is of.

    Args:
        setting: full name of the setting, for the message.
        value: of it, checked by :func:`check_selected`.
        found: names of all metrics that were measured.
        what: the groups are of.

    Raises:
        InputError: it is not one of them; the message lists those of its metric.
    """
    if value not in found:
        metric = value.partition("[")[0]
        known = [name for name in found if name.startswith(f"{metric}[")]
        raise InputError(
            f"{setting} = {value!r} has no {what} here; of {metric} there are {metric}, "
            f"{', '.join(known)}{did_you_mean(value, known)}"
        )


def target_groups(
    domains: Tensor, switched: Tensor, domain_names: Sequence[str], cold: Tensor | None = None
) -> dict[str, Tensor]:
    """Which targets count to what: "" all, "[switch]", "[stay]", "[cold]", "[domain]" of each name.

    Args:
        domains: (Q,) int64, domain of each target.
        switched: (Q,) bool, the target's domain differs from that of the event before it.
        domain_names: names by domain id.
        cold: (Q,) bool, training never met the target; None: that is not told apart.

    Returns:
        (Q,) bool for every group that has a target.
    """
    groups = {"": torch.ones_like(switched), "[switch]": switched, "[stay]": ~switched}
    groups |= {} if cold is None else {f"[{COLD}]": cold}
    groups |= {f"[{name}]": domains == i for i, name in enumerate(domain_names)}
    return {suffix: members for suffix, members in groups.items() if bool(members.any())}


def grouped_metrics(
    ranked: RankedTargets,
    domain_names: Sequence[str],
    protocol: Protocol = DEFAULTS,
    more: Metrics | None = None,
) -> dict[str, float]:
    """Take metrics overall (``name``), a domain (``name[domain]``), of switch and stay targets.

    Args:
        ranked: the targets, at least one.
        domain_names: names by domain id.
        protocol: which k, and whether candidates are sampled.
        more: further metrics.

    Returns:
        Every metric and ``count`` for each group that has a target; ``count_unreachable`` where
        there are targets without a rank. ``name[macro]`` is the mean over domains where there are
        several. Where targets have no more than k candidates ``count_trivial@k`` is their number,
        and ``hr@k[nontrivial]`` and ``ndcg@k[nontrivial]`` leave them out.
    """
    values: dict[str, float] = {}
    of_users = user_metrics(ranked, protocol, more)
    groups = target_groups(ranked.domains, ranked.switched, domain_names, ranked.cold)
    for suffix, members in groups.items():
        values |= {f"{k}{suffix}": float(v[members].mean()) for k, v in of_users.items()}
        values[f"count{suffix}"] = int(members.sum())
        if unreachable := int((ranked.ranks[members] == UNREACHABLE).sum()):
            values[f"count_unreachable{suffix}"] = unreachable
    present = [name for name in domain_names if f"count[{name}]" in values]
    if len(present) > 1:
        for metric in of_users:
            of_domains = [values[f"{metric}[{name}]"] for name in present]
            values[f"{metric}[macro]"] = sum(of_domains) / len(of_domains)
    for k in protocol.ks:
        trivial = ranked.right_by_necessity(k, protocol)
        if number := int(trivial.sum()):
            values[f"count_trivial@{k}"] = number
        if 0 < number < len(trivial):
            for metric in of_users.keys() & {f"hr@{k}", f"ndcg@{k}"}:
                values[f"{metric}[nontrivial]"] = float(of_users[metric][~trivial].mean())
    return values
