"""What a log holds in numbers: counts, history lengths, switches and the cost ratio delta.

They stand in a store's manifest, and ``prepare`` and ``synth`` print them at their end.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hstu_xd.data.filters import domain_counts

DIGITS = 9
# Shares that are summed at once: the last digits of a sum depend on it.
_SUMMED = 1 << 18


def describe(
    offsets: NDArray[np.int64],
    item_ids: NDArray[np.int32],
    item_domain: NDArray[np.int32],
    domain_names: list[str],
) -> dict[str, Any]:
    """Count what a log holds and measure its shape, as its manifest states it.

    delta = mean over users of sum_d (s_d / S)^2: the cost of attention inside domains relative to
    attention over the whole history; 1 / D when balanced, 1 with one domain.

    Args:
        offsets: (U + 1,) int64, start of each user's events; no user without events.
        item_ids: (L,) in 1..I.
        item_domain: (I,) domain of each item.
        domain_names: D names.

    Returns:
        users, items, interactions, domains {name: users, items, interactions}, delta,
        history_length {mean, median, max}, switch_share (of neighbouring events, 0 where none).
        Fractions are rounded to nine digits so that they are the same on every machine.
    """
    num_domains = len(domain_names)
    lengths = np.diff(offsets)
    users_of = np.zeros(num_domains, np.int64)
    events_of = np.zeros(num_domains, np.int64)
    delta_sum, switches = 0.0, 0
    by_id = np.concatenate([item_domain[:1], item_domain])
    by_id = by_id.astype(np.min_scalar_type(num_domains))
    step = max(1, _SUMMED // num_domains)
    for first in range(0, len(lengths), step):
        part = offsets[first : first + step + 1]
        blocks = []
        for block in domain_counts(part, item_ids, by_id, num_domains):
            blocks.append(block.counts)
            switched = block.domain[1:] != block.domain[:-1]
            starts = part[block.users.start + 1 : block.users.stop] - block.rows.start
            switched[starts - 1] = False
            switches += int(np.count_nonzero(switched))
        counts = np.concatenate(blocks)
        delta_sum += float(np.square(counts / np.diff(part)[:, None]).sum())
        # Sums along the short axis, by numpy's own sum(axis=0), take eight times as long.
        users_of += [np.count_nonzero(of_domain) for of_domain in counts.T]
        events_of += [of_domain.sum() for of_domain in counts.T]
    items_of = np.bincount(item_domain, minlength=num_domains)
    neighbours = len(item_ids) - len(lengths)
    return {
        "users": len(lengths),
        "items": len(item_domain),
        "interactions": len(item_ids),
        "domains": {
            name: {"users": int(u), "items": int(i), "interactions": int(e)}
            for name, u, i, e in zip(domain_names, users_of, items_of, events_of)
        },
        "delta": round(delta_sum / len(lengths), DIGITS),
        "history_length": _spread(lengths),
        "switch_share": round(switches / neighbours, DIGITS) if neighbours else 0.0,
    }


def _spread(lengths: NDArray[np.int64]) -> dict[str, float]:
    return {
        "mean": round(int(lengths.sum()) / len(lengths), DIGITS),
        "median": float(np.median(lengths)),
        "max": int(lengths.max()),
    }


class TransitionEntropy(NamedTuple):
    """How hard the domain of the next event is to tell, in bits.

    Attributes:
        conditional: ``H(next | present)``, where the domain of the present event is known.
        marginal: ``H(next)``, where nothing is known; the difference is what the present domain
            tells about the next one.
    """

    conditional: float
    marginal: float


def transition_entropy(transitions: NDArray[np.int64]) -> TransitionEntropy:
    """Measure how random the domains of neighbouring events of a user are.

    With ``p(a, b)`` the share of the neighbouring pairs whose first event is of the domain ``a``
    and whose second is of ``b``: ``H(next | present) = -sum_ab p(a, b) log2 p(b | a)`` and
    ``H(next) = -sum_b p(b) log2 p(b)`` over the second events of the same pairs, so that it is
    never the smaller one. A cycle through the domains has 0 bits given the present one and
    ``log2 D`` without; domains that are drawn by lot have the same of both.

    Args:
        transitions: (D, D) how often an event of the row's domain is followed by one of the
            column's.

    Returns:
        Both entropies; 0 of a log without neighbours.
    """
    pairs = _bits(transitions.ravel())
    presents, nexts = _bits(transitions.sum(1)), _bits(transitions.sum(0))
    # H(present, next) - H(present); rounding must not make it negative.
    return TransitionEntropy(max(pairs - presents, 0.0), nexts)


def _bits(counts: NDArray[np.int64]) -> float:
    """Return the entropy of counts in bits."""
    counts = counts[counts > 0]
    shares = counts / max(int(counts.sum()), 1)
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def print_summary(
    out: Path, manifest: dict[str, Any], *, notes: Sequence[str] = (), warnings: Sequence[str] = ()
) -> None:
    """Print a few lines about a store that was just written; warnings go to stderr.

    Args:
        out: the store.
        manifest: of the store.
        notes: what the files were taken to be.
        warnings: about single files, beside those of the manifest.
    """
    label = " (SYNTHETIC data)" if manifest["synthetic"] else ""
    length = manifest["history_length"]
    print(f"wrote {out}{label}")
    print(
        f"  {manifest['users']:,} users, {manifest['items']:,} items, "
        f"{manifest['interactions']:,} interactions, {len(manifest['domains'])} domains"
    )
    width = max(len(name) for name in manifest["domains"])
    for name, counts in manifest["domains"].items():
        share = counts["interactions"] / manifest["interactions"]
        print(
            f"  {name:<{width}}  {counts['users']:>10,} users {counts['items']:>10,} items "
            f"{counts['interactions']:>12,} interactions {share:6.1%}"
        )
    print(
        f"  history length mean {length['mean']:.1f} median {length['median']:g} "
        f"max {length['max']}; {manifest['switch_share']:.1%} of neighbours switch domain; "
        f"attention cost ratio delta {manifest['delta']:.3f}"
    )
    for line in _said_of_events(manifest):
        print(f"  {line}")
    dropped = manifest["filters"]["dropped"]
    if dropped["interactions"]:
        print(
            f"  filters dropped {dropped['interactions']:,} interactions, "
            f"{dropped['users']:,} users, {dropped['items']:,} items"
        )
    for note in notes:
        print(f"  {note}")
    for warning in (*warnings, *manifest["warnings"]):
        print(f"WARNING: {warning}", file=sys.stderr)


def _said_of_events(manifest: dict[str, Any]) -> list[str]:
    """Say how many events are tied in time or repeat others, and how many targets are old items."""
    lines = []
    ties, repeats, test = manifest["ties"], manifest["repeats"], manifest["targets"]["test"]
    if ties["events"]:
        lines.append(
            f"{ties['share']:.1%} of events share user and time with another; their order is by "
            f"{ties['order']}"
        )
    if repeats["window_seconds"] is not None:
        lines.append(f"--drop-repeats dropped {repeats['dropped']:,} events")
    if manifest["duplicates"]:
        lines.append(
            f"{manifest['duplicates']:,} events repeat the one before (same user, item, second)"
        )
    if test["met_before"]:
        lines.append(
            f"{test['met_before']:,} of {test['targets']:,} test targets are items their user had "
            "before"
        )
    return lines
