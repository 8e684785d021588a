"""argv -> commands. No maths; each command imports what it needs once it is called."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

app = typer.Typer(
    name="ringjax",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(f"ringjax {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Exact ring attention in JAX: train a decoder with it, watch it, time it, inspect the compiled program."""
    del version  # Unused: the callback has answered.


_PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True}


class ResumeMode(StrEnum):
    """What to do about a checkpoint in the output directory."""

    auto = "auto"
    intact = "intact"
    force = "force"
    never = "never"


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A TOML file, as in configs/.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Overrides one key, as in optimizer.steps=10. Repeatable."),
    ] = None,
    resume: Annotated[
        ResumeMode,
        typer.Option(
            help="auto: continue from the newest checkpoint in the output if its configuration agrees and it is not "
            "damaged; intact: pass over damaged checkpoints, and set them aside; force: continue even if the "
            "configuration does not agree; never: refuse an output that has a checkpoint."
        ),
    ] = ResumeMode.auto,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Trace the step to shapes, on no devices, and say what it takes.")
    ] = False,
) -> None:
    """Trains a byte-level decoder with ring attention.

    Given again, the same command goes on where the last one stopped, killed
    or not. Ctrl-C and SIGTERM save a checkpoint first. The output directory
    gets metrics.jsonl, loss.png and checkpoints/.
    """
    from .training.loading import ConfigError, load

    try:
        settings = load(config, overrides or ())
    except ConfigError as error:
        _fail(error)
    # Only now JAX may start: the configuration says on which devices.
    from rich.console import Console

    from .training import dryrun, loop

    try:
        if dry_run:
            dryrun.show(settings, Console())
            return
        sets = [part for override in overrides or () for part in ("--set", override)]
        command = shlex.join(["ringjax", "train", str(config), *sets])
        outcome = loop.train(settings, resume=resume.value, command=command)
    except loop.REFUSALS as error:
        _fail(error)
    except loop.TrainingError as error:
        _fail(error, code=1)
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on from the last checkpoint, if there is one", err=True)
        raise typer.Exit(128 + signal.SIGINT) from None
    if outcome.stopped_by is not None:
        raise typer.Exit(128 + outcome.stopped_by)


@app.command(context_settings=_PASS_ON, add_help_option=False)
def demo(context: typer.Context) -> None:
    """Shows on simulated devices what the ring does: hops, exactness, memory, bytes. See `ringjax demo --help`."""
    from . import demo as command

    raise typer.Exit(command.main(context.args))


@app.command(context_settings=_PASS_ON, add_help_option=False)
def bench(context: typer.Context) -> None:
    """Times attention beside what else there is: `bench cpu`, `gpu`, `tpu-static`. See `ringjax bench --help`."""
    from .bench import command

    raise typer.Exit(command.main(context.args))


@app.command(context_settings=_PASS_ON, add_help_option=False)
def tune(context: typer.Context) -> None:
    """Finds the fastest tiles of the kernels on this GPU, for later runs to use. See `ringjax tune --help`."""
    # TPU software that finds no TPU would fill the screen.
    if "JAX_PLATFORMS" not in os.environ:
        import jax

        jax.config.update("jax_platforms", "cuda,cpu")
    from .tune import command

    raise typer.Exit(command.main(context.args))


@app.command(context_settings=_PASS_ON, add_help_option=False)
def inspect(context: typer.Context) -> None:
    """Compiles a ring for TPUs or GPUs, without them, and reads order and memory. See `ringjax inspect --help`."""
    from .inspect import command

    raise typer.Exit(command.main(context.args))


def main() -> None:
    """The `ringjax` command."""
    app()


def _fail(error: Exception, code: int = 2) -> NoReturn:
    """Prints each line of an error and ends the command, without a traceback: the user's input is wrong, not ours."""
    for line in str(error).splitlines():
        typer.echo(f"error: {line}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
