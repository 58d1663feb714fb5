"""Rows that are asked for alone: each is what the encoding of all rows has there."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tiny_models import (
    EVERYTHING,
    NUM_DOMAINS,
    SWITCHES,
    domain_of,
    draw_histories,
    tiny_catalog,
    tiny_model,
    to_batch,
)
from torch import Tensor, nn

from hstu_xd.batch import JaggedBatch, Questions
from hstu_xd.errors import InputError
from hstu_xd.model import asked_rows
from hstu_xd.model.encoder import HSTULayer
from hstu_xd.model.featured_items import FeatureTable
from hstu_xd.model.fused_layer import LayerCache
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.model.sasrec import SASRecLayer
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.ops import available_impls
from hstu_xd.parts import Part

HISTORIES = draw_histories([20, 1, 24, 0, 7, 13], seed=3)
BATCH = to_batch(HISTORIES)
NUM_EVENTS = len(BATCH.item_ids)
LAST = (BATCH.offsets[1:] - 1)[BATCH.offsets.diff() > 0]
SOFTMAX = {"normalization": "softmax"}
SASREC = SOFTMAX | {"layer": "sasrec", "enable_relative_attention_bias": False}
EVERY_CASE: dict[str, dict[str, Any]] = SWITCHES | {
    "lookback": SWITCHES["history_tokens_and_everything"] | {"segment_lookback": 1},
    "full_output": {"ddsr": True, "state_from": "output"},
    "softmax": SOFTMAX | EVERYTHING,
    "sasrec": SASREC,
    "sasrec_masked": SASREC | {"domain_mask": True, "target_view_heads": 2},
}
every_case = pytest.mark.parametrize("name", EVERY_CASE)


@pytest.fixture(autouse=True, scope="module")
def worth_it() -> Iterator[None]:
    """Batches are small here; they take the way of large ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asked_rows, "WORTH_ASKING", 0)
        yield


def drawn_rows(number: int, bound: int = NUM_EVENTS, seed: int = 0) -> Tensor:
    """In any order, some several times."""
    return torch.randint(bound, (number,), generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, needed: Tensor) -> None:
    torch.testing.assert_close(found, needed, rtol=0, atol=1e-6)


@torch.no_grad()
@every_case
def test_rows_are_those_of_the_whole(name: str) -> None:
    model = tiny_model(**EVERY_CASE[name])
    whole = model(BATCH)
    every = torch.arange(NUM_EVENTS)
    for rows in (LAST, torch.cat([LAST - 1, LAST]), drawn_rows(30), every.flip(0), every[:0]):
        close(model(BATCH, asked=rows), whole[rows])


@torch.no_grad()
@pytest.mark.parametrize("normalization", ["silu", "softmax"])
@pytest.mark.parametrize("view", [0, 2])
def test_by_every_implementation(normalization: str, view: int) -> None:
    for impl in available_impls(normalization):
        biased = impl != "flex"
        model = tiny_model(
            impl=impl,
            normalization=normalization,
            domain_mask=True,
            target_view_heads=view,
            enable_relative_attention_bias=biased,
            ddsr=impl != "flex",
        )
        rows = drawn_rows(9)
        close(model(BATCH, asked=rows), model(BATCH)[rows])


@st.composite
def batches(draw: st.DrawFn) -> tuple[JaggedBatch, Tensor, str]:
    lengths = draw(st.lists(st.integers(0, 24), min_size=1, max_size=6))
    batch = to_batch(draw_histories(lengths, seed=draw(st.integers(0, 99))))
    row = st.integers(0, max(0, sum(lengths) - 1))
    rows = draw(st.lists(row, max_size=12 if sum(lengths) else 0))
    return batch, torch.tensor(rows, dtype=torch.int64), draw(st.sampled_from([*EVERY_CASE]))


@torch.no_grad()
@given(batches())
@hypothesis_settings(max_examples=60, deadline=None)
def test_of_any_batch(given_batch: tuple[JaggedBatch, Tensor, str]) -> None:
    """Empty histories, rows in any order, several of a user and one several times."""
    batch, rows, name = given_batch
    model = tiny_model(**EVERY_CASE[name])
    close(model(batch, asked=rows), model(batch)[rows])


