"""A run that reads older events of each domain: every way to ask it gives the same answers."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from tiny_models import ITEMS_PER_DOMAIN, NUM_DOMAINS, SWITCHES, tiny_model
from torch import Tensor

from hstu_xd.cli import app
from hstu_xd.data.batches import SequenceData, Split
from hstu_xd.data.store import InteractionStore
from hstu_xd.data.synthetic import SynthOptions, synthesize
from hstu_xd.data.window import Window
from hstu_xd.errors import InputError
from hstu_xd.evaluation.ranks import rank_targets, recommend_items
from hstu_xd.serving import EncoderSession
from hstu_xd.serving.codec import decode_state, encode_state, fingerprint
from hstu_xd.serving.http.retrieval_engine import RetrievalEngine
from hstu_xd.serving.http.settings import StateSettings
from hstu_xd.serving.stores import MemoryStore
from hstu_xd.training.run import load_trained

RECIPE = (
    "xd_encoder.num_heads = 2",
    "xd_encoder.dqk = 4",
    "xd_encoder.dv = 4",
    "xd_encoder.domain_mask = True",
    "xd_encoder.target_view_heads = 1",
    "xd_encoder.tape = True",
    "xd_encoder.ddsr = True",
    "xd_train.item_embedding_dim = 8",
    "xd_train.num_epochs = 1",
    "xd_train.num_negatives = 20",
    "xd_train.max_sequence_length = 5",
    "xd_train.older_per_domain = 2",
)
WINDOW = Window(5, 2)
Call = Callable[..., str]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> InteractionStore:
    path = tmp_path_factory.mktemp("synth") / "store"
    synthesize(path, SynthOptions(users=80, domains=3, items_per_domain=30, mean_length=16))
    return InteractionStore.open(path)


@pytest.fixture(scope="module")
def trained(store: InteractionStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    line = ["train", "--data", str(store.path), "--out", str(run)]
    assert app.run([*line, *(x for each in RECIPE for x in ("--gin_bindings", each))]) == 0
    return run


def test_evaluation_ranks_as_recommendation_does(store: InteractionStore, trained: Path) -> None:
    best = load_trained(trained)
    assert best.window == WINDOW
    assert best.model.window == 5 + 2 * 3
    data = SequenceData(store, Split.TEST, best.window)
    assert (data.lengths(data.users) > 5).any()
    ranks = rank_targets(best.model, data, data.users, protocol=best.protocol).ranks
    for user, rank in zip(data.users.tolist(), ranks.tolist()):
        items, times = store.history(user)
        domain = int(best.model.catalog.item_domains[items[-1]])
        given = recommend_items(
            best.model,
            *(items[:-1], times[:-1], domain, 90),
            window=best.window,
            protocol=best.protocol,
            at=int(times[-1]),
        )
        assert [item for item, _ in given].index(int(items[-1])) + 1 == rank


def test_everybody_and_pairs_get_what_a_user_alone_gets(
    store: InteractionStore, trained: Path, tmp_path: Path, call: Call
) -> None:
    everybody, pairs, scored = (tmp_path / f"{name}.parquet" for name in ("all", "pairs", "scored"))
    call("recommend", trained, "--all-users", "--k", "4", "--out", everybody)
    table = pl.read_parquet(everybody)
    table.select("user", "item").write_parquet(pairs)
    call("recommend", trained, "--pairs", pairs, "--out", scored)
    both = table.join(pl.read_parquet(scored), on=["user", "item"], suffix="_of_pair")
    assert both.height == table.height
    assert np.allclose(both["score"], both["score_of_pair"], rtol=0, atol=1e-6)
    for user in table["user"].unique(maintain_order=True)[::9]:
        for domain in store.catalog.domain_names:
            own = table.filter(pl.col("user") == user, pl.col("domain") == domain)
            words = ("--user", user, "--domain", domain, "--k", "4", "--json")
            alone = json.loads(call("recommend", trained, *words))["items"]
            assert own["item"].to_list() == [row["item"] for row in alone]
            assert np.allclose(own["score"], [row["score"] for row in alone], rtol=0, atol=1e-6)


def test_the_manifest_of_an_export_says_what_to_give(
    trained: Path, tmp_path: Path, call: Call
) -> None:
    call("export", trained, "--out", tmp_path / "exported")
    manifest = json.loads((tmp_path / "exported" / "manifest.json").read_text())
    assert (manifest["window"], manifest["older_per_domain"]) == (5, 2)


def test_a_service_reads_the_same_events(store: InteractionStore, trained: Path) -> None:
    engine = RetrievalEngine.from_run(trained, store, StateSettings(), allow_imports=False)
    best = load_trained(trained)
    user = int(np.argmax(np.diff(store.offsets)))
    items, times = store.history(user)
    session = engine.session(None, None).encoder
    session.append(["ann"] * len(items), items.tolist(), times.tolist())
    known = EncoderSession(best.model, window=best.window)
    known.append(["ann"] * len(items), items.tolist(), times.tolist())
    assert torch.equal(session.query(["ann"], [1]), known.query(["ann"], [1]))
    state = session._cache.get("ann")
    assert state is not None
    assert state.older > 0


def test_a_continued_run_keeps_to_the_window(
    store: InteractionStore, trained: Path, tmp_path: Path, call: Call
) -> None:
    line = ["train", "--data", str(store.path), "--continue-from", str(trained)]
    line += ["--out", str(tmp_path / "next")]
    for binding in (*RECIPE[:-1], "xd_train.older_per_domain = 3", "xd_train.replay_share = 1.0"):
        line += ["--gin_bindings", binding]
    assert app.run(line) == 2
    assert not (tmp_path / "next").exists()


NET = tiny_model(**SWITCHES["everything"]).float().eval()
READ = Window(9, 2)


def events(number: int, seed: int = 0) -> Tensor:
    """Draw (3, n) items, times and domains; most are of the first domain."""
    draw = np.random.default_rng(seed)
    domains = draw.choice(NUM_DOMAINS, number, p=[0.8, 0.1, 0.1])
    candidates = [NET.catalog.items_of(d).numpy() for d in range(NUM_DOMAINS)]
    items = np.array([draw.choice(candidates[d]) for d in domains], np.int64)
    times = draw.integers(0, 50, number).cumsum() + 10**6
    return torch.from_numpy(np.stack([items, times, domains]))


def kept_of(history: Tensor, window: Window) -> Tensor:
    """Return the events that a session keeps: its window slides by quarters."""
    quarter, number = window.latest // 4, history.shape[1]
    left = quarter * max(0, -((window.latest - number) // quarter))
    kept = Window(number - left, window.older).kept(history[2], torch.tensor([0, number]))
    return history[:, kept]


def vector_of(history: Tensor, domain: int) -> Tensor:
    with torch.inference_mode():
        return NET.encode(history[:1], history[1:2], torch.tensor([domain]))[0]


@pytest.mark.parametrize("step", [1, 3, 40])
def test_a_session_equals_the_encoder_on_what_it_keeps(step: int) -> None:
    history = events(40)
    store = MemoryStore()
    session, rebuilt = (
        EncoderSession(NET, window=READ, store=store),
        EncoderSession(NET, window=READ, history=lambda _: tuple(history[:2, :end].tolist())),
    )
    for start in range(0, 40, step):
        end = min(40, start + step)
        session.append(["ann"] * (end - start), *history[:2, start:end].tolist())
        kept = kept_of(history[:, :end], READ)
        reader = EncoderSession(NET, window=READ, store=store)
        for one in (session, rebuilt, reader):
            rebuilt.release(["ann"])
            for domain in range(NUM_DOMAINS):
                found = one.query(["ann"], [domain])[0]
                torch.testing.assert_close(found, vector_of(kept, domain), rtol=0, atol=1e-5)
        unseen = {item for item, _ in session.recommend(["ann"], [0], ITEMS_PER_DOMAIN)[0]}
        met = set(history[0, :end].tolist())
        assert unseen == {int(item) for item in NET.catalog.items_of(0)} - met
    assert kept_of(history, READ).shape[1] > READ.latest


def test_a_stored_state_knows_which_events_are_older() -> None:
    session = EncoderSession(NET, window=READ)
    session.append(["ann"] * 40, *events(40)[:2].tolist())
    state = session._cache.get("ann")
    assert state is not None
    assert state.older > 0
    checkpoint = fingerprint(NET, READ, torch.float32)
    for version in (b"", b"v" * 16):
        state.version = version
        again = decode_state(
            encode_state(state, checkpoint), checkpoint, NET.settings, torch.float32
        )
        assert (again.older, again.version, again.length) == (state.older, version, state.length)
        assert torch.equal(again.events, state.events[:, : state.length])
        assert torch.equal(again.memory, state.memory[..., : state.num_rows])
    windows = (READ, Window(9), Window(9, 3), Window(8, 2))
    assert len({fingerprint(NET, window, torch.float32) for window in windows}) == 4


@pytest.mark.parametrize("number", [5, 9, 10, 25, 40])
def test_a_state_that_is_behind_its_history_gets_what_it_lacks(number: int) -> None:
    history = events(60)
    session = EncoderSession(NET, window=READ)
    session.append(["ann"] * number, *history[:2, :number].tolist())
    state = session._cache.get("ann")
    assert state is not None
    lacked = state.lacked(history, READ)
    assert lacked is not None
    assert torch.equal(lacked, history[:, number:])
    assert state.lacked(history[:, : number - 1], READ) is None
    # An event that is kept as an older one is another one.
    if state.older:
        other = history.clone()
        (place,) = (history[0] == state.item_ids[0]).nonzero(as_tuple=True)
        other[0, place] = other[0, place] % NET.catalog.num_items + 1
        assert state.lacked(other, READ) is None


def test_a_window_that_the_model_has_no_positions_for_is_refused() -> None:
    most = NET.window - 2 * NUM_DOMAINS
    EncoderSession(NET, window=Window(most, 2))
    with pytest.raises(InputError, match=rf"older=2\); 4\.\.{most} events"):
        EncoderSession(NET, window=Window(most + 1, 2))
