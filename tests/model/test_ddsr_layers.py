"""DDSR in some layers alone: the others have none of its weights, and keep no states."""

import pytest
import torch
from tiny_models import EVERYTHING, tiny_model

from hstu_xd.data.window import Window
from hstu_xd.serving.codec import fingerprint
from hstu_xd.serving.state import UserState, expected_bytes


@pytest.mark.parametrize("layers", [(), (0,), (1,), (1, 0), (-1,), (-2, 1)])
def test_only_the_named_layers_have_it(layers: tuple[int, ...]) -> None:
    model = tiny_model(**EVERYTHING, ddsr_layers=layers)
    named = [
        number
        for number in range(2)
        if any(f"_attention_layers.{number}._ddsr" in name for name in model.state_dict())
    ]
    expected = sorted(i % 2 for i in layers or (0, 1))
    assert named == expected == [*model.settings.state_layers]
    state = UserState.empty(model.settings, torch.float32)
    assert len(state.state_memory) == len(named)
    assert state.num_bytes == expected_bytes(model.settings, 0, torch.float32)


def test_states_of_other_layers_are_not_taken() -> None:
    models = [tiny_model(**EVERYTHING, ddsr_layers=layers) for layers in ((0,), (1,), (0, 1))]
    assert len({fingerprint(model, Window(9), torch.float32) for model in models}) == 3
