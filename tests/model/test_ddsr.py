"""DDSR against a loop over tokens, domains and heads; its chunks; the zero it starts as."""

from typing import Any

import pytest
import torch
from state_reading import reads_in_tiles
from torch import Tensor

from hstu_xd.model.ddsr import DynamicDomainState
from hstu_xd.ops.grouping import DomainGrouping
from hstu_xd.ops.state_attention import eager

WIDTH, HEADS, DQK, DV = 6, 2, 3, 4

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"query_target_domain": False, "age_bias": False},
    "three_states": {"states_per_domain": 3},
    "three_states_without_age": {"states_per_domain": 3, "age_bias": False},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
every_size = pytest.mark.parametrize("num_domains", [1, 2, 30])


class Example:
    """Three users, one of them without history, and a module with no parameter at zero."""

    def __init__(self, num_domains: int, **options: Any) -> None:
        generator = torch.Generator().manual_seed(num_domains)
        self.num_domains = num_domains
        self.states_per_domain = options.get("states_per_domain", 1)
        self.offsets = torch.tensor([0, 14, 14, 20])
        self.domains = torch.randint(num_domains, (20,), generator=generator)
        self.targets = torch.randint(num_domains, (20,), generator=generator)
        steps = torch.randint(0, 10_000, (20,), generator=generator)
        self.times = torch.cat([steps[:14].cumsum(0), steps[14:].cumsum(0)])
        self.next_times = self.times + steps.flip(0)
        self.hidden = torch.randn(20, WIDTH, generator=generator).double().requires_grad_()
        self.states = torch.randn(20, WIDTH, generator=generator).double().requires_grad_()
        self.module = DynamicDomainState(WIDTH, num_domains, HEADS, DQK, DV, **options).double()
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def run(self, height: int | None = None) -> Tensor:
        grouping = DomainGrouping.from_jagged(self.domains, self.offsets, self.num_domains)
        reads = reads_in_tiles(
            grouping, self.times, self.next_times, self.states_per_domain, height
        )
        return self.module(self.hidden, self.states, reads, self.targets)

    def gradients(self, height: int | None = None) -> dict[str, Tensor]:
        leaves = dict(self.module.named_parameters())
        leaves |= {"hidden": self.hidden, "states": self.states}
        weights = torch.arange(20 * HEADS * DV).view(20, -1).double().cos()
        found = torch.autograd.grad((self.run(height) * weights).sum(), list(leaves.values()))
        return dict(zip(leaves, found))

    def read(self, token: int) -> tuple[list[Tensor], list[int]]:
        """States that a token reads and the log bucket of the age of each; 128 is never written."""
        start = max(int(s) for s in self.offsets[:-1] if s <= token)
        states, ages = [], []
        initial = self.module.state_dict()["_initial_state"]
        for domain in range(self.num_domains):
            visits = [j for j in range(token, start - 1, -1) if self.domains[j] == domain]
            for visit in visits[: self.states_per_domain]:
                age = max(1, abs(int(self.next_times[token] - self.times[visit])))
                states.append(self.states[visit])
                ages.append(int(torch.tensor(float(age)).log() / 0.301))
            if not visits:
                states.append(initial[domain])
                ages.append(128)
        return states, ages

    def by_loop(self) -> Tensor:
        """C_i = softmax(<Wq h_i, Wk S_i[s]> / sqrt(dqk) + age bias) Wv S_i[s], head by head."""
        weight = self.module.state_dict()
        out = torch.zeros(20, HEADS * DV).double()
        for token in range(20):
            query = weight["_query.weight"] @ self.hidden[token]
            if "_target_emb.weight" in weight:
                query = query + weight["_target_emb.weight"][self.targets[token]]
            states, ages = self.read(token)
            for head in range(HEADS):
                narrow = slice(head * DQK, (head + 1) * DQK)
                wide = slice(head * DV, (head + 1) * DV)
                scores = [query[narrow] @ (weight["_key.weight"] @ s)[narrow] for s in states]
                scores = torch.stack(scores) / DQK**0.5
                if "_age_w" in weight:
                    scores = scores + weight["_age_w"][ages, head]
                values = torch.stack([(weight["_value.weight"] @ s)[wide] for s in states])
                out[token, wide] = scores.softmax(0) @ values
        return out


@every_option
@every_size
@pytest.mark.parametrize("height", [None, 1, 4, 13, 14, 15])
def test_equals_a_loop(num_domains: int, options: dict[str, Any], height: int | None) -> None:
    example = Example(num_domains, **options)
    torch.testing.assert_close(example.run(height), example.by_loop(), rtol=1e-12, atol=1e-12)


@every_option
@pytest.mark.parametrize("tiles_a_chunk", [1, 2, 6])
def test_chunks_change_nothing(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], tiles_a_chunk: int
) -> None:
    """The path for hundreds of domains, taken here with a handful and seven tiles of three."""
    example = Example(5, **options)
    whole, gradients = example.run(3), example.gradients(3)
    keys = 5 * example.states_per_domain + 3
    floats = HEADS * keys * (2 * (DQK + DV) + 3 * 3) * tiles_a_chunk
    monkeypatch.setattr(eager, "_CHUNK_FLOATS", floats)
    calls: list[int] = []
    attend = eager._attend

    def counted(queries: Tensor, *rest: Any) -> Tensor:
        calls.append(len(queries))
        return attend(queries, *rest)

    monkeypatch.setattr(eager, "_attend", counted)
    torch.testing.assert_close(example.run(3), whole, rtol=1e-12, atol=1e-12)
    assert max(calls) == tiles_a_chunk
    assert sum(calls) == 7
    for name, gradient in example.gradients(3).items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-12, atol=1e-12, msg=name)


@every_option
def test_zero_at_the_start(options: dict[str, Any]) -> None:
    example = Example(4, **options)
    example.module = DynamicDomainState(WIDTH, 4, HEADS, DQK, DV, **options).double()
    assert torch.equal(example.run(), torch.zeros(20, HEADS * DV).double())


def test_users_share_no_states() -> None:
    example = Example(3)
    before = example.run()
    with torch.no_grad():
        example.states[:14] += 1
    after = example.run()
    assert torch.equal(after[14:], before[14:])
    assert not torch.equal(after[:14], before[:14])


def test_only_the_last_state_of_a_domain_is_read() -> None:
    example = Example(2)
    before = example.run()
    domains = example.domains[:14].tolist()
    overwritten = [i for i in range(13) if domains[i] in domains[i + 1 :]]
    with torch.no_grad():
        example.states[overwritten] += 1
    assert torch.equal(example.run()[13], before[13])


def test_the_future_is_not_seen() -> None:
    example = Example(3)
    before = example.run()
    with torch.no_grad():
        example.states[8:14] += 1
        example.hidden[8:14] += 1
    after = example.run()
    assert torch.equal(after[:8], before[:8])
    assert torch.equal(after[14:], before[14:])
    assert not torch.equal(after[8:14], before[8:14])


@every_option
@pytest.mark.parametrize("offsets", [[0], [0, 0, 0]])
def test_no_tokens(options: dict[str, Any], offsets: list[int]) -> None:
    example = Example(3, **options)
    example.domains = example.targets = example.times = example.next_times = example.domains[:0]
    example.hidden = example.states = torch.zeros(0, WIDTH).double().requires_grad_()
    example.offsets = torch.tensor(offsets)
    answer = example.run()
    assert answer.shape == (0, HEADS * DV)
    answer.sum().backward()
    assert not any(p.grad is None or p.grad.any() for p in example.module.parameters())
