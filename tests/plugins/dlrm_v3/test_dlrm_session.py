"""A session over the production path's model: every answer equals that of the whole model."""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dlrm_runs import Run, process_of
from generative_recommenders.common import HammerKernel
from generative_recommenders.dlrm_v3.configs import get_hstu_configs
from torch import Tensor

from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.plugins.bridge import free_port
from hstu_xd.plugins.dlrm_v3 import incremental
from hstu_xd.plugins.dlrm_v3 import session as session_module
from hstu_xd.plugins.dlrm_v3.domain_states import DomainStateStack, UncachedStack
from hstu_xd.plugins.dlrm_v3.launch import parsed_gin
from hstu_xd.plugins.dlrm_v3.model import CrossDomainDlrmHSTU
from hstu_xd.plugins.dlrm_v3.requests import RequestBatch
from hstu_xd.plugins.dlrm_v3.session import DlrmSession, new_model
from hstu_xd.plugins.dlrm_v3.settings import DlrmSettings, cross_domain
from hstu_xd.plugins.dlrm_v3.store_dataset import configure, request_features, tables
from hstu_xd.plugins.dlrm_v3.user_memory import num_equal

GIN = Path(__file__).parents[3] / "gin" / "dlrm_stock.gin"
SIZES = ("xd_dlrm.norm_length = 40", "xd_dlrm.max_history = 12")
VARIANTS = {
    "stock": (),
    "tape": ("xd_encoder.tape = True",),
    "mask": ("xd_encoder.domain_mask = True", "xd_dlrm.user_token = True"),
    "mask+tape": (
        "xd_encoder.domain_mask = True",
        "xd_encoder.tape = True",
        "xd_encoder.target_domain_embedding = True",
    ),
    "ddsr": ("xd_encoder.ddsr = True", "xd_dlrm.user_token = True"),
    "all": (
        "xd_encoder.domain_mask = True",
        "xd_encoder.tape = True",
        "xd_encoder.ddsr = True",
        "xd_encoder.states_per_domain = 2",
        "xd_dlrm.user_token = True",
    ),
    "order": ("xd_dlrm.positions = 'order'", "xd_encoder.domain_mask = True"),
    "order+all": (
        "xd_dlrm.positions = 'order'",
        "xd_encoder.domain_mask = True",
        "xd_encoder.tape = True",
        "xd_encoder.ddsr = True",
        "xd_dlrm.user_token = True",
    ),
    "feature": ("xd_dlrm.domain_as_feature = True", "xd_encoder.domain_mask = True"),
}


@contextmanager
def bound(store: Path, bindings: Sequence[str]) -> Iterator[DlrmSettings]:
    with parsed_gin(GIN, (f'dataset = "xd:{store}"', *SIZES, *bindings), told=GIN):
        yield DlrmSettings()


def shown(events: Sequence[tuple[int, int]], settings: DlrmSettings) -> list[tuple[int, int]]:
    """The events of the window, which slides by one or by three."""
    window: list[tuple[int, int]] = []
    for event in events:
        window.append(event)
        if len(window) > 12:
            del window[: 1 if settings.positions == "recency" else 3]
    return window


class Whole:
    """The definition: upstream's layers as they are, over the whole request of one user."""

    def __init__(self, store: InteractionStore, settings: DlrmSettings) -> None:
        config = configure(get_hstu_configs("debug"), settings)
        extension = dataclasses.replace(cross_domain(settings, 3, config), in_buckets=False)
        self.model = CrossDomainDlrmHSTU(
            config, tables(store, settings, 64), False, bf16_training=False, cross_domain=extension
        )
        self.model.get_submodule("_embedding_collection").to_empty(device="cpu")
        self.model.set_hammer_kernel(HammerKernel.PYTORCH)
        self.model.eval()
        self.store, self.settings = store, settings

    @torch.no_grad()
    def scores(
        self, number: int, events: Sequence[tuple[int, int]], candidates: list[int], time: int
    ) -> Tensor:
        events = shown(events, self.settings)
        items, times = (
            torch.tensor([event[column] for event in events], dtype=torch.int64)
            for column in (0, 1)
        )
        domains, asked = self.store.catalog.item_domains, torch.tensor(candidates)
        batch = RequestBatch(
            users=torch.tensor([number]),
            history_lengths=torch.tensor([len(events)]),
            items=items,
            times=times,
            domains=domains[items],
            candidate_lengths=torch.tensor([len(candidates)]),
            candidates=asked,
            candidate_domains=domains[asked],
            request_times=torch.full_like(asked, time),
            labels=torch.zeros_like(asked),
            actions=torch.ones_like(items),
        )
        sample = request_features(batch, self.settings)
        return self.model(sample.uih_features_kjt, sample.candidates_features_kjt)[3][0].double()


