"""For the probes, inside a codebase's code/ folder: whole runs of it, and their metrics by loops.

A probe is a process of its own: python PROBE OUT.json WORK, WORK being the tests' work folder.
"""

import csv
import importlib.util
import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hstu_xd.catalog import DomainCatalog
from hstu_xd.plugins.host import stand_in_for_absent
from hstu_xd.plugins.rebinding import Rebinding, apply
from hstu_xd.plugins.rec import HOST

sys.path.insert(0, "")
stand_in_for_absent(HOST)

from hstu_xd.plugins.rec.launch import main  # noqa: E402
from hstu_xd.plugins.rec.rec_metrics import with_request  # noqa: E402
from hstu_xd.plugins.rec.rec_session import SESSION  # noqa: E402

OUT, WORK = map(Path, sys.argv[1:])
IS_PERSREC = importlib.util.find_spec("REC.data.comm") is not None
TOKENS = ["[PAD]", *DomainCatalog.load(WORK / "store").item_tokens]
ITEMS, USERS, LENGTH = len(TOKENS) - 1, 7, 10
STORE = ["--item_domain_path", str(WORK / "store")]


class Data:
    item_num = ITEMS + 1


# What a model of REC takes behind its configuration.
ARGUMENTS = (ITEMS + 1, 5) if IS_PERSREC else (Data(),)


def words(switches: dict[str, Any]) -> list[str]:
    return [word for key, value in switches.items() for word in (f"--xd_{key}", str(value))]


