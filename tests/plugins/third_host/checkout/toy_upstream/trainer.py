"""Its trainer, which looks ``build_model`` and ``pick_device`` up when it runs."""

import toy_accelerator  # noqa: F401  (not installed anywhere)


def build_model(name: str) -> str:
    return f"model {name}"


def pick_device(rank: int) -> str:
    return f"cuda:{rank}"


def train(name: str) -> str:
    return f"{build_model(name)} on {pick_device(0)}"
