"""The launcher: checks a command line and a gin file, then runs upstream's production trainer."""

import argparse
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.plugins.dlrm_v3 import HOST
from hstu_xd.plugins.host import check_version

PROGRAM = "python -m hstu_xd.plugins.dlrm_v3"
PLUGIN = "hstu_xd.plugins.dlrm_v3.activated"
MODES = ("train", "eval", "train-eval", "streaming-train-eval")
# What upstream calls a file that is not one of its own.
_KEY = "xd"


def main(argv: Sequence[str]) -> int:
    """Run and return the exit code: 0 done, 1 the work failed, 2 bad input or usage."""
    try:
        run(argv)
    except HstuXdError as error:
        # gin adds lines of its own to what its configurables raise.
        print(f"{PROGRAM}: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    return 0


def run(argv: Sequence[str]) -> None:
    """Train or evaluate with a gin file: on GPUs by upstream's own main, else on CPU.

    Args:
        argv: ``--gin_config_file FILE --mode MODE`` and ``--gin_bindings "a.b = c"``, which may be
            repeated. The environment variable WORLD_SIZE is the number of processes.

    Raises:
        InputError: bad input, or upstream is not importable or not a verified version; nothing was
            started.
        HstuXdError: a library that upstream needs does not load.
    """
    options = _parse(argv)
    if "" not in sys.path:  # as for a script in a checkout
        sys.path.insert(0, "")
    try:
        check_version(HOST)
    except HstuXdError as error:
        raise InputError(str(error)) from error
    _import_needed()
    with tempfile.TemporaryDirectory() as folder:
        file = _with_bindings(options.gin_config_file, options.gin_bindings, Path(folder))
        check_gin(file, options.mode, told=options.gin_config_file)
        _start(file, options.mode)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=PROGRAM, allow_abbrev=False)
    parser.add_argument("--gin_config_file", type=Path, required=True)
    parser.add_argument("--mode", choices=MODES, default="train")
    parser.add_argument("--gin_bindings", action="append", default=[])
    options = parser.parse_args(list(argv))
    if not options.gin_config_file.is_file():
        raise InputError(f"--gin_config_file {options.gin_config_file}: no such file")
    return options


def _import_needed() -> None:
    try:
        import fbgemm_gpu  # noqa: F401  (registers the operators that upstream calls)
        from generative_recommenders.dlrm_v3.train import train_ranker  # noqa: F401
    except Exception as error:  # a wheel for another torch fails in many ways
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise HstuXdError(
            f"upstream's production trainer does not load: {cause}; it needs fbgemm_gpu, torchrec, "
            "torchmetrics 1.0.3, pandas and tensorboard; hstu-xd doctor says what fits"
        ) from error


def _with_bindings(file: Path, bindings: Sequence[str], folder: Path) -> Path:
    """Return a file that includes this one and has the bindings: all that upstream takes is one."""
    if not bindings:
        return file.resolve()
    whole = folder / "bindings.gin"
    whole.write_text("\n".join([f'include "{file.resolve()}"', *bindings, ""]), encoding="utf-8")
    return whole


def check_gin(file: Path, mode: str, *, told: Path) -> None:
    """Refuse what upstream would fail at, in every process and with a traceback.

    Args:
        file: that is going to be parsed.
        mode: of the run.
        told: what messages call the file.

    Raises:
        InputError: a file that gin refuses, or a value that cannot work.
    """
    with parsed_gin(file, told=told):
        _check_bindings(mode, told)


@contextmanager
def parsed_gin(file: Path, bindings: Sequence[str] = (), *, told: Path) -> Iterator[None]:
    """Hold what a gin file binds.

    Args:
        file: that is parsed.
        bindings: that come after it.
        told: what messages call the file.

    Raises:
        InputError: gin refuses the file or a binding.
    """
    import gin

    # Included files are named from the folder that holds gin/, wherever the command runs.
    for folder in told.resolve().parents:
        if folder.name == "gin":
            gin.add_config_file_search_path(str(folder.parent))
    try:
        try:
            gin.parse_config_files_and_bindings([str(file)], list(bindings), finalize_config=False)
        except HstuXdError:
            raise
        except (ValueError, TypeError, OSError, SyntaxError, ImportError) as error:
            raise InputError(f"{told}: {' '.join(str(error).split())}{_hint()}") from error
        yield
    finally:
        gin.clear_config()


def _hint() -> str:
    return "" if PLUGIN in sys.modules else f"; the first line of the file must import {PLUGIN}"


