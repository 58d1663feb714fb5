"""DDSR as a sublayer of its own behind any encoder."""

from torch import Tensor, nn
from torch.nn.functional import layer_norm

from hstu_xd.model.ddsr import DynamicDomainState
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.model.views import EncoderRows, Events


class DomainStateSublayer(nn.Module):
    """``Wo DDSR(LN(x))``, to be added to ``x``: what the domains' latest hidden states say to each.

    It starts at zero, as DDSR's values do.

    Args:
        settings: sizes of the encoder, and those of DDSR.

    Source: arXiv 2508.20945, dynamic domain state representation; a sublayer behind a transformer
        in place of a gate's term inside HSTU is this project's.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        s = self._settings = settings
        self._states = DynamicDomainState.from_settings(s)
        self._output = nn.Linear(s.num_heads * s.dv, s.embedding_dim, bias=False)
        nn.init.xavier_uniform_(self._output.weight)

    def forward(self, x: Tensor, events: Events) -> Tensor:
        """(L, K) float -> (L, K) float."""
        normed = layer_norm(x, x.shape[-1:])
        reads = EncoderRows(self._settings, events).state_reads
        answer = self._states(normed, normed, reads, events.target_domains)
        return self._output(answer)
