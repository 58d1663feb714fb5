from collections import defaultdict
from typing import Any

import pytest
import torch

from hstu_xd.errors import InputError
from hstu_xd.plugins.rec.user_tokens import TokenPlaces, TokenSlots


def read(around_llm: bool = False, **keys: Any) -> TokenPlaces:
    known = {"MAX_ITEM_LIST_LENGTH": 10, "number_of_user_tokens": 3, "pretrain_item_num": 4}
    return TokenPlaces.read(defaultdict(lambda: None, known | keys), around_llm=around_llm)


def test_one_cut_and_many() -> None:
    assert read() == TokenPlaces(10, (4, 4, 4))
    assert read(insert_method=[[4, 1], [7, 2]]) == TokenPlaces(10, (4, 7, 7))
    assert read(insert_method=[[4, 1], [7, 2]], around_llm=True) == TokenPlaces(10, (4, 4, 4))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"number_of_user_tokens": None}, "number_of_user_tokens: None; PerSRec's personalised mo"),
        ({"pretrain_item_num": "4"}, "pretrain_item_num: '4'; PerSRec's personalised models need"),
        ({"pretrain_item_num": 10}, r"pretrain_item_num: 10; fewer than MAX_ITEM_LIST_LENGTH \(10"),
        ({"insert_method": 0}, "insert_method: 0; leave it out, to insert all tokens behind"),
        ({"insert_method": [4, 3]}, r"insert_method: \[4, 3\]; leave it out"),
        ({"insert_method": [[4, 1], [7, 1]]}, r"add up to number_of_user_tokens \(3\) are needed"),
        ({"insert_method": [[7, 1], [4, 2]]}, r"columns that rise within 1\.\.9"),
        ({"insert_method": [[4, 1], [10, 2]]}, r"columns that rise within 1\.\.9"),
        ({"insert_method": [[4, 4], [7, -1]]}, "numbers from 1 on"),
    ],
)
def test_faulty_keys_are_named(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read(**keys)


def test_copies_stand_side_by_side_at_one_position() -> None:
    slots = TokenSlots(TokenPlaces(3, (1, 2)), copies=2)
    assert slots.tokens.tolist() == [-1, 0, 0, -1, 1, 1, -1]
    assert slots.runs.tolist() == [0, 0, 1, 0, 0, 1, 0]
    assert slots.columns.tolist() == [0, 1, 1, 2, 3, 3, 4]
    assert slots.segments.tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert slots.first.tolist() == [0, 1, 3, 4, 6]
    assert slots.event_columns.tolist() == [0, 2, 4]
    padded = torch.tensor([[5, 6, 7]])
    assert slots.insert(padded, 0).tolist() == [[5, 0, 0, 6, 0, 0, 7]]
    assert not slots.state_dict()
