"""Requests of ``hstu-xd requests`` in the production path, against loops over the log."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from dlrm_runs import CPU, Run, process_of

from hstu_xd.data.requests import MANIFEST, RequestSet
from hstu_xd.data.store import InteractionStore
from hstu_xd.data.synthetic import SynthOptions, synthesize
from hstu_xd.errors import InputError
from hstu_xd.evaluation.ranking import ScoredRows, ranking_metrics
from hstu_xd.plugins.bridge import free_port
from hstu_xd.plugins.dlrm_v3 import request_metrics
from hstu_xd.plugins.dlrm_v3.given_requests import GivenRequests
from hstu_xd.plugins.dlrm_v3.settings import DlrmSettings
from hstu_xd.ranking.settings import SearchSettings

LONGEST = 20
HARD = SearchSettings(kind="hard", k=3, fill=False)


def opened(baskets: Path, name: str, search: SearchSettings, split: str = "valid") -> GivenRequests:
    store = InteractionStore.open(baskets / "store")
    given = RequestSet.open(baskets / name, store)
    return GivenRequests(store, given, split=split, max_history=LONGEST, search=search)


def history(store: InteractionStore, given: RequestSet, request: int) -> list[int]:
    """Rows of the store strictly before a request, oldest first."""
    user, time = given.users[request], given.times[request]
    rows = range(store.offsets[user], store.offsets[user + 1])
    return [row for row in rows if store.timestamps[row] < time]


def found(store: InteractionStore, given: RequestSet, request: int, k: int) -> list[int]:
    """What hard search finds for any candidate: of its item first, then of its type, domain."""
    kinds = [
        lambda item: item,
        lambda item: store.catalog.token(item)[1:] and int(store.catalog.token(item)[1:]) % 12,
        lambda item: int(store.catalog.item_domains[item]),
    ]
    rows: set[int] = set()
    for candidate in given.candidates[given.offsets[request] : given.offsets[request + 1]].tolist():
        latest_first = history(store, given, request)[::-1]
        own: list[int] = []
        for kind in kinds:
            own += [
                row
                for row in latest_first
                if row not in own and kind(int(store.item_ids[row])) == kind(candidate)
            ]
        rows.update(own[:k])
    return sorted(rows)


@pytest.mark.parametrize("name", ["goals", "any"])
@pytest.mark.parametrize("search", [SearchSettings(), HARD], ids=["recent", "hard"])
@pytest.mark.parametrize("split", ["valid", "test"])
def test_batches_are_what_loops_over_the_log_give(
    baskets: Path, name: str, search: SearchSettings, split: str
) -> None:
    requests = opened(baskets, name, search, split)
    store = requests.store
    given = RequestSet.open(baskets / name, store)
    parts = [np.flatnonzero(given.splits == number) for number in (0, 1 if split == "valid" else 2)]
    order = np.concatenate(parts)
    assert (len(requests), requests.num_train) == (len(order), len(parts[0]))
    deals = store.fields.of("deal", "")[0]
    domains = store.catalog.item_domains
    numbers = np.array([0, 3, requests.num_train - 1, requests.num_train, len(requests) - 1])
    batch = requests.batch(numbers)
    histories = batch.history_lengths.tolist()
    columns = (batch.items, batch.times, batch.domains, batch.actions)
    shown = zip(*(column.split(histories) for column in columns))
    for request, (items, times, of_domains, actions) in zip(order[numbers].tolist(), shown):
        rows = history(store, given, request)
        rows = rows if search.kind == "recent" else found(store, given, request, search.k)
        rows = rows[-LONGEST:]
        assert len(rows) > 1
        assert items.tolist() == store.item_ids[rows].tolist()
        assert times.tolist() == store.timestamps[rows].tolist()
        assert torch.equal(of_domains, domains[items])
        # Code 0 stands for "no value", the codes behind it for the goals.
        bits = [1] * len(rows) if name == "any" else [2 ** int(code - 1) for code in deals[rows]]
        assert actions.tolist() == bits
    places = given.rows(order[numbers])
    assert batch.users.tolist() == given.users[order[numbers]].tolist()
    assert batch.candidates.tolist() == given.candidates[places].tolist()
    assert batch.labels.tolist() == given.labels[places].astype(int).tolist()
    assert torch.equal(batch.candidate_domains, domains[batch.candidates])
    assert batch.candidate_lengths.tolist() == np.diff(given.offsets)[order[numbers]].tolist()
    times = given.times[order[numbers]].repeat(batch.candidate_lengths.numpy())
    assert batch.request_times.tolist() == times.tolist()
    if name == "any":
        assert batch.goals is None
    else:
        assert batch.goals is not None
        assert batch.goals.tolist() == given.goals[order[numbers]].tolist()


@pytest.mark.parametrize("name", ["goals", "any"])
@pytest.mark.parametrize("hard", [False, True])
def test_a_model_trains_and_is_measured_on_them(baskets: Path, name: str, hard: bool) -> None:
    bindings = "xd_dlrm.max_history = 20\nxd_dlrm.user_token = True\nxd_dlrm.norm_length = 40\n"
    bindings += 'xd_search.kind = "hard"\nxd_search.k = 3\n' if hard else ""
    with process_of(baskets / name, free_port(), bindings):
        run = Run()
        assert run.requests.requests.num_train > 40
        before = run.parameters()
        run.train(range(4))
        table = "_embedding_collection.embeddings.goal.weight"
        assert any(key.endswith(table) for key in before) == (name == "goals")
        moved = {key for key, value in run.parameters().items() if not value.equal(before[key])}
        assert {key for key in before if key.endswith(table)} <= moved
        requests = run.requests.requests
        values = request_metrics.evaluate(run.model, run.requests, DlrmSettings(), 7, CPU)
        # Request by request, and by the definition of all metrics.
        run.model.eval()
        scores, labels = [], []
        for number in requests.evaluated():
            batch = requests.batch(np.array([number]))
            scores.append(request_metrics._predict(run.model, run.requests, batch, CPU))
            labels.append(batch.labels)
        assert len(values) > 10
    given = RequestSet.open(baskets / name)
    valid = np.flatnonzero(given.splits == 1)
    each = np.diff(given.offsets)[valid]
    rows = ScoredRows(
        torch.cat(scores).detach().numpy(),
        torch.cat(labels).float().numpy(),
        np.repeat(valid, each),
        np.repeat(given.users[valid], each),
    )
    expected = ranking_metrics(rows)
    assert 0 < expected["auc"] < 1
    for metric, value in expected.items():
        assert values[metric] == pytest.approx(value, abs=1e-6)
    groups = {key.partition("[")[2].rstrip("]") for key in values} - {""}
    goals = {"deal=false", "deal=true"} if name == "goals" else set()
    assert groups == {"d0", "d1"} | goals


REFUSED = {
    "xd_dlrm.ranked_requests = 5\nxd_dlrm.norm_length = 200": (
        "ranked_requests = 5: .* holds requests with splits and candidates of their own"
    ),
    "xd_dlrm.valid_from = 0.5\nxd_dlrm.test_from = 0.7": "valid_from = 0.5: .* of their own",
    'xd_search.soft = "shared"': "xd_search.soft = 'shared': the host dlrm_v3 has hard search only",
    'xd_search.kind = "hard"\nxd_search.levels = ("typ",)': "xd_search.levels names 'typ'",
    'xd_search.kind = "near"': "xd_search.kind = 'near'; it must be",
    "xd_rank.hidden = (3,)": "xd_rank.hidden = .*upstream's own settings; remove the binding",
}


@pytest.mark.parametrize(("bindings", "message"), REFUSED.items())
def test_what_does_not_fit_is_refused(baskets: Path, bindings: str, message: str) -> None:
    running = process_of(baskets / "goals", free_port(), bindings)
    with running, pytest.raises(InputError, match=message):
        Run()


def test_a_store_without_requests_is_not_searched(tiny_store: Path) -> None:
    running = process_of(tiny_store, free_port(), 'xd_search.kind = "hard"')
    with running, pytest.raises(InputError, match="without requests is read without a search"):
        Run()


def test_more_goals_than_bits_are_refused(baskets: Path) -> None:
    store = InteractionStore.open(baskets / "store")
    given = RequestSet.open(baskets / "goals", store)
    object.__setattr__(given, "goal_names", tuple(f"goal={n}" for n in range(33)))
    with pytest.raises(InputError, match="have 33 goals; the production path tells up to 32"):
        GivenRequests(store, given, split="valid", max_history=5, search=SearchSettings())


def test_requests_of_another_store_are_refused(baskets: Path, tmp_path: Path) -> None:
    folder, other = tmp_path / "requests", tmp_path / "store"
    shutil.copytree(baskets / "goals", folder)
    synthesize(other, SynthOptions(users=20))
    told = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(told | {"data": str(other)}))
    with process_of(folder, free_port()), pytest.raises(InputError, match="of another store than"):
        Run()
