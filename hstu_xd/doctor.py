"""What is installed, what will run here, and why not more; every library is asked in a subprocess.

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
from hstu_xd.plugins.gr.research.gin_files import MARKERS
from hstu_xd.plugins.rec.launch import missing_markers
from hstu_xd.plugins.source_patches import inspect_tree
from hstu_xd.subprocess_checks import ask
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
        ``generative_recommenders``, ``rec`` and ``verdict``, each a dict of JSON values.
    """
    here = Path.cwd()
    path = list(sys.path)
    # `python main.py` has the checkout on its path; so has this report when it is run from there.
    inside = all((here / marker).is_file() for marker in MARKERS) and not {"", str(here)} & {*path}
    upstream_path = [str(here), *path] if inside else path

    def about(*question: str, path: list[str] = path) -> dict[str, Any]:
        return ask(*question, timeout_s=timeout_s, path=path)

    def about_upstream() -> dict[str, Any]:
        found = about("upstream", path=upstream_path)
        plugin = about("plugin", path=upstream_path) if found.get("importable") else {}
        return _upstream(found, plugin) | {"through_current_folder": inside}

    def about_rec() -> dict[str, Any]:
        # The launcher runs in REC's code/ folder and finds it nowhere else.
        if missing_markers(here):
            error = "not in this folder; run it in the code/ folder of HLLM or PerSRec"
            return {"importable": False, "path": "", "error": error}
        inside = [str(here), *path]
        return _rec(here, about("rec", path=inside), about("rec_plugin", path=inside))

    with ThreadPoolExecutor(max_workers=3) as pool:
        upstream, rec = pool.submit(about_upstream), pool.submit(about_rec)
        single = {name: pool.submit(about, name) for name in ("torch", "fbgemm_gpu", "attention")}
        libraries = {name: pool.submit(about, "library", name) for name in LIBRARIES}
        answers = {name: future.result() for name, future in (single | libraries).items()}
        report = _assemble(answers)
        report |= {"generative_recommenders": upstream.result(), "rec": rec.result()}
    return report | {"verdict": verdict(report)}


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
            why = f"triton does not load: {triton['error']}" if triton["error"] else "unknown"
    return {"available": available, "auto": found.get("auto", ""), "why_not_faster": why}


def _upstream(found: dict[str, Any], plugin: dict[str, Any]) -> dict[str, Any]:
    status: dict[str, Any] = {
        "importable": False,
        "path": "",
        "commit": "",
        "verified": False,
        "problems": [],
        **found,
        "plugin": {"rebinds": plugin.get("rebinds", []), "error": plugin.get("error", "")},
        "patches": {"state": "", "reason": ""},
    }
    if status["importable"]:
        status["patches"] = _patches(Path(status["path"]).parent)
    return status


def _rec(code: Path, found: dict[str, Any], plugin: dict[str, Any]) -> dict[str, Any]:
    problems = [found["error"]] if found["error"] else found["problems"]
    return {
        "importable": not plugin["error"],
        "path": str(code / "REC"),
        "error": plugin["error"],
        "verified": not problems,
        "problems": problems,
        "without": plugin.get("without", []),
        "plugin": {"rebinds": plugin.get("rebinds", []), "error": plugin["error"]},
        "patches": _patches(code.parent),
    }


def _patches(root: Path) -> dict[str, str]:
    """Whether the source patches are in a checkout, and why not."""
    try:
        tree = inspect_tree(root)
    except HstuXdError as problem:
        return {"state": "unknown", "reason": str(problem)}
    return {"state": tree.state, "reason": tree.reason}


