"""Runs inside a codebase's code/ folder, in a process of its own: figures as JSON for the tests.

python probe.py OUT.json WORK: WORK holds small.yaml, store/ and data/synth.csv.
"""

import csv
import importlib.util
import json
import math
import os
import sys
from collections import defaultdict
from pathlib import Path

import torch

from hstu_xd.catalog import DomainCatalog
from hstu_xd.plugins.rec.absent import stand_in_for_absent

sys.path.insert(0, "")
stand_in_for_absent()

from REC.config import Config  # noqa: E402
from REC.model.IDNet import hstu as theirs  # noqa: E402

from hstu_xd.plugins.patching import Rebinding, apply  # noqa: E402
from hstu_xd.plugins.rec.evaluation import with_request  # noqa: E402
from hstu_xd.plugins.rec.launch import main  # noqa: E402
from hstu_xd.plugins.rec.model import HSTU_XD  # noqa: E402
from hstu_xd.plugins.rec.session import SESSION  # noqa: E402
from hstu_xd.plugins.rec.settings import RecSettings  # noqa: E402
from hstu_xd.plugins.rec.verified import unverified_sources  # noqa: E402

OUT, WORK = map(Path, sys.argv[1:])
FILES = ["overall/ID.yaml", "IDNet/hstu.yaml", str(WORK / "small.yaml")]
IS_PERSREC = importlib.util.find_spec("REC.data.comm") is not None
TOKENS = ["[PAD]", *DomainCatalog.load(WORK / "store").item_tokens]
ITEMS, USERS, LENGTH = len(TOKENS) - 1, 7, 10


class _Data:
    item_num = ITEMS + 1


def config(**changes):
    made = Config(config_file_list=FILES)
    for key, value in {"hidden_dropout_prob": 0.0, **changes}.items():
        made[key] = value
    return made


def models(changes=None, **keys):
    """REC's HSTU and HSTU_XD with the same, large, parameters."""
    made = config(**(changes or {}))
    SESSION.configure(RecSettings("HSTU_XD", str(WORK / "store"), **keys))
    SESSION.open(TOKENS, None)
    arguments = (ITEMS + 1, 5) if IS_PERSREC else (_Data(),)
    torch.manual_seed(3)
    one = theirs.HSTU(made, *arguments)
    torch.manual_seed(3)
    other = HSTU_XD(made, *arguments)
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in one.named_parameters():
            if "logit_scale" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    left = other.load_state_dict(one.state_dict(), strict=False)
    unused = [name for name in left.unexpected_keys if "_rel_attn_bias" not in name]
    assert not unused, unused
    return one, other


def batch(padding_seed=0):
    """Histories of every length, random items at their left; with times behind."""
    random = torch.Generator().manual_seed(1)
    lengths = torch.tensor([11, 2, 7, 11, 5, 3, 9])
    columns = torch.arange(LENGTH + 1)
    real = columns >= (LENGTH + 1 - lengths)[:, None]
    items = torch.randint(1, ITEMS + 1, real.shape, generator=random)
    noise = torch.Generator().manual_seed(padding_seed)
    items = torch.where(real, items, torch.randint(1, ITEMS + 1, real.shape, generator=noise))
    drawn = torch.randint(1, ITEMS + 1, real.shape, generator=random)
    times = torch.randint(0, 10**6, real.shape, generator=random).cumsum(1) * real
    users = (torch.arange(USERS),) if IS_PERSREC else ()
    return items, drawn, real[:, :-1].long(), users, times


def losses(one, other, reads_time):
    items, drawn, valid, users, times = batch()
    first = one((items, drawn, valid, *users))["loss"]
    second = other((items, drawn, valid, *users, *((times,) if reads_time else ())))["loss"]
    first.backward()
    second.backward()
    theirs_, ours = (dict(model.named_parameters()) for model in (one, other))
    worst = max(
        float((theirs_[name].grad - ours[name].grad).abs().max())
        for name in theirs_
        if theirs_[name].grad is not None
    )
    return abs(float(first - second)), worst


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
    zero_init = {"tape": True, "ddsr": True, "target_domain_embedding": True}
    cases = {
        "all_off": {},
        "eager": {"encoder": {"impl": "eager"}},
        "reference": {"encoder": {"impl": "reference"}},
        "zero_initialised": {"encoder": zero_init, "negatives": "catalogue"},
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


EVERYTHING = {
    "domain_mask": True,
    "target_view_heads": 2,
    "tape": True,
    "ddsr": True,
    "target_domain_embedding": True,
}


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
    }


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


