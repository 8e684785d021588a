"""`ringjax plan`."""

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from ..usage import UsageError
from .errors import refusals
from .options import Documents, Dtype, DtypeName, PassName, SeqLen, integer

EPILOG = """
Nothing is compiled or run: the figures are predicted from a table of chips, see docs/plan.md. Of the memory only what
the attention of one layer takes is counted; --memory-budget says what parameters and the rest leave for it.
"""


def plan(
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE|N,K,D,LAYERS",
            help="llama3-8b and others; a training configuration as configs/v5p_256_1m.toml; or query heads, key/value "
            "heads, size of a head and layers.",
        ),
    ],
    seq_len: SeqLen,
    devices: Annotated[
        str,
        typer.Option(
            metavar="TOPOLOGY",
            help="All devices share the sequence: TPUs as v5p:4x4x4 (v4, v5e, v5p, v6e or v7x), or GPUs as h100:8 or "
            "h100:4x8 (a100, h100, h200 or b200).",
        ),
    ],
    batch: Annotated[int, typer.Option(parser=integer, metavar="B", help="Sequences at a time.")] = 1,
    dtype: Dtype = DtypeName.bfloat16,
    full: Annotated[bool, typer.Option("--full", help="No causal mask: a query attends to later keys too.")] = False,
    window: Annotated[
        str | None,
        typer.Option(
            metavar="W|L,R",
            help="A query attends to at most W keys to either side, or L before and R after it, 'none' being no bound.",
        ),
    ] = None,
    max_segment_length: Annotated[
        int | None,
        typer.Option(parser=integer, metavar="M", help="Packed documents: none has tokens M or more places apart."),
    ] = None,
    shared_length: Annotated[
        int | None,
        typer.Option(
            parser=integer,
            metavar="G",
            help="Packed documents: of a shard only the first G tokens are in documents of several shards.",
        ),
    ] = None,
    documents: Documents = None,
    passes: Annotated[
        PassName, typer.Option("--pass", help="backward: forward and all gradients.")
    ] = PassName.backward,
    memory_budget: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES", help="For the attention of a layer, as 20GiB; default: all of a device's memory."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    picture: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw where the time goes, and the memory.")
    ] = None,
) -> None:
    """Predicts what a model's attention costs on given devices.

    For every strategy, hybrid, direction and layout: products, bytes on the wire, what of them is exposed, memory. It
    says which one to take and why, and prints the code to paste.
    """
    from .. import planner
    from ..inspect.command import parse_window, with_flags

    given: dict[str, Any] = {
        "model": model,
        "seq_len": seq_len,
        "devices": devices,
        "batch": batch,
        "dtype": str(dtype),
        "is_causal": not full,
        "max_segment_length": max_segment_length,
        "shared_length": shared_length,
        "documents": documents,
        "memory_budget": memory_budget,
        "backward": passes == PassName.backward,
    }
    with refusals():
        if picture is not None and not picture.absolute().parent.is_dir():
            raise UsageError(f"--picture must be a file in a directory that exists. Got {str(picture)!r}.")
        try:
            made = planner.plan(**given, window=parse_window(window))
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError(with_flags(str(error), [*given, "window"])) from None
    if json:
        typer.echo(json_module.dumps(made.to_json(), indent=1))
    else:
        from ..planner.text import lines

        typer.echo("\n".join(lines(made)))
    if picture is not None:
        from ..planner.picture import draw

        draw(made, picture)
        typer.echo(f"wrote {picture}", err=True)
