"""Ranks by an exported folder where only torch can be imported, with a search by its manifest.

Given folders, each with a file of requests, asked.pt, beside it; the chances go to answers.pt
there. The search is written after what the manifest says of it, and looks at every event of a
history, the latest first.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

from exported_elsewhere import ALLOWED, OnlyTorch

Rows = list[tuple[int, int]]


def hard(
    settings: dict[str, Any], names: list[str], paths: list[list[int]], past: Rows, candidate: int
) -> Rows:
    """The events that hard search finds among ``past``, latest first, for a candidate."""
    levels = [names.index(name) for name in settings["levels"] or names]
    quotas = settings["quotas"] or [0] * len(levels)
    wanted, found, nowhere = paths[candidate], [[] for _ in levels], []
    for event in past[settings["skip_recent"] :]:
        nodes = paths[event[0]]
        if settings["scope"] == "target_domain" and nodes[-1] != wanted[-1]:
            continue
        shared = [i for i, at in enumerate(levels) if nodes[at] == wanted[at] != -1]
        (found[shared[0]] if shared else nowhere).append(event)
    limited = [rows[: most or None] for rows, most in zip(found, quotas)]
    every = sum(limited, nowhere[:0]) + (nowhere if settings["fill"] else [])
    return every[: settings["k"]]


def counts(paths: list[list[int]], past: Rows, at: int, candidate: int) -> list[float]:
    """How often each level's node was met, then how long ago."""
    numbers, recent = [], []
    for level, node in enumerate(paths[candidate]):
        times = [time for item, time in past if node != -1 and paths[item][level] == node]
        numbers.append(math.log(1 + len(times)))
        days = (at - max(times)) / 86_400 if times else 3650
        recent.append(max(0.0, math.log(3650 / days) / math.log(3650)))
    return numbers + recent


def padded(rows: Rows, at: int, width: int) -> tuple[list[int], list[int]]:
    """Items and gaps of some events."""
    behind = [0] * (width - len(rows))
    return [item for item, _ in rows] + behind, [at - time for _, time in rows] + behind


def inputs_for(manifest: dict[str, Any], paths: list[list[int]], request: Any) -> dict[str, Any]:
    """All that a program may be given for one request, as nested lists."""
    search, at, candidates = manifest["settings"]["search"], request["at"], request["candidates"]
    past = [(item, time) for item, time in request["history"] if time < at][::-1]
    k, names = search["k"], manifest["levels"]
    if search["kind"] == "hard":
        found = [padded(hard(search, names, paths, past, item), at, k) for item in candidates]
        events, gaps = ([list(column) for column in zip(*found)]) if found else ([], [])
    else:
        events, gaps = padded(past[:k], at, k)
    most = manifest["settings"]["short"]["events"] or 1
    history = padded(past[::-1], at, max(1, len(past)))
    latest = padded(past[:most][::-1], at, most)
    return {
        "candidates": candidates,
        "goals": manifest["goals"].index(request["goal"]),
        "counts": [counts(paths, past, at, item) for item in candidates],
        "events": events,
        "gaps": gaps,
        **dict(zip(("history", "history_gaps"), history)),
        **dict(zip(("latest", "latest_gaps"), latest)),
    }


def answer(folder: Path) -> None:
    """Rank the requests of a folder's neighbour one by one and all at once, which is the same."""
    manifest = json.loads((folder / "manifest.json").read_text())
    towers = "user_vectors" in manifest["outputs"]
    program = torch.export.load(folder / ("towers.pt2" if towers else "ranker.pt2")).module()
    paths = torch.load(folder / "levels.pt").tolist()
    requests = torch.load(folder.parent / "asked.pt")
    every = [inputs_for(manifest, paths, request) for request in requests]
    columns = {name: [torch.tensor(each[name]) for each in every] for name in manifest["inputs"]}
    alone = [
        program(**{name: column[row].unsqueeze(0) for name, column in columns.items()})[0]
        for row in range(len(requests))
    ]
    pad = torch.nn.utils.rnn.pad_sequence  # behind what is shorter
    stacked = {
        name: pad(column, batch_first=True) if column[0].ndim else torch.stack(column)
        for name, column in columns.items()
    }
    for one, row in zip(alone, program(**stacked), strict=True):
        torch.testing.assert_close(row[: len(one)], one, rtol=0, atol=1e-6)
    answers = [answer.tolist() for answer in alone]
    if towers:
        vectors = torch.load(folder / "item_vectors.pt")
        for row, request in enumerate(requests):
            goal = manifest["goals"].index(request["goal"])
            logits = vectors[torch.tensor(request["candidates"])] @ alone[row][goal]
            answers[row] = (logits + manifest["biases"][goal]).double().sigmoid().tolist()
    torch.save(answers, folder.parent / "answers.pt")


if __name__ == "__main__":
    sys.meta_path[:] = [OnlyTorch(tuple(sys.meta_path))]
    import torch

    for name in sys.argv[1:]:
        answer(Path(name))
    strangers = {name.partition(".")[0] for name in sys.modules} - ALLOWED
    print(*sorted(strangers & {"hstu_xd", "polars", "gin", "safetensors", "numpy", "pyarrow"}))