def alone(figures: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Figures that need a process group but no run."""
    group = {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
    torch.distributed.init_process_group("gloo", **group)
    found = figures()
    torch.distributed.destroy_process_group()
    return found


def histories(padding_seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Of every length, random items at their left: items, drawn ones, validity, times."""
    random = torch.Generator().manual_seed(1)
    lengths = torch.tensor([11, 2, 7, 11, 5, 3, 9])
    columns = torch.arange(LENGTH + 1)
    real = columns >= (LENGTH + 1 - lengths)[:, None]
    items = torch.randint(1, ITEMS + 1, real.shape, generator=random)
    noise = torch.Generator().manual_seed(padding_seed)
    items = torch.where(real, items, torch.randint(1, ITEMS + 1, real.shape, generator=noise))
    drawn = torch.randint(1, ITEMS + 1, real.shape, generator=random)
    times = torch.randint(0, 10**6, real.shape, generator=random).cumsum(1) * real
    return items, drawn, real[:, :-1].long(), times


def batch(padding_seed: int = 0) -> tuple[Any, ...]:
    """Histories with PerSRec's numbers of users where it takes them; times behind."""
    items, drawn, valid, times = histories(padding_seed)
    return items, drawn, valid, (torch.arange(USERS),) if IS_PERSREC else (), times


def text_batch(padding_seed: int = 0) -> dict[str, torch.Tensor]:
    """Histories as models around an LLM read them."""
    items, drawn, valid, times = histories(padding_seed)
    return {
        "pos_item_ids": items,
        "neg_item_ids": drawn,
        **packed(items.flatten(), "pos"),
        **packed(drawn.flatten(), "neg"),
        "attention_mask": valid,
        "xd_times": times,
    }


def shake(one: torch.nn.Module, other: torch.nn.Module, unused: str | None = None) -> None:
    """Give both the same, large, parameters; those named ``unused`` may be of ``one`` alone."""
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in one.named_parameters():
            if "logit_scale" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    left = other.load_state_dict(one.state_dict(), strict=False).unexpected_keys
    left = [name for name in left if unused is None or unused not in name]
    assert not left, left


def packed(items: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
    """Texts of items, each of one to four words that the item alone has."""
    texts = [[(item + 7 * word) % 200 for word in range(1 + item % 4)] for item in items.tolist()]
    parts = {
        "input_ids": [number for text in texts for number in [*text, 0]],
        "cu_input_lens": [len(text) + 1 for text in texts],
        "position_ids": [place for text in texts for place in range(len(text) + 1)],
    }
    return {f"{kind}_{name}": torch.tensor(part) for name, part in parts.items()}


def llm_scores(model: Any) -> torch.Tensor:
    """What a model around an LLM predicts for the histories, with random item vectors."""
    items, _, valid, times = histories()
    torch.manual_seed(9)
    features = torch.randn(len(TOKENS), 32)
    if getattr(model, "_xd_is_plain", True):
        request = torch.zeros(USERS, valid.shape[1], 6, dtype=torch.int64)
    else:
        request = with_request(times, torch.arange(USERS) % 3)
    user = (torch.arange(USERS),) if IS_PERSREC else ()
    return model.predict(items[:, :-1] * valid, request, features, *user)


def worst_gradient(one: torch.nn.Module, other: torch.nn.Module) -> float:
    """Of the parameters of ``one``, which ``other`` has too."""
    theirs, ours = (dict(model.named_parameters()) for model in (one, other))
    return max(
        float((theirs[name].grad - ours[name].grad).abs().max())
        for name in theirs
        if theirs[name].grad is not None
    )


def launched(files: list[str], model: str, out: str, *keys: str) -> tuple[Any, Any, Any, Any]:
    """Train, validate and test: trainer, training data, test data and the last result."""
    os.environ.pop("LOCAL_RANK", None)
    if IS_PERSREC:
        import REC.data.comm

        REC.data.comm._LOCAL_PROCESS_GROUP = None
        REC.data.comm._get_global_gloo_group.cache_clear()
    trained, tested = [], []

    def fitting(fit):
        def captured(self, train_data, *arguments, **others):
            trained.append(train_data.dataset)
            return fit(self, train_data, *arguments, **others)

        return captured

    def evaluating(evaluate):
        def captured(self, eval_data, *arguments, **others):
            result = evaluate(self, eval_data, *arguments, **others)
            tested.append((self, trained[-1], eval_data, dict(result)))
            return result

        return captured

    rebindings = [
        Rebinding("REC.trainer.trainer", "Trainer.fit", fitting),
        Rebinding("REC.trainer.trainer", "Trainer.evaluate", evaluating),
    ]
    with apply(rebindings):
        run_keys = {"model": model, "data_path": WORK / "data", "dataset": "synth", "epochs": 1}
        run_keys["checkpoint_dir"] = WORK / OUT.stem / out
        pairs = [word for key, value in run_keys.items() for word in (f"--{key}", str(value))]
        code = main(["--config_file", *files, *keys, *pairs])
    assert code == 0, code
    return tested[-1]


def differing(expected: dict[str, float], found: dict[str, float]) -> list[str]:
    """Names of metrics that differ; REC's are rounded to 7 places."""
    return sorted(k for k in expected if abs(expected[k] - found.get(k, -1)) > 1e-6)


def brute_force(trainer: Any, eval_data: Any) -> dict[str, float]:
    """Every metric by loops over the interaction file, one user and one candidate at a time."""
    model, features = trainer.model.module, trainer.item_feature
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


def compared(
    files: list[str], theirs: str, ours: str, switches: dict[str, Any], zero_init: dict[str, Any]
) -> dict[str, Any]:
    """Trained and tested: ours with switches, theirs, ours with everything off.

    And not trained: ours with what starts at zero, from the checkpoint of theirs.
    """
    trainer, train_data, test_data, result = launched(files, ours, "xd", *STORE, *words(switches))
    expected = brute_force(trainer, test_data)
    plain, _, plain_data, plain_result = launched(files, theirs, "plain", *STORE)
    plain_expected = brute_force(plain, plain_data)
    off = launched(files, ours, "off", *STORE)[-1]
    (checkpoint,) = (WORK / OUT.stem / "plain").rglob("*.pth")
    keys = [*words(zero_init | {"warm_start": checkpoint}), "--need_training", "False"]
    continued, _, _, continued_result = launched(files, ours, "continued", *STORE, *keys)
    same = dict(continued.model.module.named_parameters())
    new = sorted(set(same) - {name for name, _ in plain.model.module.named_parameters()})
    return {
        "metrics": result,
        "differs": differing(expected, result),
        "unexpected": sorted(set(result) ^ set(expected)),
        "theirs_differs": differing(plain_expected, plain_result),
        "off_differs": differing(plain_result, off),
        "continued_differs": differing(plain_result, continued_result),
        "new_parameters": new,
        "train_data": train_data,
    }
