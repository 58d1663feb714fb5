"""What REC calls to make its data loaders and its model, extended by ours."""

import ast
from collections.abc import Callable
from contextlib import nullcontext
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from hstu_xd.errors import InputError
from hstu_xd.plugins.rebinding import Rebinding, apply
from hstu_xd.plugins.rec.packed_attention import provide_packed_attention, warn_if_texts_mix
from hstu_xd.plugins.rec.session import SESSION
from hstu_xd.plugins.rec.settings import HLLM_MODEL, MODELS, RecSettings, as_theirs

DATASETS = "REC.data.dataset"


def with_domains(bulid_dataloader: Callable[..., Any]) -> Callable[..., Any]:
    """REC's ``bulid_dataloader`` (sic) that knows our models and every item's domain."""

    def xd_bulid_dataloader(config: Any, data: Any) -> Any:
        SESSION.configure(RecSettings.read(config.final_config_dict))
        warn_if_texts_mix(config)
        with as_theirs(config), apply(_datasets()) if SESSION.extends_model else nullcontext():
            loaders = bulid_dataloader(config, data)
        assert SESSION.settings is not None
        if SESSION.settings.item_domain_path:
            SESSION.open(data.id2token["item_id"], _Occurring(data))
            _check_top(config, data.item_num)
        if SESSION.settings.model == HLLM_MODEL and SESSION.settings.scopes_negatives:
            loaders[0].dataset.xd_catalog = SESSION.catalog
        return loaders

    return xd_bulid_dataloader


def _datasets() -> tuple[Rebinding, ...]:
    from hstu_xd.plugins.rec import datasets

    assert SESSION.settings is not None
    ours: dict[str, Any] = {"SeqEvalDataset": datasets.TimedEvalDataset}
    if SESSION.settings.model == HLLM_MODEL:
        ours["TextSEQTrainDataset"] = datasets.ScopedTextDataset
    elif SESSION.settings.reads_time:
        ours["SEQTrainDataset"] = datasets.TimedTrainDataset
    return tuple(
        Rebinding(DATASETS, name, lambda _, dataset=dataset: dataset)
        for name, dataset in ours.items()
    )


class _Occurring:
    """Item numbers that the log holds, gathered when first asked."""

    def __init__(self, data: Any) -> None:
        self._data = data
        self._items: set[int] | None = None

    def __contains__(self, item: int) -> bool:
        if self._items is None:
            sequences = self._data.user_seq
            if isinstance(sequences, dict):
                sequences = sequences.values()
            self._items = {int(number) for items in sequences for number in items}
        return int(item) in self._items


def _check_top(config: Any, item_num: int) -> None:
    places = config["topk"]
    if not isinstance(places, list):
        raise InputError(f"topk: {places!r}; a list is needed, topk: [{places}] in a yaml file")
    top = max(places)
    if top > item_num:
        raise InputError(
            f"topk: {top} places cannot be filled from {item_num} items; give smaller ones, in "
            f"topk and in valid_metric ({config['valid_metric']})"
        )


def with_hstu_xd(get_model: Callable[[str], Any]) -> Callable[[str], Any]:
    """REC's ``get_model`` that knows our models, and names the nearest of an unknown one."""

    def xd_get_model(model_name: str) -> Any:
        if model_name in MODELS:
            module = import_module(f"hstu_xd.plugins.rec.{MODELS[model_name].lower()}")
            model = getattr(module, model_name)
        else:
            check_model(model_name)
            model = get_model(model_name)
        provide_packed_attention()
        return model

    return xd_get_model


def check_model(model_name: str) -> None:
    """Refuse a model that is neither REC's nor this package's.

    Raises:
        InputError: the message names the nearest.
    """
    known = known_models()
    if model_name in known:
        return
    near = get_close_matches(model_name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise InputError(f"model: {model_name!r} is unknown; known: {', '.join(known)}{hint}")


def known_models() -> list[str]:
    """Classes of REC's model modules that say what input they take, and this package's."""
    import REC.utils

    folder = Path(REC.utils.__file__).parent.parent / "model"
    names = []
    for file in (*folder.glob("IDNet/*.py"), *folder.glob("HLLM/hllm.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and _says_input_type(node):
                names.append(node.name)
    return [*MODELS, *sorted(names)]


def _says_input_type(node: ast.ClassDef) -> bool:
    assigned = [
        target for part in node.body if isinstance(part, ast.Assign) for target in part.targets
    ]
    return any(isinstance(target, ast.Name) and target.id == "input_type" for target in assigned)
