"""CrossDomainDlrmHSTU against upstream's own model: bit by bit, and against the dense mask."""

from typing import Any

import pytest
import torch
from torch import Tensor
from upstream_dlrm import (
    CANDIDATES,
    DOMAINS,
    HISTORY,
    answers,
    batch,
    build,
    cross_domain,
    dense_domain_mask,
    jagged,
    stock_model,
    twin_of,
)

from hstu_xd.errors import InputError

with_and_without_context = pytest.mark.parametrize("num_context", [0, 1])


EVERYTHING = {
    "domain_mask": True,
    "tape": True,
    "target_domain_embedding": True,
    "ddsr": True,
    "states_per_domain": 2,
}


def replaced(features: Any, name: str, values: Tensor) -> Any:
    """The features with other values of one of them."""
    keys = tuple(features.keys())
    return jagged(
        keys,
        [
            [v.long() for v in features[key].to_dense()]
            if key != name
            else list(values.split(features[key].lengths().tolist()))
            for key in keys
        ],
    )


@with_and_without_context
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_all_off_is_the_stock_model_to_the_bit(num_context: int, dropout: float) -> None:
    stock = stock_model(num_context, dropout)
    ours = twin_of(stock, cross_domain(), num_context=num_context, dropout=dropout)
    assert list(ours.state_dict()) == list(stock.state_dict())
    for seed in range(20):
        torch.manual_seed(seed)
        expected = answers(stock, batch(seed))
        torch.manual_seed(seed)
        found = answers(ours, batch(seed))
        assert found.keys() == expected.keys()
        different = [n for n in expected if not torch.equal(found[n], expected[n])]
        assert different == []


@with_and_without_context
def test_mask_is_the_dense_definition(num_context: int) -> None:
    stock = stock_model(num_context)
    ours = twin_of(stock, cross_domain(domain_mask=True), num_context=num_context)
    assert list(ours.state_dict()) == list(stock.state_dict())
    unmasked = answers(stock, batch(0))
    for seed in range(20):
        features = batch(seed)
        with dense_domain_mask(features, num_context):
            expected = answers(stock, features)
        found = answers(ours, features)
        for name, value in expected.items():
            if name.startswith("gradient"):
                limit = 1e-6 * max(1.0, float(value.abs().max()))
                assert float((found[name] - value).abs().max()) <= limit, name
            else:
                assert torch.equal(found[name], value), name
        if seed == 0:
            assert not torch.allclose(unmasked["users"], expected["users"], atol=1e-3)


@with_and_without_context
@pytest.mark.parametrize("switches", [{}, {"ddsr": True, "tape": True}, EVERYTHING])
def test_buckets_compute_the_same(num_context: int, switches: dict) -> None:
    stock, options = stock_model(num_context), {"norm_length": 40, **switches}
    whole = with_signals(twin_of(stock, cross_domain(**options), num_context=num_context))
    ours = twin_of(stock, cross_domain(in_buckets=True, **options), num_context=num_context)
    ours.load_state_dict(whole.state_dict())
    assert list(ours.state_dict()) == list(whole.state_dict())
    for seed in range(20):
        expected, found = answers(whole, batch(seed)), answers(ours, batch(seed))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            limit = 1e-6 * max(1.0, float(value.abs().max()))
            assert float((found[name] - value).abs().max()) <= limit, name


@pytest.mark.parametrize("switches", [{"domain_mask": True}, {"ddsr": True}])
@pytest.mark.parametrize("in_buckets", [False, True])
def test_there_is_no_cache(switches: dict, in_buckets: bool) -> None:
    ours = build(extension=cross_domain(in_buckets=in_buckets, **switches))
    with pytest.raises(InputError, match="cached_forward knows no domains"):
        ours._hstu_transducer._stu_module.cached_forward(delta_x=None, num_targets=None)


@with_and_without_context
def test_one_domain_with_the_mask_is_the_stock_model(num_context: int) -> None:
    stock = stock_model(num_context)
    ours = twin_of(stock, cross_domain(domain_mask=True), num_context=num_context)
    for seed in range(20):
        features = batch(seed, domains=1)
        expected, found = answers(stock, features), answers(ours, features)
        assert found.keys() == expected.keys()
        different = [n for n in expected if not torch.equal(found[n], expected[n])]
        assert different == []


def with_signals(model: Any) -> Any:
    """Move what starts at zero, or near it, away from there."""
    for name, parameter in model.named_parameters():
        if "_xd_" in name and name.endswith(("_scale", "_domain_emb.weight", "_value.weight")):
            torch.nn.init.normal_(parameter)
        if "_xd_ddsr" in name and name.endswith(("_state", "_target_emb.weight", "_age_w")):
            torch.nn.init.normal_(parameter)
    return model


@with_and_without_context
@pytest.mark.parametrize("domain_mask", [False, True])
def test_signals_start_at_zero_and_then_tell_of_transitions(
    num_context: int, domain_mask: bool
) -> None:
    stock = stock_model(num_context)
    without = twin_of(stock, cross_domain(domain_mask=domain_mask), num_context=num_context)
    options = EVERYTHING | {"domain_mask": domain_mask}
    ours = twin_of(stock, cross_domain(**options), num_context=num_context)
    for seed in range(20):
        expected, found = answers(without, batch(seed)), answers(ours, batch(seed))
        for name in [n for n in expected if not torch.equal(found[n], expected[n])]:
            # Groups without a target, which states are read of, add zeros in another order.
            assert domain_mask
            assert name.startswith("gradient")
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
        if (batch(seed)[0]["item_id"].lengths() > 1).any():
            assert found["gradient _hstu_transducer._xd_tape._scale"].abs().max() > 0
            (ddsr,) = (found[n] for n in found if n.endswith("_xd_ddsr.1._ddsr._value.weight"))
            assert ddsr.abs().max() > 0
    assert not torch.equal(with_signals(ours)(*batch(0))[3], without(*batch(0))[3])