@torch.no_grad()
@pytest.mark.parametrize("blocks", [1, 3])
def test_of_any_number_of_layers(blocks: int) -> None:
    settings = EncoderSettings(
        num_domains=NUM_DOMAINS, norm_length=24, embedding_dim=16, num_blocks=blocks, **EVERYTHING
    )
    torch.manual_seed(5)
    model = CrossDomainHSTU(tiny_catalog(), settings).eval()
    close(model(BATCH, asked=LAST), model(BATCH)[LAST])


@torch.no_grad()
def test_of_items_with_features() -> None:
    items = tiny_catalog().num_items + 1
    table = FeatureTable(
        categories={"colour": ("red", "blue")},
        widths={"price": 1},
        codes=torch.arange(items)[:, None] % 3,
        numbers=torch.randn(items, 1, generator=torch.Generator().manual_seed(0)),
        is_met=torch.arange(items) % 4 > 0,
    )
    torch.manual_seed(0)
    settings = EncoderSettings(num_domains=NUM_DOMAINS, norm_length=24, **EVERYTHING)
    model = CrossDomainHSTU(tiny_catalog(), settings, features=table).eval()
    close(model(BATCH, asked=LAST), model(BATCH)[LAST])


@torch.no_grad()
@pytest.mark.parametrize(
    "name", [name for name, switches in EVERY_CASE.items() if "normalization" not in switches]
)
def test_questions_are_rows_behind_the_events(name: str) -> None:
    model, put = tiny_model(**EVERY_CASE[name]), drawn_rows(9, seed=4)
    questions = Questions(put, drawn_rows(9, NUM_DOMAINS), BATCH.timestamps[put] + 5)
    whole = model(BATCH, questions=questions)
    answers = NUM_EVENTS + torch.arange(9)
    for rows in (answers, answers[3:5], torch.cat([answers.flip(0), LAST]), LAST):
        close(model(BATCH, questions=questions, asked=rows), whole[rows])


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in SWITCHES if "history" not in name])
@pytest.mark.parametrize("rows", [LAST, LAST[:0]])
def test_what_is_left_for_later_rows_is_of_all(name: str, rows: Tensor) -> None:
    """A serving session begins with it, and asks for no row at all."""
    model = tiny_model(**SWITCHES[name])
    caches: tuple[list[LayerCache], ...] = ([], [])
    model(BATCH, caches=caches[0])
    model(BATCH, caches=caches[1], asked=rows)
    for needed, found in zip(*caches, strict=True):
        close(found.keys, needed.keys)
        close(found.values, needed.values)
        if model.settings.ddsr:
            close(found.states, needed.states)


@pytest.mark.parametrize("name", EVERY_CASE)
def test_gradients_are_those_of_the_whole(name: str) -> None:
    """In float64, up to vectors of the model, which are float32."""
    model, rows = tiny_model(**EVERY_CASE[name]).double(), drawn_rows(15)
    toward = torch.randn(15, 16, generator=torch.Generator().manual_seed(2))
    gradients = []
    for vectors in (model(BATCH)[rows], model(BATCH, asked=rows)):
        model.zero_grad()
        (vectors * toward).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    whole, some = gradients
    for parameter, needed in whole.items():
        found = some.get(parameter, torch.zeros_like(needed))
        within = 1e-6 * float(needed.abs().max()) + 1e-12
        torch.testing.assert_close(found, needed, rtol=0, atol=within, msg=parameter)


