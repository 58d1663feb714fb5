"""Plug-ins into generative-recommenders; its trainers are hosts of their own."""

from hstu_xd.plugins.host import Codebase

GENERATIVE_RECOMMENDERS = Codebase(
    name="generative-recommenders",
    repository="meta-recsys/generative-recommenders",
    # The ends of the verified range, of 2025-02-06 and 2026-07-22, and one in between.
    commits=("44b62c6", "2e81fab", "db1bf8f"),
    markers=("main.py", "generative_recommenders/research/trainer/train.py"),
)
