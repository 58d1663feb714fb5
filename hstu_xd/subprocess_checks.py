"""Look at libraries in processes of their own, so that a crash or a hang is only an answer.

The questions are the functions of ``QUESTIONS``; they run in the child process only.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hstu_xd.errors import HstuXdError

if TYPE_CHECKING:
    import torch

_MARK = "hstu-xd-answer "
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from hstu_xd.subprocess_checks import answer; answer(json.loads(sys.argv[2]))"
)


def ask(question: str, *arguments: str, timeout_s: float, path: list[str]) -> dict[str, Any]:
    """Put one question to a new process.

    Args:
        question: a key of ``QUESTIONS``.
        arguments: of the question.
        timeout_s: seconds after which the process is ended.
        path: its ``sys.path``.

    Returns:
        The answer and ``error``: "" or one line that says what broke.
    """
    return ask_together([(question, *arguments)], timeout_s=timeout_s, path=path)[0]


def ask_together(
    questions: Sequence[tuple[str, ...]], *, timeout_s: float, path: list[str]
) -> list[dict[str, Any]]:
    """Put several questions to one process, which imports what they share once.

    What breaks is the fault of the question at which it broke; those after it go to a new process.

    Args:
        questions: each with its arguments, as of :func:`ask`.
        timeout_s: seconds after which a process is ended.
        path: its ``sys.path``.

    Returns:
        What :func:`ask` returns for each question.
    """
    found, end = _answers(questions, timeout_s, path)
    if end and len(found) == len(questions) > 1:
        # The process broke while it ended: which library did that?
        return [ask(*question, timeout_s=timeout_s, path=path) for question in questions]
    if end and len(found) < len(questions):
        found.append({"error": end})
    elif end:
        found[-1]["error"] = f"answers, then {end}"
    rest = questions[len(found) :]
    return found + (ask_together(rest, timeout_s=timeout_s, path=path) if rest else [])


def _answers(
    questions: Sequence[tuple[str, ...]], timeout_s: float, path: list[str]
) -> tuple[list[dict[str, Any]], str]:
    """Return the answers of one process, and how it ended if not well."""
    command = [sys.executable, "-c", _CHILD, json.dumps(path), json.dumps(questions)]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    ) as process:
        late = ""
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            late = f"no answer within {timeout_s:g} s"
    # A library may have printed something without an end of line before.
    lines = [line.rpartition(_MARK) for line in out.splitlines()]
    found = [json.loads(text) for _, mark, text in lines if mark]
    if late:
        return found, late
    stopped = bool(found) and bool(found[-1]["error"])
    if stopped or (process.returncode == 0 and len(found) == len(questions)):
        return found, ""
    said = err.strip().splitlines() if len(found) < len(questions) else []
    return found, _end(process.returncode) + (f" ({said[-1].strip()})" if said else "")


def answer(questions: Sequence[Sequence[str]]) -> None:
    """Answer questions on stdout up to the first that breaks; an exception is part of an answer."""
    for question, *arguments in questions:
        found: dict[str, Any] = {"error": ""}
        try:
            found |= QUESTIONS[question](*arguments)
        except BaseException as error:  # SystemExit, too: libraries call it when they are imported
            found["error"] = _cause(error)
        print(f"\n{_MARK}{json.dumps(found)}", flush=True)
        if found["error"]:
            break


def _cause(error: BaseException) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), "").strip()
    return f"{type(error).__name__}: {first}".rstrip(": ")


def _end(code: int) -> str:
    if code >= 0:
        return f"its process ended with exit code {code}"
    try:
        return f"its process died of {signal.Signals(-code).name}"
    except ValueError:
        return f"its process died of signal {-code}"


def _library(name: str) -> dict[str, Any]:
    module = import_module(name)
    if getattr(module, "__file__", None) is None:
        # A folder of that name lies on the path; Python takes it for an empty package.
        raise ImportError(f"only a folder of that name, {next(iter(module.__path__), '?')}")
    return {"file": module.__file__}


def _torch() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda}
    try:
        found["devices"] = [
            torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
        ]
    except RuntimeError as error:  # a driver that does not fit leaves the CPU usable
        found["gpu_error"] = _cause(error)
    return found


def _fbgemm() -> dict[str, Any]:
    if find_spec("fbgemm_gpu") is None:
        raise ModuleNotFoundError("No module named 'fbgemm_gpu'")
    import torch

    found = _library("fbgemm_gpu")
    # The import survives libraries that do not load; the operators are missing then.
    offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([1, 2]))
    if offsets.tolist() != [0, 1, 3]:
        raise RuntimeError(f"asynchronous_complete_cumsum([1, 2]) gives {offsets.tolist()}")
    return found


def _attention() -> dict[str, Any]:
    import torch

    from hstu_xd import ops

    names = ops.available_impls()
    fused = "triton" in names and torch.cuda.is_available()  # elsewhere it is only interpreted
    problem = kernels_problem(torch.device("cuda")) if fused else ""
    auto = "triton" if fused and not problem else "eager"
    loops = "" if torch.cuda.is_available() else loops_problem()
    if not loops and not torch.cuda.is_available():
        auto = "native"
    return {"available": list(names), "auto": auto, "kernels": problem, "loops": loops}


def loops_problem() -> str:
    """Use both operators' loops in C once, with gradients; return what is wrong, or ""."""
    import torch

    from hstu_xd.ops.domain_attention.native import LIBRARY

    return LIBRARY.problem() or _problem("native", torch.device("cpu"), (torch.float32,))


