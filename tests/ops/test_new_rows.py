"""What a step's new rows read: the loops in C against plain PyTorch, and who is served by which."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from native_marks import needs_compiler
from tiny_models import ITEMS_PER_DOMAIN, NORM_LENGTH, NUM_DOMAINS, SWITCHES, tiny_model
from torch import Tensor

from hstu_xd.model import step_memory
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.ops import first_use
from hstu_xd.ops.first_use import KernelUse
from hstu_xd.serving import EncoderSession

ITEMS = NUM_DOMAINS * ITEMS_PER_DOMAIN
UNCUT = sorted(name for name in SWITCHES if "segment_by" not in SWITCHES[name])
USERS = ["ann", "bob", "cleo", "nobody"]


def pair(name: str, **more: Any) -> dict[str, CrossDomainHSTU]:
    """The same weights, read by loops and by plain PyTorch."""
    plain = tiny_model(**SWITCHES[name] | more, impl="eager").float().eval()
    auto = tiny_model(**SWITCHES[name] | more).float().eval()
    auto.load_state_dict(plain.state_dict())
    return {"eager": plain, "native": auto}


def asked(model: CrossDomainHSTU, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Vectors of users with many, few and no events, after each of several appends."""
    session, found = EncoderSession(model, dtype=dtype), []
    draw = torch.Generator().manual_seed(0)
    times = dict.fromkeys(USERS, 0)
    for events in ((12, 1, 0), (1, 1, 0), (5, 7, 0), (0, 1, 2)):
        users = [user for user, count in zip(USERS, events) for _ in range(count)]
        items = torch.randint(1, 1 + ITEMS, (len(users),), generator=draw).tolist()
        for user, item in zip(users, items):
            times[user] += int(torch.randint(0, 100_000, (), generator=draw))
            session.append([user], [item], [times[user]])
        every = [list(range(NUM_DOMAINS)) * 2] * len(USERS)
        found.append(session.query(USERS, every))
        found.append(session.query(USERS, [0] * len(USERS), [10**7] * len(USERS)))
    return found


@needs_compiler
@pytest.mark.parametrize("name", UNCUT)
def test_loops_read_what_plain_pytorch_reads(name: str) -> None:
    found = {impl: asked(model) for impl, model in pair(name).items()}
    for one, other in zip(found["native"], found["eager"]):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@needs_compiler
def test_memory_in_half_precision_is_read_and_written() -> None:
    found = {impl: asked(model, torch.float16) for impl, model in pair("everything").items()}
    for one, other in zip(found["native"], found["eager"]):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-3)


@needs_compiler
def test_threads_change_no_bit() -> None:
    model = pair("everything")["native"]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = asked(model)
        torch.set_num_threads(2)
        assert all(torch.equal(*both) for both in zip(alone, asked(model)))
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_rows_are_more_than_go_together_and_columns_fill_no_vector() -> None:
    """Sixteen writers and seven readers, beside memories of each length up to two vectors."""
    models = pair("everything")
    for known in range(1, NORM_LENGTH - 16, 3):
        found = {}
        for impl, model in models.items():
            session = EncoderSession(model)
            items = [1 + number * 7 % ITEMS for number in range(known + 15)]
            for first, last in ((0, known), (known, known + 15)):
                some = items[first:last]
                session.append(["ann"] * len(some), some, list(range(first, last)))
                found[impl] = session.query(["ann"], [[0, 1, 2, 2, 1, 0, 1]])
        torch.testing.assert_close(found["native"], found["eager"], rtol=0, atol=1e-5)


@needs_compiler
def test_who_reads_by_loops() -> None:
    settings = pair("everything")["native"].settings
    assert step_memory.loops_suit(settings)
    assert step_memory.loops_suit(replace(settings, impl="native"))
    for other in (
        {"impl": "eager"},
        {"impl": "reference"},
        {"segment_by": "count", "segment_length": 3},
    ):
        assert not step_memory.loops_suit(replace(settings, **other))


@needs_compiler
def test_the_trial_of_the_first_use_holds() -> None:
    for heads, dqk, dv in ((4, 16, 16), (2, 5, 7), (1, 33, 1)):
        cpu = torch.device("cpu")
        use = KernelUse("new_rows", cpu, torch.float32, heads, dqk, dv, True, "native")
        assert first_use._try(use, step_memory._trial) is None
