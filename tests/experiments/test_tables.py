"""The comparison as numbers and as Markdown."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hstu_xd.experiments.report.style import short, spread_labels
from hstu_xd.experiments.report.tables import compare, markdown_table, metric_label, points
from hstu_xd.experiments.run_folders import aggregate


def results(**variants):
    return aggregate(
        {"variant": name, "seed": seed, "test": {"mrr": value}}
        for name, values in variants.items()
        for seed, value in enumerate(values)
    )


def test_best_difference_and_spread():
    base, close, best = compare(results(a=[0.10, 0.12], b=[0.11, 0.13], c=[0.20, 0.22]), "mrr")
    assert (base.best, close.best, best.best) == (False, False, True)
    assert base.difference is None
    assert best.difference == pytest.approx(0.10)
    assert (close.within_spread, best.within_spread) == (True, False)


def test_one_variant_is_never_the_best_and_missing_stays_missing():
    (cell,) = compare(results(a=[0.1]), "mrr")
    assert not cell.best
    (cell,) = compare(results(a=[0.1]), "hr@1")
    assert cell.mean is None


def test_markdown_table():
    text = markdown_table(
        results(**{"hstu": [0.031, 0.033], "a|b": [0.0305]}), metrics=["mrr", "hr@1"]
    )
    assert text.splitlines() == [
        "| variant | seeds | MRR % | HR@1 % |",
        "|---|---:|---:|---:|",
        "| hstu | 2 | **3.20** \u00b1 0.14 | - |",
        "| a\\|b | 1 | 3.05 (-0.15) | - |",
    ]
    assert markdown_table(results(a=[0.1]), synthetic=True).startswith("Synthetic data.\n\n|")


def test_costs_stand_beside_the_metrics_where_pairs_were_counted():
    row = {"variant": "hstu", "test": {"mrr": 0.1}, "seconds_per_step": 1.25}
    told = [row | {"seed": 1}, row | {"seed": 2, "attention_pairs": 1234.4, "state_bytes": 2048}]
    text = markdown_table(aggregate(told), metrics=["mrr"])
    assert text.splitlines() == [
        "| variant | seeds | MRR % | pairs | state KiB | s/step |",
        "|---|---:|---:|---:|---:|---:|",
        "| hstu | 2 | 10.00 \u00b1 0.00 | 1,234 | 2.0 | 1.25 |",
    ]
    assert "pairs" not in markdown_table(aggregate(told[:1]), metrics=["mrr"])


def test_wording_of_numbers():
    assert points(-0.000001) == "0.00"
    assert points(0.0041) == "+0.41"
    assert metric_label("ndcg@100[stay]") == "NDCG@100 [stay]"


def test_short_names_keep_both_ends():
    assert short("a\nb\x00c") == "a b c"
    assert short("mask + TAPE + DDSR + target view", 20) == "mask + TA..rget view"
    assert short("\u200b") == "(empty)"


@given(
    st.lists(st.tuples(st.floats(-1, 2), st.floats(0.01, 0.2)), min_size=1, max_size=12).filter(
        lambda labels: sum(size for _, size in labels) < 0.95
    )
)
def test_labels_stay_apart_in_order_and_inside(labels):
    heights, sizes = [h for h, _ in labels], [s for _, s in labels]
    placed = spread_labels(heights, sizes, 0.0, 1.0)
    order = sorted(range(len(labels)), key=lambda i: heights[i])
    for low, high in pairwise(order):
        assert placed[high] - placed[low] >= (sizes[high] + sizes[low]) / 2 - 1e-9
    assert placed[order[0]] - sizes[order[0]] / 2 >= -1e-9
    assert placed[order[-1]] + sizes[order[-1]] / 2 <= 1 + 1e-9


def test_labels_with_room_do_not_move():
    assert spread_labels([0.8, 0.2], [0.1, 0.1], 0, 1) == pytest.approx([0.8, 0.2])