def _check_bindings(mode: str, told: Path) -> None:
    from generative_recommenders.dlrm_v3.train import utils

    from hstu_xd.plugins.dlrm_v3.settings import DlrmSettings, bound_value, cross_domain

    dataset = bound_value("make_model.dataset")
    if dataset is None:
        raise InputError(f'{told}: bind make_model.dataset, for example to "xd:data/mine"')
    if not bound_value("MetricsLogger.tensorboard_log_path"):
        raise InputError(
            f"{told}: bind MetricsLogger.tensorboard_log_path to a folder; upstream's trainer "
            "fails without one"
        )
    if mode == "train-eval" and bound_value("train_eval_loop.num_eval_batches") is None:
        raise InputError(
            f"{told}: bind train_eval_loop.num_eval_batches; without it upstream's first "
            "evaluation never ends"
        )
    if bound_value("sparse_optimizer_factory_and_class.optimizer_name") == "Adam":
        raise InputError(
            f"{told}: sparse_optimizer_factory_and_class.optimizer_name = 'Adam' fails in "
            "upstream; take 'RowWiseAdagrad' or 'SGD'"
        )
    if PLUGIN not in sys.modules:
        if str(dataset).startswith("xd:"):
            raise InputError(f"{told}: make_model.dataset = {dataset!r}{_hint()}")
        return
    settings = DlrmSettings()
    check_libraries(settings.kernel)
    known = _open_store(dataset, settings, mode, told)
    cross_domain(settings, known, utils.get_hstu_configs(dataset))


def check_libraries(kernel: str) -> None:
    """Refuse libraries that upstream fails with, and kernels that do not run here.

    Args:
        kernel: as ``xd_dlrm.kernel``.

    Raises:
        InputError: a version that does not fit, or Triton without a GPU.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    if kernel == "triton" and not on_gpu:
        raise InputError(
            'xd_dlrm.kernel = "triton" needs a GPU, and PyTorch sees none; take "auto" or "pytorch"'
        )
    runs_triton = on_gpu and kernel != "pytorch"
    wrong = [each.problem for each in HOST.libraries if runs_triton or not each.on_gpu]
    if any(wrong):
        hint = '; on a GPU xd_dlrm.kernel = "pytorch" does without triton' if runs_triton else ""
        raise InputError("; ".join(filter(None, wrong)) + hint)


def _open_store(dataset: str, settings: Any, mode: str, told: Path) -> int:
    """Open the store that is named, if one is; return its number of domains or 0."""
    from generative_recommenders.dlrm_v3.utils import SUPPORTED_DATASETS

    from hstu_xd.plugins.dlrm_v3.dlrm_rebindings import store_folder
    from hstu_xd.plugins.dlrm_v3.settings import bound_value
    from hstu_xd.plugins.dlrm_v3.store_dataset import open_requests

    read = bound_value("make_train_test_dataloaders.dataset_type")
    if mode != "streaming-train-eval" and read != dataset:
        raise InputError(
            f"{told}: make_model.dataset = {dataset!r} but make_train_test_dataloaders."
            f"dataset_type = {read!r}; bind both to the same"
        )
    folder = store_folder(dataset)
    if folder is None:
        if dataset not in SUPPORTED_DATASETS:
            raise InputError(
                f'{told}: make_model.dataset = {dataset!r}; "xd:<prepared folder>" or one of '
                f"{', '.join(SUPPORTED_DATASETS)} is needed"
            )
        return 0
    if mode == "streaming-train-eval":
        raise InputError(f"--mode {mode}: a prepared store has no stream; take train-eval")
    return open_requests(folder, settings).store.num_domains


def _start(file: Path, mode: str) -> None:
    import torch
    from generative_recommenders.dlrm_v3.train import train_ranker

    from hstu_xd.plugins.bridge import free_port
    from hstu_xd.plugins.dlrm_v3.cpu_worker import run_worker

    if torch.cuda.is_available():
        own = Path(train_ranker.__file__).parent / "gin"
        train_ranker.SUPPORTED_CONFIGS[_KEY] = os.path.relpath(file, own)
        sys.argv = [PROGRAM, "--dataset", _KEY, "--mode", mode]
        with _causes_in_words():
            train_ranker.main()
        return
    # Upstream logs its metrics, and nobody would see them where a library has set logging up.
    logging.basicConfig(level=logging.INFO, force=True)
    logging.getLogger(__name__).warning("no GPU is visible: dlrm_v3 runs on CPU")
    processes = world_size()
    arguments = (processes, str(free_port()), str(file), mode)
    with _causes_in_words():
        if processes == 1:
            run_worker(0, *arguments)
        else:
            torch.multiprocessing.start_processes(
                run_worker, arguments, nprocs=processes, start_method="spawn"
            )


def world_size() -> int:
    """Return the number of processes, of the environment variable WORLD_SIZE.

    Raises:
        InputError: it is no number from 1.
    """
    told = os.environ.get("WORLD_SIZE", "1")
    if not told.isdecimal() or int(told) < 1:
        raise InputError(f"WORLD_SIZE = {told!r}; a number of processes from 1 is needed")
    return int(told)


@contextmanager
def _causes_in_words() -> Iterator[None]:
    """Raise what stopped a worker: upstream wraps it, and a process of its own tells its traceback.

    Raises:
        InputError, HstuXdError: the cause, where it is one of these.
    """
    import torch

    try:
        yield
    except torch.multiprocessing.ProcessRaisedException as error:
        told = re.search(r"^hstu_xd\.errors\.(\w+): (.+)$", str(error), re.MULTILINE)
        if told is None:
            raise
        raise (InputError if told[1] == "InputError" else HstuXdError)(told[2]) from None
    except Exception as error:
        cause = error.args[0] if error.args else None
        raise (cause if isinstance(cause, HstuXdError) else error) from None
