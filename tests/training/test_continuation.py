"""A run that continues another one on a newer store: what is carried, and what begins anew."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quick_runs import QUICK

import hstu_xd
from hstu_xd.cli.app import run
from hstu_xd.data.batches import SequenceData, Split
from hstu_xd.data.store import InteractionStore
from hstu_xd.training.checkpoint import load_checkpoint

ALL = tuple(
    f"xd_encoder.{switch} = True"
    for switch in ("domain_mask", "tape", "ddsr", "target_domain_embedding")
)
DOMAIN_TABLES = (
    "_tape._domain_emb.weight",
    "_target_domain_emb.weight",
    "_hstu._attention_layers.0._ddsr._initial_state",
    "_hstu._attention_layers.1._ddsr._target_emb.weight",
)
ITEMS = "_embedding_module._item_emb.weight"
BEGIN = 1_500_000_000


def write_log(file: Path, events: int, leave_out: str = "", more: tuple[str, ...] = ()) -> Path:
    """Twelve users of so many events each in two domains, and lines beside them."""
    lines = ["user,item,domain,timestamp"]
    for user in range(12):
        for event in range(events):
            number = (user + event) % 10
            domain = ("books", "films")[number % 2]
            if f"{domain}{number}" != leave_out:
                time = BEGIN + 60 * event
                lines.append(f"u{user},{domain}{number},{domain},{time}")
    file.write_text("\n".join([*lines, *more]) + "\n")
    return file


def later(items: dict[str, str], users: int = 3) -> tuple[str, ...]:
    """Lines of events after all others: each of some users takes each of these items."""
    return tuple(
        f"u{user},{item},{domain},{BEGIN + 10_000 + 60 * number}"
        for user in range(users)
        for number, (item, domain) in enumerate(items.items())
    )


def prepare(log: Path) -> Path:
    store = log.with_suffix("")
    assert run(["prepare", str(log), "--out", str(store)]) == 0
    return store


def train(data: Path, out: Path, *more: str, bindings: tuple[str, ...] = ()) -> int:
    words = [word for binding in bindings for word in ("--gin_bindings", binding)]
    return run(["train", "--data", str(data), "--out", str(out), *words, *more])


def facts(out: Path) -> dict[str, Any]:
    return json.loads((out / "run.json").read_text())


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a log, its store and a run on it."""
    folder = tmp_path_factory.mktemp("continued")
    store = prepare(write_log(folder / "old.csv", 8))
    assert train(store, folder / "run", bindings=(*QUICK, *ALL)) == 0
    return folder


@pytest.fixture
def beginnings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict, dict, np.ndarray]]:
    """Weights, optimiser's state and users of the first epoch, as each training begins."""
    from hstu_xd.training.checkpoint import optimizer_tensors
    from hstu_xd.training.trainer import Trainer

    found = []
    fit = Trainer.fit

    def watched(self: Trainer, **options: bool) -> dict[str, Any]:
        weights = {k: v.clone() for k, v in self.model.state_dict().items()}
        state = optimizer_tensors(self.model, self._optimizer)
        users = np.concatenate(self.batches(0))
        found.append((weights, {k: v.clone() for k, v in state.items()}, users))
        return fit(self, **options)

    monkeypatch.setattr(Trainer, "fit", watched)
    return found


