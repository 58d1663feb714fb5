"""PersonalizedHLLM_XD inside a codebase, with tiny LLMs: figures as JSON. See probe_runs.py."""

import json
import math

import torch
from probe_runs import (
    ARGUMENTS,
    IS_PERSREC,
    LENGTH,
    OUT,
    TOKENS,
    USERS,
    WORK,
    alone,
    compared,
    histories,
    llm_scores,
    packed,
    shake,
    text_batch,
    worst_gradient,
)
from REC.config import Config
from REC.utils import get_model

from hstu_xd.errors import InputError
from hstu_xd.model.hstu import is_cross_domain
from hstu_xd.plugins.rec.rec_rebindings import with_hstu_xd
from hstu_xd.plugins.rec.rec_session import SESSION
from hstu_xd.plugins.rec.settings import RecSettings

TEXTS = WORK / ("texts_persrec.yaml" if IS_PERSREC else "texts.yaml")
FILES = ["overall/LLM_ddp.yaml", "HLLM/HLLM.yaml"]
FILES += [str(WORK / name) for name in ("small_hllm.yaml", "cuts.yaml")] + [str(TEXTS)]
CUT, TOKENS_A_USER = 4, 3
ZERO_INIT = {"tape": True, "ddsr": True, "target_domain_embedding": True}
MODELS = with_hstu_xd(get_model)


def models(keys, **changes):
    """PerSRec's PersonalizedHLLM and ours with the same, large, parameters."""
    made = Config(config_file_list=FILES)
    for key, value in changes.items():
        made[key] = value
    SESSION.configure(RecSettings("PersonalizedHLLM_XD", str(WORK / "store"), **keys))
    SESSION.open_log(TOKENS, None)
    names = ("PersonalizedHLLM", "PersonalizedHLLM_XD")
    one, other = (MODELS(name)(made, *ARGUMENTS) for name in names)
    shake(one, other)
    return one, other


def batch(padding_seed=0):
    return text_batch(padding_seed) | {"user_id": torch.arange(USERS)}


def states_and_loss(model, interaction):
    """Outputs of the user LLM at valid events, and the loss."""
    kept = []
    handle = model.user_llm.register_forward_hook(
        lambda module, given, output: kept.append(output.hidden_states[-1])
    )
    loss = model(interaction)["loss"]
    handle.remove()
    columns = [c + TOKENS_A_USER * (c >= CUT) for c in range(LENGTH)]
    return kept[0][:, columns][interaction["attention_mask"].bool()], loss


def all_off():
    one, other = models({})
    losses = []
    for model in (one, other):
        torch.manual_seed(5)  # PerSRec draws which events to drop, none here
        losses.append(model(batch())["loss"])
        losses[-1].backward()
    return {
        "loss": abs(float(losses[0] - losses[1])),
        "gradient": worst_gradient(one, other),
        "scores": float((llm_scores(one.eval()) - llm_scores(other.eval())).abs().max()),
        "names": list(one.state_dict()) != list(other.state_dict()),
    }


def on(keys, **changes):
    """States, their gradients, scores, and the loss over events by its formula."""
    one, other = models(keys, **changes)
    (first, _), (second, loss) = (
        states_and_loss(one, batch()),
        states_and_loss(other, batch()),
    )
    weights = torch.randn(first.shape, generator=torch.Generator().manual_seed(6))
    expected = loss_over_events(one, first)
    (first * weights).mean().backward()
    (second * weights).mean().backward()
    return {
        "states": float((first - second).abs().max()),
        "gradient": worst_gradient(one, other),
        "scores": float((llm_scores(one.eval()) - llm_scores(other.eval())).abs().max()),
        "loss": abs(float(loss) - expected),
    }


def loss_over_events(one, hidden):
    """Every valid event predicts its next item, against all drawn ones."""
    interaction = batch()
    items, drawn, valid = (
        interaction[name] for name in ("pos_item_ids", "neg_item_ids", "attention_mask")
    )
    targets = embedded(one, items, "pos")[:, 1:][valid.bool()]
    shared = embedded(one, drawn, "neg").flatten(0, 1)
    unit = torch.nn.functional.normalize
    hidden, targets, shared = (unit(x, dim=-1) for x in (hidden, targets, shared))
    logits = (hidden @ shared.T).masked_fill(targets @ shared.T > one.nce_thres, -1e30)
    logits = torch.cat([(hidden * targets).sum(1, keepdim=True), logits], 1) * one.logit_scale.exp()
    labels = torch.zeros(len(logits), dtype=torch.int64)
    return float(torch.nn.functional.cross_entropy(logits, labels))


def embedded(one, items, kind):
    """What the item LLM makes of a table of items."""
    found = one({**packed(items.flatten(), "pos")}, mode="compute_item")
    return found.detach().unflatten(0, items.shape)


def parity():
    zero_init = {"encoder": ZERO_INIT, "negatives": "catalogue"}
    unmasked = {"encoder": {"domain_mask": True, "full_attention_layers": (0, 1)}}
    return {
        "zero_initialised": on(zero_init),
        "zero_initialised_without_flash": on(zero_init, use_ft_flash_attn=False),
        "no_layer_masked": on(unmasked | {"negatives": "catalogue"}),
        "few_negatives": few_negatives(zero_init),
    }


def few_negatives(keys):
    """The loss does not change by how many of the drawn items PerSRec counts twice."""
    _, other = models(keys)
    interaction = batch()
    few = interaction["neg_item_ids"][:, :2]
    interaction |= {"neg_item_ids": few, **packed(few.flatten(), "neg")}
    seen = []
    theirs = type(other).__mro__[1].nce_loss

    def captured(self, hidden, targets, negatives, valid):
        seen.append((targets.shape[1], negatives.shape[1]))
        return theirs(self, hidden, targets, negatives, valid)

    type(other).__mro__[1].nce_loss = captured
    other(interaction)
    type(other).__mro__[1].nce_loss = theirs
    return seen


