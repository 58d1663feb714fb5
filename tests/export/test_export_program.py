"""The encoder with padding kept, and the program traced from it, compute what encode computes."""

import io
from typing import Any

import pytest
import torch
from requests_of import request, requests
from tiny_models import (
    ITEMS_PER_DOMAIN,
    NORM_LENGTH,
    NUM_DOMAINS,
    SWITCHES,
    tiny_catalog,
    tiny_model,
)
from torch import Tensor

from hstu_xd.catalog import DomainCatalog
from hstu_xd.errors import InputError
from hstu_xd.export import export_encoder
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.serving import EncoderSession

ITEMS = NUM_DOMAINS * ITEMS_PER_DOMAIN
WHOLE = sorted(name for name, switches in SWITCHES.items() if "segment_by" not in switches)
HOLE = 5
WINDOW = NORM_LENGTH - 4


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("normalization", ["silu", "softmax"])
@pytest.mark.parametrize("name", WHOLE)
def test_kept_padding_changes_nothing(name: str, normalization: str) -> None:
    model = tiny_model(impl="reference", normalization=normalization, **SWITCHES[name])
    with torch.no_grad():
        for asked in requests(NORM_LENGTH, items=ITEMS):
            close(model.encode_padded(*asked), model.encode(*asked))


def test_a_row_of_padding_alone_gets_zeros_and_disturbs_nobody() -> None:
    model = tiny_model(impl="reference", **SWITCHES["everything"])
    asked = request([4, 0, 6], 6, items=ITEMS)
    others = [x[[0, 2]] for x in asked]
    with torch.no_grad():
        found = model.encode_padded(*asked)
        close(found[[0, 2]], model.encode(*others))
    assert not found[1].any()


def holey_model(**switches: Any) -> CrossDomainHSTU:
    """A tiny model with an id that no item bears, and room behind its window as trained ones."""
    tiny = tiny_model(**switches)
    domains = tiny_catalog().item_domains.clone()
    domains[HOLE] = -1
    catalog = DomainCatalog(domains, ["books", "films", "games"])
    model = CrossDomainHSTU(catalog, tiny.settings, window=WINDOW)
    model.load_state_dict(tiny.state_dict())
    return model.eval()


# Together with the run that test_export_folder exports, every switch that takes a path of its own.
TRACED: dict[str, dict[str, Any]] = {
    "silu": {"ddsr": True, "concat_ua": True, "state_from": "output", "states_per_domain": 3},
    "softmax": {
        "normalization": "softmax",
        "domain_mask": True,
        "full_attention_layers": (1,),
        "enable_relative_attention_bias": False,
        "linear_activation": "none",
        "ddsr": True,
        "query_target_domain": False,
        "state_age_bias": False,
        "combine": "after_gate",
        "target_view_heads": 4,
    },
}


@pytest.fixture(scope="module", params=TRACED)
def traced(request: pytest.FixtureRequest) -> tuple[CrossDomainHSTU, Any]:
    """A model and its program, which has been a file in between."""
    model = holey_model(**TRACED[request.param])
    file = io.BytesIO()
    torch.export.save(export_encoder(model), file)
    file.seek(0)
    return model, torch.export.load(file).module()


def test_the_program_answers_as_the_model(traced: tuple[CrossDomainHSTU, Any]) -> None:
    model, encode = traced
    for items, times, domains in requests(WINDOW, items=ITEMS):
        items[items == HOLE] = HOLE + 1
        found = encode(items, times, domains)
        assert not found.requires_grad
        with torch.no_grad():
            close(found, model.encode(items, times, domains))


