"""The launcher: checks a command line, makes our models known to REC, runs REC's run.py."""

import argparse
import ast
import json
import logging
import os
import runpy
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.plugins.host import activate, stand_in_for_absent
from hstu_xd.plugins.rec import HOST

if TYPE_CHECKING:
    from hstu_xd.plugins.rec.settings import RecSettings

_logger = logging.getLogger(__name__)

PROGRAM = "python -m hstu_xd.plugins.rec"
# Configuration files that come with the plug-in, looked up by name from anywhere.
YAML_FOLDER = Path(__file__).parent / "yaml"


def main(argv: Sequence[str]) -> int:
    """Run and return the exit code: 0 done, 1 the work failed, 2 bad input or usage."""
    try:
        run(argv)
    except HstuXdError as error:
        _tell(error)
        return error.exit_code
    finally:
        _leave_process_group()
    return 0


def run(argv: Sequence[str]) -> None:
    """Run REC's run.py out of the working folder with the arguments it takes.

    Args:
        argv: ``--config_file FILE...`` and pairs ``--key value``. A file that is not in the
            working folder is looked up among those of this package: ``xd.yaml``.

    Raises:
        InputError: a wrong working folder or configuration; nothing was started.
    """
    check_folder(Path.cwd())
    files, extras = parse(argv)
    if "" not in sys.path:
        sys.path.insert(0, "")
    show_logs_of(Path("run.py"))
    _stand_alone()
    stand_in_for_absent(HOST)
    _check_configuration(files, extras)
    activate(HOST)
    sys.argv = ["run.py", "--config_file", *files, *extras]
    runpy.run_path("run.py", run_name="__main__")


def _tell(error: HstuXdError) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{PROGRAM}: {error}", file=sys.stderr)


