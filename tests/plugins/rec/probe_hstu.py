"""HSTU_XD inside a codebase: figures as JSON for the tests. See probe_runs.py."""

import json
from pathlib import Path

import torch
from probe_runs import (
    ARGUMENTS,
    LENGTH,
    OUT,
    TOKENS,
    USERS,
    WORK,
    alone,
    batch,
    compared,
    shake,
    worst_gradient,
)
from REC.config import Config
from REC.model.IDNet import hstu as theirs

from hstu_xd.plugins.host import source_problems
from hstu_xd.plugins.rebinding import Rebinding, apply
from hstu_xd.plugins.rec import HOST
from hstu_xd.plugins.rec.hstu import HSTU_XD
from hstu_xd.plugins.rec.rec_metrics import with_request
from hstu_xd.plugins.rec.rec_session import SESSION
from hstu_xd.plugins.rec.settings import RecSettings

FILES = ["overall/ID.yaml", "IDNet/hstu.yaml", str(WORK / "small.yaml")]

ZERO_INIT = {"tape": True, "ddsr": True, "target_domain_embedding": True}
EVERYTHING = {"domain_mask": True, "target_view_heads": 2, **ZERO_INIT}


def config(**changes):
    made = Config(config_file_list=FILES)
    for key, value in {"hidden_dropout_prob": 0.0, **changes}.items():
        made[key] = value
    return made


def models(changes=None, **keys):
    """REC's HSTU and HSTU_XD with the same, large, parameters."""
    made = config(**(changes or {}))
    SESSION.configure(RecSettings("HSTU_XD", str(WORK / "store"), **keys))
    SESSION.open_log(TOKENS, None)
    torch.manual_seed(3)
    one = theirs.HSTU(made, *ARGUMENTS)
    torch.manual_seed(3)
    other = HSTU_XD(made, *ARGUMENTS)
    shake(one, other, unused="_rel_attn_bias")
    return one, other


def losses(one, other, reads_time):
    items, drawn, valid, users, times = batch()
    first = one((items, drawn, valid, *users))["loss"]
    second = other((items, drawn, valid, *users, *((times,) if reads_time else ())))["loss"]
    first.backward()
    second.backward()
    return abs(float(first - second)), worst_gradient(one, other)


def scores(one, other):
    items, _, valid, users, times = batch()
    histories = items[:, :-1] * valid
    request = with_request(times, torch.arange(USERS) % 3)
    features = one.compute_item_all()
    calendar = torch.zeros(USERS, LENGTH, 6, dtype=torch.int64)
    second = calendar if other._xd_is_plain else request
    difference = one.eval().predict(histories, calendar, features, *users) - other.eval().predict(
        histories, second, features, *users
    )
    return float(difference.abs().max())


def parity():
    found = {}
    cases = {
        "all_off": {},
        "eager": {"encoder": {"impl": "eager"}},
        "reference": {"encoder": {"impl": "reference"}},
        "zero_initialised": {"encoder": ZERO_INIT, "negatives": "catalogue"},
    }
    for name, keys in cases.items():
        one, other = models(**keys)
        loss, gradient = losses(one, other, SESSION.settings.reads_time)
        found[name] = {"loss": loss, "gradient": gradient, "scores": scores(one, other)}
    for name, changes in {
        "projected_items": {"item_embedding_size": 24},
        "no_bias_built": {"enable_relative_attention_bias": False},
    }.items():
        one, other = models(changes, encoder={"impl": "eager"})
        loss, gradient = losses(one, other, False)
        found[name] = {"loss": loss, "gradient": gradient, "scores": scores(one, other)}
    return found


