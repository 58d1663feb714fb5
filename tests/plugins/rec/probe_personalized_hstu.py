"""PersonalizedHSTU_XD inside a codebase: figures as JSON for the tests. See probe_runs.py."""

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
from torch.nn.functional import cross_entropy, layer_norm, normalize, silu

from hstu_xd.catalog import DomainCatalog
from hstu_xd.errors import InputError
from hstu_xd.plugins.host import source_problems
from hstu_xd.plugins.rec import HOST
from hstu_xd.plugins.rec.personalized_hstu import PersonalizedHSTU_XD
from hstu_xd.plugins.rec.rec_metrics import with_request
from hstu_xd.plugins.rec.rec_session import SESSION
from hstu_xd.plugins.rec.settings import RecSettings

FILES = ["overall/ID.yaml", "IDNet/hstu.yaml", str(WORK / "small.yaml"), str(WORK / "cuts.yaml")]
HEADS = 4
ZERO_INIT = {"tape": True, "ddsr": True, "target_domain_embedding": True}
VIEWS = {"domain_mask": True, "target_view_heads": 2}
ONE_CUT = {"insert_method": None}


def models(changes=None, one_domain=False, **keys):
    """PerSRec's PersonalizedHSTU and ours with the same, large, parameters."""
    made = Config(config_file_list=FILES)
    for key, value in {"hidden_dropout_prob": 0.0, **(changes or {})}.items():
        made[key] = value
    SESSION.configure(RecSettings("PersonalizedHSTU_XD", str(WORK / "store"), **keys))
    SESSION.open_log(TOKENS, None)
    if one_domain:
        SESSION.open(DomainCatalog(torch.zeros(len(TOKENS), dtype=torch.int64), ["all"]))
    torch.manual_seed(3)
    one = theirs.PersonalizedHSTU(made, *ARGUMENTS)
    torch.manual_seed(3)
    other = PersonalizedHSTU_XD(made, *ARGUMENTS)
    shake(one, other, unused="_rel_attn_bias")
    return one, other


def cuts_of(one):
    return [(int(column), int(number)) for column, number in one.insert_method]


def encoded(other, padding_seed=0, swapped=None):
    items, _, valid, _, times = batch(padding_seed)
    items = items if swapped is None else swapped
    domains = other._xd_domains_of(items)
    return other._xd_encode(items[:, :-1], valid.bool(), domains, times)


def their_states(one):
    """Outputs of their layers at valid events: (L, K); of whole columns with tokens, their own."""
    items, drawn, valid, users, _ = batch()
    kept = []
    handle = one._hstu.register_forward_hook(lambda module, given, output: kept.append(output))
    one((items, drawn, valid, *users))
    handle.remove()
    columns = [c + sum(n for cut, n in cuts_of(one) if cut <= c) for c in range(LENGTH)]
    return kept[0][:, columns][valid.bool()]


def scores(one, other):
    items, _, valid, users, times = batch()
    histories = items[:, :-1] * valid
    features = one.compute_item_all()
    calendar = torch.zeros(USERS, LENGTH, 6, dtype=torch.int64)
    request = with_request(times, torch.arange(USERS) % len(SESSION.catalog.domain_names))
    second = calendar if other._xd_is_plain else request
    found = (
        model.eval().predict(histories, given, features, *users)
        for model, given in ((one, calendar), (other, second))
    )
    return float((next(found) - next(found)).abs().max())


def all_off():
    one, other = models()
    items, drawn, valid, users, _ = batch()
    torch.manual_seed(5)
    first = one((items, drawn, valid, *users))["loss"]
    torch.manual_seed(5)
    second = other((items, drawn, valid, *users))["loss"]
    first.backward()
    second.backward()
    return {
        "loss": abs(float(first - second)),
        "gradient": worst_gradient(one, other),
        "scores": scores(one, other),
        "names": list(one.state_dict()) != list(other.state_dict()),
    }


def on(changes=None, **keys):
    """States, their gradients, scores, and the loss over events by its formula."""
    one, other = models(changes, **keys)
    first, second = their_states(one), encoded(other)
    weights = torch.randn(first.shape, generator=torch.Generator().manual_seed(6))
    (first * weights).sum().backward()
    (second * weights).sum().backward()
    items, drawn, valid, users, times = batch()
    late = (times,) if SESSION.settings.reads_time else ()
    loss = other((items, drawn, valid, *users, *late))["loss"]
    return {
        "states": float((first - second).abs().max()),
        "gradient": worst_gradient(one, other) / largest_gradient(one),
        "scores": scores(one, other),
        "loss": abs(float(loss) - float(loss_over_events(one, first, items, drawn, valid))),
    }


def largest_gradient(model):
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return max(float(gradient.abs().max()) for gradient in gradients)


def loss_over_events(one, hidden, items, drawn, valid):
    def vectors(numbers):
        return normalize(one.item_id_proj_tower(one.item_embedding(numbers)), dim=-1)

    targets = vectors(items[:, 1:][valid.bool()])
    shared, hidden = vectors(drawn.flatten()), normalize(hidden, dim=-1)
    logits = (hidden @ shared.T).masked_fill(targets @ shared.T > one.nce_thres, -1e30)
    logits = torch.cat([(hidden * targets).sum(1, keepdim=True), logits], 1)
    labels = torch.zeros(len(logits), dtype=torch.int64)
    return cross_entropy(logits * one.logit_scale.exp(), labels)


