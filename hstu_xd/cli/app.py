"""Entry point of ``hstu-xd``: registers the commands and maps errors to exit codes."""

import sys
from importlib import import_module
from typing import Any

import typer

from hstu_xd.errors import HstuXdError
from hstu_xd.version import __version__

# Command -> module of hstu_xd.cli that defines a function of the command's name.
COMMANDS = {
    "prepare": "data",
    "synth": "data",
    "train": "runs",
    "evaluate": "runs",
    "recommend": "runs",
    "export": "runs",
    "settings": "runs",
    "compare": "experiments",
    "report": "experiments",
    "ablate": "experiments",
    "demo": "experiments",
    "serve": "serve",
    "bench": "bench",
    "init": "upstream",
    "patch": "upstream",
    "upstream-train": "upstream",
    "upstream-evaluate": "upstream",
    "rec-dataset": "upstream",
    "doctor": "upstream",
}


def build_app() -> typer.Typer:
    """Assemble the command line; command modules import their libraries only when they run."""
    app = typer.Typer(
        name="hstu-xd",
        help="Cross-domain HSTU: prepare logs, train, evaluate, serve, compare, benchmark.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )

    @app.callback(invoke_without_command=True)
    def root(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
        if version:
            typer.echo(__version__)
            raise typer.Exit

    for name, module in COMMANDS.items():
        function = getattr(import_module(f"hstu_xd.cli.{module}"), name.replace("-", "_"))
        app.command(name)(function)
    return app


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 the work failed, 2 bad input or usage."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> int:
    """Run one command and return its exit code; every error becomes one readable line on stderr."""
    command: Any = typer.main.get_command(build_app())
    try:
        result = command.main(args=argv, prog_name="hstu-xd", standalone_mode=False)
    except HstuXdError as error:
        return _fail(str(error), error.exit_code)
    except typer.Abort:
        return _fail("interrupted", 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 1)
    except OSError as error:
        # A full disk, a path that cannot be: no fault of the package, so no traceback.
        return _fail(": ".join(str(x) for x in (error.filename, error.strerror or error) if x), 1)
    except Exception as error:
        # Typer's usage errors carry their own one-line text and exit code; anything else is ours
        # to fix and keeps its traceback.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            return _fail(error.format_message(), error.exit_code)
        raise
    return result if isinstance(result, int) else 0


def _fail(message: str, exit_code: int) -> int:
    print(f"hstu-xd: {message}", file=sys.stderr)
    return exit_code
