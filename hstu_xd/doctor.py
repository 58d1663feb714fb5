"""What is installed, what will run here, and why not more; every library is tried in a subprocess.

A verdict follows from what was tried: imports, a step of a small model, the hooks of the hosts.
Nothing here raises because of what it finds: a broken library is a line of the report.
"""

import platform
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from hstu_xd.errors import HstuXdError
from hstu_xd.plugins.host import Host, hosts
from hstu_xd.plugins.source_patches import inspect_tree
from hstu_xd.subprocess_checks import ask, ask_together
from hstu_xd.version import __version__

# Cold caches make the import of torch and upstream take most of a minute on a small machine.
TIME_LIMIT_S = 120.0

# torch -> the fbgemm whose binaries were built for it.
FBGEMM_FOR_TORCH = {"2.10": "1.5", "2.11": "1.6", "2.12": "1.7", "2.13": "1.8"}

# Import name -> distributions that bring it.
LIBRARIES = {
    "triton": ("triton", "pytorch-triton"),
    "gin": ("gin-config",),
    "polars": ("polars",),
    "pyarrow": ("pyarrow",),
    "fastapi": ("fastapi",),
    "uvicorn": ("uvicorn",),
    "prometheus_client": ("prometheus-client",),
}
# What only a GPU or `hstu-xd serve` needs.
OPTIONAL = ("triton", "fastapi", "uvicorn", "prometheus_client")
FBGEMM = ("fbgemm-gpu-cpu", "fbgemm-gpu", "fbgemm-gpu-nightly-cpu", "fbgemm-gpu-nightly")


def examine(*, timeout_s: float = TIME_LIMIT_S) -> dict[str, Any]:
    """Collect the report.

    Args:
        timeout_s: seconds that one library may take to answer.

    Returns:
        ``hstu_xd``, ``python``, ``torch``, ``libraries``, ``fbgemm_gpu``, ``attention``,
        ``training``, the name of every host and ``verdict``, each a dict of JSON values.
    """
    path = list(sys.path)
    # In one process: torch, which all of them share, takes most of the time to import.
    asked = {name: (name,) for name in ("torch", "attention", "training")}
    asked |= {name: ("library", name) for name in LIBRARIES} | {"fbgemm_gpu": ("fbgemm_gpu",)}
    with ThreadPoolExecutor(max_workers=3) as pool:
        found = {host.name: pool.submit(_examine_host, host, timeout_s) for host in hosts()}
        questions = [*asked.values()]
        answers = dict(zip(asked, ask_together(questions, timeout_s=timeout_s, path=path)))
        report = _assemble(answers)
        report |= {name: future.result() for name, future in found.items()}
    return report | {"verdict": verdict(report)}


def _examine_host(host: Host, timeout_s: float) -> dict[str, Any]:
    here, path = Path.cwd(), list(sys.path)
    # `python main.py` has the checkout on its path; so has this report when it is run from there.
    is_here = not host.missing_markers(here)
    through_here = is_here and not {"", str(here)} & {*path}
    if through_here:
        path = [str(here), *path]
    status: dict[str, Any] = {
        "importable": False,
        "error": "",
        "path": "",
        "commit": "",
        "verified": False,
        "problems": [],
        "without": [],
        "libraries": {
            each.name: {"version": each.version, "problem": each.problem, "on_gpu": each.on_gpu}
            for each in host.libraries
        },
        "through_current_folder": through_here,
        "plugin": {"rebinds": [], "error": ""},
        "patches": {"state": "", "reason": ""},
    }
    if host.in_place and not is_here:
        names = sorted(each.repository.partition("/")[2] for each in host.codebases)
        where = f"run it in the {host.start_folder}/ folder of {' or '.join(names)}"
        return status | {"error": f"not in this folder; {where}"}
    status |= ask("host", host.declared_in, timeout_s=timeout_s, path=path)
    if not status["importable"]:
        return status
    plugin = ask("plugin", host.declared_in, timeout_s=timeout_s, path=path)
    status["without"] = plugin.get("without", [])
    status["plugin"] = {"rebinds": plugin.get("rebinds", []), "error": plugin["error"]}
    status["patches"] = _patches(host.checkout_of(Path(status["path"])))
    if host.in_place:
        # The folder is always there; that it can be imported is known when the plug-in works.
        status |= {"importable": not plugin["error"], "error": plugin["error"]}
    return status


