"""argv -> commands. No maths; each command imports what it needs once it is called."""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import bench, demo, evaluate, generate, inspect, plan, train, tune


class _InOrder(TyperGroup):
    """Lists the commands as a newcomer meets them; Typer would put a command with commands of its own first."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(
            super().list_commands(ctx),
            key=["train", "generate", "eval", "demo", "bench", "tune", "plan", "inspect"].index,
        )


app = typer.Typer(
    name="ringjax",
    cls=_InOrder,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command()(train.train)
app.command()(generate.generate)
app.command("eval")(evaluate.evaluate)
app.command()(demo.demo)
app.add_typer(bench.app, name="bench")
app.command()(tune.tune)
app.command(epilog=plan.EPILOG)(plan.plan)
app.command(epilog=inspect.EPILOG)(inspect.inspect)


def _print_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"ringjax {__version__}")
        raise typer.Exit


@app.callback()
def ringjax(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Exact ring attention in JAX: train a decoder with it, watch it, time it, plan it, inspect what is compiled."""
    del version  # Unused: the callback has answered.


def main() -> None:
    """The `ringjax` command."""
    app()
