from pathlib import Path

import torch

from hstu_xd.catalog import DomainCatalog
from hstu_xd.plugins.rec.rec_metrics import _elsewhere
from hstu_xd.plugins.rec.rec_session import SESSION, RecSession
from hstu_xd.plugins.rec.settings import RecSettings


def test_domains_of_an_earlier_run_do_not_linger(work: Path) -> None:
    session = RecSession()
    session.configure(RecSettings("HSTU", str(work / "store")))
    tokens = DomainCatalog.load(work / "store").item_tokens
    session.open_log(["[PAD]", *tokens], None)
    assert session.catalog is not None
    session.configure(RecSettings("HSTU"))
    assert session.catalog is None


def test_scores_of_texts_without_events_are_of_no_domain() -> None:
    SESSION.open(DomainCatalog(torch.tensor([0, 0, 1]), ["a", "b"]))
    found = _elsewhere(torch.tensor([0, 1]), 5)
    SESSION.open(None)
    assert found.tolist() == [[True, False, True, True, True], [True, True, False, True, True]]
