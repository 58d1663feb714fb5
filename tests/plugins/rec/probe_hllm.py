"""HLLM_XD inside a codebase, with tiny LLMs: figures as JSON for the tests. See probe_runs.py."""

import json

import torch
from probe_runs import (
    ARGUMENTS,
    IS_PERSREC,
    OUT,
    TOKENS,
    USERS,
    WORK,
    alone,
    compared,
    histories,
    llm_scores,
    shake,
    text_batch,
    worst_gradient,
)
from REC.config import Config
from REC.utils import get_model

from hstu_xd.errors import InputError
from hstu_xd.model.hstu import is_cross_domain
from hstu_xd.model.views import Events
from hstu_xd.plugins.rec.rec_rebindings import with_hstu_xd
from hstu_xd.plugins.rec.rec_session import SESSION
from hstu_xd.plugins.rec.settings import RecSettings

TEXTS = WORK / ("texts_persrec.yaml" if IS_PERSREC else "texts.yaml")
FILES = ["overall/LLM_ddp.yaml", "HLLM/HLLM.yaml", str(WORK / "small_hllm.yaml"), str(TEXTS)]
ZERO_INIT = {"tape": True, "ddsr": True, "target_domain_embedding": True}
MODELS = with_hstu_xd(get_model)


def models(keys, **changes):
    """REC's HLLM and HLLM_XD with the same, large, parameters."""
    made = Config(config_file_list=FILES)
    for key, value in changes.items():
        made[key] = value
    SESSION.configure(RecSettings("HLLM_XD", str(WORK / "store"), **keys))
    SESSION.open_log(TOKENS, None)
    one, other = (MODELS(name)(made, *ARGUMENTS) for name in ("HLLM", "HLLM_XD"))
    shake(one, other)
    return one, other


def differences(one, other):
    losses = [model(text_batch())["loss"] for model in (one, other)]
    for loss in losses:
        loss.backward()
    gradient = worst_gradient(one, other)
    scores = float((llm_scores(one.eval()) - llm_scores(other.eval())).abs().max())
    return {"loss": abs(float(losses[0] - losses[1])), "gradient": gradient, "scores": scores}


def parity():
    zero_init = {"encoder": ZERO_INIT, "negatives": "catalogue"}
    unmasked = {"encoder": {"domain_mask": True, "full_attention_layers": (0, 1)}}
    cases = {
        "all_off": ({}, {}),
        "zero_initialised": (zero_init, {}),
        "zero_initialised_without_flash": (zero_init, {"use_ft_flash_attn": False}),
        "no_layer_masked": (unmasked | {"negatives": "catalogue"}, {}),
    }
    return {name: differences(*models(keys, **changes)) for name, (keys, changes) in cases.items()}


def hidden_states(model, embeds, valid, domains, times):
    model._xd_take(valid.bool(), domains, times)
    return last_states(model, embeds, valid)


def last_states(model, embeds, valid):
    return model.user_llm(inputs_embeds=embeds, attention_mask=valid).hidden_states[-1]


def mask():
    """What masked layers see of the first domain; which layers are masked; which LLMs can be."""
    plain, second = models({"encoder": {"domain_mask": True, "full_attention_layers": (0,)}})
    items, _, valid, times = histories()
    domains = SESSION.catalog.item_domains[items]
    torch.manual_seed(5)
    embeds = torch.randn(*valid.shape, 32)
    found = hidden_states(second, embeds, valid, domains, times)
    expected = by_explicit_masks(plain.user_llm.model, embeds, valid, domains[:, :-1])
    return {
        "change": {kind: change(f"user_{kind}", embeds) for kind in ("llm", "mistral")},
        "second_layer_only": float((found - expected)[valid.bool()].abs().max()),
        "checkpointing": checkpointing(),
        "bert": refusal("user_bert"),
    }


def change(folder, embeds):
    """How much other items of the first domain move the states of the others, and of their own."""
    keys = {"encoder": {"domain_mask": True}}
    _, model = models(keys, user_pretrain_dir=str(WORK / folder))
    items, _, valid, times = histories()
    domains = SESSION.catalog.item_domains[items]
    first = (domains[:, :-1] == 0) & (torch.arange(valid.shape[1]) < 8)
    others = torch.where(first.unsqueeze(2), torch.randn_like(embeds), embeds)
    before, after = (hidden_states(model, x, valid, domains, times) for x in (embeds, others))
    moved = (before - after).abs().amax(2)[valid.bool()]
    elsewhere = (domains[:, :-1] != 0)[valid.bool()]
    return float(moved[elsewhere].max()), float(moved[~elsewhere].max())


def refusal(folder):
    try:
        models({"encoder": {"domain_mask": True}}, user_pretrain_dir=str(WORK / folder))
    except InputError as error:
        return str(error)
    return ""


def by_explicit_masks(llm, x, valid, domains):
    """Two layers, the first over the whole history, the second over the own domain; by loops."""
    full, own = (torch.full((USERS, 1, *valid.shape[1:] * 2), -1e30) for _ in range(2))
    for user in range(USERS):
        for query in range(valid.shape[1]):
            for key in range(query + 1):
                is_padding = not valid[user, key]
                if is_padding and key != query:
                    continue
                full[user, 0, query, key] = 0
                if domains[user, key] == domains[user, query]:
                    own[user, 0, query, key] = 0
    positions = torch.arange(valid.shape[1]).unsqueeze(0)
    if hasattr(llm, "positions"):  # the stand-in's, where Llama rotates inside its layers
        x = x + llm.positions(positions)
    for layer, allowed in zip(llm.layers, (full, own)):
        layer.self_attn.use_ft_flash_attn = False
        x = layer(x, attention_mask=allowed, position_ids=positions)
        x = x[0] if isinstance(x, tuple) else x
    return llm.norm(x)


