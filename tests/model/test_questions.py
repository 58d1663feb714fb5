"""Questions to a batch: each equals a history of its own, and leaves all events as they were."""

from typing import Any

import pytest
import torch
from tiny_models import (
    NUM_DOMAINS,
    SWITCHES,
    History,
    draw_histories,
    hidden_states,
    tiny_model,
    to_batch,
)
from torch import Tensor

from hstu_xd.batch import Questions
from hstu_xd.errors import InputError
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.ops.grouping import num_pairs

HISTORIES = draw_histories([20, 1, 24, 0, 7, 13], seed=3)
BATCH = to_batch(HISTORIES)
NUM_EVENTS = len(BATCH.item_ids)
EVERY_CASE = SWITCHES | {
    "lookback": SWITCHES["history_tokens_and_everything"] | {"segment_lookback": 1},
    "sessions_and_target_view": SWITCHES["history_tokens_of_domains"] | {"target_view_heads": 2},
}
every_case = pytest.mark.parametrize("name", EVERY_CASE)


def drawn_questions(number: int, seed: int = 0) -> Questions:
    """Of random events in random order, some asked several times and some not at all."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randint(NUM_EVENTS, (number,), generator=random)
    later = torch.randint(100_000, (number,), generator=random)
    return Questions(
        rows=rows,
        target_domains=torch.randint(NUM_DOMAINS, (number,), generator=random),
        timestamps=BATCH.timestamps[rows] + later,
    )


def history_until(questions: Questions, number: int) -> History:
    """What a question is a shorthand for: the history up to its event, and its request."""
    row = int(questions.rows[number])
    user = int(torch.searchsorted(BATCH.offsets, row, right=True)) - 1
    length = row - int(BATCH.offsets[user]) + 1
    return History(
        HISTORIES[user].items[:length],
        HISTORIES[user].times[:length],
        int(questions.target_domains[number]),
        int(questions.timestamps[number]),
    )


def encoded_apart(model: CrossDomainHSTU, questions: Questions) -> Tensor:
    """Vectors of the questions, each by a history of its own."""
    histories = [history_until(questions, number) for number in range(len(questions.rows))]
    batch = to_batch(histories)
    return model(batch)[batch.offsets[1:] - 1]


@every_case
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_question_equals_the_history_up_to_it(name: str, impl: str) -> None:
    model, questions = tiny_model(impl=impl, **EVERY_CASE[name]), drawn_questions(90)
    with torch.no_grad():
        alone, apart = model(BATCH), encoded_apart(model, questions)
        events, asked = model(BATCH, questions=questions).split([NUM_EVENTS, 90])
    torch.testing.assert_close(asked, apart, rtol=0, atol=1e-5)
    torch.testing.assert_close(events, alone, rtol=0, atol=1e-6)


@every_case
def test_in_double_precision_nothing_is_left_of_the_difference(name: str) -> None:
    model = tiny_model(**EVERY_CASE[name]).double()
    questions = drawn_questions(40, seed=1)
    histories = [history_until(questions, number) for number in range(40)]
    apart_batch = to_batch(histories)
    with torch.no_grad():
        apart = hidden_states(model, apart_batch)[apart_batch.offsets[1:] - 1]
        kept: list[Tensor] = []
        hook = model.get_submodule("_hstu").register_forward_hook(
            lambda _module, _inputs, output: kept.append(output)
        )
        model(BATCH, questions=questions)
        hook.remove()
        events = hidden_states(model, BATCH)
    torch.testing.assert_close(kept[0], torch.cat([events, apart]), rtol=1e-10, atol=1e-10)


def test_the_event_asked_as_it_is_answers_the_same() -> None:
    model = tiny_model(**SWITCHES["everything"])
    questions = Questions(torch.arange(NUM_EVENTS), BATCH.target_domains, BATCH.next_timestamps)
    with torch.no_grad():
        events, asked = model(BATCH, questions=questions).chunk(2)
    torch.testing.assert_close(asked, events, rtol=0, atol=1e-5)


@every_case
def test_questions_do_not_see_one_another(name: str) -> None:
    """Half of them are answered as all of them are, and none costs the events a pair."""
    model, questions = tiny_model(**EVERY_CASE[name]), drawn_questions(60)
    half = Questions(*(x[::2] for x in vars(questions).values()))
    with torch.no_grad():
        every, some = (model(BATCH, questions=x)[NUM_EVENTS:] for x in (questions, half))
    torch.testing.assert_close(some, every[::2], rtol=0, atol=1e-5)


def test_pairs_are_those_of_the_histories() -> None:
    """A question costs the pairs of its own row, no more: nothing hidden is computed."""
    model, questions = tiny_model(**SWITCHES["mask"]), drawn_questions(60)

    def pairs(asked: Questions | None) -> int:
        (view,) = model.rows(BATCH, asked).views(0)
        return sum(map(num_pairs, view.groupings))

    domains = model.catalog.domain_of(BATCH.item_ids)
    read = 0
    for row in questions.rows.tolist():
        first = int(BATCH.offsets[BATCH.offsets <= row][-1])
        read += int((domains[first : row + 1] == domains[row]).sum())
    assert pairs(questions) == pairs(None) + read


@pytest.mark.parametrize("name", ["everything", "history_tokens_and_everything"])
def test_gradients_are_those_of_the_histories(name: str) -> None:
    model, questions = tiny_model(**SWITCHES[name]).double(), drawn_questions(30)
    random = torch.Generator().manual_seed(4)
    weights = torch.randn(30, 16, generator=random)

    def gradients(vectors: Tensor) -> dict[str, Tensor | None]:
        names, leaves = zip(*model.named_parameters())
        found = torch.autograd.grad((vectors * weights).sum(), leaves, allow_unused=True)
        return dict(zip(names, found))

    expected = gradients(encoded_apart(model, questions))
    for key, found in gradients(model(BATCH, questions=questions)[NUM_EVENTS:]).items():
        truth = expected[key]
        assert found is not None
        assert truth is not None
        # Vectors are cut to float32 before the loss.
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5, msg=key)


def test_no_question_is_no_row_more() -> None:
    model, nothing = tiny_model(**SWITCHES["everything"]), torch.zeros(0, dtype=torch.int64)
    with torch.no_grad():
        found = model(BATCH, questions=Questions(nothing, nothing, nothing))
        torch.testing.assert_close(found, model(BATCH), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("switches", "changes", "message"),
    [
        ({"normalization": "softmax"}, {}, "questions need normalization='silu', got 'softmax'"),
        (
            {},
            {"rows": torch.tensor([NUM_EVENTS])},
            rf"questions.rows holds .*; 0..{NUM_EVENTS - 1}",
        ),
        ({}, {"target_domains": torch.tensor([-1])}, "questions.target_domains holds -1..-1"),
        ({}, {"timestamps": torch.tensor([1, 2])}, r"questions.timestamps is .* shape \(2,\)"),
        ({}, {"timestamps": torch.tensor([1.0])}, "questions.timestamps is torch.float32"),
    ],
)
def test_questions_that_cannot_be(
    switches: dict[str, Any], changes: dict[str, Tensor], message: str
) -> None:
    given = {name: torch.tensor([0]) for name in ("rows", "target_domains", "timestamps")}
    with pytest.raises(InputError, match=message):
        tiny_model(**switches)(BATCH, questions=Questions(**(given | changes)))
