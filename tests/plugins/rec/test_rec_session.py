from pathlib import Path

import torch

from hstu_xd.catalog import DomainCatalog
from hstu_xd.plugins.rec.evaluation import _elsewhere
from hstu_xd.plugins.rec.session import SESSION, Session
from hstu_xd.plugins.rec.settings import RecSettings


def test_domains_of_an_earlier_run_do_not_linger(work: Path) -> None:
    session = Session()
    session.configure(RecSettings("HSTU", str(work / "store")))
    tokens = DomainCatalog.load(work / "store").item_tokens
    session.open(["[PAD]", *tokens], None)
    assert session.catalog is not None
    session.configure(RecSettings("HSTU"))
    assert session.catalog is None


def test_scores_of_texts_without_events_are_of_no_domain(monkeypatch) -> None:
    monkeypatch.setattr(SESSION, "catalog", DomainCatalog(torch.tensor([0, 0, 1]), ["a", "b"]))
    monkeypatch.setattr(SESSION, "_copies", {})
    found = _elsewhere(torch.tensor([0, 1]), 5)
    assert found.tolist() == [[True, False, True, True, True], [True, True, False, True, True]]
