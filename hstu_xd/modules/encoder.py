"""The encoder: input embeddings in, one hidden state a token out."""

from torch import Tensor, nn

from hstu_xd.modules.hstu_layer import HSTULayer
from hstu_xd.modules.plan import EncoderPlan
from hstu_xd.modules.settings import EncoderSettings


class CrossDomainEncoder(nn.Module):
    """A stack of HSTU layers that share one plan of the batch.

    Args:
        settings: sizes and switches.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        self._attention_layers = nn.ModuleList(
            HSTULayer(settings, full_attention=i in settings.full_attention_layers)
            for i in range(settings.num_blocks)
        )

    def forward(self, x: Tensor, plan: EncoderPlan) -> Tensor:
        """(L, K) float -> (L, K) float."""
        for layer in self._attention_layers:
            x = layer(x, plan)
        return x
