"""Asking positions for other domains: what is asked, that no label leaks, and what it adds."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quick_runs import QUICK
from test_loss import NothingIsReadBack
from tiny_models import EVERYTHING, NUM_DOMAINS, draw_histories, tiny_model, to_batch
from torch import Tensor

from hstu_xd.batch import AskedEvents, JaggedBatch, Questions
from hstu_xd.cli import app
from hstu_xd.data.batches import SequenceData, Split
from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.objectives import retrieval
from hstu_xd.objectives.asking import OtherDomains, next_in_domains
from hstu_xd.objectives.retrieval import Retrieval, sample_negatives
from hstu_xd.objectives.sampled_softmax import count_per_domain, sampled_softmax_loss
from hstu_xd.training import run as runs
from hstu_xd.training.settings import load_settings

ALL = 100
BATCH = to_batch(draw_histories([20, 1, 24, 0, 7, 13], seed=5))
# Items of the domains that tokens predict: tiny catalogues number domains in turn.
TARGETS = BATCH.target_domains + 1 + NUM_DOMAINS * (torch.arange(len(BATCH.item_ids)) % 8)


def generator(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def asked_of(others: OtherDomains, *, seed: int = 7) -> AskedEvents:
    return others.ask(BATCH, TARGETS, NUM_DOMAINS, generator(seed))


def as_rows(asked: AskedEvents) -> list[tuple[int, int, int, int]]:
    """(token, domain asked for, time asked for, item that answers) of every question."""
    questions = asked.questions
    columns = questions.rows, questions.target_domains, questions.timestamps, asked.targets
    return list(zip(*(column.tolist() for column in columns)))


def expected_rows(within_events: int, within_time: int) -> list[tuple[int, int, int, int]]:
    """The same of all that may be asked, by the definition."""
    domains, times = BATCH.target_domains.tolist(), BATCH.next_timestamps.tolist()
    rows = []
    for begin, end in zip(BATCH.offsets.tolist(), BATCH.offsets.tolist()[1:]):
        for row in range(begin, end):
            for domain in set(range(NUM_DOMAINS)) - {domains[row]}:
                later = [token for token in range(row, end) if domains[token] == domain]
                if not later or (within_events and later[0] - row + 1 > within_events):
                    continue
                passed = times[later[0]] - int(BATCH.timestamps[row])
                if not within_time or passed <= within_time:
                    rows.append((row, domain, times[later[0]], int(TARGETS[later[0]])))
    return rows


@pytest.mark.parametrize("within_events", [0, 1, 2, 5])
@pytest.mark.parametrize("within_time", [0, 60_000])
def test_the_answer_is_the_next_event_of_the_domain(within_events: int, within_time: int) -> None:
    asked = asked_of(OtherDomains(ALL, 1.0, within_events, within_time))
    rows = expected_rows(within_events, within_time)
    assert sorted(as_rows(asked)) == sorted(rows)
    assert bool(rows) == (within_events != 1)  # the first event is the position's own target
    counts = torch.bincount(asked.questions.target_domains, minlength=NUM_DOMAINS)
    assert asked.targets_per_domain == tuple(counts.tolist())


def test_what_comes_next_ends_with_the_history() -> None:
    batch = replace(
        BATCH, target_domains=torch.tensor([1, 0, 1, 0]), offsets=torch.tensor([0, 2, 2, 4])
    )
    assert next_in_domains(batch, 2).tolist() == [[1, 1, 3, 3], [0, 4, 2, 4]]


def test_fewer_domains_than_come_again_are_drawn() -> None:
    everything = set(expected_rows(0, 0))
    several = {row[0] for row in everything if sum(r[0] == row[0] for r in everything) > 1}
    drawn = [as_rows(asked_of(OtherDomains(1), seed=seed)) for seed in range(40)]
    for rows in drawn:
        tokens = [row[0] for row in rows]
        assert len(tokens) == len(set(tokens))
        assert set(tokens) == {row[0] for row in everything}
        assert set(rows) <= everything
    assert as_rows(asked_of(OtherDomains(1), seed=3)) == drawn[3]
    assert sorted(drawn[0]) != sorted(drawn[1])
    # A fair coin of 40 * len(several) tosses, to five standard deviations.
    smaller = {t: min(r[1] for r in everything if r[0] == t) for t in several}
    heads = sum(row[1] == smaller[row[0]] for rows in drawn for row in rows if row[0] in several)
    tosses = 40 * len(several)
    assert abs(heads - tosses / 2) < 2.5 * tosses**0.5


def test_several_processes_ask_what_one_would() -> None:
    """And draw as much from the step's generator, or their negatives would differ."""
    whole, halves = asked_of(OtherDomains(1)), []
    middle = int(BATCH.offsets[3])
    for part, offsets in (
        (slice(0, middle), BATCH.offsets[:4]),
        (slice(middle, None), BATCH.offsets[3:] - middle),
    ):
        batch = JaggedBatch(
            BATCH.item_ids[part],
            BATCH.timestamps[part],
            BATCH.next_timestamps[part],
            BATCH.target_domains[part],
            offsets,
        )
        step = generator()
        asked = OtherDomains(1).ask(batch, TARGETS[part], NUM_DOMAINS, step)
        halves += [(row + part.start, *rest) for row, *rest in as_rows(asked)]
        left = generator()
        torch.randint(2**62, (), generator=left)
        assert torch.equal(step.get_state(), left.get_state())
    assert sorted(halves) == sorted(as_rows(whole))


