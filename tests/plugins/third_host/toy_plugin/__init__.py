"""All that a plug-in for one more codebase declares."""

from pathlib import Path

from hstu_xd.plugins.host import Codebase, Host

HOST = Host(
    name="toy",
    title="Toy",
    verdict_title="toy",
    declared_in=__name__,
    package="toy_upstream",
    codebases=(
        Codebase(
            name="toy-upstream",
            repository="somebody/toy-upstream",
            commits=("1234567",),
            markers=("start.py", "toy_upstream/trainer.py"),
            patches=Path(__file__).parent / "patches",
        ),
    ),
    sources={"trainer.py": {"build_model": ("a1cb5e3b7f30a8cd",), "train": ("4c14fa561a022407",)}},
    rebindings=f"{__name__}.toy_rebindings:REBINDINGS",
    cpu_rebindings=f"{__name__}.toy_rebindings:cpu_rebindings",
    markers=("start.py", "toy_upstream/trainer.py"),
    dispensable={"toy_accelerator": {}},
)
