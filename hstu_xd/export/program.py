"""The full encoder as one torch.export program, for any number of users and any length."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from hstu_xd.catalog import DomainCatalog
from hstu_xd.errors import InputError
from hstu_xd.model import CrossDomainHSTU


class EncodeProgram(nn.Module):
    """What is traced: checks of the request that a graph can make, then the model.

    Args:
        model: whose attention implementation can be traced ("reference").
    """

    def __init__(self, model: CrossDomainHSTU) -> None:
        super().__init__()
        self.model = model

    def forward(self, item_ids: Tensor, timestamps: Tensor, target_domains: Tensor) -> Tensor:
        """See :meth:`CrossDomainHSTU.encode_padded`.

        Raises:
            RuntimeError: an unknown item or domain, or padding before items.
        """
        catalog = self.model.catalog
        known = _known_items(catalog, item_ids)
        torch._assert_async(known, f"item_ids: only 0..{catalog.num_items} that the catalogue has")
        present = item_ids != 0
        column = torch.arange(item_ids.shape[1], device=item_ids.device)
        in_place = present == (column < present.sum(1, keepdim=True))
        torch._assert_async(in_place.all(), "item_ids: padding (0) before a row's last item")
        last = catalog.num_domains - 1
        inside = (target_domains >= 0) & (target_domains <= last)
        torch._assert_async(inside.all(), f"target_domains: only 0..{last}")
        return self.model.encode_padded(item_ids, timestamps, target_domains)


def export_encoder(model: CrossDomainHSTU) -> ExportedProgram:
    """Trace a model.

    The program's call is ``encode(item_ids, timestamps, target_domains)``, with (B, N), (B, N) and
    (B,) int64, to (B, K) float32: :meth:`CrossDomainHSTU.encode` for any ``B >= 1`` and
    ``1 <= N <= norm_length``, within rounding. Attention is the dense definition: memory grows with
    ``B H N^2``. A row without events gets zeros.

    Args:
        model: trained, of whatever attention implementation.

    Raises:
        InputError: the model cuts histories into segments.
    """
    settings = model.settings
    if settings.has_segments:
        raise InputError(
            f"the model cuts histories into segments by {settings.segment_by!r}: how many there "
            "are is data, and the sizes of an exported program are not; export a model trained "
            "with xd_encoder.segment_by = 'none'"
        )
    catalog = DomainCatalog(model.catalog.item_domains.cpu(), model.catalog.domain_names)
    traced = CrossDomainHSTU(catalog, replace(settings, impl="reference"))
    traced.load_state_dict(model.state_dict())
    traced.eval().requires_grad_(False)
    users, events = Dim("users", min=1), Dim("events", min=1, max=settings.norm_length)
    ids = torch.ones(2, min(3, settings.norm_length), dtype=torch.int64)
    with torch.no_grad():
        program = torch.export.export(
            EncodeProgram(traced),
            # Copies: a tensor given twice is traced as one input.
            (ids, ids.clone(), torch.zeros(2, dtype=torch.int64)),
            dynamic_shapes=({0: users, 1: events}, {0: users, 1: events}, {0: users}),
            strict=False,
        )
    for node in program.graph.nodes:
        # Paths of the machine that traced it.
        node.meta.pop("stack_trace", None)
    return program


def _known_items(catalog: DomainCatalog, item_ids: Tensor) -> Tensor:
    """() bool: every id is padding or an item of the catalogue."""
    nearest = item_ids.clamp(0, catalog.num_items)
    borne = (catalog.item_domains[nearest] >= 0) | (nearest == 0)
    return ((nearest == item_ids) & borne).all()