def _assemble(answers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    torch: dict[str, Any] = {"version": "", "cuda": None, "devices": [], "gpu_error": ""}
    torch |= answers["torch"]
    libraries = {
        name: {"version": _version(LIBRARIES[name]), "error": answers[name]["error"]}
        for name in LIBRARIES
    }
    fbgemm = {
        "version": _version(FBGEMM),
        "loads": not answers["fbgemm_gpu"]["error"],
        "error": answers["fbgemm_gpu"]["error"],
        "fits": FBGEMM_FOR_TORCH.get(".".join(torch["version"].split(".")[:2]), ""),
    }
    return {
        "hstu_xd": {"version": __version__, "path": str(Path(__file__).parent)},
        "python": {"version": platform.python_version(), "path": sys.executable},
        "torch": torch,
        "libraries": libraries,
        "fbgemm_gpu": fbgemm,
        "attention": _attention(answers["attention"], torch, libraries["triton"]),
        "training": {"device": "", **answers["training"]},
    }


def _version(distributions: Sequence[str]) -> str:
    """``name version`` of the first that is installed, or "" when none is."""
    for name in distributions:
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return ""


def _attention(
    found: dict[str, Any], torch: dict[str, Any], triton: dict[str, Any]
) -> dict[str, Any]:
    available = found.get("available", [])
    why = ""
    if found["error"]:
        why = found["error"]
    elif found["auto"] != "triton":
        if not torch["devices"]:
            why = "the Triton kernel needs a GPU, and PyTorch sees none"
        else:
            why = found.get("kernels") or "unknown"
            if triton["error"]:
                why = f"triton does not load: {triton['error']}"
        if found.get("loops"):
            why += f"; no loops in C: {found['loops']}"
    return {"available": available, "auto": found.get("auto", ""), "why_not_faster": why}


def _patches(root: Path) -> dict[str, str]:
    """Whether the source patches are in a checkout, and why not."""
    try:
        tree = inspect_tree(root)
    except HstuXdError as problem:
        return {"state": "unknown", "reason": str(problem)}
    return {"state": tree.state, "reason": tree.reason}


def verdict(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Tell whether the stand-alone trainer and each plug-in are ready, or what is in the way."""
    libraries = {k: v for k, v in report["libraries"].items() if k not in OPTIONAL}
    needed = {"torch": report["torch"], **libraries}
    missing = [f"{name}: {each['error']}" for name, each in needed.items() if each["error"]]
    if not missing and report["training"]["error"]:
        missing = [f"a step of a small model: {report['training']['error']}"]
    verdicts = {"stand_alone": {"ready": not missing, "blocks": missing}}
    for host in hosts():
        blocks = [*missing, *_blocks(host, report)]
        verdicts[host.name] = {"ready": not blocks, "blocks": blocks}
    return verdicts


def _blocks(host: Host, report: dict[str, Any]) -> list[str]:
    """Tell what is in the way of a plug-in beside what the stand-alone trainer needs."""
    found, asked = report[host.name], {"fbgemm_gpu": report["fbgemm_gpu"], **report["libraries"]}
    broken = [name for name in host.needs if name in asked and asked[name]["error"]]
    blocks = [f"{name}: {asked[name]['error']}" for name in broken]
    if not found["importable"]:
        blocks.append(f"{host.title}: {found['error'] or 'not importable'}")
        return blocks
    if found["plugin"]["error"] and not blocks:
        blocks.append(f"plug-in: {found['plugin']['error']}")
    on_gpu = bool(report["torch"]["devices"])
    wrong = [each for each in found["libraries"].values() if each["problem"]]
    return blocks + [each["problem"] for each in wrong if on_gpu or not each["on_gpu"]]


def render(report: dict[str, Any]) -> str:
    """Write the report as aligned lines, the verdict last."""
    lines = [
        ("hstu-xd", f"{report['hstu_xd']['version']}, {report['hstu_xd']['path']}"),
        ("python", report["python"]["version"]),
        ("torch", _torch_line(report["torch"])),
        ("fbgemm_gpu", _fbgemm_line(report["fbgemm_gpu"], report["torch"])),
        *((name, _library_line(each, name)) for name, each in report["libraries"].items()),
        ("attention", _attention_line(report["attention"])),
        ("training", _training_line(report["training"])),
    ]
    for host in hosts():
        lines += _host_lines(host, report[host.name])
    lines += [
        ("verdict, stand-alone", _verdict_line(report["verdict"]["stand_alone"], "")),
        *(
            (f"verdict, {host.verdict_title}", _verdict_line(report["verdict"][host.name], remark))
            for host, remark in ((host, _cpu_remark(host, report)) for host in hosts())
        ),
    ]
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(f"{name.ljust(width)}{text}" for name, text in lines)


def _cpu_remark(host: Host, report: dict[str, Any]) -> str:
    if report["torch"]["devices"]:
        return ""
    return f" (no GPU: {f'use {host.cpu_command}' if host.cpu_command else 'on the CPU'})"


def _short(error: str, name: str) -> str:
    absent = f"ModuleNotFoundError: No module named '{name}'"
    return "not installed" if error == absent else f"does not load: {error}"


def _library_line(library: dict[str, Any], name: str) -> str:
    if not library["error"]:
        return library["version"] or "of unknown version"
    return ", ".join(filter(None, (library["version"], _short(library["error"], name))))


def _torch_line(torch: dict[str, Any]) -> str:
    if not torch["version"]:
        return _short(torch["error"], "torch")
    built = f"built for CUDA {torch['cuda']}" if torch["cuda"] else "built without CUDA"
    gpus = ", ".join(torch["devices"]) or "no GPU visible"
    line = f"{torch['version']}, {built}; {gpus}"
    return "; ".join(filter(None, (line, torch["gpu_error"], torch["error"])))


def _fbgemm_line(fbgemm: dict[str, Any], torch: dict[str, Any]) -> str:
    if fbgemm["loads"]:
        return f"{fbgemm['version'] or 'of unknown version'}, loads with this torch"
    line = _library_line(fbgemm, "fbgemm_gpu")
    if fbgemm["fits"]:
        package = "fbgemm-gpu" if torch["cuda"] else "fbgemm-gpu-cpu"
        return f"{line}; this torch needs {package}=={fbgemm['fits']}.*"
    known = ", ".join(f"{b} for torch {a}" for a, b in FBGEMM_FOR_TORCH.items())
    return f"{line}; known to fit: {known}"


def _attention_line(attention: dict[str, Any]) -> str:
    if not attention["available"]:
        return f"none: {attention['why_not_faster']}"
    line = f'"auto" is {attention["auto"]} (of {", ".join(attention["available"])})'
    return "; ".join(filter(None, (line, attention["why_not_faster"])))


def _training_line(training: dict[str, Any]) -> str:
    if training["error"]:
        return f"a step of a small model fails: {training['error']}"
    return f"a step of a small model was computed on {training['device']}"


def _host_lines(host: Host, found: dict[str, Any]) -> list[tuple[str, str]]:
    lines = [
        (host.title, _host_line(host, found)),
        *(("  problem", problem) for problem in found["problems"]),
    ]
    if found["without"]:
        names = ", ".join(found["without"])
        lines += [("  without", f"{names}, which {host.title} mostly does without")]
    if found["libraries"]:
        lines += [("  libraries", _libraries_line(found["libraries"]))]
    if found["path"]:
        patches = ": ".join(filter(None, found["patches"].values()))
        lines += [("  plug-in", _plugin_line(found["plugin"])), ("  source patches", patches)]
    return lines


def _libraries_line(libraries: dict[str, dict[str, Any]]) -> str:
    return ", ".join(
        ("on a GPU: " if each["on_gpu"] else "")
        + (each["problem"] or f"{name} {each['version']} fits")
        for name, each in libraries.items()
    )


def _host_line(host: Host, found: dict[str, Any]) -> str:
    known = "verified" if found["verified"] else "not verified"
    if host.in_place:
        return f"{found['path']}, {known}" if found["path"] else found["error"]
    if not found["importable"]:
        return f"not importable: {found['error']}"
    through = ", through the current folder" if found["through_current_folder"] else ""
    return f"{found['path']}{through}, commit {found['commit'][:7] or 'unknown'}, {known}"


def _plugin_line(plugin: dict[str, Any]) -> str:
    if plugin["error"]:
        return plugin["error"]
    names = dict.fromkeys(path.rpartition(".")[2] for path in plugin["rebinds"])
    return f"works; rebinds {', '.join(names)}"


def _verdict_line(verdict: dict[str, Any], remark: str) -> str:
    if verdict["ready"]:
        return f"ready{remark}"
    return f"not ready: {'; '.join(verdict['blocks'])}"
