import csv
from pathlib import Path

import pytest

from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.plugins.rec.export import write_interactions


def test_every_event_with_raw_tokens(work: Path) -> None:
    store = InteractionStore.open(work / "store")
    with (work / "data" / "synth.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == store.num_interactions
    assert list(rows[0]) == ["item_id", "user_id", "timestamp"]
    items, times = store.history(0)
    first = [row for row in rows if row["user_id"] == store.user_token(0)]
    assert [row["item_id"] for row in first] == [store.catalog.token(int(i)) for i in items]
    assert [int(row["timestamp"]) for row in first] == times.tolist()


def test_no_folder(work: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        write_interactions(work / "store", work / "nowhere" / "x.csv")
