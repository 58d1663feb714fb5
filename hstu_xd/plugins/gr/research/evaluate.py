"""Read a split once with a checkpoint; upstream itself evaluates during training only."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hstu_xd.errors import InputError
from hstu_xd.plugins.gr.research.factories import read_upstream_checkpoint
from hstu_xd.plugins.gr.research.run import CPU_REBINDINGS, TRAINER, prepare, read_gin
from hstu_xd.plugins.gr.research.settings import bound_arguments
from hstu_xd.plugins.rebinding import Rebinding, apply


@dataclass
class _Parts:
    """What train_fn has built by the time it would start to train."""

    dataset: Any = None
    sampler: Any = None
    model: Any = None


class _BuiltError(Exception):
    """Leaves train_fn once its model stands."""


def upstream_evaluate(
    gin_config_file: Path, checkpoint: Path, bindings: Sequence[str] = (), *, split: str = "test"
) -> dict[str, float]:
    """Metrics of a checkpoint on a split.

    Args:
        gin_config_file: the file it was trained with.
        checkpoint: out of upstream's ckpts folder.
        bindings: further bindings, those of the training.
        split: value of ``xd_upstream.split``.

    Returns:
        Mean of every metric over all users of the split, under upstream's names and per group
        ("hr@10", "hr@10/films", "mrr/switch"); groups without a target are absent.

    Raises:
        InputError: no such file, or a checkpoint of another model.
    """
    state = read_upstream_checkpoint(checkpoint)
    prepare(gin_config_file)
    # The checkpoint replaces whatever the training started from.
    ours = [f"xd_upstream.split = {split!r}", "xd_upstream.warm_start = ''"]
    read_gin(gin_config_file, [*bindings, *ours])
    on_cpu = not torch.cuda.device_count()
    with apply(CPU_REBINDINGS if on_cpu else ()):
        parts = _build()
        own = {name.removeprefix("module."): value for name, value in state.items()}
        try:
            parts.model.load_state_dict(own)
        except RuntimeError as error:
            raise InputError(
                f"{checkpoint}: not a checkpoint of the model that {gin_config_file} describes: "
                f"{' '.join(str(error).split())[:300]}"
            ) from error
        return _evaluate(parts)


def _build() -> _Parts:
    """Let train_fn build its data set, sampler and model, and stop it there."""
    from generative_recommenders.research.trainer import train

    parts = _Parts()

    def keeping(attribute: str) -> Callable[[Any], Any]:
        def wrap(original: Any) -> Any:
            def kept(*arguments: Any, **others: Any) -> Any:
                built = original(*arguments, **others)
                setattr(parts, attribute, built)
                return built

            return kept

        return wrap

    def stop(original: Any) -> Any:
        def stopped(module: Any, **others: Any) -> Any:
            parts.model = module
            raise _BuiltError

        return stopped

    rebindings = [
        Rebinding(TRAINER, "setup", lambda original: lambda *arguments: None),
        Rebinding(TRAINER, "get_reco_dataset", keeping("dataset")),
        Rebinding(TRAINER, "LocalNegativesSampler", keeping("sampler")),
        Rebinding(TRAINER, "InBatchNegativesSampler", keeping("sampler")),
        Rebinding(TRAINER, "DDP", stop),
    ]
    with apply(rebindings):
        try:
            train.train_fn(0, 1, 0)
        except _BuiltError:
            return parts
    raise AssertionError("train_fn did not reach DDP")


@torch.inference_mode()
def _evaluate(parts: _Parts) -> dict[str, float]:
    from generative_recommenders.research.trainer import train

    bound = bound_arguments(train.train_fn)
    dtype = torch.bfloat16 if bound["main_module_bf16"] else None
    model = parts.model.eval()
    state = train.get_eval_state(
        model=model,
        all_item_ids=parts.dataset.all_item_ids,
        negatives_sampler=parts.sampler,
        top_k_module_fn=lambda vectors, ids: train.get_top_k_module(
            top_k_method=bound["top_k_method"], model=model, item_embeddings=vectors, item_ids=ids
        ),
        device=0,
        float_dtype=dtype,
    )
    loader = torch.utils.data.DataLoader(
        parts.dataset.eval_dataset, batch_size=bound["eval_batch_size"]
    )
    values: dict[str, list[Tensor]] = {}
    for row in loader:
        features, target_ids, target_ratings = train.movielens_seq_features_from_row(
            row, device=0, max_output_length=bound["gr_output_length"] + 1
        )
        found = train.eval_metrics_v2_from_tensors(
            state,
            model,
            features,
            target_ids=target_ids,
            target_ratings=target_ratings,
            user_max_batch_size=bound["eval_user_max_batch_size"],
            dtype=dtype,
        )
        for name, value in found.items():
            values.setdefault(name, []).append(value)
    whole = {name: torch.cat(parts).double() for name, parts in values.items()}
    return {name: float(value.mean()) for name, value in whole.items() if value.numel()}
