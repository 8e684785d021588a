"""`ringjax train`."""

import shlex
import signal
from enum import StrEnum
from typing import Annotated

import typer

from .errors import fail


class ResumeMode(StrEnum):
    """What to do about a checkpoint in the output directory."""

    auto = "auto"
    intact = "intact"
    force = "force"
    never = "never"


def train(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG",
            help="A TOML file, or the name of a configuration that ships with ringjax, as stdlib_tiny.",
            show_default=False,
        ),
    ] = None,
    as_option: Annotated[str | None, typer.Option("--config", metavar="CONFIG", help="The same as CONFIG.")] = None,
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
    """Trains a decoder with ring attention, new or pretrained.

    Given again, the same command goes on where the last one stopped, killed
    or not. Ctrl-C and SIGTERM save a checkpoint first. The output directory
    gets metrics.jsonl, loss.png and checkpoints/; export.path, where it is
    given, a directory that transformers loads.
    """
    from ..training.loading import ConfigError, load

    if config is not None and as_option is not None:
        fail(ConfigError(f"CONFIG must be given once. Got {config!r} and --config {as_option!r}."))
    config = config if as_option is None else as_option
    if config is None:
        fail(ConfigError("Missing argument 'CONFIG': a TOML file, or a name, as stdlib_tiny."))
    try:
        settings = load(config, overrides or ())
    except ConfigError as error:
        fail(error)
    # Only now JAX may start: the configuration says on which devices.
    from rich.console import Console

    from ..training import dryrun, loop

    try:
        if dry_run:
            dryrun.show(settings, Console())
            return
        sets = [part for override in overrides or () for part in ("--set", override)]
        command = shlex.join(["ringjax", "train", config, *sets])
        outcome = loop.train(settings, resume=resume.value, command=command)
    except loop.REFUSALS as error:
        fail(error)
    except loop.TrainingError as error:
        fail(error, code=1)
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on from the last checkpoint, if there is one", err=True)
        raise typer.Exit(128 + signal.SIGINT) from None
    if outcome.stopped_by is not None:
        raise typer.Exit(128 + outcome.stopped_by)
