"""``hstu-xd export`` of ranking runs: torch alone scores as ``score`` does, whatever the kind."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranking_runs import KINDS, asked_of, make_runs, rank_run
from safetensors.torch import load_file

from hstu_xd.cli import app
from hstu_xd.export import export_ranker
from hstu_xd.export.ranker import how_to_find, inputs_of
from hstu_xd.ranking.run import ServedRanker, load_ranker, open_store
from hstu_xd.serving.ranking_session import RankingSession, RankRequest

Cli = Callable[..., Any]
MADE = ("counts", "recent", "hard", "domain", "towers", "soft", "xd")
OWN = {
    "din": (
        *("xd_search.kind = 'hard'", "xd_search.levels = ('item', 'type')"),
        *("xd_search.quotas = (1, 2)", "xd_search.fill = False", "xd_search.soft = 'four'"),
        *("xd_interest.kind = 'din'", "xd_interest.counts = True"),
    ),
    "tape": ("xd_interest.tape = True", "xd_search.soft = 'projection'"),
    "tokens": ("xd_short.events = 8", "xd_encoder.segment_by = 'count'"),
}
# Ways to read events whose programs differ; no run is made of these.
FORMS = {
    "mean": ("xd_interest.kind = 'mean'",),
    "hstu": KINDS["hstu"],
    "plain": (
        *("xd_interest.rank_encoding = False", "xd_interest.gap_encoding = False"),
        "xd_interest.target_product = False",
    ),
    "hop": ("xd_interest.order = 3", "xd_interest.goal_positions = 'additive'"),
    "dense": ("xd_interest.order = 2", "xd_interest.form = 'dense'", "xd_search.kind = 'hard'"),
    "groups": ("xd_interest.groups = ('item+type', 'all')",),
    "shared": ("xd_interest.kind = 'none'", "xd_search.soft = 'shared'"),
    "branch": (
        *("xd_short.events = 5", "xd_encoder.ddsr = True", "xd_encoder.states_per_domain = 2"),
        *("xd_search.kind = 'hard'", "xd_encoder.target_domain_embedding = True"),
    ),
    "layer": ("xd_interest.kind = 'towers'", "xd_interest.readout = 'layer'"),
    "tower": ("xd_interest.kind = 'towers'", "xd_interest.readout = 'tower'"),
    "embedding": ("xd_interest.kind = 'towers'", "xd_interest.readout = 'embedding'"),
    "one": ("xd_interest.kind = 'towers'", "xd_interest.readout = 'shared'"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_runs(tmp_path_factory.mktemp("exported"), MADE)
    for name, bindings in OWN.items():
        rank_run(made / name, made / "requests", bindings)
    return made


def requests_of(run: Path) -> list[RankRequest]:
    """Requests of the test split, and of users of much and little and of nobody at all."""
    _, requests = asked_of(load_ranker(run))
    start = min(request.timestamp or 0 for request in requests)
    items = ["i3", "i8", "i21"]
    for user, at in (("u2", start), ("u2", 1_600_000_000 + 5 * 86_400), ("nobody", start)):
        requests.append(RankRequest(user, items, "deal=true", at))
    return [*requests[::5], *requests[-3:], RankRequest("u7", ["i4"], "deal=false", start)]


def as_told(run: Path, requests: list[RankRequest]) -> list[dict[str, Any]]:
    """Requests in ids, each with the whole history of its user."""
    store = open_store(run)
    ids = {store.catalog.token(i): i for i in range(1, store.num_items + 1)}
    told = []
    for request in requests:
        number = store.find_user(request.user)
        columns = ((), ()) if number is None else store.history(number)
        told.append(
            {
                "history": [(int(item), int(time)) for item, time in zip(*columns)],
                "candidates": [ids[name] for name in request.candidates],
                "goal": request.goal,
                "at": request.timestamp,
            }
        )
    return told


Answers = dict[str, list[list[float]]]


def answers_elsewhere(folder: Path, kinds: Iterable[str]) -> Answers:
    """What torch alone answers by the exported folders of runs, in one process for all."""
    places = {}
    for kind in kinds:
        run, places[kind] = folder / kind, folder / "elsewhere" / kind
        assert app.run(["export", str(run), "--out", str(places[kind] / "out")]) == 0
        torch.save(as_told(run, requests_of(run)), places[kind] / "asked.pt")
    blind = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "ranked_elsewhere.py"]
        + [str(place / "out") for place in places.values()],
        cwd=folder,
        env=blind | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
    return {kind: torch.load(place / "answers.pt") for kind, place in places.items()}


@pytest.fixture(scope="module")
def answers(folder: Path) -> Answers:
    return answers_elsewhere(folder, (*MADE, "din", "tape"))


@pytest.fixture(scope="module")
def answers_of_forms(folder: Path) -> Answers:
    for form, bindings in FORMS.items():
        rank_run(folder / form, folder / "requests", bindings)
    return answers_elsewhere(folder, FORMS)


@pytest.mark.parametrize("kind", [*MADE, "din", "tape"])
def test_torch_alone_scores_as_the_run(folder: Path, kind: str, answers: Answers, cli: Cli) -> None:
    check_answers(folder / kind, answers[kind], cli)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_exported(
    folder: Path, form: str, answers_of_forms: Answers, cli: Cli
) -> None:
    check_answers(folder / form, answers_of_forms[form], cli)


def check_answers(run: Path, found: list[list[float]], cli: Cli) -> None:
    requests = requests_of(run)
    wanted = RankingSession.open(run).rank(requests)
    assert [len(row) for row in found] == [len(row) for row in wanted]
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(wanted), rtol=0, atol=1e-5)
    assert np.std(np.concatenate(wanted)) > 1e-3
    request = requests[0]
    ask = ("--user", request.user, "--items", ",".join(request.candidates), "--json")
    said = cli("score", run, *ask, "--goal", request.goal, "--at", request.timestamp)
    scores = {row["item"]: row["score"] for row in json.loads(said.out)["items"]}
    assert found[0] == pytest.approx([scores[name] for name in request.candidates], abs=1e-5)


def test_the_folder_says_what_it_holds(folder: Path, tmp_path: Path, cli: Cli) -> None:
    run, out = folder / "hard", tmp_path / "out"
    said = cli("export", run, "--out", out)
    manifest = json.loads((out / "manifest.json").read_text())
    assert {file.name for file in out.iterdir()} == {*manifest["hashes"], "manifest.json"}
    for name, expected in manifest["hashes"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == expected
        assert f"wrote {out / name}" in said.out
    facts = json.loads((run / "run.json").read_text())
    assert (manifest["of"], manifest["format_version"]) == ("ranking", 1)
    assert manifest["run"]["data_hashes"] == facts["data_hashes"]
    assert manifest["goals"] == facts["goals"]
    assert manifest["levels"] == ["item", "type", "domain"]
    assert manifest["settings"]["search"] == facts["search"]
    assert set(manifest["inputs"]) == {"candidates", "goals", "events", "gaps"}
    assert manifest["inputs"]["events"].startswith("(R, C, 6) int64, ")
    told = manifest["finding"]["events"]
    assert "first of the levels item, type, domain" in told
    assert "The latest 1 events of the user are left out" in told
    assert "Behind them come the latest that match nowhere" in told
    ranker = ServedRanker.of(run, open_store(run))
    assert torch.equal(torch.load(out / "levels.pt"), torch.from_numpy(ranker.levels.paths))
    weights, state = load_file(out / "model.safetensors"), ranker.model.state_dict()
    assert weights.keys() == state.keys()
    assert all(torch.equal(weights[name], value) for name, value in state.items())
    vectors, items = torch.load(out / "item_vectors.pt"), torch.arange(len(ranker.levels.paths))
    assert torch.equal(vectors, ranker.model.items(items).detach())
    names = json.loads((out / "catalog.json").read_text())["tokens"]
    assert names[1:] == [ranker.catalog.token(i) for i in range(1, len(names))]
    assert cli("export", run, "--out", out).code == 2
    assert cli("export", run, "--out", out, "--force").code == 0


def test_what_is_found_is_said_of_quotas_scope_and_counts(folder: Path) -> None:
    told = {}
    for kind in ("din", "domain", "recent", "counts"):
        ranker = ServedRanker.of(folder / kind, open_store(folder / kind))
        told[kind] = how_to_find(ranker.settings, ranker.levels, "levels.pt")
    assert "At most 1 of item, 2 of type are taken" in told["din"]["events"]
    assert "match nowhere" not in told["din"]["events"]
    assert told["din"]["counts"].startswith("6 numbers for each candidate.")
    assert "node of 'domain' is not the candidate's" in told["domain"]["events"]
    assert told["recent"]["events"] == "The latest 6 events, the latest first."
    assert "counts" not in told["recent"]
    assert "events" not in told["counts"]


def program_of(run: Path) -> tuple[Any, ServedRanker]:
    ranker = ServedRanker.of(run, open_store(run))
    return export_ranker(ranker).module(), ranker


def test_the_program_refuses_what_makes_no_sense(folder: Path) -> None:
    program, ranker = program_of(folder / "tape")
    k, last = ranker.settings.search.k, len(ranker.levels.paths) - 1

    def ask(**changed: Any) -> torch.Tensor:
        given = {
            "candidates": torch.tensor([[1, 2, 0]]),
            "goals": torch.tensor([1]),
            "events": torch.tensor([[3, 4] + [0] * (k - 2)]),
            "gaps": torch.tensor([[1, 9] + [0] * (k - 2)]),
            "history": torch.tensor([[4, 3, 0]]),
            "history_gaps": torch.tensor([[9, 1, 5]]),
            "latest": torch.tensor([[3]]),
            "latest_gaps": torch.tensor([[1]]),
        }
        assert list(given) == [each.name for each in inputs_of(ranker)]
        return program(**given | {name: torch.tensor(value) for name, value in changed.items()})

    chances = ask()
    assert chances.dtype == torch.float64
    assert (chances[0, :2] > 0).all()
    assert chances[0, 2] == 0
    assert torch.equal(ask(history=[[4, 3]], history_gaps=[[9, 1]]), chances)
    rest = [0] * (k - 2)
    for changed, message in (
        ({"candidates": [[1, last + 1, 0]]}, f"candidates: only 0..{last} that the catalogue"),
        ({"events": [[-1, 4, *rest]]}, f"events: only 0..{last} that"),
        ({"events": [[0, 4, *rest]]}, r"events: padding \(0\) before"),
        ({"gaps": [[0, 9, *rest]]}, "gaps: events at least a second before"),
        ({"history": [[4, 0, 3]]}, r"history: padding \(0\) before"),
        ({"history_gaps": [[9, 0, 5]]}, "history_gaps: events at least a second before"),
        ({"history_gaps": [[1, 9, 5]]}, "history_gaps: a row's events oldest first"),
        ({"latest_gaps": [[-1]]}, "latest_gaps: events at least"),
        ({"goals": [2]}, "goals: only 0..1"),
        ({"goals": [-1]}, "goals: only 0..1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ask(**changed)


def test_the_user_side_of_towers_refuses_what_makes_no_sense(folder: Path) -> None:
    program, ranker = program_of(folder / "towers")
    k, last = ranker.settings.search.k, len(ranker.levels.paths) - 1
    events, gaps = torch.zeros(3, k, dtype=torch.int64), torch.ones(3, k, dtype=torch.int64)
    assert program(events=events, gaps=gaps).shape == (3, 2, ranker.model.items.width)
    events[1, 0] = last + 1
    with pytest.raises(RuntimeError, match=f"events: only 0..{last} that"):
        program(events=events, gaps=gaps)
    events[1, 0], gaps[1, 0] = 1, 0
    with pytest.raises(RuntimeError, match="gaps: events at least a second before"):
        program(events=events, gaps=gaps)
    events[1] = torch.tensor([0, 1, *[0] * (k - 2)])
    with pytest.raises(RuntimeError, match=r"events: padding \(0\) before"):
        program(events=events, gaps=gaps.clamp(min=1))


def test_segments_are_refused(folder: Path, tmp_path: Path, cli: Cli) -> None:
    said = cli("export", folder / "tokens", "--out", tmp_path / "out")
    assert said.code == 2
    assert "cuts histories into segments by 'count'" in said.err
    assert "export a model trained with xd_encoder.segment_by = 'none'" in said.err
    assert not (tmp_path / "out").exists()


def test_ranking_runs_import_nothing(folder: Path, tmp_path: Path, cli: Cli) -> None:
    said = cli("export", folder / "hard", "--out", tmp_path / "out", "--allow-imports")
    assert (said.code, "--allow-imports has no meaning there" in said.err) == (2, True)


def test_tracing_leaves_the_model_and_the_process_alone(folder: Path) -> None:
    ranker = ServedRanker.of(folder / "towers", open_store(folder / "towers"))
    program = export_ranker(ranker)
    assert not any("stack_trace" in node.meta for node in program.graph.nodes)
    assert all(parameter.requires_grad for parameter in ranker.model.parameters())
    assert torch.backends.mha.get_fastpath_enabled()