def relative_bias():
    """Scores with the bias against REC's own dense layers with REC's own formula put in."""
    one, other = models(relative_bias=True, negatives="catalogue")
    with torch.no_grad():
        for model in (one, other):
            torch.manual_seed(8)
            for name, parameter in model.named_parameters():
                if "_rel_attn_bias" in name:
                    parameter.copy_(torch.randn_like(parameter))
    items, _, valid, _, times = batch()
    histories = items[:, :-1] * valid
    hidden = other._xd_encode(
        histories, valid.bool(), torch.zeros_like(items), times
    )  # (L, K) of the valid tokens
    x = other._xd_inputs(histories, torch.arange(LENGTH))
    columns = torch.arange(LENGTH)
    mask = (valid.bool()[:, None] & (columns <= columns[:, None])).unsqueeze(1)
    gaps = (times[:, 1:, None] - times[:, None, :-1]).abs().clamp(min=1)
    buckets = (gaps.log() / 0.301).long().clamp(max=128)
    for layer in one._hstu._attention_layers:
        table = layer._rel_attn_bias
        middle = len(table._pos_w) // 2
        bias = table._pos_w[middle + columns - columns[:, None]] + table._ts_w[buckets]
        x = _biased(layer, x, mask, bias.unsqueeze(1))
    return float((x[valid.bool()] - hidden).abs().max())


def _biased(layer, x, mask, bias):
    from torch.nn.functional import layer_norm, silu

    width = x.shape[-1]
    parts = silu(layer_norm(x, [width], eps=1e-6) @ layer._uvqk).chunk(4, dim=-1)
    v, q, k = (part.view(*x.shape[:2], 4, -1).transpose(1, 2) for part in parts[1:])
    attended = (silu(q @ k.transpose(2, 3) + bias) / LENGTH * mask) @ v
    attended = attended.transpose(1, 2).reshape(x.shape)
    return layer._o(parts[0] * layer_norm(attended, [width], eps=1e-6)) + x


def semantics():
    """Random padding changes nothing; another domain's items change nothing under the mask."""
    _, other = models(encoder=EVERYTHING, negatives="catalogue")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    found = []
    for seed in (0, 5):
        items, drawn, valid, users, times = batch(seed)
        found.append(float(other((items, drawn, valid, *users, times))["loss"]))
    _, masked = models(encoder={"domain_mask": True})
    items, _, valid, users, times = batch()
    catalog = SESSION.catalog
    domains = catalog.item_domains[items]
    swapped = torch.where(
        (domains == 0) & (torch.arange(LENGTH + 1) < LENGTH - 1), catalog.items_of(0)[5], items
    )
    hidden = [masked._xd_encode(x[:, :-1], valid.bool(), domains, times) for x in (items, swapped)]
    outside = (domains[:, :-1] != 0)[valid.bool()]
    moved = (hidden[0] - hidden[1]).abs().amax(1)
    return {
        "padding": abs(found[0] - found[1]),
        "other_domain": float(moved[outside].max()),
        "own_domain": float(moved[~outside].max()),
        "negatives": negatives(),
        "equal_draws": equal_draws(),
    }


def equal_draws():
    """Share of the negatives that two processes of a job, seeded alike, draw both at a place."""
    items, drawn, valid, _, _ = batch()
    found = []
    for rank in (0, 1):
        _, other = models(encoder=EVERYTHING)
        torch.manual_seed(3)
        with apply([Rebinding("torch.distributed", "get_rank", lambda _, rank=rank: lambda: rank)]):
            found.append(other._xd_negatives(items, drawn, items[:, 1:][valid.bool()])[0])
    return float((found[0] == found[1]).float().mean())


def negatives():
    """Loss with domain-scoped shared negatives against a loop, and of a number a target."""
    _, other = models(encoder=EVERYTHING)
    items, drawn, valid, _, _ = batch()
    catalog = SESSION.catalog
    targets = items[:, 1:][valid.bool()]
    shared, excluded = other._xd_negatives(items, drawn, targets)
    kept = ~excluded == (catalog.item_domains[shared] == catalog.item_domains[targets].unsqueeze(1))
    other.num_negatives = 6
    own, none = other._xd_negatives(items, drawn, targets)
    inside = catalog.item_domains[own] == catalog.item_domains[targets].unsqueeze(1)
    return bool(kept.all() and inside.all() and none is None and own.shape == (len(targets), 6))


if __name__ == "__main__":
    figures = alone(
        lambda: {
            "parity": parity(),
            "relative_bias": relative_bias(),
            "semantics": semantics(),
        }
    )
    figures["unverified"] = source_problems(HOST, Path("REC"))
    figures["end_to_end"] = compared(FILES, "HSTU", "HSTU_XD", EVERYTHING, ZERO_INIT)
    del figures["end_to_end"]["train_data"]
    OUT.write_text(json.dumps(figures, indent=1), encoding="utf-8")