@pytest.mark.parametrize(
    "switches",
    [
        {"domain_mask": True},
        {"domain_mask": True, "tape": True, "target_domain_embedding": True},
        {"tape": True, "target_domain_embedding": True},
        {"ddsr": True},
        EVERYTHING,
    ],
)
@pytest.mark.parametrize("kept", ["first", "last"])
def test_a_score_does_not_move_when_the_other_candidates_are_replaced(
    switches: dict, kept: str
) -> None:
    ours = with_signals(twin_of(stock_model(), cross_domain(**switches)).eval())
    history, candidates = batch(2)
    first = ours(history, candidates)[3]
    lengths = candidates["item_candidate_id"].lengths()
    is_kept = torch.zeros(int(lengths.sum()), dtype=torch.bool)
    is_kept[lengths.cumsum(0) - (lengths if kept == "first" else 1)] = True
    ids, domains = (candidates[name].values() for name in ("item_candidate_id", "item_domain"))
    others = replaced(candidates, "item_candidate_id", torch.where(is_kept, ids, 60 - ids))
    others = replaced(others, "item_domain", torch.where(is_kept, domains, (domains + 1) % DOMAINS))
    second = ours(history, others)[3]
    assert torch.equal(first[:, is_kept], second[:, is_kept])
    assert not torch.equal(first, second)


def test_a_score_reads_its_own_domain_and_no_other() -> None:
    ours = twin_of(stock_model(), cross_domain(domain_mask=True)).eval()
    history, candidates = batch(3)
    before = ours(history, candidates)[3]
    seen = history["uih_domain"].values()
    target = candidates["item_domain"].values()
    ids = torch.where(seen == 1, 60 - history["item_id"].values(), history["item_id"].values())
    after = ours(replaced(history, "item_id", ids), candidates)[3]
    assert torch.equal(before[:, target != 1], after[:, target != 1])
    assert not torch.equal(before[:, target == 1], after[:, target == 1])


@pytest.mark.parametrize("switches", [{}, {"domain_mask": True}, EVERYTHING])
def test_with_a_norm_length_a_score_does_not_depend_on_the_batch(switches: dict) -> None:
    model = build(extension=cross_domain(norm_length=40, **switches)).eval()
    model.load_state_dict(stock_model().state_dict(), strict=False)
    with_signals(model)
    history, candidates = batch(5)
    both = model(history, candidates)[3]
    users = [
        [
            jagged(keys, [[f[key].to_dense()[user].long()] for key in keys])
            for f, keys in ((history, HISTORY), (candidates, CANDIDATES))
        ]
        for user in range(5)
    ]
    alone = torch.cat([model(*user)[3] for user in users], dim=1)
    torch.testing.assert_close(both, alone, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match=r"xd_dlrm.norm_length = 9, but .* rows; raise it"):
        build(extension=cross_domain(norm_length=9))(history, candidates)


@pytest.mark.parametrize(("worst", "name"), [(DOMAINS, "uih_domain"), (-1, "item_domain")])
def test_a_domain_out_of_range_is_refused(worst: int, name: str) -> None:
    ours = build(extension=cross_domain(domain_mask=True))
    history, candidates = batch(4)
    features = candidates if name in CANDIDATES else history
    values = features[name].values().clone()
    values[0] = worst
    changed = replaced(features, name, values)
    both = (history, changed) if name in CANDIDATES else (changed, candidates)
    with pytest.raises(InputError, match=rf"feature '{name}' holds domain {worst}, outside 0..3"):
        ours(*both)


def test_a_missing_feature_is_refused() -> None:
    ours = build(extension=cross_domain(domain_mask=True))
    history, _ = batch(4)
    with pytest.raises(InputError, match="no feature 'item_domain' but item_id"):
        ours(history, jagged(("item_id",), [[v.long() for v in history["item_id"].to_dense()]]))


def test_inference_mode_is_refused() -> None:
    from hstu_xd.plugins.dlrm_v3.model import CrossDomainDlrmHSTU

    with pytest.raises(InputError, match="is_inference = True"):
        CrossDomainDlrmHSTU(None, None, True, cross_domain=cross_domain(domain_mask=True))


@pytest.mark.parametrize("reach", ["max_attn_len", "contextual_seq_len"])
def test_layers_that_reach_otherwise_are_refused(
    monkeypatch: pytest.MonkeyPatch, reach: str
) -> None:
    from generative_recommenders.modules import dlrm_hstu

    original = dlrm_hstu.STULayerConfig

    def windowed(**arguments: Any) -> Any:
        return original(**arguments | {reach: 5})

    monkeypatch.setattr(dlrm_hstu, "STULayerConfig", windowed)
    with pytest.raises(InputError, match=f"a layer has {reach} = 5"):
        build(extension=cross_domain(domain_mask=True))