def verdict(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of the stand-alone trainer and of each plug-in: ready or not, and what stands in the way."""
    libraries = {k: v for k, v in report["libraries"].items() if k not in OPTIONAL}
    needed = {"torch": report["torch"], **libraries}
    missing = [f"{name}: {each['error']}" for name, each in needed.items() if each["error"]]
    upstream, fbgemm = report["generative_recommenders"], report["fbgemm_gpu"]
    blocks = list(missing)
    if not fbgemm["loads"]:
        blocks.append(f"fbgemm_gpu: {fbgemm['error']}")
    if not upstream["importable"]:
        blocks.append(f"generative_recommenders: {upstream['error'] or 'not importable'}")
    elif upstream["plugin"]["error"] and fbgemm["loads"] and not missing:
        blocks.append(f"plug-in: {upstream['plugin']['error']}")
    rec = report["rec"]["error"]
    rec_blocks = [*missing, *([f"REC: {rec}"] if rec else [])]
    return {
        "stand_alone": {"ready": not missing, "blocks": missing},
        "generative_recommenders": {"ready": not blocks, "blocks": blocks},
        "rec": {"ready": not rec_blocks, "blocks": rec_blocks},
    }


def render(report: dict[str, Any]) -> str:
    """The report as aligned lines, the verdict last."""
    upstream, rec = report["generative_recommenders"], report["rec"]
    lines = [
        ("hstu-xd", f"{report['hstu_xd']['version']}, {report['hstu_xd']['path']}"),
        ("python", report["python"]["version"]),
        ("torch", _torch_line(report["torch"])),
        ("fbgemm_gpu", _fbgemm_line(report["fbgemm_gpu"], report["torch"])),
        *((name, _library_line(each, name)) for name, each in report["libraries"].items()),
        ("attention", _attention_line(report["attention"])),
        ("generative_recommenders", _upstream_line(upstream)),
        *(("  problem", problem) for problem in upstream["problems"]),
    ]
    if upstream["importable"]:
        lines += _plugin_lines(upstream)
    lines += [("REC", _rec_line(rec))]
    if rec["path"]:
        lines += [("  problem", problem) for problem in rec["problems"]]
        if rec["without"]:
            lines += [("  without", f"{', '.join(rec['without'])}, which REC mostly does without")]
        lines += _plugin_lines(rec)
    remarks = dict.fromkeys(report["verdict"], "")
    if not report["torch"]["devices"]:
        remarks["generative_recommenders"] = " (no GPU: use hstu-xd upstream-train)"
        remarks["rec"] = " (no GPU: on the CPU)"
    names = {"stand_alone": "stand-alone", "generative_recommenders": "upstream", "rec": "REC"}
    for key, each in report["verdict"].items():
        lines += [(f"verdict, {names[key]}", _verdict_line(each, remarks[key]))]
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(f"{name.ljust(width)}{text}" for name, text in lines)


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


def _upstream_line(upstream: dict[str, Any]) -> str:
    if not upstream["importable"]:
        return f"not importable: {upstream['error']}"
    known = "verified" if upstream["verified"] else "not verified"
    through = ", through the current folder" if upstream["through_current_folder"] else ""
    return f"{upstream['path']}{through}, commit {upstream['commit'][:7] or 'unknown'}, {known}"


def _rec_line(rec: dict[str, Any]) -> str:
    if not rec["path"]:
        return rec["error"]
    return f"{rec['path']}, {'verified' if rec['verified'] else 'not verified'}"


def _plugin_lines(codebase: dict[str, Any]) -> list[tuple[str, str]]:
    patches = ": ".join(filter(None, codebase["patches"].values()))
    return [("  plug-in", _plugin_line(codebase["plugin"])), ("  source patches", patches)]


def _plugin_line(plugin: dict[str, Any]) -> str:
    if plugin["error"]:
        return plugin["error"]
    names = dict.fromkeys(path.rpartition(".")[2] for path in plugin["rebinds"])
    return f"works; rebinds {', '.join(names)}"


def _verdict_line(verdict: dict[str, Any], remark: str) -> str:
    if verdict["ready"]:
        return f"ready{remark}"
    return f"not ready: {'; '.join(verdict['blocks'])}"
