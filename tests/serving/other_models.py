"""Models beside that of service_client: of other weights, other ids, or that do not fit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from service_client import DOMAINS, MODEL, WINDOW, write_run

from hstu_xd.catalog import DomainCatalog
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.serving import EncoderSession


def other_model(catalog: DomainCatalog = MODEL.catalog) -> CrossDomainHSTU:
    """Other weights, over the same items or others."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(7)
        model = CrossDomainHSTU(catalog, MODEL.settings, dropout_rate=0.0).float().eval()
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


OTHER = other_model()


def shuffled_catalog(without: Sequence[int] = ()) -> DomainCatalog:
    """The items of the tiny catalogue under other ids, domains in another order, some left out."""
    tokens = [n for n in reversed(range(1, MODEL.catalog.num_items + 1)) if n not in without]
    names = ["games", "books", "films"]
    domains = [names.index(DOMAINS[int(MODEL.catalog.item_domains[n])]) for n in tokens]
    return DomainCatalog(torch.tensor([0, *domains]), names, [str(n) for n in tokens])


def expected(model: CrossDomainHSTU, rows: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
    """Scores of all items of a domain by a model, for who has these events."""
    catalog = model.catalog
    ids = {catalog.token(item): item for item in catalog.domain_items.tolist()}
    known = [row for row in rows if row["item"] in ids]
    session = EncoderSession(model, window=WINDOW)
    session.append(
        ["ann"] * len(known), [ids[r["item"]] for r in known], [r["timestamp"] for r in known]
    )
    domain = catalog.domain_index(name)
    items = catalog.items_of(domain)
    (found,) = session.score(["ann"], items.unsqueeze(0), [domain])
    return {catalog.token(i): score for i, score in zip(items.tolist(), found.tolist())}


def write_runs(folder: Path) -> Path:
    """Run folders side by side: of the model, of another one, and of some that do not fit."""
    write_run(folder / "old")
    write_run(folder / "new", OTHER)
    write_run(folder / "shuffled", other_model(shuffled_catalog()))
    write_run(folder / "smaller", other_model(shuffled_catalog([1, 5])))
    names = ["books", "films", "toys"]
    write_run(folder / "toys", other_model(DomainCatalog(MODEL.catalog.item_domains, names)))
    tokens = [f"x{number}" for number in range(MODEL.catalog.num_items)]
    strange = DomainCatalog(MODEL.catalog.item_domains, DOMAINS, tokens)
    write_run(folder / "strange", other_model(strange))
    (write_run(folder / "broken") / "model.pt").write_bytes(b"nothing")
    for file in (folder / "broken").glob("*.safetensors"):
        file.write_bytes(b"nothing")
    return folder