def kernels_problem(device: "torch.device") -> str:
    """Use both fused operators once, with gradients; return what is wrong with them, or ""."""
    import torch

    return _problem("triton", device, (torch.float32, torch.bfloat16))


def _problem(impl: str, device: "torch.device", dtypes: "Sequence[torch.dtype]") -> str:
    import torch

    from hstu_xd import ops
    from hstu_xd.ops.grouping import DomainGrouping

    domains, offsets = torch.tensor([0, 1, 0], device=device), torch.tensor([0, 3], device=device)
    grouping = DomainGrouping.from_jagged(domains, offsets, 2)
    reads = ops.StateReads(grouping, domains, domains, states_per_domain=1)
    try:
        for dtype in dtypes:
            x = torch.ones(5, 2, 16, dtype=dtype, device=device, requires_grad=True)
            token = x[:3]
            out = ops.domain_attention(token, token, token, grouping, norm_length=3, impl=impl)
            (out + ops.state_attention(token, x, x, reads, impl=impl)).sum().backward()
    except Exception as error:
        return str(error) if isinstance(error, HstuXdError) else _cause(error)
    return ""


def _training() -> dict[str, Any]:
    """Compute a small model and its gradients, as a step of training does."""
    import torch

    from hstu_xd.catalog import DomainCatalog
    from hstu_xd.model.hstu import CrossDomainHSTU
    from hstu_xd.model.settings import EncoderSettings
    from hstu_xd.training import trainer  # noqa: F401  (what a training imports)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    settings = EncoderSettings(
        num_domains=2, norm_length=4, domain_mask=True, tape=True, ddsr=True, target_view_heads=1
    )
    catalog = DomainCatalog(torch.tensor([0, 0, 1, 0]), ["a", "b"])
    model = CrossDomainHSTU(catalog, settings).to(device)
    ids = torch.tensor([[1, 2, 3], [2, 1, 0]], device=device)
    times = torch.tensor([[1, 2, 3], [1, 2, 0]], device=device)
    vectors = model.encode(ids, times, torch.tensor([0, 1], device=device))
    vectors.sum().backward()
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    if not all(bool(x.isfinite().all()) for x in (vectors, *gradients)):
        raise RuntimeError(f"a small model gives numbers that are not finite on {device}")
    return {"device": device.type}


def _host(folder: str) -> dict[str, Any]:
    from hstu_xd.plugins.host import declared_host, inspect_host

    status = asdict(inspect_host(declared_host(folder)))
    return {key: value for key, value in status.items() if value != ""}


def _plugin(folder: str) -> dict[str, Any]:
    from hstu_xd.plugins.host import activate, declared_host, stand_in_for_absent

    host = declared_host(folder)
    for library in host.needs:
        import_module(library)
    without = stand_in_for_absent(host)
    return {"rebinds": list(activate(host).originals), "without": without}


# "host" and "plugin" take the dotted name of the folder that declares the host.
QUESTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "library": _library,
    "torch": _torch,
    "fbgemm_gpu": _fbgemm,
    "attention": _attention,
    "training": _training,
    "host": _host,
    "plugin": _plugin,
}
