"""The production path's model with candidates that meet the events of their request."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from dlrm_runs import CPU, Run, process_of
from session_cases import bound
from upstream_dlrm import CANDIDATES, WIDTH, answers, batch, cross_domain, jagged, stock_model
from upstream_dlrm import twin_of as model_of

from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.interest import InterestSettings
from hstu_xd.plugins.bridge import free_port
from hstu_xd.plugins.dlrm_v3 import request_metrics
from hstu_xd.plugins.dlrm_v3.session import new_model
from hstu_xd.plugins.dlrm_v3.settings import DlrmSettings

ALL = {"domain_mask": True, "tape": True, "ddsr": True}
HARD = "xd_dlrm.interest = True\nxd_search.kind = 'hard'\nxd_search.k = 3\n"


def with_interest(switches: dict[str, Any]) -> Any:
    return dataclasses.replace(cross_domain(**switches), interest=InterestSettings())


def moved(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if "_xd_interest.last" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("switches", [{}, ALL], ids=["stock", "all"])
def test_it_begins_as_the_model_without(switches: dict[str, Any]) -> None:
    stock = stock_model()
    without = model_of(stock, cross_domain(**switches))
    ours = model_of(stock, with_interest(switches))
    # Its weights are drawn after all others, so these begin the same without a checkpoint, too.
    for name, value in without.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    for seed in range(20):
        expected, found = answers(without, batch(seed)), answers(ours, batch(seed))
        assert [n for n in expected if not torch.equal(found[n], expected[n])] == []
        assert found["gradient _xd_interest.last.weight"].abs().max() > 0


def test_what_events_say_is_in_both_embeddings_of_a_candidate() -> None:
    ours = moved(model_of(stock_model(), with_interest({}))).eval()
    without = model_of(stock_model(), cross_domain()).eval()
    features = batch(0)
    said, plain = ours(*features), without(*features)
    for place in (0, 1):  # as the layers encode it, and as an item
        assert (said[place] - plain[place]).abs().max(1).values.min() > 1e-3


def test_a_score_does_not_move_when_the_other_candidates_are_replaced() -> None:
    ours = moved(model_of(stock_model(), with_interest(ALL))).eval()
    history, candidates = batch(2)
    lengths = candidates["item_candidate_id"].lengths()
    is_first = torch.zeros(int(lengths.sum()), dtype=torch.bool)
    is_first[lengths.cumsum(0) - lengths] = True
    ids = candidates["item_candidate_id"].values()
    values = {name: candidates[name].values() for name in CANDIDATES}
    values["item_candidate_id"] = torch.where(is_first, ids, 60 - ids)
    others = jagged(CANDIDATES, [list(values[n].split(lengths.tolist())) for n in CANDIDATES])
    before, after = ours(history, candidates)[3], ours(history, others)[3]
    assert torch.equal(before[:, is_first], after[:, is_first])
    assert not torch.equal(before, after)


@pytest.mark.parametrize("name", ["goals", "any"])
def test_a_model_trains_and_is_measured_with_it(baskets: Path, name: str) -> None:
    goals = "xd_interest.goal_positions = 'additive'\n" if name == "goals" else ""
    with process_of(baskets / name, free_port(), HARD + goals):
        run = Run()
        before = run.parameters()
        run.train(range(4))
        moved = {key for key, value in run.parameters().items() if not value.equal(before[key])}
        parts = {key.split("_xd_interest.")[1] for key in moved if "_xd_interest." in key}
        assert {"last.weight", "norm.weight", "read.positions.tables.gap"} <= parts
        assert ("read.positions.deltas.rank" in parts) == (name == "goals")
        values = request_metrics.evaluate(run.model, run.requests, DlrmSettings(), 7, CPU)
    assert 0 < values["gauc"] < 1


def test_a_checkpoint_without_it_starts_one_with_it(baskets: Path, tmp_path: Path) -> None:
    with process_of(baskets / "any", free_port()):
        run = Run()
        run.train(range(2))
        run.save(tmp_path)
        expected = run.parameters()
    warm = f"xd_dlrm.warm_start = '{tmp_path / '3'}'\n"
    with process_of(baskets / "any", free_port(), "xd_dlrm.interest = True\n" + warm):
        run = Run()
        run.start()
        found = run.parameters()
    assert {key for key in found if "_xd_interest" in key} == found.keys() - expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_its_width_is_that_of_the_tables(tiny_store: Path) -> None:
    wide = ("xd_dlrm.interest = True", "xd_dlrm.hstu_embedding_table_dim = 32")
    with bound(tiny_store, wide) as settings:
        model = new_model(InteractionStore.open(tiny_store), settings)
    assert model.get_parameter("_xd_interest.last.weight").shape == (32, 96)
    assert WIDTH != 32


REFUSED = {
    "xd_interest.kind = 'din'": (
        "xd_interest.kind = 'din' does nothing while xd_dlrm.interest is False; bind "
        "xd_dlrm.interest = True"
    ),
    "xd_dlrm.interest = True\nxd_interest.kind = 'towers'": (
        "xd_interest.kind = 'towers' with xd_dlrm.interest = True: no candidate meets an event; "
        "one of tin, din, hstu, mean is needed"
    ),
    "xd_dlrm.interest = True\nxd_interest.counts = True": (
        "xd_interest.counts = True: the host dlrm_v3 computes kind, rank_encoding,"
    ),
    "xd_dlrm.interest = True\nxd_interest.order = 7": "xd_interest.order = 7; it must be",
    "xd_dlrm.interest = True\nxd_interest.goal_positions = 'additive'": (
        "xd_interest.goal_positions = 'additive': the requests tell of no goals"
    ),
}


@pytest.mark.parametrize(("bindings", "message"), REFUSED.items())
def test_what_it_does_not_compute_is_refused(baskets: Path, bindings: str, message: str) -> None:
    running = process_of(baskets / "any", free_port(), bindings)
    with running, pytest.raises(InputError, match=message):
        Run()


def test_a_setting_that_does_nothing_is_told(
    baskets: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bindings = "xd_dlrm.interest = True\nxd_interest.kind = 'mean'\nxd_interest.order = 2\n"
    with process_of(baskets / "any", free_port(), bindings):
        Run()
    assert "xd_interest.order = 2 does nothing while xd_interest.kind is 'mean'" in caplog.text
