"""`ringjax eval`."""

import signal
from pathlib import Path
from typing import Annotated

import typer

from .errors import fail
from .options import DtypeName, OptionalDevices, integer


def evaluate(
    model: Annotated[
        Path, typer.Option(metavar="PATH", help="A Hugging Face directory or a GGUF file.", show_default=False)
    ],
    text: Annotated[Path, typer.Option(metavar="FILE", help="A text in UTF-8.", show_default=False)],
    seq_len: Annotated[
        int, typer.Option("--seq-len", parser=integer, metavar="T", help="The text is cut into sequences of T tokens.")
    ] = 2048,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", parser=integer, metavar="N", help="Of the text. Default: all.")
    ] = None,
    devices: OptionalDevices = None,
    dtype: Annotated[DtypeName, typer.Option("--dtype", help="Dtype of parameters and computation.")] = (
        DtypeName.float32
    ),
    png: Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Also draw it.")] = None,
) -> None:  # fmt: skip
    """Says how well a pretrained model predicts a text, by position.

    Perplexity of the tokens that have 1 to 63 tokens before them, 64 to 127,
    128 to 255 and so on: does more context help? Needs pip install
    "ringjax[models]"; nothing is downloaded.
    """
    for name, value, least in (("seq-len", seq_len, 2), ("max-tokens", max_tokens, 2), ("devices", devices, 1)):
        if value is not None and value < least:
            fail(ValueError(f"--{name} must be at least {least}. Got {value}."))
    from ..simulate import set_cpu_devices

    if devices is not None:
        set_cpu_devices(devices)
    from rich.console import Console
    from rich.table import Table

    from ..models import command
    from ..models.errors import ModelError

    try:
        whole, ranges = command.evaluate(
            model, text, sequence_length=seq_len, max_tokens=max_tokens, dtype=dtype.value, png=png,
            say=lambda line: typer.echo(line, err=True),
        )  # fmt: skip
    except ModelError as error:
        fail(error)
    except KeyboardInterrupt:
        raise typer.Exit(128 + signal.SIGINT) from None
    table = Table("tokens before", "tokens", "nats per token", "perplexity")
    for each in ranges:
        table.add_row(
            f"{each.start} to {each.stop - 1}", str(each.tokens), f"{each.loss:.4f}", f"{each.perplexity:.2f}"
        )
    table.add_section()
    table.add_row("all", str(whole.tokens), f"{whole.loss:.4f}", f"{whole.perplexity:.2f}")
    Console().print(table)
    if png is not None:
        typer.echo(f"drawn in {png}", err=True)
