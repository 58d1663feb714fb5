import logging
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from hstu_xd.plugins.rec.packed_attention import (
    packed_attention,
    provide_packed_attention,
    warn_if_texts_mix,
)


def qkv(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(2)
    q, k, v = (torch.randn(*shape).double() for _ in range(3))
    return q, k, v


def by_loops(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """(n, H, d) of one text."""
    out = torch.zeros_like(v)
    for head in range(q.shape[1]):
        for query in range(len(q)):
            end = query + 1 if causal else len(q)
            scores = k[:end, head] @ q[query, head] / q.shape[2] ** 0.5
            out[query, head] = scores.softmax(0) @ v[:end, head]
    return out


@pytest.mark.parametrize("causal", [True, False])
def test_texts_of_a_row_read_themselves_only(causal: bool) -> None:
    lengths = torch.tensor([3, 1, 5, 2])
    q, k, v = qkv(1, 11, 2, 4)
    found = packed_attention(q, k, v, cu_input_lens=lengths, causal=causal)
    texts = zip(*(x[0].split(lengths.tolist()) for x in (q, k, v)))
    expected = torch.cat([by_loops(*text, causal=causal) for text in texts])
    torch.testing.assert_close(found[0], expected)


def test_padding_at_either_side_is_not_read_and_comes_out_zero() -> None:
    q, k, v = qkv(2, 5, 2, 4)
    mask = torch.full((2, 5), torch.finfo(torch.float32).min)
    mask[0, 2:] = mask[1, :4] = 0
    found = packed_attention(q, k, v, mask)
    for row, present in ((0, slice(2, 5)), (1, slice(0, 4))):
        expected = torch.zeros_like(v[row])
        expected[present] = by_loops(*(x[row, present] for x in (q, k, v)), causal=True)
        torch.testing.assert_close(found[row], expected)


def test_without_a_mask_every_row_is_one_text() -> None:
    q, k, v = qkv(2, 4, 1, 3)
    found = packed_attention(q, k, v)
    for row in range(2):
        torch.testing.assert_close(found[row], by_loops(q[row], k[row], v[row], causal=True))


def test_takes_the_place_of_flash_attn_that_is_not_there(monkeypatch, caplog) -> None:
    module = ModuleType("REC.model.HLLM.modeling_llama")
    module.compute_flash_attention = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with caplog.at_level(logging.WARNING):
        provide_packed_attention()
        provide_packed_attention()
    assert module.compute_flash_attention is packed_attention
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(("keys", "is_told"), [({}, False), ({"item_pretrain_dir": "x"}, True)])
def test_mixed_texts_are_told(keys: dict[str, str], is_told: bool, caplog) -> None:
    config = {"item_pretrain_dir": None, "use_ft_flash_attn": False, **keys}
    warn_if_texts_mix(config)
    assert ("read each other" in caplog.text) == is_told
