"""PerSRec's PersonalizedHSTU with the cross-domain parts: the same parameters, the same calls."""

from typing import Any

import torch
from REC.model.IDNet.hstu import PersonalizedHSTU
from torch import Tensor

from hstu_xd.plugins.bridge import UnpaddedBatch
from hstu_xd.plugins.rec.hstu import HSTU_XD
from hstu_xd.plugins.rec.settings import PERSONALIZED_HSTU_MODEL
from hstu_xd.plugins.rec.user_tokens import TokenPlaces, UserTokenMixin


class PersonalizedHSTU_XD(HSTU_XD, UserTokenMixin, PersonalizedHSTU):
    """PerSRec's PersonalizedHSTU that may attend inside domains, know the next one, read states.

    With everything off it runs PerSRec's own code. Otherwise it is HSTU_XD with user tokens among
    its events, see :mod:`hstu_xd.plugins.rec.user_tokens`: outputs at events, and so scores, are
    PerSRec's where nothing that is on says otherwise, and what is learnt from differs. There the
    event before the tokens is taught to predict a token's input, the one behind them is never
    predicted, and some negatives count twice; here every event predicts its next one, once.

    Tokens are told nothing of the next domain, write no domain state and read none. Of PerSRec's
    keys ``item_dropout`` and ``predict_with_full_item_seq`` do nothing, as there: its evaluation
    always reads the history with its tokens.

    Args:
        config: PerSRec's configuration.
        args: its numbers of items and users.

    Raises:
        InputError: a key of PerSRec's that is missing or out of range.
    """

    _xd_model = PERSONALIZED_HSTU_MODEL

    def __init__(self, config: Any, *args: Any) -> None:
        self._xd_places = TokenPlaces.read(config, around_llm=False)
        super().__init__(config, *args)

    def _xd_take_over_layers(self) -> None:
        super()._xd_take_over_layers()
        self._xd_add_slots()

    def _xd_inputs(self, items: Tensor, columns: Tensor | int) -> Tensor:
        columns = torch.as_tensor(columns, device=items.device)
        return super()._xd_inputs(items, self._xd_slots.event_columns[columns])

    def _xd_through_layers(self, x: Tensor, batch: UnpaddedBatch) -> Tensor:
        slots = self._xd_slots
        rows = slots.rows(self._xd_encoder_settings, batch)
        columns = slots.columns[slots.is_token & (slots.runs == 0)]
        x = rows.lay_out(x, self.user_embedding[0] + self.position_embedding(columns))
        for number, layer in enumerate(self._hstu.layers):
            x = layer(x, rows, rows.views(number))
        return rows.take_entries(x)

    def compress_pretrain(self, *given: Any, **named: Any) -> Any:
        """Run PerSRec's method, which its trainer does not call; refused with anything on."""
        self._xd_refuse_cache("compress_pretrain")
        return super().compress_pretrain(*given, **named)

    def predict2(self, *given: Any, **named: Any) -> Any:
        """Run PerSRec's method, which its trainer does not call; refused with anything on."""
        self._xd_refuse_cache("predict2")
        return super().predict2(*given, **named)
