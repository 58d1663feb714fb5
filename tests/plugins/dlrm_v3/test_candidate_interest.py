"""What shown events say of candidates, against the package's own interest modules one by one."""

import pytest
import torch
from torch import Tensor, nn

from hstu_xd.interest import InterestSettings
from hstu_xd.interest.positions import gap_buckets
from hstu_xd.plugins.dlrm_v3.candidate_interest import CandidateInterest

WIDTH, MOST = 6, 9
SETTINGS = {
    "tin": InterestSettings(),
    "tin, goals": InterestSettings(goal_positions="additive"),
    "stacked": InterestSettings(order=3),
    "dense": InterestSettings(order=2, form="dense"),
    "no places": InterestSettings(rank_encoding=False, gap_encoding=False, target_product=False),
    "din": InterestSettings(kind="din", hidden=5),
    "hstu": InterestSettings(kind="hstu"),
    "mean": InterestSettings(kind="mean"),
}
every_kind = pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))

NUM_EVENTS, NUM_CANDIDATES = torch.tensor([4, 0, 9, 1]), torch.tensor([2, 3, 1, 4])


def module(settings: InterestSettings) -> CandidateInterest:
    torch.manual_seed(1)
    return CandidateInterest(WIDTH, settings, most_events=MOST, num_goals=3).double()


def moved(interest: CandidateInterest) -> CandidateInterest:
    """With every parameter large."""
    for parameter in interest.parameters():
        nn.init.normal_(parameter)
    return interest


def inputs(seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shown, asked = int(NUM_EVENTS.sum()), int(NUM_CANDIDATES.sum())
    requests = torch.tensor([10**6, 2 * 10**6, 10**7, 3])
    before = torch.randint(0, 9 * 10**5, (shown,), generator=draw)
    return {
        "events": torch.randn(shown, WIDTH, generator=draw, dtype=torch.float64),
        "event_times": torch.cat([before[:4].sort()[0], before[4:13].sort()[0], torch.tensor([2])]),
        "num_events": NUM_EVENTS,
        "candidates": torch.randn(asked, WIDTH, generator=draw, dtype=torch.float64),
        "request_times": requests.repeat_interleave(NUM_CANDIDATES),
        "num_candidates": NUM_CANDIDATES,
        "goals": torch.tensor([2, 0, 1, -1]),
    }


def one_by_one(interest: CandidateInterest, given: dict[str, Tensor]) -> Tensor:
    """The definition: each candidate alone before the events of its request, latest first."""
    found = []
    per_request = zip(
        given["events"].split(NUM_EVENTS.tolist()),
        given["event_times"].split(NUM_EVENTS.tolist()),
        given["candidates"].split(NUM_CANDIDATES.tolist()),
        given["request_times"].split(NUM_CANDIDATES.tolist()),
        given["goals"].split(1),
    )
    for events, times, candidates, asked_at, goal in per_request:
        for candidate in candidates:
            seen = interest.norm(events.flip(0))[None]
            buckets = gap_buckets((asked_at[0] - times.flip(0)).clamp(min=1))[None]
            there = torch.ones(buckets.shape, dtype=torch.bool)
            read = interest.read(interest.norm(candidate)[None, None], seen, there, buckets, goal)
            found.append(interest.last(read)[0, 0])
    return torch.stack(found)


@every_kind
def test_every_candidate_is_read_as_if_alone(settings: InterestSettings) -> None:
    interest, given = moved(module(settings)), inputs()
    expected = one_by_one(interest, given)
    torch.testing.assert_close(interest(**given), expected, rtol=0, atol=1e-12)
    assert expected.abs().min() > 0
    assert len({tuple(row) for row in expected.tolist()}) == len(expected)


@every_kind
def test_it_is_zero_at_first_and_learns(settings: InterestSettings) -> None:
    interest, given = module(settings), inputs()
    added = interest(**given)
    assert torch.equal(added, torch.zeros_like(added))
    (added - 1).square().sum().backward()
    assert interest.last.weight.grad.abs().min() > 0
    interest.zero_grad()
    (moved(interest)(**given) - 1).square().sum().backward()
    unmoved = [n for n, p in interest.named_parameters() if p.grad is None or not p.grad.any()]
    assert unmoved == []


@every_kind
def test_gradients_are_those_of_differences(settings: InterestSettings) -> None:
    interest, given = moved(module(settings)), inputs()
    given["events"].requires_grad_()
    given["candidates"].requires_grad_()

    def read(events: Tensor, candidates: Tensor) -> Tensor:
        return interest(**given | {"events": events, "candidates": candidates})

    assert torch.autograd.gradcheck(read, (given["events"], given["candidates"]))


def test_goals_that_nobody_tells_are_unknown_ones() -> None:
    interest, given = moved(module(SETTINGS["tin, goals"])), inputs()
    untold = interest(**given | {"goals": None})
    assert torch.equal(untold, interest(**given | {"goals": torch.full((4,), -1)}))
    assert not torch.equal(untold, interest(**given))


def test_an_event_at_the_time_of_its_request_is_one_of_just_before() -> None:
    interest, given = moved(module(SETTINGS["tin"])), inputs()
    times = given["event_times"].clone()
    times[-1] = 3
    assert torch.equal(interest(**given | {"event_times": times}), interest(**given))
    times[-1] = -60
    assert not torch.equal(interest(**given | {"event_times": times}), interest(**given))


@every_kind
def test_a_batch_without_any_event_is_read(settings: InterestSettings) -> None:
    given = inputs()
    nothing = {
        "events": given["events"][:0],
        "event_times": given["event_times"][:0],
        "num_events": torch.zeros(4, dtype=torch.int64),
    }
    interest = moved(module(settings))
    found = interest(**given | nothing)
    # As the candidates of the second request, which has none beside others that have some.
    torch.testing.assert_close(found[2:5], interest(**given)[2:5], rtol=0, atol=1e-12)
    assert found.isfinite().all()
