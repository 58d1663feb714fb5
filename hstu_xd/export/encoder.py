"""A trained encoder as one torch.export program, for any number of users and any length."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from hstu_xd.catalog import DomainCatalog
from hstu_xd.errors import InputError
from hstu_xd.export.program import check, known_items, without_paths
from hstu_xd.model.ddsr import attend_states_in_tiles
from hstu_xd.model.hstu import CrossDomainHSTU


class EncodeProgram(nn.Module):
    """What is traced: checks of the request that a graph can make, then the model.

    Args:
        model: whose attention implementation can be traced ("reference").
    """

    def __init__(self, model: CrossDomainHSTU) -> None:
        super().__init__()
        self.model = model

    def forward(self, item_ids: Tensor, timestamps: Tensor, target_domains: Tensor) -> Tensor:
        """See :meth:`CrossDomainHSTU.encode`, and :func:`export_encoder` for the inputs.

        Raises:
            RuntimeError: an unknown item or domain, padding before items, more events than the
                model's window, times out of order, or a request before the last event.
        """
        catalog, window = self.model.catalog, self.model.window
        known = known_items(catalog.item_domains, item_ids)
        check(known, f"item_ids: only 0..{catalog.num_items} that the catalogue has")
        present = item_ids != 0
        lengths = present.sum(1, keepdim=True)
        column = torch.arange(item_ids.shape[1], device=item_ids.device)
        in_place = present == (column < lengths)
        check(in_place.all(), "item_ids: padding (0) before a row's last item")
        check((lengths <= window).all(), f"item_ids: only the latest {window} events of a row")
        last = catalog.num_domains - 1
        inside = (target_domains >= 0) & (target_domains <= last)
        check(inside.all(), f"target_domains: only 0..{last}")
        falls = (timestamps < timestamps.roll(1, 1)) & present & (column > 0)
        check(~falls.any(), "timestamps: a row's events oldest first")
        latest = timestamps.gather(1, (lengths - 1).clamp(min=0)).squeeze(1)
        asked = _request_times(timestamps, lengths)
        given = asked != 0
        check(
            (~given | (asked >= latest)).all(),
            "timestamps: after a row's last event 0, or the time of the request, no earlier one",
        )
        times = torch.where(given, asked, latest)
        return self.model.encode_padded(item_ids, timestamps, target_domains, times)


def export_encoder(model: CrossDomainHSTU) -> ExportedProgram:
    """Trace a model.

    The program's call is ``encode(item_ids, timestamps, target_domains)``, with (B, N), (B, N) and
    (B,) int64, to (B, K) float32: :meth:`CrossDomainHSTU.encode` for any ``B >= 1`` and
    ``1 <= N <= norm_length``, within rounding. ``timestamps`` has the time of the request, too: in
    the first column of a row's padding, where 0, or no such column, stands for the time of the last
    event. Attention is the dense definition: memory grows with ``B H N^2``. A row without events
    gets zeros.

    Args:
        model: a trained model, with any attention implementation.

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
    traced = CrossDomainHSTU(
        catalog,
        replace(settings, impl="reference"),
        window=model.window,
        features=model.item_features,
    )
    # DDSR's tiles can be traced, too, and need far less memory than the definition.
    attend_states_in_tiles(traced)
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
    return without_paths(program)


def _request_times(timestamps: Tensor, lengths: Tensor) -> Tensor:
    """(B,) what stands in the first column of each row's padding; 0 where there is none."""
    columns = timestamps.shape[1]
    padding = timestamps.gather(1, lengths.clamp(max=columns - 1))
    return torch.where((lengths > 0) & (lengths < columns), padding, 0).squeeze(1)