def by_loops(one, full_layers):
    """States of valid events, who reads whom and with which weight decided pair by pair."""
    items, _, valid, _ = histories()
    domains = SESSION.catalog.item_domains[items]
    vectors = embedded(one, items, "pos")
    states = []
    for user in range(USERS):
        rows = []
        for event in range(LENGTH):
            if event == CUT:
                for token in range(TOKENS_A_USER):
                    for domain in range(3):
                        rows.append((True, domain, CUT + token, one.user_embedding[0, token]))
            if valid[user, event]:
                place = event + TOKENS_A_USER * (event >= CUT)
                rows.append((False, int(domains[user, event]), place, vectors[user, event]))
        x = torch.stack([row[3] for row in rows]).unsqueeze(0)
        positions = torch.tensor([[row[2] for row in rows]])
        states.append(through(one.user_llm.model, x, positions, rows, full_layers))
    return torch.cat(states)


def through(llm, x, positions, rows, full_layers):
    if hasattr(llm, "positions"):  # the stand-in's, where Llama rotates inside its layers
        x = x + llm.positions(positions)
    for number, layer in enumerate(llm.layers):
        layer.self_attn.use_ft_flash_attn = False
        masks = [[weight(q, k, number in full_layers) for k in rows] for q in rows]
        mask = torch.tensor(masks) + torch.full((len(rows),) * 2, -1e30).triu(1)
        x = layer(x, attention_mask=mask[None, None], position_ids=positions)
        x = x[0] if isinstance(x, tuple) else x
    return llm.norm(x)[0, [i for i, row in enumerate(rows) if not row[0]]]


def weight(query, key, is_full):
    """What is added to the score of an earlier key."""
    (asks_as_token, own, asked_at, _), (is_token, domain, place, _) = query, key
    if not is_token and place < CUT <= asked_at and not asks_as_token:
        return -1e30
    if is_full:
        if is_token and asks_as_token:
            return 0.0 if own == domain else -1e30
        return -math.log(3) if is_token else 0.0
    return 0.0 if own == domain else -1e30


def masked():
    found = {}
    for name, full in (("mask", ()), ("first_layer_full", (0,)), ("last_layer_full", (1,))):
        one, other = models({"encoder": {"domain_mask": True, "full_attention_layers": full}})
        states, _ = states_and_loss(other, batch())
        found[name] = float((states - by_loops(one, full)).abs().max())
    return found


def semantics():
    keys = {"encoder": {"domain_mask": True, **ZERO_INIT}}
    _, other = models(keys)
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if is_cross_domain(name):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    (usual, loss), (padded, _) = (states_and_loss(other, batch(seed)) for seed in (0, 5))
    again = checkpointed(other)
    return {
        "padding": float((usual - padded).abs().max()),
        "checkpointing": abs(float(loss) - again),
        "negatives": negatives(),
    }


def checkpointed(model):
    """The loss with activations computed twice."""
    model.train().user_llm.model.gradient_checkpointing = True
    loss = model(batch())["loss"]
    loss.backward()
    return float(loss)


def negatives():
    """How many pairs domain-scoped logits do not treat as the domains say; none of the old ones."""
    wrong = 0
    for keys in ({}, {"loss_on_all_items": False}) if IS_PERSREC else ({},):
        _, scoped = models({"negatives": "domain"}, **keys)
        kept, theirs = [], scoped.nce_loss

        def captured(*given, theirs=theirs, kept=kept):
            kept.append(theirs(*given))
            return kept[-1]

        scoped.nce_loss = captured
        interaction = batch()
        scoped(interaction)
        valid = interaction["attention_mask"].bool().clone()
        if keys:
            valid[:, :CUT] = False
        domains = SESSION.catalog.item_domains
        targets = domains[interaction["pos_item_ids"][:, 1:][valid]]
        other = targets.unsqueeze(1) != domains[interaction["neg_item_ids"].flatten()]
        (logits, _), *_ = kept
        wrong += abs(len(logits) - len(targets))
        wrong += int((logits[:, 1:][other] > -1e30).sum())
    return wrong


def refusals():
    said = {}
    for name, changes in {
        "mistral": {"user_pretrain_dir": str(WORK / "user_mistral")},
        "dropped": {"item_dropout": 0.1},
        "recent": {"recent_item_num": 5},
        "evaluated": {"MAX_ITEM_LIST_LENGTH_TEST": 12},
    }.items():
        try:
            models({"encoder": {"domain_mask": True}}, **changes)
        except InputError as error:
            said[name] = str(error)
    _, other = models({"encoder": {"domain_mask": True}})
    for method in ("compress_pretrain", "predict1"):
        try:
            getattr(other, method)(None, None, None)
        except InputError as error:
            said[method] = str(error)
    return said


if __name__ == "__main__":
    figures = alone(
        lambda: {
            "all_off": all_off(),
            "parity": parity(),
            "masked": masked(),
            "semantics": semantics(),
            "refusals": refusals(),
        }
    )
    switches = {"domain_mask": True, **ZERO_INIT}
    found = compared(FILES, "PersonalizedHLLM", "PersonalizedHLLM_XD", switches, ZERO_INIT)
    del found["train_data"]
    figures["end_to_end"] = found
    OUT.write_text(json.dumps(figures, indent=1), encoding="utf-8")