def test_the_loss_is_the_sum_of_both_kinds_of_targets() -> None:
    model = tiny_model(**EVERYTHING)
    found = Retrieval("domain", 5, 0.1, OtherDomains(1, 0.25)).loss(
        model, BATCH, TARGETS, step := generator()
    )
    same = generator()
    asked = OtherDomains(1).ask(BATCH, TARGETS, NUM_DOMAINS, same)
    negatives = sample_negatives(model.catalog, 5, same, scope="domain")
    assert torch.equal(step.get_state(), same.get_state())
    vectors = model(BATCH, questions=asked.questions)
    own, others = vectors.split([len(TARGETS), len(asked.targets)])
    torch.testing.assert_close(own, model(BATCH), rtol=0, atol=1e-6)  # questions leave no trace
    losses = [
        sampled_softmax_loss(model, users, items, negatives, temperature=0.1)
        for users, items in ((own, TARGETS), (others, asked.targets))
    ]
    assert found.item() == pytest.approx((losses[0] + 0.25 * losses[1]).item(), rel=1e-6)


def test_nothing_is_asked_unless_it_is_wanted() -> None:
    model = tiny_model(**EVERYTHING)
    batch = Retrieval().prepare(model.catalog, BATCH, TARGETS, step := generator())
    assert batch is BATCH
    assert torch.equal(step.get_state(), generator().get_state())


def test_questions_that_nothing_answers_cost_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model, alike = tiny_model(), replace(BATCH, target_domains=BATCH.target_domains * 0)
    vectors = model(alike)
    monkeypatch.setattr(model, "forward", lambda batch: vectors)
    found = Retrieval(others=OtherDomains(1)).loss(model, alike, TARGETS * 0 + 1, generator())
    assert found.item() > 0


