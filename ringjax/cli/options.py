"""Options that several commands take: one name and one meaning each, declared once. Imports no JAX."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Choice(StrEnum):
    """The words that an option takes. Messages quote them as the plain strings that the library knows."""

    __repr__ = str.__repr__


class DtypeName(Choice):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class LayoutName(Choice):
    contiguous = "contiguous"
    zigzag = "zigzag"
    striped = "striped"


class PassName(Choice):
    forward = "forward"
    backward = "backward"


# Typer's own words for a wrong number do not say what was given.
def integer(text: str) -> int:
    """Of an option's text."""
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"must be an integer. Got {text!r}.") from None


def number(text: str) -> float:
    """Of an option's text."""
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"must be a number. Got {text!r}.") from None


TUNING = "Tuning, as in RingConfig"  # a panel of the help

SeqLen = Annotated[int, typer.Option("--seq-len", parser=integer, metavar="T", help="Tokens of the whole sequence.")]
Documents = Annotated[
    str | None,
    typer.Option(
        "--documents",
        metavar="FILE|NAME:NUMBERS",
        help="Lengths of documents: a file of integers, one a line or a JSON list; or documents for 16 sequences drawn "
        "from lognormal:MEDIAN:SIGMA:LONGEST, uniform:SHORTEST:LONGEST or equal:LENGTH. Reports their balance, hops "
        "and bytes as they come, and packed.",
    ),
]
Heads = Annotated[int, typer.Option("--heads", parser=integer, metavar="N", help="Query heads.")]
HeadDim = Annotated[int, typer.Option("--head-dim", parser=integer, metavar="H", help="Size of a query and key head.")]
Dtype = Annotated[DtypeName, typer.Option("--dtype", help="Dtype of query, key and value.")]
Devices = Annotated[int, typer.Option("--devices", parser=integer, metavar="C", help="Simulated devices on the ring.")]
OptionalDevices = Annotated[
    int | None,
    typer.Option(
        "--devices",
        parser=integer,
        metavar="C",
        help="Simulated CPU devices on the ring. Default: the devices that JAX finds.",
    ),
]
Rounds = Annotated[
    int, typer.Option("--rounds", parser=integer, metavar="R", help="Rounds in which every program is timed.")
]
BlockQ = Annotated[
    int | None, typer.Option("--block-q", parser=integer, help="Tile of queries, in tokens.", rich_help_panel=TUNING)
]
BlockKv = Annotated[
    int | None, typer.Option("--block-kv", parser=integer, help="Tile of keys, in tokens.", rich_help_panel=TUNING)
]
Timeout = Annotated[float, typer.Option("--timeout", parser=number, metavar="S", help="Seconds for each compilation.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write all figures to FILE, as JSON.")
]
WriteDocs = Annotated[
    Path | None,
    typer.Option("--write-docs", metavar="FILE", help="Also replace the table in FILE, such as docs/performance.md."),
]