def checkpointing():
    """Loss and gradients with activations computed twice."""
    keys = {"encoder": {"domain_mask": True, **ZERO_INIT}}
    (_, one), (_, other) = models(keys), models(keys)
    other.load_state_dict(one.state_dict())
    other.user_llm.model.gradient_checkpointing = True
    return differences(one.train(), other.train())


def enlarge_parts(model):
    """Away from zero: the parameters that HLLM has not."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_cross_domain(name):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)


def semantics():
    """What random padding and the times change, what each part adds, which negatives count."""
    _, other = models({"encoder": {"domain_mask": True, **ZERO_INIT}})
    enlarge_parts(other)
    usual, padded = (text_batch(seed) for seed in (0, 5))
    older = usual | {"xd_times": usual["xd_times"] // 1000}
    loss, padding, times = (float(other(x)["loss"]) for x in (usual, padded, older))
    return {
        "padding": abs(loss - padding),
        "times": abs(loss - times),
        "parts": parts(),
        "negatives": negatives(),
    }


def parts():
    """Hidden states against the parts put around REC's user LLM by hand, one user at a time."""
    plain, model = models({"encoder": ZERO_INIT})
    enlarge_parts(model)
    items, _, valid, times = histories()
    domains = SESSION.catalog.item_domains[items]
    torch.manual_seed(5)
    embeds = torch.randn(*valid.shape, 32)
    found = hidden_states(model, embeds, valid, domains, times)
    difference, effect = [], []
    for user, length in enumerate(valid.sum(1).tolist()):
        here, following = slice(-length - 1, -1), slice(-length, None)
        own, target = domains[user, here], domains[user, following]
        told = embeds[user].clone()
        told[following] += model._tape(own, target) + model._target_domain_emb(target)
        before, after = (
            last_states(plain, x.unsqueeze(0), valid[user : user + 1])[0, following]
            for x in (embeds[user], told)
        )
        events = Events(
            domains=own,
            target_domains=target,
            timestamps=times[user, here],
            next_timestamps=times[user, following],
            offsets=torch.tensor([0, length]),
        )
        answer = model._ddsr(after, events)
        difference.append((found[user, following] - after - answer).abs().max())
        effect += [(before - after).abs().max(), answer.abs().max()]
    return {"difference": float(max(difference)), "effect": float(min(effect))}


def negatives():
    """Domain-scoped logits against REC's own, one pair at a time."""
    plain, scoped = models({"negatives": "domain"})
    interaction = text_batch()
    scoped(interaction)
    torch.manual_seed(6)
    valid = interaction["attention_mask"]
    vectors = [torch.randn(USERS, valid.shape[1] + i, 32) for i in (0, 0, 1)]
    before, _ = plain.nce_loss(*vectors, valid)
    after, _ = scoped.nce_loss(*vectors, valid)
    domains = SESSION.catalog.item_domains
    targets = interaction["pos_item_ids"][:, 1:][valid.bool()].tolist()
    drawn = interaction["neg_item_ids"].flatten().tolist()
    wrong = 0
    for row, target in enumerate(targets):
        wrong += int(before[row, 0] != after[row, 0])
        for column, item in enumerate(drawn, 1):
            if domains[item] == domains[target]:
                wrong += int(before[row, column] != after[row, column])
            else:
                wrong += int(after[row, column] > -1e30)
    return wrong


def drawn(dataset):
    """Whether samples draw negatives from their events' domains, and bring the events' times."""
    domains = dataset.xd_catalog.item_domains
    found = []
    for number in (None, 6):
        dataset.num_negatives = number
        for index in range(5):
            sample = dataset[index]
            items, own = domains[sample["pos_item_ids"]], domains[sample["neg_item_ids"]]
            events = items[-1 - int(sample["attention_mask"].sum()) :]
            expected = set(events.tolist())
            found.append(
                bool((own == items).all()) if not number else set(own.tolist()) <= expected
            )
            times = [int(time) for time in dataset.train_time_seq[index]][-len(items) :]
            found.append(sample["xd_times"].tolist() == [0] * (len(items) - len(times)) + times)
    return found


def equal_draws(dataset):
    """Share of the negatives that two processes of a job, seeded alike, draw both at a place."""
    dataset.num_negatives, found = None, []
    for rank in (0, 1):
        dataset.xd_rank = rank
        torch.manual_seed(3)
        found.append(torch.cat([dataset[index]["neg_item_ids"] for index in range(5)]))
    return float((found[0] == found[1]).float().mean())


if __name__ == "__main__":
    figures = alone(lambda: {"parity": parity(), "mask": mask(), "semantics": semantics()})
    found = compared(FILES, "HLLM", "HLLM_XD", {"domain_mask": True, **ZERO_INIT}, ZERO_INIT)
    figures["end_to_end"] = found
    dataset = found.pop("train_data")
    figures["drawn"] = drawn(dataset)
    figures["equal_draws"] = equal_draws(dataset)
    OUT.write_text(json.dumps(figures, indent=1), encoding="utf-8")