def test_a_step_with_questions_waits_for_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for its encoder; the host has prepared the batch."""
    model, objective = tiny_model(), Retrieval(others=OtherDomains(1))
    counts = count_per_domain(BATCH.target_domains, NUM_DOMAINS)
    batch = replace(BATCH, targets_per_domain=tuple(counts))
    batch = objective.prepare(model.catalog, batch, TARGETS, generator())
    assert batch.asked is not None
    vectors = model(batch, questions=batch.asked.questions).detach().requires_grad_()
    monkeypatch.setattr(model, "forward", lambda batch, questions: vectors)
    with NothingIsReadBack():
        objective.loss(model, batch, TARGETS, generator()).backward()
    assert vectors.grad is not None


def test_a_batch_takes_its_questions_to_another_device() -> None:
    batch = Retrieval(others=OtherDomains(1)).prepare(
        tiny_model().catalog, BATCH, TARGETS, generator()
    )
    moved = batch.to(torch.device("meta")).asked
    assert moved is not None
    tensors = [moved.targets, *vars(moved.questions).values()]
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert batch.asked is not None
    assert moved.targets_per_domain == batch.asked.targets_per_domain


@pytest.mark.parametrize("max_length", [4, 100])
def test_every_label_is_of_the_users_training_part(
    store: InteractionStore, max_length: int
) -> None:
    data = SequenceData(store, Split.TRAIN, max_length)
    domains = store.catalog.item_domains
    found = 0
    for user in data.users[:60]:
        items, times = store.history(int(user))
        batch, targets = data.batch(np.array([user]))
        asked = OtherDomains(ALL).ask(batch, targets, store.num_domains, generator())
        first = len(items) - 3 - len(targets)
        for row, domain, time, item in as_rows(asked):
            later = range(first + row + 1, len(items) - 2)  # the last two events are held out
            event = next(i for i in later if domains[int(items[i])] == domain)
            assert (item, time) == (items[event], times[event])
            found += 1
    assert found > 100


@pytest.fixture
def held_out_store(tmp_path: Path) -> Path:
    """Users whose validation and test events are of domains and of items met nowhere else."""
    lines = ["user_id,item_id,domain,timestamp"]
    for user in range(40):
        events = [
            (f"{'ab'[(user + i) % 2]}{(user * i) % 7}", "ab"[(user + i) % 2]) for i in range(9)
        ]
        events += [(f"v{user % 5}", "valid"), (f"t{user % 5}", "test")]
        lines += [f"u{user},{item},{domain},{time}" for time, (item, domain) in enumerate(events)]
    log = tmp_path / "log.csv"
    log.write_text("\n".join(lines) + "\n")
    assert app.run(["prepare", str(log), "--out", str(tmp_path / "held_out")]) == 0
    return tmp_path / "held_out"


@pytest.mark.parametrize("count", [1, ALL])
def test_no_training_step_is_given_a_held_out_event(
    held_out_store: Path, tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Tensor] = []
    asked: list[Questions] = []
    loss: Callable[..., Any] = retrieval.sampled_softmax_loss
    ask = OtherDomains.ask

    def noting_loss(model: Any, users: Tensor, items: Tensor, *rest: Any, **named: Any) -> Tensor:
        given.append(items)
        return loss(model, users, items, *rest, **named)

    def noting_ask(*arguments: Any) -> AskedEvents:
        found = ask(*arguments)
        asked.append(found.questions)
        return found

    monkeypatch.setattr(retrieval, "sampled_softmax_loss", noting_loss)
    monkeypatch.setattr(OtherDomains, "ask", noting_ask)
    settings = load_settings([], [*QUICK, f"xd_train.asked_domains = {count}"])
    summary = runs.train(held_out_store, settings, tmp_path / "run")
    assert summary["valid"]["count"] == 40
    catalog = InteractionStore.open(held_out_store).catalog
    held_out = {catalog.domain_names.index(name) for name in ("valid", "test")}
    assert len(given) == len(asked) > 0
    trained = {int(d) for items in given for d in catalog.domain_of(items)}
    assert trained == set(range(4)) - held_out
    assert {int(d) for q in asked for d in q.target_domains} == set(range(4)) - held_out


def test_a_run_that_asks_says_so_in_its_name(store_path: Path, tmp_path: Path) -> None:
    settings = load_settings([], [*QUICK, "xd_train.asked_domains = 2"])
    summary = runs.train(store_path, settings, tmp_path / "run")
    assert runs.read_run(tmp_path / "run")["variant_name"].endswith(" + 2 other domains asked")
    assert app.run(["evaluate", str(tmp_path / "run")]) == 0
    # Ranking asks for the requested domain alone, as without.
    assert summary["test"].keys() == summary["valid"].keys()


def test_one_domain_leaves_nothing_to_ask(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    line = ["synth", "--out", str(tmp_path / "one"), "--users", "40", "--domains", "1"]
    assert app.run([*line, "--items-per-domain", "30"]) == 0
    settings = load_settings([], [*QUICK, "xd_train.asked_domains = 1"])
    with caplog.at_level(logging.WARNING):
        runs.train(tmp_path / "one", settings, tmp_path / "run")
    assert "xd_train.asked_domains = 1 does nothing: the data have one domain" in caplog.text


def test_softmax_attention_cannot_be_asked() -> None:
    bindings = ["xd_train.asked_domains = 1", 'xd_encoder.normalization = "softmax"']
    with pytest.raises(InputError, match=r"asked_domains = 1 needs .* 'silu', got 'softmax'"):
        load_settings([], bindings)


def test_details_of_no_question_do_nothing(caplog: pytest.LogCaptureFixture) -> None:
    load_settings([], ["xd_train.asked_domains = 1", "xd_train.asked_weight = 0.5"])
    assert not caplog.records
    load_settings([], ["xd_train.asked_weight = 0.5"])
    assert (
        "xd_train.asked_weight = 0.5 does nothing while xd_train.asked_domains is 0" in caplog.text
    )


def test_a_horizon_that_leaves_nothing_to_ask_is_refused() -> None:
    bindings = ["xd_train.asked_domains = 1", "xd_train.asked_within_events = 1"]
    with pytest.raises(InputError, match=r"asked_within_events = 1 leaves nothing to ask.* 2, or"):
        load_settings([], bindings)
