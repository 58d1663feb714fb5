"""``bench train-step --data`` of requests: steps of rankers, proven right before they are timed."""

import json
from pathlib import Path
from typing import Any

import pytest
from bench_runs import call
from ranking_runs import KINDS, make_runs

from hstu_xd.bench import request_steps
from hstu_xd.bench.memory import growth_elsewhere
from hstu_xd.bench.request_steps import RequestSteps
from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.ranking.batches import RequestBatch, RequestData
from hstu_xd.ranking.trainer import RankTrainer

SMALL = ("xd_search.k = 6", "xd_rank.item_width = 4", "xd_rank.batch_requests = 5")


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_runs(tmp_path_factory.mktemp("ranking"), kinds=()) / "requests"


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, files = tmp_path_factory.mktemp("variants"), {}
    for name, bindings in KINDS.items():
        lines = "\n".join(["import hstu_xd.ranking.settings", *bindings, *SMALL, ""])
        (files.setdefault(name, folder / f"rank_{name}.gin")).write_text(lines)
    return files


def rows_of(
    capsys: pytest.CaptureFixture[str], requests: Path, *files: Path, **options: Any
) -> list[dict[str, Any]]:
    capsys.readouterr()
    given = {"threads": 1, "repeats": 2, "json": True} | options
    call("train-step", data=requests, variants=",".join(map(str, files)), **given)
    return json.loads(capsys.readouterr().out)


def test_rankers_of_every_kind_take_turns_on_the_same_requests(
    requests: Path,
    variants: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[list[int]] = []
    step = RankTrainer.step

    def noting(self: RankTrainer, chosen: Any, mark: Any) -> None:
        taken.append(chosen.tolist())
        step(self, chosen, mark)

    monkeypatch.setattr(RankTrainer, "step", noting)
    rows = rows_of(capsys, requests, *variants.values())
    assert [row["provider"] for row in rows] == [f"rank_{kind}" for kind in KINDS]
    assert {len(batch) for batch in taken} == {5}
    turns = [taken[i : i + len(variants)] for i in range(0, len(taken), len(variants))]
    assert len(turns) == 3
    assert all(batch == turn[0] for turn in turns for batch in turn)
    first, *others = rows
    assert not [key for key in first if key.startswith("times_faster_than_")]
    for row in rows:
        assert row["correct"] is True
        assert 0 <= row["error_of_budget"] <= 1
        assert row["peak_bytes"] == 4096
        assert (row["k"], row["batch_size"], row["candidates"]) == (6, 5, 6)
        assert 5 <= row["seq_len"] <= 90
        assert 0 < row["search_share"] < 1
        assert all(0 < row[f"ms_{phase}"] < row["ms_p80"] for phase in ("batch", "forward"))
    assert all(row["times_faster_than_rank_counts"] > 0 for row in others)


@pytest.mark.parametrize("kind", ["recent", "hard"])
@pytest.mark.parametrize("fill", [True, False])
def test_other_events_get_no_time(
    requests: Path,
    kind: str,
    fill: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    file = tmp_path / f"{kind}.gin"
    bindings = (f"xd_search.kind = '{kind}'", *SMALL)
    bindings += ("xd_search.fill = False",) if not fill and kind == "hard" else ()
    file.write_text("\n".join(["import hstu_xd.ranking.settings", *bindings, ""]))
    assert rows_of(capsys, requests, file)[0]["correct"] is True
    right = RequestData.batch

    def wrong(self: RequestData, chosen: Any) -> RequestBatch:
        batch = right(self, chosen)
        batch.events[-1, 0] += 1
        return batch

    monkeypatch.setattr(RequestData, "batch", wrong)
    with pytest.raises(HstuXdError, match=f"{kind} disagrees with the reference"):
        rows_of(capsys, requests, file)


def test_wrong_scores_get_no_time(
    requests: Path, variants: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = RequestSteps(str(requests), [str(variants["hard"])], (), 1)
    trainer = steps.trainer(*steps.open())
    assert request_steps._error(trainer) <= 1
    forward = type(trainer.model).forward

    def noisy(self: Any, batch: RequestBatch) -> Any:
        found = forward(self, batch)
        return found * (1 + 1e-2 * (found.element_size() == 4))

    monkeypatch.setattr(type(trainer.model), "forward", noisy)
    assert request_steps._error(trainer) > 1


def test_memory_is_of_a_process_of_its_own(requests: Path, variants: dict[str, Path]) -> None:
    steps = RequestSteps(str(requests), [str(variants["hard"])], (), 1)
    assert growth_elsewhere("hstu_xd.bench.request_steps", "hard", vars(steps)) > 2**20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": "hstu"}, "variant 'hstu' is one of hstu-xd train"),
        ({"device": "cuda"}, "--device cuda: rankers are trained on the CPU"),
        ({"seq_len": 5}, "xd_train.max_sequence_length"),
    ],
)
def test_what_rankers_have_no_use_for_is_refused(
    requests: Path, variants: dict[str, Path], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        call("train-step", **{"data": requests, "variants": variants["hard"], **options})
