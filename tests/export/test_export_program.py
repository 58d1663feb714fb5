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

ITEMS = NUM_DOMAINS * ITEMS_PER_DOMAIN
WHOLE = sorted(name for name, switches in SWITCHES.items() if "segment_by" not in switches)
HOLE = 5


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
    """A tiny model with an id that no item bears."""
    tiny = tiny_model(**switches)
    domains = tiny_catalog().item_domains.clone()
    domains[HOLE] = -1
    model = CrossDomainHSTU(DomainCatalog(domains, ["books", "films", "games"]), tiny.settings)
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
    for items, times, domains in requests(NORM_LENGTH, items=ITEMS):
        items[items == HOLE] = HOLE + 1
        found = encode(items, times, domains)
        assert not found.requires_grad
        with torch.no_grad():
            close(found, model.encode(items, times, domains))


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
    # torch 2.8 raises a RuntimeError here, later versions an AssertionError.
    with pytest.raises((AssertionError, RuntimeError), match=str(NORM_LENGTH)):
        ask([1] * (NORM_LENGTH + 1))


def test_tracing_leaves_the_model_alone_and_no_paths_in_the_program() -> None:
    model = tiny_model()
    program = export_encoder(model)
    assert not any("stack_trace" in node.meta for node in program.graph.nodes)
    assert model.settings.impl == "auto"
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_history_tokens_are_refused() -> None:
    with pytest.raises(InputError, match=r"segments by 'count'.*segment_by = 'none'"):
        export_encoder(tiny_model(**SWITCHES["history_tokens"]))