def randomize(model: Any) -> None:
    """Make every parameter large, so that no term is negligible."""
    for name, parameter in model.named_parameters():
        is_weight = "norm" in name and "weight" in name
        with torch.no_grad():
            if parameter.ndim < 2 or "emb" in name or "_xd_" in name:
                parameter.normal_(std=0.3).add_(1.0 if is_weight else 0.0)


@contextmanager
def session_and_whole(
    store_path: Path, variant: str, **options: Any
) -> Iterator[tuple[DlrmSession, Whole, InteractionStore]]:
    with bound(store_path, VARIANTS[variant]) as settings:
        store = InteractionStore.open(store_path)
        torch.manual_seed(5)
        model, whole = new_model(store, settings), Whole(store, settings)
        randomize(model)
        whole.model.load_state_dict(model.state_dict())
        yield DlrmSession(model, store, settings, **options), whole, store


def logged(store: InteractionStore, number: int) -> list[tuple[int, int]]:
    items, times = store.history(number)
    return [(int(item), int(time)) for item, time in zip(items, times)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", range(4))
def test_every_answer_is_the_whole_models(tiny_store: Path, variant: str, seed: int) -> None:
    follow(tiny_store, variant, seed)


def follow(store_path: Path, variant: str, seed: int) -> None:
    """Append and score in any order, now and then at the same time as before."""
    draw = random.Random(seed)
    with session_and_whole(store_path, variant) as (session, whole, store):
        numbers = draw.sample(range(store.num_users), 3)
        events = {number: logged(store, number) for number in numbers}
        spread = set()
        for _ in range(30):
            number = draw.choice(numbers)
            user, last = store.user_token(number), events[number][-1][1]
            if draw.random() < 0.4:
                new = [
                    (draw.randint(1, store.num_items), last + step * draw.choice((0, 50, 90_000)))
                    for step in range(draw.randint(1, 3))
                ]
                new.sort(key=lambda event: event[1])
                session.append([user] * len(new), *map(list, zip(*new)))
                events[number] += new
                continue
            if draw.random() < 0.1:
                session.release([user])
            time = last + draw.choice((0, 0, 30, 40_000, 10**8))
            asked = [draw.randint(1, store.num_items) for _ in range(draw.randint(1, 40))]
            if draw.random() < 0.5:
                domain = draw.randrange(3)
                asked = draw.choices(store.catalog.items_of(domain).tolist(), k=5)
            (found,) = session.score([user], torch.tensor([asked]), [time])
            parts = [asked[at : at + 10] for at in range(0, len(asked), 10)]
            expected = torch.cat([whole.scores(number, events[number], p, time) for p in parts])
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            spread.update(found.tolist())
        assert max(spread) - min(spread) > 0.05


def counted(extend: Any, rows: list[int]) -> Any:
    def counting(self: Any, x: Tensor, *others: Any) -> Tensor:
        rows.append(len(x))
        return extend(self, x, *others)

    return counting


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows the first layer computes, call by call."""
    rows: list[int] = []
    for stack in (UncachedStack, DomainStateStack):
        monkeypatch.setattr(stack, "extend", counted(stack.extend, rows))
    return rows


def a_long_user(store: InteractionStore) -> int:
    """One who has the latest twelve events in all three domains."""
    for number in range(store.num_users):
        domains = store.catalog.item_domains[
            torch.from_numpy(store.history(number)[0][-12:]).long()
        ]
        if len(domains) == 12 and len(domains.unique()) == 3:
            return number
    raise AssertionError


def test_only_the_domain_that_is_asked_for_is_computed(
    tiny_store: Path, computed: list[int]
) -> None:
    with session_and_whole(tiny_store, "mask+tape") as (session, _, store):
        number = a_long_user(store)
        user, catalog = store.user_token(number), store.catalog
        items, times = store.history(number)
        sizes = np.bincount(catalog.item_domains.numpy()[items[-12:]], minlength=3).tolist()
        first, second = (catalog.items_of(domain)[:4].unsqueeze(0) for domain in (0, 1))
        session.score([user], first)
        session.score([user], first + 1)  # the same events: candidates alone
        session.score([user], second)
        session.score([user], torch.cat([first, second], dim=1))
        # Later than the last event, so that times and positions of all events are others.
        session.append([user], [int(catalog.items_of(2)[0])], [int(times[-1]) + 10**7])
        left = int(catalog.item_domains[int(items[-12])])
        session.score([user], first)
        session.release([user])
        session.score([user], second)
        changed = [sizes[0] - (left == 0), sizes[1] - (left == 1)]
        assert computed == [sizes[0] + 4, 4, sizes[1] + 4, 8, changed[0] + 4, changed[1] + 4]


def test_in_order_of_events_an_append_costs_its_own_rows(
    tiny_store: Path, computed: list[int]
) -> None:
    for variant, expected in (("order", [0, 0, 1, 0]), ("order+all", [2, 0, 2, 0])):
        with session_and_whole(tiny_store, variant) as (session, _, store):
            number = a_short_user(store)
            user, catalog = store.user_token(number), store.catalog
            last = int(store.history(number)[1][-1])
            first, second = (catalog.items_of(domain)[:4].unsqueeze(0) for domain in (0, 1))
            both = torch.cat([first, second], dim=1)
            session.score([user], both)
            del computed[:]
            session.append([user], [int(catalog.items_of(2)[0])], [last + 10**7])
            # With states the event itself, and the one before it, which knows the next one's time.
            session.score([user], first)
            session.score([user], both, [last + 2 * 10**7])
            session.append([user], [int(catalog.items_of(0)[0])], [last + 3 * 10**7])
            session.score([user], first)
            session.score([user], second)
            assert [rows - asked for rows, asked in zip(computed, (4, 8, 4, 4))] == expected


def a_short_user(store: InteractionStore) -> int:
    """One whose window has room, of three domains."""
    for number in range(store.num_users):
        items = torch.from_numpy(store.history(number)[0]).long()
        if len(items) < 9 and len(store.catalog.item_domains[items].unique()) == 3:
            return number
    raise AssertionError


def test_rows_that_read_states_are_computed_once_for_an_event(
    tiny_store: Path, computed: list[int]
) -> None:
    with session_and_whole(tiny_store, "all") as (session, _, store):
        number = a_long_user(store)
        user, catalog = store.user_token(number), store.catalog
        first, second = (catalog.items_of(domain)[:4].unsqueeze(0) for domain in (0, 1))
        session.score([user], first)
        session.score([user], second)
        # Twelve events, and the user's token in each of the three domains.
        assert computed == [12 + 3 + 4, 4]


def test_the_same_rows_at_other_times_are_other_rows(tiny_store: Path) -> None:
    the_same_item_again_and_again(tiny_store)


def the_same_item_again_and_again(store_path: Path) -> None:
    """A full window slides, and what the layers are given of each place stays what it was."""
    with session_and_whole(store_path, "ddsr") as (session, whole, store):
        user, events = store.user_token(0), logged(store, 0)
        new = [(5, events[-1][1] + 10 * step) for step in range(12)]
        # Of another age, but of the same time before a request that is a year later.
        new += [(5, new[-1][1] + 700)]
        later = new[-1][1] + 365 * 86_400
        session.append([user] * 12, *map(list, zip(*new[:12])))
        for count in (12, 13):
            found = session.score([user], torch.tensor([[5, 40, 80]]), [later])
            expected = whole.scores(0, [*events, *new[:count]], [5, 40, 80], later)
            torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-5)
            if count == 12:
                session.append([user], [5], [new[12][1]])


@pytest.mark.parametrize("variant", ["stock", "mask", "order", "all", "order+all"])
def test_users_of_one_call_are_answered_as_each_alone(
    tiny_store: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "_USERS_AT_ONCE", 4)
    with session_and_whole(tiny_store, variant) as (session, whole, store):
        numbers = [0, 7, 1, 7, 2, 3]  # one of them twice, and a second batch
        users = [store.user_token(number) for number in numbers]
        events = {number: logged(store, number) for number in numbers}
        times = [events[number][-1][1] + 100 * row for row, number in enumerate(numbers)]
        draw = torch.Generator().manual_seed(1)
        for step in range(3):
            asked = torch.randint(1, store.num_items + 1, (6, 11), generator=draw)
            found = session.score(users, asked, times)
            for row, number in enumerate(numbers):
                expected = whole.scores(number, events[number], asked[row].tolist(), times[row])
                torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-5)
            new = 5 + step, events[7][-1][1] + 50
            session.append([users[1]], [new[0]], [new[1]])
            events[7].append(new)
        assert len(session) == 5
        assert session.num_bytes == sum(each.num_bytes for each in session._memories.values())
        assert session.score([], torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3)
        assert session.score(users[:1], torch.zeros(1, 0, dtype=torch.int64)).shape == (1, 0)


def everything_holds(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        incremental,
        "num_equal",
        lambda kept, given: 0 if kept is None else min(len(kept), len(given)),
    )


@pytest.mark.parametrize("variant", ["mask+tape", "all"])
def test_that_check_kills_what_keeps_too_much(
    tiny_store: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything_holds(monkeypatch)
    with pytest.raises(AssertionError):
        follow(tiny_store, variant, seed=0)


def test_that_check_kills_rows_known_by_their_inputs_alone(
    tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        incremental, "_num_kept", lambda kept, given, _: num_equal(kept and kept.inputs, given)
    )
    with pytest.raises(AssertionError):
        the_same_item_again_and_again(tiny_store)


def test_the_least_recently_asked_are_dropped_and_computed_anew(tiny_store: Path) -> None:
    with session_and_whole(tiny_store, "all") as (session, _, store):
        users = [store.user_token(number) for number in range(4)]
        asked = torch.arange(1, 6).expand(4, -1)
        expected = session.score(users, asked)
        assert len(session) == 4
        each = session.num_bytes // 4
        assert session.num_bytes == sum(
            tensor.nbytes
            for memory in session._memories.values()
            for part in memory.parts()
            for tensor in part.tensors()
        )
    with session_and_whole(tiny_store, "all", max_bytes=2 * each) as (session, _, store):
        found = session.score(users, asked)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert 1 <= len(session) < 4
        assert users[3] in session
        assert users[0] not in session
        assert session.num_bytes <= 2 * each
        torch.testing.assert_close(session.score(users, asked), expected, rtol=0, atol=1e-5)
        session.release(users)
        assert session.num_bytes == len(session) == 0


def test_what_is_kept_can_be_saved(tiny_store: Path, tmp_path: Path, computed: list[int]) -> None:
    file = tmp_path / "states.pt"
    with session_and_whole(tiny_store, "all") as (session, _, store):
        user = store.user_token(0)
        session.append([user], [3], [2_000_000_000])
        expected = session.score([user], torch.tensor([[1, 2, 60]]))
        session.save(file)
    del computed[:]
    with session_and_whole(tiny_store, "all") as (session, _, _):
        session.load(file)
        assert user in session
        found = session.score([user], torch.tensor([[1, 2, 60]]))
        assert computed == [3]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        with pytest.raises(InputError, match="an event at 5 after one at 2000000000"):
            session.append([user], [3], [5])
        with torch.no_grad():
            next(iter(session._model.parameters())).add_(1.0)
        with pytest.raises(InputError, match="states of another model"):
            session.load(file)
        for content in (b"", b"nothing"):
            file.write_bytes(content)
            with pytest.raises(InputError, match="no states of a session"):
                session.load(file)
        with pytest.raises(InputError, match="no states of a session"):
            session.load(tmp_path / "missing")


def test_a_checkpoint_of_the_trainer_is_opened(tiny_store: Path, tmp_path: Path) -> None:
    bindings = "xd_dlrm.norm_length = 130\n"
    with process_of(tiny_store, free_port(), bindings):
        run = Run()
        run.train(range(3))
        run.save(tmp_path)
        requests = run.requests.requests
        number = requests.num_train
        sample = run.requests.get_samples([number])
        run.model.eval()
        features = sample.uih_features_kjt, sample.candidates_features_kjt
        with torch.no_grad():
            expected = run.model(*features)[3][0].double()
        batch = requests.batch(np.array([number]))
    everything = [f"xd_encoder.{name} = True" for name in ("domain_mask", "tape", "ddsr")]
    told = [f'dataset = "xd:{tiny_store}"', bindings.strip(), *everything]
    session = DlrmSession.open(tmp_path / "3", GIN, bindings=told)
    store = InteractionStore.open(tiny_store)
    # A stranger who has had the events that the request shows.
    session.append(["stranger"] * len(batch.items), batch.items.tolist(), batch.times.tolist())
    found = session.score(
        ["stranger"], batch.candidates.unsqueeze(0), batch.request_times[:1].tolist()
    )
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match=r"it has no .*_xd_target_domain_emb.* and no more"):
        DlrmSession.open(
            tmp_path / "3",
            GIN,
            bindings=[*told, "xd_encoder.target_domain_embedding = True"],
        )
    with pytest.raises(InputError, match="a checkpoint of another model, which differs in"):
        DlrmSession.open(tmp_path / "3", GIN, bindings=[*told, "xd_dlrm.hstu_attn_num_layers = 3"])
    with pytest.raises(InputError, match="no checkpoint there"):
        DlrmSession.open(tmp_path / "4", GIN, bindings=told)
    with pytest.raises(InputError, match=r"xd_dlrm\.norm_length = 0: a session needs one above"):
        DlrmSession.open(tmp_path / "3", GIN, bindings=[*told, "xd_dlrm.norm_length = 0"])
    with pytest.raises(InputError, match=r"make_model\.dataset = 'kuairand-1k'; a session needs"):
        DlrmSession.open(tmp_path / "3", GIN, bindings=[*told, 'dataset = "kuairand-1k"'])
    with pytest.raises(InputError, match=r"dlrm_stock\.gin: .*no_such"):
        DlrmSession.open(tmp_path / "3", GIN, bindings=["xd_dlrm.no_such = 1"])
    assert store.find_user("stranger") is None


def test_bad_input_is_named_and_changes_nothing(tiny_store: Path) -> None:
    with session_and_whole(tiny_store, "all") as (session, _, store):
        user, last = store.user_token(0), logged(store, 0)[-1][1]
        before = session.score([user], torch.tensor([[1]]))
        for wrong, message in (
            ((["a"], [1, 2], [3]), "1 users, 2 items and 1 timestamps"),
            (
                ([user, user], [1, 91], [last, last]),
                r"unknown item 91; the catalogue has items 1\.\.90",
            ),
            (([user], [0], [last]), "unknown item 0"),
            (
                ([user, user], [1, 2], [last, last - 1]),
                f"an event at {last - 1} after one at {last}",
            ),
            (([user, "ann"], [1, 2], [last, last]), "unknown user 'ann'.*user_token = False"),
        ):
            with pytest.raises(InputError, match=message):
                session.append(*wrong)
        for arguments, message in (
            (([user], torch.tensor([1, 2])), r"candidates has shape \(2,\); \(1, C\) is needed"),
            (([user, user], torch.tensor([[1, 2]])), r"shape \(1, 2\); \(2, C\)"),
            (([user], torch.tensor([[91]])), "unknown item 91"),
            (([user], torch.tensor([[1]]), [1, 2]), "2 request_timestamps for 1 users"),
            ((["ann"], torch.tensor([[1]])), "unknown user 'ann'"),
        ):
            with pytest.raises(InputError, match=message):
                session.score(*arguments)
        torch.testing.assert_close(session.score([user], torch.tensor([[1]])), before)