def test_the_program_is_told_the_time_of_the_request(traced: tuple[CrossDomainHSTU, Any]) -> None:
    """As ``encode`` and a session of the service; what comes behind it is ignored."""
    model, encode = traced
    lengths = [1, 5, 2, WINDOW]
    items, times, domains = request(lengths, WINDOW + 2, items=ITEMS, seed=3)
    items[items == HOLE] = HOLE + 1
    ends = torch.tensor(lengths).unsqueeze(1)
    last = times.gather(1, ends - 1).squeeze(1)
    at = last + torch.tensor([0, 1, 10**6, 10**8])
    asked = times.scatter(1, ends, at.unsqueeze(1))
    asked[:, WINDOW + 1] = -7
    found = encode(items, asked, domains)
    with torch.no_grad():
        close(found, model.encode(items, times, domains, at))
        at_last = model.encode(items, times, domains)
    close(encode(items, times, domains), at_last)
    if not model.settings.enable_relative_attention_bias:
        return
    assert not torch.allclose(found[2:], at_last[2:], rtol=0, atol=1e-4)
    session = EncoderSession(model, window=WINDOW)
    for row, count in enumerate(lengths):
        session.append([row] * count, items[row, :count].tolist(), times[row, :count].tolist())
    close(found, session.query(range(len(lengths)), domains.tolist(), at))


def test_the_program_refuses_what_the_model_refuses(traced: tuple[CrossDomainHSTU, Any]) -> None:
    _, encode = traced

    def ask(items: list[int], domain: int = 0) -> None:
        ids = torch.tensor([items])
        encode(ids, torch.zeros_like(ids), torch.tensor([domain]))

    ask([1, 2, 0])
    for items in ([1, ITEMS + 1], [-1, 2], [HOLE, 1]):
        with pytest.raises(RuntimeError, match=f"item_ids: only 0..{ITEMS} that"):
            ask(items)
    with pytest.raises(RuntimeError, match="item_ids: padding"):
        ask([1, 0, 2])
    for domain in (-1, NUM_DOMAINS):
        with pytest.raises(RuntimeError, match=f"target_domains: only 0..{NUM_DOMAINS - 1}"):
            ask([1, 2], domain)
    ask([1] * WINDOW)
    with pytest.raises(RuntimeError, match=f"item_ids: only the latest {WINDOW} events of a row"):
        ask([1] * (WINDOW + 1))
    # torch 2.8 raises a RuntimeError here, later versions an AssertionError.
    with pytest.raises((AssertionError, RuntimeError), match=str(NORM_LENGTH)):
        ask([1] * (NORM_LENGTH + 1))


def test_the_program_refuses_times_as_the_model_does(traced: tuple[CrossDomainHSTU, Any]) -> None:
    model, encode = traced
    items, domains = torch.tensor([[1, 2, 3, 0], [1, 2, 0, 0]]), torch.tensor([0, 1])

    def both(times: list[list[int]], at: list[int]) -> None:
        close(encode(items, torch.tensor(times), domains), expected(times, at))

    def expected(times: list[list[int]], at: list[int]) -> Tensor:
        with torch.no_grad():
            return model.encode(items, torch.tensor(times), domains, torch.tensor(at))

    both([[5, 5, 9, 9], [-4, -3, -3, 1]], [9, -3])
    both([[5, 5, 9, 10], [-4, -3, 8, 1]], [10, 8])
    both([[5, 5, 9, 0], [-4, -3, 0, 99]], [9, -3])
    refused = [
        ([[5, 9, 8, 0], [1, 2, 0, 0]], "events oldest first", [8, 2], "falls from 9 to 8"),
        ([[5, 6, 7, 0], [2, 1, 0, 0]], "events oldest first", [7, 1], "falls from 2 to 1"),
        ([[5, 6, 7, 6], [1, 2, 0, 0]], "time of the request", [6, 2], "before the last event at 7"),
        ([[5, 6, 7, 0], [1, 2, 1, 0]], "time of the request", [7, 1], "before the last event at 2"),
    ]
    for times, said, at, also in refused:
        with pytest.raises(RuntimeError, match=f"timestamps: .*{said}"):
            encode(items, torch.tensor(times), domains)
        with pytest.raises(InputError, match=also):
            expected(times, at)


def test_tracing_leaves_the_model_alone_and_no_paths_in_the_program() -> None:
    model = tiny_model()
    program = export_encoder(model)
    assert not any("stack_trace" in node.meta for node in program.graph.nodes)
    assert model.settings.impl == "auto"
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_history_tokens_are_refused() -> None:
    with pytest.raises(InputError, match=r"segments by 'count'.*segment_by = 'none'"):
        export_encoder(tiny_model(**SWITCHES["history_tokens"]))
