"""What a prediction may depend on, at the level of the whole model and for every switch."""

import pytest
import torch
from tiny_models import (
    SWITCHES,
    History,
    domain_of,
    draw_histories,
    encode,
    other_item,
    tiny_model,
    to_batch,
)

HISTORIES = draw_histories([20, 1, 7, 13])
USER = HISTORIES[0]
START_OF_NEXT_USER = len(USER.items)

every_switch = pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)


def outputs(user: History, switches: dict) -> torch.Tensor:
    """Vectors of all tokens, with another history of the first user."""
    model = tiny_model(**switches)
    with torch.no_grad():
        return model(to_batch([user, *HISTORIES[1:]]))


@every_switch
@pytest.mark.parametrize("position", [1, 9, 19])
def test_a_future_item_is_not_seen(switches: dict, position: int) -> None:
    """Nor is the item to predict: a token knows its domain and time, never the item itself."""
    changed = USER.with_item(position, other_item(USER.items[position]))
    assert domain_of(changed.items[position]) == domain_of(USER.items[position])
    before, after = outputs(USER, switches), outputs(changed, switches)
    assert torch.equal(after[:position], before[:position])
    assert not torch.equal(after[position], before[position])
    assert torch.equal(after[START_OF_NEXT_USER:], before[START_OF_NEXT_USER:])


@every_switch
def test_a_future_event_of_another_domain_is_not_seen(switches: dict) -> None:
    """Only the token before it learns of the new domain and time: they are its request."""
    item = next(i for i in (1, 2, 3) if domain_of(i) != domain_of(USER.items[10]))
    times = (*USER.times[:10], USER.times[9] + 3, *USER.times[11:])
    changed = History(USER.with_item(10, item).items, times, 0, USER.request_time)
    before, after = outputs(USER, switches), outputs(changed, switches)
    torch.testing.assert_close(after[:9], before[:9], rtol=1e-6, atol=1e-6)
    rest = slice(START_OF_NEXT_USER, None)
    torch.testing.assert_close(after[rest], before[rest], rtol=1e-6, atol=1e-6)


def change_domain(domain: int) -> History:
    """The first user with every item of one domain exchanged for another of that domain."""
    items = tuple(other_item(i) if domain_of(i) == domain else i for i in USER.items)
    return History(items, USER.times, USER.request_domain, USER.request_time)


@pytest.mark.parametrize(
    "switches",
    [
        {"domain_mask": True},
        {"domain_mask": True, "tape": True},
        {"domain_mask": True, "tape": True, "target_domain_embedding": True},
    ],
    ids=["mask", "mask_tape", "mask_tape_target_domain_embedding"],
)
@pytest.mark.parametrize("domain", [0, 1, 2])
def test_another_domain_is_not_seen_under_the_mask(switches: dict, domain: int) -> None:
    elsewhere = [i for i, item in enumerate(USER.items) if domain_of(item) != domain]
    before, after = outputs(USER, switches), outputs(change_domain(domain), switches)
    assert torch.equal(after[elsewhere], before[elsewhere])


SEES_OTHER_DOMAINS = [
    name
    for name, switches in SWITCHES.items()
    if (not switches.get("domain_mask") or {"ddsr", "full_attention_layers"} & set(switches))
    and name != "segments_alone"  # its events of before are gone
]


@pytest.mark.parametrize("name", SEES_OTHER_DOMAINS)
def test_another_domain_is_seen_where_it_should_be(name: str) -> None:
    first = next(i for i, item in enumerate(USER.items) if domain_of(item) == 1)
    later = [i for i, item in enumerate(USER.items) if i > first and domain_of(item) != 1]
    before, after = outputs(USER, SWITCHES[name]), outputs(change_domain(1), SWITCHES[name])
    assert (after[later] != before[later]).any(dim=1).all()


@pytest.mark.parametrize("name", ["target_view", "target_view_all_heads"])
def test_the_target_view_opens_the_target_domain(name: str) -> None:
    """Item ids give the domains 1 1 0 2 0 2 0 1: token 6 is the first elsewhere to aim at 1."""
    model = tiny_model(**SWITCHES[name])
    times = tuple(range(0, 800, 100))
    user = History((2, 5, 1, 3, 4, 6, 7, 8), times, 0, 900)
    assert [domain_of(item) for item in user.items] == [1, 1, 0, 2, 0, 2, 0, 1]
    before = model(to_batch([user]))
    after = model(to_batch([user.with_item(0, other_item(2))]))
    assert torch.equal(after[2:6], before[2:6])
    assert not torch.equal(after[6], before[6])


@every_switch
def test_a_user_alone_equals_the_user_in_a_batch(switches: dict) -> None:
    model = tiny_model(**switches)
    together = encode(model, HISTORIES)
    for row, history in enumerate(HISTORIES):
        alone = encode(model, [history])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-6, atol=1e-6)


@every_switch
def test_the_order_of_users_does_not_matter(switches: dict) -> None:
    model = tiny_model(**switches)
    forward, backward = encode(model, HISTORIES), encode(model, HISTORIES[::-1])
    torch.testing.assert_close(backward.flip(0), forward, rtol=1e-6, atol=1e-6)


@every_switch
def test_padding_does_not_matter(switches: dict) -> None:
    model = tiny_model(**switches)
    assert torch.equal(encode(model, HISTORIES, padded=24), encode(model, HISTORIES, padded=20))


@every_switch
def test_serving_equals_training(switches: dict) -> None:
    """A request for the next event's domain and time gives the vector that training saw there."""
    model = tiny_model(**switches)
    trained = model(to_batch([USER]))
    prefixes = [USER.before(n, domain_of(USER.items[n])) for n in range(1, 20)]
    served = encode(model, [*prefixes, USER])
    torch.testing.assert_close(served, trained, rtol=1e-5, atol=1e-6)


@every_switch
def test_both_implementations_agree(switches: dict) -> None:
    reference, eager = (
        encode(tiny_model(impl=impl, **switches), HISTORIES) for impl in ("reference", "eager")
    )
    torch.testing.assert_close(eager, reference, rtol=1e-5, atol=1e-6)


@every_switch
def test_the_same_bits_on_every_run(switches: dict) -> None:
    model = tiny_model(**switches)
    assert torch.equal(encode(model, HISTORIES), encode(model, HISTORIES))


def test_a_batch_may_hold_users_without_history() -> None:
    model = tiny_model(**SWITCHES["everything"])
    empty = History((), (), 0, 0)
    with_gaps = model(to_batch([empty, HISTORIES[0], empty, HISTORIES[1], empty]))
    without = model(to_batch(HISTORIES[:2]))
    torch.testing.assert_close(with_gaps, without, rtol=1e-6, atol=1e-6)
    assert model(to_batch([empty, empty])).shape == (0, 16)
    assert model(to_batch([])).shape == (0, 16)


def test_the_requested_domain_changes_the_answer() -> None:
    model = tiny_model(**SWITCHES["everything"])
    asked = [History(USER.items, USER.times, d, USER.request_time) for d in (0, 1, 2)]
    vectors = encode(model, asked)
    assert not torch.allclose(vectors[0], vectors[1])
    assert not torch.allclose(vectors[1], vectors[2])
