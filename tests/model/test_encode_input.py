"""Requests that encode() refuses: the message names the value and what is needed."""

import re
from typing import Any

import pytest
import torch
from tiny_models import NORM_LENGTH, tiny_catalog, tiny_model
from torch import Tensor

from hstu_xd.batch import JaggedBatch
from hstu_xd.catalog import DomainCatalog
from hstu_xd.data.window import Window
from hstu_xd.errors import InputError
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.serving.session import EncoderSession


def request_with(**changes: Any) -> dict[str, Tensor]:
    return {
        "item_ids": torch.tensor([[1, 3, 2], [4, 0, 0]]),
        "timestamps": torch.tensor([[5, 6, 9], [7, 0, 0]]),
        "target_domains": torch.tensor([1, 0]),
        **changes,
    }


def test_a_sound_request() -> None:
    vectors = tiny_model(domain_mask=True, ddsr=True).encode(**request_with())
    assert vectors.shape == (2, 16)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))


def test_the_request_is_made_at_the_last_event_unless_told() -> None:
    model = tiny_model()
    implied = model.encode(**request_with())
    explicit = model.encode(**request_with(request_timestamps=torch.tensor([9, 7])))
    later = model.encode(**request_with(request_timestamps=torch.tensor([90, 700])))
    assert torch.equal(implied, explicit)
    assert not torch.equal(implied, later)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"item_ids": torch.tensor([1, 2]), "timestamps": torch.tensor([1, 2])},
            "item_ids (2,) and timestamps (2,) must both be (B, N)",
        ),
        (
            {"timestamps": torch.tensor([[5, 6], [7, 0]])},
            "item_ids (2, 3) and timestamps (2, 2) must both be (B, N)",
        ),
        ({"target_domains": torch.tensor([1])}, "target_domains has shape (1,); (2,) is needed"),
        ({"target_domains": torch.tensor([1, 3])}, "target_domains holds ids 1..3; 0..2 are known"),
        ({"target_domains": torch.tensor([-1, 0])}, "target_domains holds ids -1..0; 0..2"),
        (
            {"item_ids": torch.tensor([[1, 3, 2], [25, 0, 0]])},
            "item_ids holds ids 0..25; 0..24 are known",
        ),
        ({"item_ids": torch.tensor([[1, 3, -2], [4, 0, 0]])}, "item_ids holds ids -2..4"),
        (
            {"item_ids": torch.tensor([[1, 3, 2], [0, 0, 0]])},
            "item_ids row 1 is empty; at least one event is needed",
        ),
        (
            {"item_ids": torch.tensor([[1, 3, 2], [0, 0, 4]])},
            "item_ids row 1 holds padding (0) before its last item",
        ),
        (
            {"item_ids": torch.tensor([[1, 0, 2], [4, 0, 0]])},
            "item_ids row 0 holds padding (0) before its last item; move the items to the left",
        ),
        (
            {
                "item_ids": torch.ones(2, NORM_LENGTH + 1, dtype=torch.int64),
                "timestamps": torch.ones(2, NORM_LENGTH + 1, dtype=torch.int64),
            },
            "a history of 25 events exceeds the model's window of 24; pass the latest 24",
        ),
        (
            {"timestamps": torch.tensor([[5, 9, 6], [7, 0, 0]])},
            "timestamps row 0 falls from 9 to 6 at column 2; give the events oldest first",
        ),
        (
            {"request_timestamps": torch.tensor([9, 6])},
            "request_timestamps row 1 is 6, before the last event at 7; ask for a later time",
        ),
    ],
)
def test_messages(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        tiny_model().encode(**request_with(**changes))


def test_events_beyond_the_trained_window_are_refused() -> None:
    """The model has room for outputs behind its window, at positions that nobody trained."""
    tiny = tiny_model()
    model = CrossDomainHSTU(tiny.catalog, tiny.settings, window=4).eval()
    model.load_state_dict(tiny.state_dict())
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with pytest.raises(InputError, match="a history of 5 events exceeds the model's window of 4"):
        model.encode(ids, ids, torch.tensor([0]))
    with pytest.raises(InputError, match=r"window is 5; 4\.\.4 events"):
        EncoderSession(model, window=5)
    assert EncoderSession(model).window == Window(4)
    padded = torch.nn.functional.pad(ids[:, 1:], (0, 30))
    vectors = model.encode(padded, padded, torch.tensor([0]))
    torch.testing.assert_close(vectors, tiny.encode(ids[:, 1:], ids[:, 1:], torch.tensor([0])))


def test_times_at_padding_are_ignored() -> None:
    model = tiny_model()
    other = model.encode(**request_with(timestamps=torch.tensor([[5, 6, 9], [7, 99, -3]])))
    assert torch.equal(other, model.encode(**request_with()))


@pytest.mark.parametrize(
    "changes",
    [
        {"request_timestamps": torch.tensor([9])},
        {"request_timestamps": torch.tensor([[9], [7]])},
        {"target_domains": torch.tensor([1, 0], dtype=torch.int32)},
        {"item_ids": torch.tensor([[1.0, 3, 2], [4, 0, 0]])},
        {"timestamps": torch.tensor([[5.0, 6, 9], [7, 0, 0]])},
        {
            "item_ids": torch.zeros(2, 0, dtype=torch.int64),
            "timestamps": torch.zeros(2, 0, dtype=torch.int64),
        },
    ],
    ids=["one_time", "column_of_times", "int32", "float_ids", "float_times", "no_columns"],
)
def test_other_shapes_and_types_are_refused_or_work(changes: dict[str, Tensor]) -> None:
    """Never an error from deep inside torch."""
    try:
        vectors = tiny_model().encode(**request_with(**changes))
    except InputError:
        return
    assert vectors.isfinite().all()


def test_left_padding_is_named() -> None:
    """An empty first column is either an empty or a left-padded history; both are refused."""
    with pytest.raises(InputError, match="item_ids row 1"):
        tiny_model().encode(**request_with(item_ids=torch.tensor([[1, 3, 2], [0, 0, 4]])))


def test_no_users_at_all() -> None:
    nobody = torch.zeros(0, 3, dtype=torch.int64)
    assert tiny_model().encode(nobody, nobody, nobody[:, 0]).shape == (0, 16)


def test_settings_must_fit_the_catalogue() -> None:
    settings = EncoderSettings(num_domains=2, norm_length=8)
    message = "settings.num_domains is 2, the catalogue has 3 domains; give both the same"
    with pytest.raises(InputError, match=re.escape(message)):
        CrossDomainHSTU(tiny_catalog(), settings)


def test_item_vectors_are_unit_vectors() -> None:
    vectors = tiny_model().item_vectors(torch.tensor([[1, 2], [3, 4]]))
    assert vectors.shape == (2, 2, 16)
    torch.testing.assert_close(vectors.norm(dim=2), torch.ones(2, 2))


def test_from_padded_drops_padding_and_shifts_times() -> None:
    batch = JaggedBatch.from_padded(
        torch.tensor([[4, 2, 3], [5, 0, 0], [0, 0, 0]]),
        torch.tensor([[1, 3, 4], [7, 99, 99], [99, 99, 99]]),
        torch.tensor([8, 9, 99]),
        torch.tensor([[0, 1, 2], [1, 99, 99], [99, 99, 99]]),
    )
    assert batch.item_ids.tolist() == [4, 2, 3, 5]
    assert batch.timestamps.tolist() == [1, 3, 4, 7]
    assert batch.next_timestamps.tolist() == [3, 4, 8, 9]
    assert batch.target_domains.tolist() == [0, 1, 2, 1]
    assert batch.offsets.tolist() == [0, 3, 4, 4]
    assert batch.to(torch.device("cpu")).offsets.tolist() == [0, 3, 4, 4]


def test_one_item_one_domain() -> None:
    catalog = DomainCatalog(torch.tensor([0, 0]), ["only"])
    settings = EncoderSettings(
        num_domains=1, norm_length=4, domain_mask=True, tape=True, ddsr=True, target_view_heads=1
    )
    model = CrossDomainHSTU(catalog, settings).eval()
    once = torch.tensor([[1]])
    assert model.encode(once, once, torch.tensor([0])).isfinite().all()
