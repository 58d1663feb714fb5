"""Prints what a store holds, for the end of ``prepare`` and ``synth``."""

import sys
from pathlib import Path
from typing import Any


def print_summary(out: Path, manifest: dict[str, Any]) -> None:
    """Print a few lines about a store that was just written; its warnings go to stderr."""
    label = " (SYNTHETIC data)" if manifest["synthetic"] else ""
    length = manifest["history_length"]
    print(f"wrote {out}{label}")
    print(
        f"  {manifest['users']:,} users, {manifest['items']:,} items, "
        f"{manifest['interactions']:,} interactions, {len(manifest['domains'])} domains"
    )
    width = max(len(name) for name in manifest["domains"])
    for name, counts in manifest["domains"].items():
        share = counts["interactions"] / manifest["interactions"]
        print(
            f"  {name:<{width}}  {counts['users']:>10,} users {counts['items']:>10,} items "
            f"{counts['interactions']:>12,} interactions {share:6.1%}"
        )
    print(
        f"  history length mean {length['mean']:.1f} median {length['median']:g} "
        f"max {length['max']}; {manifest['switch_share']:.1%} of neighbours switch domain; "
        f"attention cost ratio delta {manifest['delta']:.3f}"
    )
    dropped = manifest["filters"]["dropped"]
    if dropped["interactions"]:
        print(
            f"  filters dropped {dropped['interactions']:,} interactions, "
            f"{dropped['users']:,} users, {dropped['items']:,} items"
        )
    for warning in manifest["warnings"]:
        print(f"WARNING: {warning}", file=sys.stderr)