def one_line_errors(excepthook: Callable[..., Any]) -> Callable[..., Any]:
    """Build an excepthook that tells a user's errors in one line, for a patched run.py of REC's.

    Python exits with 1 after it, whatever the error.
    """

    def told(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
        if isinstance(error, HstuXdError):
            _tell(error)
        else:
            excepthook(kind, error, traceback)

    return told


def _leave_process_group() -> None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def check_folder(folder: Path) -> None:
    """Refuse a folder that is not the code/ of HLLM or PerSRec.

    Raises:
        InputError: the message names what is missing.
    """
    missing = HOST.missing_markers(folder)
    if missing:
        raise InputError(f"{folder}: no {', '.join(missing)} here; {HOST.where_to_run}")


def parse(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into configuration files, which exist, and pairs for run.py.

    Raises:
        InputError: no file, one that is not there, or an option without a value.
    """
    parser = argparse.ArgumentParser(prog=PROGRAM, add_help=False, allow_abbrev=False)
    parser.add_argument("--config_file", nargs="+", default=[])
    known, extras = parser.parse_known_args(list(argv))
    if not known.config_file:
        raise InputError(
            "no --config_file; for example --config_file overall/ID.yaml IDNet/hstu.yaml xd.yaml"
        )
    for place, key in enumerate(extras):
        if (place % 2 == 0) != key.startswith("--"):
            raise InputError(f"{key!r}: options are pairs, --key value")
        if place % 2 == 0 and "=" in key:
            raise InputError(f"{key!r}: REC's run.py takes --key value, not --key=value")
    if len(extras) % 2:
        raise InputError(f"{extras[-1]}: a value is missing")
    return [_found(name) for name in known.config_file], extras


def _found(name: str) -> str:
    if Path(name).is_file():
        return name
    if (YAML_FOLDER / name).is_file():
        return str(YAML_FOLDER / name)
    ours = ", ".join(sorted(file.name for file in YAML_FOLDER.glob("*.yaml")))
    raise InputError(f"--config_file {name}: no such file in {Path.cwd()} (of hstu-xd: {ours})")


def _check_configuration(files: list[str], extras: list[str]) -> None:
    """Check what can be checked before REC starts, with REC's own reader.

    Raises:
        InputError: an unknown model or key, a faulty value or item -> domain file.
    """
    from hstu_xd.plugins.rebinding import apply
    from hstu_xd.plugins.rec.cross_domain_mixin import CHECKPOINTS
    from hstu_xd.plugins.rec.rec_rebindings import MODEL_REBINDINGS, check_model
    from hstu_xd.plugins.rec.rec_session import SESSION
    from hstu_xd.plugins.rec.settings import RecSettings
    from hstu_xd.plugins.rec.user_tokens import TokenPlaces

    with apply(MODEL_REBINDINGS):
        values = defaultdict(lambda: None, _read_by_rec(files))  # as REC's answers missing keys
    for key, value in zip(extras[::2], extras[1::2]):
        values[key.removeprefix("--")] = _converted(value)
    check_model(str(values.get("model")))
    settings = RecSettings.read(values)
    if settings.is_ours and settings.warm_start:
        CHECKPOINTS.check(Path(settings.warm_start))
    if settings.is_personalized:
        TokenPlaces.read(values, around_llm=settings.is_around_llm)
    if settings.is_ours and not settings.is_plain:
        sizes = _sizes(settings, values)
        if sizes is not None:
            settings.encoder_settings(sizes, num_domains=1)
    SESSION.configure(settings)


def _sizes(settings: "RecSettings", values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Read the sizes of the encoder; None for a user LLM that only a hub knows."""
    from hstu_xd.plugins.rec.cross_domain_mixin import hstu_sizes, llm_sizes, local_llm_config

    if not settings.is_around_llm:
        return hstu_sizes(values)
    if values["user_pretrain_dir"] is None:
        raise InputError("user_pretrain_dir: None; give the folder or the hub's name of an LLM")
    llm = local_llm_config(str(values["user_pretrain_dir"]))
    return llm and llm_sizes(llm, values)


def _read_by_rec(files: list[str]) -> Mapping[str, Any]:
    """Read the files' keys and REC's own; its reader imports the model too.

    Raises:
        InputError: what REC's reader does not take, or an unknown model.
        HstuXdError: a package that REC needs is missing.
    """
    try:
        from REC.config import Config

        return Config(config_file_list=files).final_config_dict
    except HstuXdError:
        raise
    except ImportError as error:
        raise HstuXdError(
            f"REC does not load: {error}; install what its requirements.txt names"
        ) from error
    except Exception as error:  # a faulty file fails in many ways, a missing key in others
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"REC cannot make a configuration of {', '.join(files)}: {cause}; its own two files "
            "come first: overall/ID.yaml IDNet/hstu.yaml xd.yaml"
        ) from error


def _converted(text: str) -> Any:
    """Convert a value of the command line as run.py does."""
    if "[" in text or "{" in text:
        try:
            value = json.loads(text)
        except ValueError as error:
            raise InputError(f"{text!r} is not JSON: {error}") from error
        if not isinstance(value, list):
            return value
        if not all(isinstance(x, str) for x in value):
            raise InputError(
                f"{text!r}: REC's run.py wants the entries of a list in quotes, as in "
                '["1", "2"]; or put the key into a yaml file'
            )
        return [_converted(x) for x in value]
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() else number


def _configures_logging(script: Path) -> bool:
    """Tell whether REC's run.py calls ``init_logger``; PerSRec's has it commented out."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return any(isinstance(call, ast.Name) and call.id == "init_logger" for call in calls)


def show_logs_of(script: Path) -> None:
    """Log to stdout where a run.py does not see to it; of other processes, warnings.

    REC sets the levels of its loggers itself.
    """
    # It tells of every metric's name that its file format spells otherwise.
    logging.getLogger("tensorboardX").setLevel(logging.WARNING)
    if not script.is_file() or _configures_logging(script):
        return
    handler = logging.StreamHandler(sys.stdout)
    handler.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def _stand_alone() -> None:
    """Be the one process of a job, where no torchrun says otherwise."""
    if "LOCAL_RANK" in os.environ:
        return
    # Here, so that a wrong command line is refused before torch is imported.
    from hstu_xd.plugins.bridge import free_port

    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    os.environ.update({name: str(value) for name, value in alone.items()})
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ["MASTER_PORT"] = str(free_port())
