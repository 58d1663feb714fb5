"""Entry point of ``hstu-xd``: the table of commands, their help, and the exit codes of errors."""

import sys
from importlib import import_module
from typing import Annotated, Any

import typer
import typer.core

from hstu_xd.errors import HstuXdError, Interrupted
from hstu_xd.version import __version__

# Command -> the module of hstu_xd.cli that defines it under that name, and its section in the help.
COMMANDS = {
    "prepare": ("data", "Data"),
    "synth": ("data", "Data"),
    "requests": ("ranking", "Data"),
    "labelled-requests": ("ranking", "Data"),
    "train": ("runs", "Models"),
    "rank": ("ranking", "Models"),
    "evaluate": ("runs", "Models"),
    "recommend": ("recommend", "Models"),
    "score": ("ranking", "Models"),
    "settings": ("runs", "Models"),
    "ablate": ("experiments", "Experiments"),
    "tune": ("experiments", "Experiments"),
    "compare": ("experiments", "Experiments"),
    "report": ("experiments", "Experiments"),
    "demo": ("experiments", "Experiments"),
    "export": ("runs", "Production"),
    "serve": ("serve", "Production"),
    "events": ("events", "Production"),
    "init": ("upstream", "Other codebases"),
    "patch": ("upstream", "Other codebases"),
    "upstream-train": ("upstream", "Other codebases"),
    "upstream-evaluate": ("upstream", "Other codebases"),
    "rec-dataset": ("upstream", "Other codebases"),
    "doctor": ("upstream", "This machine"),
    "bench": ("bench", "This machine"),
}


class SectionedHelp(typer.core.TyperGroup):
    """Lists commands by section, in plain text that a pipe can take, a whole sentence each."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a section for every ``rich_help_panel`` of the commands."""
        sections: dict[str, list[tuple[str, str]]] = {}
        commands: dict[str, Any] = {**self.commands}
        for name, command in commands.items():
            rows = sections.setdefault(command.rich_help_panel, [])
            rows.append((name, command.get_short_help_str(_WHOLE_SENTENCE)))
        # All sections get the width of the longest name, so that their texts stand in one column.
        width = max(map(len, self.commands))
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), text) for name, text in rows])


# More characters than a first sentence has: it is wrapped rather than cut.
_WHOLE_SENTENCE = 1000


def build_app() -> typer.Typer:
    """Assemble the command line; command modules import their libraries only when they run."""
    app = typer.Typer(
        name="hstu-xd",
        help="Cross-domain HSTU: prepare logs, train, evaluate, serve, compare, benchmark.",
        cls=SectionedHelp,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"max_content_width": 100},
    )

    @app.callback(invoke_without_command=True)
    def root(
        context: typer.Context,
        version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    ) -> None:
        if version:
            typer.echo(__version__)
            raise typer.Exit
        _print_help_alone(context)

    for name, (module, section) in COMMANDS.items():
        command = getattr(import_module(f"hstu_xd.cli.{module}"), name.replace("-", "_"))
        if isinstance(command, typer.Typer):
            app.add_typer(
                command,
                name=name,
                cls=SectionedHelp,
                callback=_print_help_alone,
                invoke_without_command=True,
                rich_help_panel=section,
            )
        else:
            app.command(name, rich_help_panel=section)(command)
    return app


def _print_help_alone(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 the work failed, 2 bad input or usage.

    A command that a signal stops exits with 128 + its number: 130 after Ctrl-C, 143 after SIGTERM.
    """
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> int:
    """Run one command and return its exit code; every error becomes one readable line on stderr."""
    command: Any = typer.main.get_command(build_app())
    try:
        result = command.main(args=argv, prog_name="hstu-xd", standalone_mode=False)
    except (HstuXdError, Interrupted) as error:
        return _fail(str(error), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        return _fail("interrupted", _INTERRUPTED)
    except OSError as error:
        # A full disk, a path that cannot be: no fault of the package, so no traceback.
        return _fail(": ".join(str(x) for x in (error.filename, error.strerror or error) if x), 1)
    except Exception as error:
        # Typer's usage errors carry their own one-line text and exit code; anything else is ours
        # to fix and keeps its traceback.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            return _fail(_with_hint(error), error.exit_code)
        raise
    if result == _INTERRUPTED:  # how newer versions of typer tell of Ctrl-C
        return _fail("interrupted", _INTERRUPTED)
    return result if isinstance(result, int) else 0


_INTERRUPTED = 130


def _with_hint(error: Any) -> str:
    """Return the text of a usage error, and where the usage is described."""
    text, context = error.format_message(), getattr(error, "ctx", None)
    if context is None:
        return text
    return f"{text}{'' if text[-1] in '.?!' else '.'} See {context.command_path} --help"


def _fail(message: str, exit_code: int) -> int:
    if message:  # of several processes that stop together one speaks
        print(f"hstu-xd: {message}", file=sys.stderr)
    return exit_code