def parity():
    eager = {"encoder": {"impl": "eager"}}
    mask = {"encoder": {"domain_mask": True, "target_view_heads": 2}, "negatives": "catalogue"}
    return {
        "eager": on(**eager),
        "reference": on(encoder={"impl": "reference"}),
        "one_cut": on(ONE_CUT, **eager),
        "zero_initialised": on(encoder=ZERO_INIT, negatives="catalogue"),
        "projected_items": on({"item_embedding_size": 24}, **eager),
        "one_domain": on(one_domain=True, **mask),
    }


def by_loops(one, other, target_heads):
    """States of valid events by dense layers, who reads whom decided one pair at a time."""
    items, _, valid, _, _ = batch()
    domains = other._xd_domains_of(items)
    cuts, num_domains = cuts_of(one), len(SESSION.catalog.domain_names)
    states = []
    for user in range(USERS):
        rows = rows_of(one, cuts, num_domains, items[user], valid[user], domains[user])
        x = torch.stack([row["input"] for row in rows])
        masks = [[[reads(q, k, head >= HEADS - target_heads) for k in rows] for q in rows]
                 for head in range(HEADS)]  # fmt: skip
        seen = torch.tensor(masks).tril()
        for layer in one._hstu._attention_layers:
            x = dense(layer, x, seen, LENGTH + sum(number for _, number in cuts))
        states += [x[i] for i, row in enumerate(rows) if not row["is_token"]]
    return torch.stack(states)


def rows_of(one, cuts, num_domains, items, valid, domains):
    rows, column, token = [], 0, 0
    for event in range(LENGTH):
        for number in [number for cut, number in cuts if cut == event]:
            for _ in range(number):
                place = one.position_embedding.weight[column]
                vector = one.user_embedding[0, token] + place
                segment = sum(cut < event for cut, _ in cuts)
                for domain in range(num_domains):
                    rows.append({"is_token": True, "segment": segment, "own": domain,
                                 "target": domain, "input": vector})  # fmt: skip
                column, token = column + 1, token + 1
        if valid[event]:
            vector = one.item_id_proj_tower(one.item_embedding.weight[items[event]])
            rows.append({"is_token": False, "segment": sum(cut <= event for cut, _ in cuts),
                         "own": int(domains[event]), "target": int(domains[event + 1]),
                         "input": vector + one.position_embedding.weight[column]})  # fmt: skip
        column += 1
    return rows


def reads(query, key, is_target_head):
    if key["own"] != query["target" if is_target_head else "own"]:
        return False
    return key["is_token"] or key["segment"] == query["segment"]


def dense(layer, x, seen, length):
    width = x.shape[-1]
    parts = silu(layer_norm(x, [width], eps=1e-6) @ layer._uvqk).chunk(4, dim=-1)
    v, q, k = (part.unflatten(1, (HEADS, -1)).transpose(0, 1) for part in parts[1:])
    attended = (silu(q @ k.transpose(1, 2)) / length * seen) @ v
    attended = attended.transpose(0, 1).reshape(x.shape)
    return layer._o(parts[0] * layer_norm(attended, [width], eps=1e-6)) + x


def masked():
    found = {}
    for name, changes, encoder in (
        ("mask", None, {"domain_mask": True}),
        ("one_cut", ONE_CUT, {"domain_mask": True}),
        ("views", None, VIEWS),
    ):
        one, other = models(changes, encoder=encoder)
        expected = by_loops(one, other, encoder.get("target_view_heads", 0))
        found[name] = float((encoded(other) - expected).abs().max())
    return found


def semantics():
    """What moves events when items before the cuts change: of other domains, of the own one."""
    one, other = models(encoder={"domain_mask": True})
    items, _, valid, _, _ = batch()
    domains = SESSION.catalog.item_domains[items]
    first_cut = cuts_of(one)[0][0]
    old = (domains == 0) & (torch.arange(LENGTH + 1) < first_cut)
    swapped = torch.where(old, SESSION.catalog.items_of(0)[5], items)
    moved = (encoded(other) - encoded(other, swapped=swapped)).abs().amax(1)
    recent = (torch.arange(LENGTH).expand(USERS, -1) >= first_cut)[valid.bool()]
    outside = (domains[:, :-1] != 0)[valid.bool()]
    _, everything = models(encoder={**VIEWS, **ZERO_INIT}, negatives="catalogue")
    with torch.no_grad():
        for parameter in everything.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    padding = [encoded(everything, seed) for seed in (0, 5)]
    return {
        "other_domain": float(moved[outside].max()),
        "own_domain_behind_tokens": float(moved[~outside & recent].max()),
        "padding": float((padding[0] - padding[1]).abs().max()),
    }


def cached_tokens():
    """What is said of PerSRec's methods that read cached tokens."""
    _, other = models(encoder={"domain_mask": True})
    said = []
    for method in ("compress_pretrain", "predict2"):
        try:
            getattr(other, method)(None, None, None, None)
        except InputError as error:
            said.append(str(error))
    return said


if __name__ == "__main__":
    figures = alone(
        lambda: {
            "all_off": all_off(),
            "parity": parity(),
            "masked": masked(),
            "semantics": semantics(),
            "cached_tokens": cached_tokens(),
        }
    )
    figures["unverified"] = source_problems(HOST, Path("REC"))
    found = compared(
        FILES, "PersonalizedHSTU", "PersonalizedHSTU_XD", {**VIEWS, **ZERO_INIT}, ZERO_INIT
    )
    del found["train_data"]
    figures["end_to_end"] = found
    OUT.write_text(json.dumps(figures, indent=1), encoding="utf-8")
