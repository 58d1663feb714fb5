"""The encoder: input embeddings in, one hidden state a token out."""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from hstu_xd.errors import InputError
from hstu_xd.model.history_tokens import TokenPlan
from hstu_xd.model.layer import HSTULayer, Written
from hstu_xd.model.plan import EncoderPlan
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.parts import Part


class CrossDomainEncoder(nn.Module):
    """A stack of HSTU layers that share one plan of the batch.

    Args:
        settings: sizes and switches.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        self._attention_layers = nn.ModuleList(
            _build_layer(settings, i) for i in range(settings.num_blocks)
        )
        self._settings = settings
        self._history_tokens: nn.Parameter | None = None
        if settings.history_tokens:
            tokens = torch.empty(settings.history_tokens, settings.embedding_dim)
            self._history_tokens = nn.Parameter(tokens.normal_(std=0.02))

    @property
    def layers(self) -> list[HSTULayer]:
        """The layers, first to last."""
        return cast(list[HSTULayer], list(self._attention_layers))

    def take_parameters(self, layers: Iterable[nn.Module]) -> None:
        """Hold the parameters of HSTU layers, the very objects, in place of one's own.

        Args:
            layers: upstream's, of the same sizes and number.
        """
        for own, theirs in zip(self._attention_layers, layers):
            for name, parameter in theirs.named_parameters():
                path, _, leaf = name.rpartition(".")
                setattr(own.get_submodule(path), leaf, parameter)

    def forward(self, x: Tensor, plan: EncoderPlan, written: list[Written] | None = None) -> Tensor:
        """(L, K) float -> (L, K) float; ``written`` takes what each layer's tokens leave behind."""
        if not self._settings.has_segments:
            for layer in self._attention_layers:
                x = layer(x, plan, written=written)
            return x
        rows = TokenPlan.build(plan, self._settings)
        tokens = self._history_tokens
        x = rows.insert(x, x[:0] if tokens is None else tokens)
        for layer in self._attention_layers:
            x = layer(x, rows, written=written)
        return rows.take_events(x)


def _build_layer(settings: EncoderSettings, index: int) -> nn.Module:
    """Build a layer, of the class that the settings name.

    Raises:
        InputError: the user's class makes something else.
    """
    make = settings.layer.value if isinstance(settings.layer, Part) else HSTULayer
    layer = make(settings, full_attention=index in settings.full_attention_layers)
    if not isinstance(layer, nn.Module):
        raise InputError(
            f"xd_encoder.layer = {settings.layer!r} makes a {type(layer).__name__}; a "
            "torch.nn.Module is needed"
        )
    return layer