@torch.no_grad()
@pytest.mark.parametrize("name", ["everything", "history_tokens", "sasrec_masked"])
def test_the_last_layer_computes_no_other_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes through its output projection is what is asked for."""
    model = tiny_model(**EVERY_CASE[name])
    projection = model.encoder.layers[-1].get_submodule("_o")
    seen: list[int] = []
    projection.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    model(BATCH, asked=LAST)
    assert seen == [len(LAST)]


@torch.no_grad()
@pytest.mark.parametrize(
    ("switches", "needed"),
    [
        ({"domain_mask": True}, "own"),
        ({"domain_mask": True, "ddsr": True, "states_per_domain": 1}, "states"),
        ({}, "all"),
        ({"domain_mask": True, "ddsr": True, "state_from": "output"}, "all"),
        ({"domain_mask": True, "segment_by": "count", "segment_length": 9}, "all"),
    ],
)
def test_the_first_layer_computes_what_the_last_one_reads(
    switches: dict[str, Any], needed: str
) -> None:
    """Events of the last one's domain, and those whose states it reads."""
    model, count = tiny_model(**switches), 0
    for history in HISTORIES:
        domains = [domain_of(item) for item in history.items]
        read = {"own": domains[-1:], "states": domains[-1:], "all": domains}[needed]
        chosen = {place for place, domain in enumerate(domains) if domain in read}
        if needed == "states":
            chosen |= {len(domains) - 1 - domains[::-1].index(domain) for domain in domains}
        count += len(chosen)
    seen: list[int] = []
    projection = model.encoder.layers[0].get_submodule("_o")
    projection.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    model(BATCH, asked=LAST)
    assert seen == [count]
    assert count == NUM_EVENTS or needed != "all"


@torch.no_grad()
def test_of_a_small_batch_all_rows_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """To find out what is read costs more than it saves; where nothing is asked, it does not."""
    model = tiny_model(**EVERYTHING)
    seen: list[int] = []
    projection = model.encoder.layers[-1].get_submodule("_o")
    projection.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    for worth in (NUM_EVENTS, NUM_EVENTS + 1):
        monkeypatch.setattr(asked_rows, "WORTH_ASKING", worth)
        close(model(BATCH, asked=LAST), model(BATCH)[LAST])
        model(BATCH, asked=LAST[:0])
    assert seen == [len(LAST), NUM_EVENTS, 0, NUM_EVENTS, NUM_EVENTS, 0]


@torch.no_grad()
def test_where_all_rows_are_computed_nothing_is_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    """So on a GPU, where to sort what is asked for is a wait of the host."""
    monkeypatch.setattr(asked_rows, "WORTH_ASKING", NUM_EVENTS + 1)
    monkeypatch.setattr(asked_rows.AskedRows, "of", None)
    model, rows = tiny_model(**EVERYTHING), drawn_rows(9)
    close(model(BATCH, asked=rows), model(BATCH)[rows])


class Sum(nn.Module):
    """A user's layer, which has never heard of rows that are asked for."""

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()

    def forward(self, x: Tensor, rows: Any, views: Any, caches: Any = None) -> Tensor:
        return x.cumsum(0)


class Doubled(HSTULayer):
    def forward(self, *given: Any, **named: Any) -> Tensor:
        return 2 * super().forward(*given, **named)


@torch.no_grad()
@pytest.mark.parametrize("layer", [Sum, Doubled])
def test_layers_of_a_user_compute_all_rows(layer: type[nn.Module]) -> None:
    model = tiny_model(layer=Part.from_object(layer))
    rows = drawn_rows(7)
    close(model(BATCH, asked=rows), model(BATCH)[rows])


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([0, NUM_EVENTS], f"asked holds 0..{NUM_EVENTS}; the batch has rows 0..{NUM_EVENTS - 1}"),
        ([-1], "asked holds -1..-1; the batch has rows"),
    ],
)
@pytest.mark.parametrize("worth", [0, NUM_EVENTS + 1])
def test_rows_that_there_are_not(
    rows: list[int], told: str, worth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asked_rows, "WORTH_ASKING", worth)
    with pytest.raises(InputError, match=told.replace(".", r"\.")):
        tiny_model()(BATCH, asked=torch.tensor(rows))


@pytest.mark.parametrize("rows", [torch.tensor([1.0]), torch.tensor([[1]])])
def test_rows_of_another_kind(rows: Tensor) -> None:
    with pytest.raises(InputError, match=r"asked is .*; a vector of torch\.int64 is needed"):
        tiny_model()(BATCH, asked=rows)


def test_every_layer_of_the_package_takes_asked_rows() -> None:
    for layer in (HSTULayer, SASRecLayer):
        assert "asked" in (layer.forward.__kwdefaults__ or {})
