"""Distributions of a store against a slow, obvious count."""

from itertools import pairwise

import numpy as np
import pytest

from hstu_xd.data.statistics import transition_entropy
from hstu_xd.data.store import InteractionStore
from hstu_xd.experiments.report.data_figures import measure


def test_against_a_loop_over_users(workshop):
    store = InteractionStore.open(workshop.store())
    names = store.domain_names
    domain_of = store.catalog.item_domains.tolist()
    transitions = np.zeros((3, 3), int)
    deltas = []
    for user in range(store.num_users):
        domains = [domain_of[item] for item in store.history(user)[0].tolist()]
        shares = [domains.count(d) / len(domains) for d in range(3)]
        deltas.append(sum(share * share for share in shares))
        for a, b in pairwise(domains):
            transitions[a, b] += 1
    stats = measure(store)
    assert stats.domain_names == names
    np.testing.assert_array_equal(stats.transitions, transitions)
    np.testing.assert_allclose(stats.deltas, deltas)
    assert stats.mean_delta == pytest.approx(store.manifest["delta"])
    assert stats.switch_share == pytest.approx(store.manifest["switch_share"])
    assert stats.lengths.sum() == stats.events.sum() == store.num_interactions


def test_a_cycle_of_domains_is_certain() -> None:
    cycle = transition_entropy(np.array([[0, 6, 0, 0], [0, 0, 6, 0], [0, 0, 0, 6], [6, 0, 0, 0]]))
    assert cycle == (0, 2)
    assert transition_entropy(np.zeros((2, 2), np.int64)) == (0, 0)
    assert transition_entropy(np.array([[9]])) == (0, 0)


def test_domains_drawn_by_lot_tell_nothing_of_each_other() -> None:
    found = transition_entropy(np.array([[9, 3], [3, 1]]))
    assert found.conditional == pytest.approx(found.marginal, abs=1e-12)
    assert found.marginal == pytest.approx(-(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25)))
    # From the first domain either comes next, from the second always the first one.
    known = transition_entropy(np.array([[2, 2], [4, 0]]))
    assert known.conditional == pytest.approx(0.5)
    assert known.marginal == pytest.approx(-(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25)))
