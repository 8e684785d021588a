"""`ringjax tune`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from .errors import refusals
from .options import Choice, Dtype, DtypeName, Heads, PassName, Rounds, SeqLen, integer, number


class TunedImplementation(Choice):
    pallas_gpu = "pallas_gpu"
    pallas_triton = "pallas_triton"


def tune(
    implementation: Annotated[
        TunedImplementation | None,
        typer.Option(
            help="Block kernel; default: pallas_gpu on Hopper GPUs for 16-bit dtypes, otherwise pallas_triton."
        ),
    ] = None,
    head_dim: Annotated[
        list[int] | None,
        typer.Option(
            parser=integer,
            metavar="H",
            help="Size of a head: 64, 128 or 256; others take the tiles of the next larger one. Repeatable; "
            "default: all.",
        ),
    ] = None,
    passes: Annotated[
        list[PassName] | None,
        typer.Option(
            "--pass",
            help="backward: the backward kernels alone, of which those of pallas_gpu have nothing to tune: their "
            "registers leave one choice of tiles. Repeatable; default: both.",
        ),
    ] = None,
    dtype: Dtype = DtypeName.bfloat16,
    seq_len: SeqLen = 8192,
    heads: Heads = 16,
    rounds: Rounds = 7,
    seconds: Annotated[
        float | None,
        typer.Option(parser=number, metavar="S", help="Begin no further key after so long; default: search all."),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Table to write; default: that of RINGJAX_TILES, or the user's."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the candidates and do nothing else.")] = False,
    device_kind: Annotated[
        str | None, typer.Option(metavar="NAME", help="With --dry-run: a GPU that is absent, as JAX names it.")
    ] = None,
) -> None:
    """Finds the fastest tiles of the kernels on this GPU.

    For every kernel, head size and way of calling it, candidates are compiled, held against the results of the
    built-in tiles, and timed in turns with them. What is faster by more than 2%, twice, goes into the user's table,
    which later processes read by themselves (RINGJAX_TILES names another); where nothing is, the key's entry is
    dropped. The table is written after each key, so an interrupted search keeps what it has found.

    bfloat16 and float16 share their tiles. RingConfig.block_q and block_kv go before any table.
    """
    # TPU software that finds no TPU would fill the screen.
    if "JAX_PLATFORMS" not in os.environ:
        import jax

        jax.config.update("jax_platforms", "cuda,cpu")
    from ..tune import command

    with refusals():
        request = command.Request(
            implementation=implementation,
            head_sizes=tuple(head_dim or command.HEAD_SIZES),
            directions=tuple(passes or PassName),
            dtype=dtype,
            length=seq_len,
            heads=heads,
            rounds=rounds,
            seconds=seconds,
            table=table,
            dry_run=dry_run,
            device_kind=device_kind,
        )
        status = command.main(request)
    raise typer.Exit(status)