def test_the_same_store_continues_with_the_same_numbers(
    first: Path, tmp_path: Path, beginnings: list, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    again = ("xd_train.replay_share = 1.0",)
    assert train(first / "old", out, "--continue-from", str(first / "run"), bindings=again) == 0
    weights, state, users = beginnings[0]
    old, _ = load_checkpoint(first / "run" / "best.safetensors")
    assert weights.keys() == old.keys()
    assert all(torch.equal(weights[name], old[name]) for name in old)
    last, _ = load_checkpoint(first / "run" / "last.safetensors")
    carried = {key: value for key, value in last.items() if key.startswith("optimizer.")}
    assert state.keys() == carried.keys()
    assert all(torch.equal(state[key], carried[key]) for key in carried)
    assert sorted(users) == list(range(12))
    continues = facts(out)["continues"]
    assert continues["run"] == str((first / "run").resolve())
    assert continues["items"] == {"kept": 10, "new": 0, "removed": 0}
    assert facts(out)["encoder"] == facts(first / "run")["encoder"]
    assert (
        "items 10 kept, 0 new, 0 removed; domains 2 kept, 0 new, 0 removed; users 0 with news"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("older", [1, 2])
def test_a_run_that_reads_older_events_of_each_domain_is_continued(
    older: int, tmp_path: Path, beginnings: list, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its tables of positions grow with the number of domains, and are no tables of domains."""
    window = ("xd_train.max_sequence_length = 3", f"xd_train.older_per_domain = {older}")
    store = prepare(write_log(tmp_path / "old.csv", 8))
    assert train(store, tmp_path / "first", bindings=(*QUICK, *ALL, *window)) == 0
    old, _ = load_checkpoint(tmp_path / "first" / "best.safetensors")
    more = prepare(write_log(tmp_path / "new.csv", 8, more=later({"books99": "books"})))
    onward = ("--continue-from", str(tmp_path / "first"))
    assert train(more, tmp_path / "run", *onward) == 0
    weights = beginnings[1][0]
    positions = "_input_features_preproc._pos_emb.weight"
    assert len(weights[positions]) == 3 + 2 * older + 10 + 1
    assert all(torch.equal(weights[name], old[name]) for name in old if name != ITEMS)
    albums = write_log(tmp_path / "albums.csv", 8, more=later({"albums1": "albums"}))
    capsys.readouterr()
    assert train(prepare(albums), tmp_path / "other", *onward) == 2
    assert "has 3 domains" in (said := capsys.readouterr().err)
    assert f"xd_train.older_per_domain = {older}" in said
    assert not (tmp_path / "other").exists()


def test_rows_go_with_their_items_and_domains(
    first: Path, tmp_path: Path, beginnings: list
) -> None:
    new = {"albums1": "albums", "films99": "films"}
    log = write_log(tmp_path / "new.csv", 8, leave_out="books4", more=later(new))
    out = tmp_path / "run"
    assert train(prepare(log), out, "--continue-from", str(first / "run")) == 0
    continues = facts(out)["continues"]
    assert continues["items"] == {"kept": 9, "new": 2, "removed": 1}
    assert continues["domains"] == {"kept": ["books", "films"], "new": ["albums"], "removed": []}
    weights, state, _ = beginnings[0]
    old, _ = load_checkpoint(first / "run" / "best.safetensors")
    last, _ = load_checkpoint(first / "run" / "last.safetensors")
    before, after = (InteractionStore.open(x).catalog for x in (first / "old", tmp_path / "new"))
    ids = after.ids_in(before)
    kept = ids > 0
    moments = "optimizer.exp_avg_sq." + ITEMS
    assert torch.equal(weights[ITEMS][kept], old[ITEMS][ids[kept]])
    assert torch.equal(state[moments][kept], last[moments][ids[kept]])
    assert not state[moments][~kept].any()
    assert state[moments][kept].any()
    # Albums come before books and films, by name.
    for name in DOMAIN_TABLES:
        assert torch.equal(weights[name][1:], old[name])
        assert weights[name].shape[0] == 3
    others = old.keys() - {ITEMS} - {name for name in old if old[name].shape != weights[name].shape}
    assert all(torch.equal(weights[name], old[name]) for name in others)


@pytest.mark.parametrize("how", ["domain-mean", "co-occurring", "random"])
def test_new_items_begin_as_the_setting_says(
    first: Path, tmp_path: Path, beginnings: list, how: str
) -> None:
    # After the new items come two events each, which are held out.
    new = {"films98": "films", "films99": "films", "books0": "books", "films1": "films"}
    store = prepare(write_log(tmp_path / "new.csv", 8, more=later(new)))
    continued = ("--continue-from", str(first / "run"))
    bindings = (f'xd_train.new_items = "{how}"',)
    assert train(store, tmp_path / "run", *continued, bindings=bindings) == 0
    weights, old = beginnings[0][0][ITEMS], load_checkpoint(first / "run" / "best.safetensors")[0]
    catalog = InteractionStore.open(store).catalog
    tokens = [catalog.token(item) for item in catalog.items_of(1).tolist()]
    one, two = (weights[catalog.items_of(1)[tokens.index(x)]] for x in ("films98", "films99"))
    old_films = InteractionStore.open(first / "old").catalog.items_of(1)
    mean = old[ITEMS][old_films].mean(0)
    noise = 0.05  # of a start, drawn with a deviation of 0.02 and cut off at twice that
    assert not torch.equal(one, two)
    if how == "random":
        assert one.abs().max() < noise
    else:
        assert (two - mean).abs().max() < noise
    if how == "domain-mean":
        assert (one - mean).abs().max() < noise
    if how == "co-occurring":
        # Before films98 stand the eighth items of three users; after it, one that is new itself.
        earlier = InteractionStore.open(first / "old")
        histories = [earlier.history(earlier.user_index(f"u{user}"))[0] for user in range(3)]
        last = torch.tensor([int(items[-1]) for items in histories])
        assert (one - old[ITEMS][last].mean(0)).abs().max() < noise


def test_a_step_counts_the_events_that_an_epoch_trains_on(
    store: InteractionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those who have nothing new are left out of the mean, and new events have shorter windows."""
    from hstu_xd.training import trainer
    from hstu_xd.training.distributed import World
    from hstu_xd.training.run import new_model
    from hstu_xd.training.settings import TrainSettings, load_settings

    asked = []
    monkeypatch.setattr(
        TrainSettings, "users_per_step", lambda _, events: asked.append(events) or 5
    )
    until = int(np.quantile(np.asarray(store.timestamps), 0.9))
    settings = load_settings(
        [], (*QUICK, "xd_train.news_context = 1", "xd_train.replay_share = 0.0")
    )
    model, here = new_model(store.catalog, settings), World(0, 1, torch.device("cpu"))
    made = trainer.Trainer(model, store, settings.train, tmp_path, here, until=until)
    assert made.users_per_step == 5
    data = SequenceData(store, Split.TRAIN, settings.train.max_sequence_length)
    whole = data.lengths(data.users)
    news = data.begin_at_news(until, 1)
    assert 0 < news.size < whole.size
    assert sorted(asked[0]) == sorted(data.lengths(news))
    assert sorted(asked[0]) != sorted(whole)


def test_an_epoch_trains_on_those_with_news_and_a_share_of_the_others(
    first: Path, tmp_path: Path, beginnings: list
) -> None:
    store = prepare(write_log(tmp_path / "new.csv", 8, more=later({"films99": "films"})))
    continued = ("--continue-from", str(first / "run"))
    for share, number in ((0.0, 3), (0.5, 3 + 4), (1.0, 12)):
        bindings = (f"xd_train.replay_share = {share}",)
        assert train(store, tmp_path / f"run{share}", *continued, bindings=bindings) == 0
        users = beginnings[-1][2]
        assert len(set(users)) == len(users) == number
        tokens = {InteractionStore.open(store).user_token(user) for user in users.tolist()}
        assert {"u0", "u1", "u2"} <= tokens


@pytest.mark.parametrize("context", [0, 2, 100])
def test_windows_begin_shortly_before_what_is_new(store: InteractionStore, context: int) -> None:
    times = np.asarray(store.timestamps)
    assert not SequenceData(store, Split.TRAIN, 10).begin_at_news(int(times.max()), context).size
    whole, data = (SequenceData(store, Split.TRAIN, 10) for _ in range(2))
    middle = int(np.median(times))
    changed = set(data.begin_at_news(middle, context).tolist())
    assert changed
    for user in data.users.tolist():
        _, own = store.history(user)
        before, now = (n - 3 if n >= 3 else n - 1 for n in (int(sum(own <= middle)), len(own)))
        assert (user in changed) == (now > before), user
        one = np.array([user])
        longest = whole.lengths(one)[0]
        news = now - max(0, before - context)
        assert data.lengths(one)[0] == (min(longest, news) if user in changed else longest)
        batch, targets = data.batch(one)
        assert torch.equal(targets, whole.batch(one)[1][-len(targets) :])
        assert torch.equal(batch.item_ids, whole.batch(one)[0].item_ids[-len(targets) :])


def test_a_continued_run_resumes_to_the_same_numbers(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hstu_xd.errors import Interrupted
    from hstu_xd.training.trainer import Trainer

    store = prepare(write_log(tmp_path / "new.csv", 8, more=later({"films99": "films"})))
    continued = ("--continue-from", str(first / "run"))
    assert train(store, tmp_path / "whole", *continued) == 0

    def stopped(self: Trainer, **options: bool) -> dict[str, Any]:
        raise Interrupted("stopped before anything was saved", 2)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "fit", stopped)
        assert train(store, tmp_path / "half", *continued) == 130
    assert train(store, tmp_path / "half", "--resume") == 0
    one, two = (load_checkpoint(tmp_path / x / "best.safetensors")[0] for x in ("whole", "half"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_continued_run_is_continued_and_loaded_as_any_other(first: Path, tmp_path: Path) -> None:
    second = prepare(write_log(tmp_path / "second.csv", 9))
    third = prepare(write_log(tmp_path / "third.csv", 10))
    assert train(second, tmp_path / "two", "--continue-from", str(first / "run")) == 0
    assert train(third, tmp_path / "three", "--continue-from", str(tmp_path / "two")) == 0
    assert facts(tmp_path / "three")["continues"]["until"] == BEGIN + 60 * 8
    assert hstu_xd.load(tmp_path / "three").catalog.num_items == 10


def test_without_an_optimisers_state_it_begins_anew(
    first: Path, tmp_path: Path, beginnings: list, capsys: pytest.CaptureFixture[str]
) -> None:
    old = shutil.copytree(first / "run", tmp_path / "old")
    (old / "last.safetensors").unlink()
    assert (
        train(
            prepare(write_log(tmp_path / "new.csv", 9)),
            tmp_path / "run",
            "--continue-from",
            str(old),
        )
        == 0
    )
    assert not beginnings[0][1]
    assert "the optimiser's state begins anew" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("binding", "said"),
    [
        ("xd_encoder.tape = False", "xd_encoder.tape = True and cannot continue with False"),
        ("xd_encoder.num_blocks = 3", "xd_encoder.num_blocks = 2 and cannot continue with 3"),
        (
            "xd_train.item_embedding_dim = 16",
            "xd_train.item_embedding_dim = 8 and cannot continue with 16",
        ),
        (
            "xd_train.max_sequence_length = 50",
            "xd_train.max_sequence_length = 100 and cannot continue with 50",
        ),
        ('xd_train.baseline = "popularity"', "counts anew on every store"),
    ],
)
def test_another_model_is_refused_by_the_name_of_the_setting(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], binding: str, said: str
) -> None:
    store = prepare(write_log(tmp_path / "new.csv", 9))
    continued = ("--continue-from", str(first / "run"))
    assert train(store, tmp_path / "run", *continued, bindings=(binding,)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def nothing_new(first: Path, folder: Path) -> tuple[Path, list[str]]:
    return first / "old", ["--continue-from", str(first / "run")]


def no_run(first: Path, folder: Path) -> tuple[Path, list[str]]:
    return first / "old", ["--continue-from", str(folder / "none")]


def both(first: Path, folder: Path) -> tuple[Path, list[str]]:
    return first / "old", ["--continue-from", str(first / "run"), "--resume"]


def moved(first: Path, folder: Path) -> tuple[Path, list[str]]:
    log = write_log(folder / "moved.csv", 8, leave_out="books4", more=later({"books4": "films"}))
    return prepare(log), ["--continue-from", str(first / "run")]


def old_without_its_log(first: Path, folder: Path) -> tuple[Path, list[str]]:
    run = shutil.copytree(first / "run", folder / "old")
    told = facts(run) | {"data": str(folder / "gone")}
    del told["last_time"]
    (run / "run.json").write_text(json.dumps(told))
    return first / "old", ["--continue-from", str(run)]


def cut_in_time(first: Path, folder: Path) -> tuple[Path, list[str]]:
    log = write_log(folder / "new.csv", 8, more=later({"books4": "books"}))
    split = "xd_evaluate.split = 'global'"
    return prepare(log), ["--continue-from", str(first / "run"), "--gin_bindings", split]


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (cut_in_time, "continue with xd_evaluate.split = 'leave-one-out' and without"),
        (nothing_new, "holds nothing to train on that is later than what"),
        (no_run, "not a run folder"),
        (both, "--continue-from begins a new run and --resume goes on with one"),
        (moved, "item 'books4' is of domain 'films' in one catalogue and of 'books' in the other"),
        (old_without_its_log, "does not say up to what time it was trained"),
    ],
)
def test_what_cannot_be_continued_is_refused(
    first: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    case: Callable[[Path, Path], tuple[Path, list[str]]],
    said: str,
) -> None:
    data, more = case(first, tmp_path)
    assert train(data, tmp_path / "run", *more) == 2
    assert said in capsys.readouterr().err


def test_its_settings_alone_are_said_to_do_nothing(
    first: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bindings = (*QUICK, "xd_train.replay_share = 0.5")
    assert train(first / "old", tmp_path / "run", bindings=bindings) == 0
    assert "xd_train.replay_share = 0.5 does nothing without --continue-from" in caplog.text
