"""What the encoder's input is told of the next event's domain: TAPE and a plain embedding."""

from torch import Tensor, nn

from hstu_xd.modules.settings import EncoderSettings
from hstu_xd.modules.tape import TransitionAwarePositionalEmbedding


def next_domain_modules(
    settings: EncoderSettings,
) -> tuple[TransitionAwarePositionalEmbedding | None, nn.Embedding | None]:
    """TAPE and the target-domain embedding as the settings have them; both say nothing at first."""
    sizes = settings.num_domains, settings.embedding_dim
    tape = TransitionAwarePositionalEmbedding(*sizes) if settings.tape else None
    embedding = None
    if settings.target_domain_embedding:
        embedding = nn.Embedding(*sizes)
        nn.init.zeros_(embedding.weight)
    return tape, embedding


def next_domain_signal(
    tape: nn.Module | None, embedding: nn.Module | None, domains: Tensor, target_domains: Tensor
) -> Tensor | None:
    """What both say, added up.

    Args:
        tape: of :func:`next_domain_modules`.
        embedding: likewise.
        domains: (L,) int64, domain of each token.
        target_domains: (L,) int64, domain of the event after it.

    Returns:
        (L, K) float; None without either.
    """
    signal = None if tape is None else tape(domains, target_domains)
    if embedding is None:
        return signal
    embedded = embedding(target_domains)
    return embedded if signal is None else signal + embedded