def launched(model, out, *keys, capture=None):
    """Train, validate and test through the launcher; the last result and what it was made of."""
    import REC.trainer.trainer

    os.environ.pop("LOCAL_RANK", None)
    if IS_PERSREC:
        import REC.data.comm

        REC.data.comm._LOCAL_PROCESS_GROUP = None
        REC.data.comm._get_global_gloo_group.cache_clear()
    seen = []

    def captured(evaluate):
        def capturing(self, eval_data, *arguments, **others):
            result = evaluate(self, eval_data, *arguments, **others)
            seen.append((self, eval_data, dict(result)))
            return result

        return capturing

    with apply([Rebinding(REC.trainer.trainer.__name__, "Trainer.evaluate", captured)]):
        run_keys = {"model": model, "data_path": WORK / "data", "dataset": "synth", "epochs": 1}
        run_keys["checkpoint_dir"] = WORK / out
        pairs = [word for key, value in run_keys.items() for word in (f"--{key}", str(value))]
        code = main(["--config_file", *FILES, *keys, *pairs])
    assert code == 0, code
    return seen[-1]


def brute_force(trainer, eval_data):
    """Every metric by loops over the interaction file, one user and one candidate at a time."""
    model = trainer.model.module
    data = getattr(eval_data.dataset, "dataload", None) or eval_data.dataset.interaction_data
    tokens = data.id2token["item_id"]
    number = {str(tokens[i]): i for i in range(1, len(tokens))}
    catalog = DomainCatalog.load(WORK / "store")
    domain_of = {
        number[token]: catalog.domain_names[int(d)]
        for token, d in zip(catalog.item_tokens, catalog.item_domains[1:])
        if token in number
    }
    index = {name: i for i, name in enumerate(sorted(catalog.domain_names))}
    events = defaultdict(list)
    with (WORK / "data" / "synth.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            events[row["user_id"]].append((int(row["timestamp"]), number[row["item_id"]]))
    features = model.compute_item_all()
    sums, counts = defaultdict(float), defaultdict(int)
    for log in events.values():
        log.sort()
        assert len({time for time, _ in log}) == len(log), "ties have no order"
        (*history, (request, target)) = log
        seen, latest = {item for _, item in history}, history[-LENGTH:]
        blank = LENGTH - len(latest)
        items = torch.tensor([[0] * blank + [item for _, item in latest]])
        times = torch.tensor([[0] * blank + [time for time, _ in latest] + [request]])
        asked = torch.tensor([index[domain_of[target]]])
        entries = with_request(times, asked) if SESSION.extends_model else times
        user = (torch.zeros(1, dtype=torch.int64),) if IS_PERSREC else ()
        score = model.predict(items, entries, features, *user)[0].tolist()
        rivals = [
            item
            for item, domain in domain_of.items()
            if domain == domain_of[target] and item not in seen
        ]
        rank = 1 + sum(score[item] > score[target] for item in rivals)
        stays = domain_of[history[-1][1]] == domain_of[target]
        for group in ("", f"[{domain_of[target]}]", "[stay]" if stays else "[switch]"):
            counts[group] += 1
            for k in (5, 10, 50):
                hit = rank <= k and target not in seen
                sums[f"recall@{k}{group}"] += hit
                sums[f"ndcg@{k}{group}"] += hit / math.log2(rank + 1)
    return {
        name: total / counts["[" + name.partition("[")[2] if "[" in name else ""]
        for name, total in sums.items()
    }


def end_to_end():
    path = ["--item_domain_path", str(WORK / "store")]
    switches = [word for key, value in EVERYTHING.items() for word in (f"--xd_{key}", str(value))]
    trainer, data, result = launched("HSTU_XD", "xd", *path, *switches)
    expected = brute_force(trainer, data)
    hstu = launched("HSTU", "hstu", *path)
    hstu_expected = brute_force(*hstu[:2])
    off = launched("HSTU_XD", "off", *path)
    # REC's metrics are rounded to 7 places.
    return {
        "metrics": result,
        "differs": sorted(k for k in expected if abs(expected[k] - result.get(k, -1)) > 1e-6),
        "unexpected": sorted(set(result) ^ set(expected)),
        "hstu_differs": sorted(
            k for k in hstu_expected if abs(hstu_expected[k] - hstu[2].get(k, -1)) > 1e-6
        ),
        "off_differs": sorted(k for k in hstu[2] if abs(hstu[2][k] - off[2].get(k, -1)) > 1e-6),
        "class": type(trainer.model.module).__mro__[1].__module__,
    }


if __name__ == "__main__":
    group = {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
    torch.distributed.init_process_group("gloo", **group)
    figures = {
        "parity": parity(),
        "relative_bias": relative_bias(),
        "semantics": semantics(),
    }
    torch.distributed.destroy_process_group()
    figures["unverified"] = unverified_sources(Path("REC"))
    figures["end_to_end"] = end_to_end()
    OUT.write_text(json.dumps(figures, indent=1), encoding="utf-8")
