"""`ringjax inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from .errors import refusals
from .options import (
    TUNING,
    BlockKv,
    BlockQ,
    Choice,
    Documents,
    Dtype,
    DtypeName,
    HeadDim,
    Heads,
    LayoutName,
    PassName,
    SeqLen,
    Timeout,
    integer,
)

EPILOG = """
If --ring divides the devices of the topology, such rings stand side by side, each with a batch of its own. If it does
not, one ring is compiled and the other devices take no part; v5e and v6e refuse that on all but small slices. A permute
is hidden if it is asynchronous and a block kernel is issued between its start and its done.

For TPUs it needs libtpu, no TPU: pip install "ringjax[tpu]". For GPUs it needs the CUDA plugin of JAX, no GPU:
pip install "ringjax[cuda]".
"""
_REPORT = "What to report"


class Implementation(Choice):
    xla = "xla"
    pallas_tpu = "pallas_tpu"
    pallas_gpu = "pallas_gpu"
    pallas_triton = "pallas_triton"


class DeviceOrder(Choice):
    ring_mesh = "ring_mesh"
    make_mesh = "make_mesh"


class Direction(Choice):
    forward = "forward"
    both = "both"


def inspect(
    topology: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="TPUs as v5p:8x8x16 (v4, v5e, v5p, v6e or v7x), two slices of them as 2*v5e:4x4, or GPUs as h100:8 or "
            "h100:4x8 (a100, h100, h200 or b200).",
        ),
    ],
    seq_len: SeqLen,
    heads: Heads,
    head_dim: HeadDim,
    kv_heads: Annotated[
        int | None, typer.Option(parser=integer, metavar="K", help="Key/value heads; default: --heads.")
    ] = None,
    value_head_dim: Annotated[
        int | None, typer.Option(parser=integer, metavar="Hv", help="Size of a value head; default: --head-dim.")
    ] = None,
    batch: Annotated[int, typer.Option(parser=integer, metavar="B", help="Sequences of one ring.")] = 1,
    ring: Annotated[
        int | None, typer.Option(parser=integer, metavar="C", help="Devices on the ring; default: all of the topology.")
    ] = None,
    axes: Annotated[
        str | None,
        typer.Option(
            metavar="C1,C2", help="Sizes of the axes of the sequence, outermost first; default: one of all C devices."
        ),
    ] = None,
    dtype: Dtype = DtypeName.bfloat16,
    layout: Annotated[LayoutName, typer.Option(help="Which tokens a device holds.")] = LayoutName.zigzag,
    stripe: Annotated[int, typer.Option(parser=integer, help="Tokens of a stripe, with --layout striped.")] = 1,
    causal: Annotated[
        bool, typer.Option("--causal", help="A query attends to keys at its position and before.")
    ] = False,
    window: Annotated[
        str | None,
        typer.Option(
            metavar="W|L,R",
            help="A query attends to at most W keys to either side, or L before and R after it, 'none' being no bound.",
        ),
    ] = None,
    segments: Annotated[bool, typer.Option("--segments", help="With segment ids, which travel as well.")] = False,
    max_segment_length: Annotated[
        int | None,
        typer.Option(parser=integer, metavar="M", help="With --segments: none has tokens M or more places apart."),
    ] = None,
    shared_length: Annotated[
        str | None,
        typer.Option(
            metavar="G|G1,G2",
            help="With --segments: of a shard only the first G tokens are in segments of several shards; or one G for "
            "each axis.",
        ),
    ] = None,
    documents: Documents = None,
    passes: Annotated[
        PassName, typer.Option("--pass", help="backward: forward and all gradients in one program.")
    ] = PassName.forward,
    timeout: Timeout = 600.0,
    strategy: Annotated[
        str,
        typer.Option(
            metavar="WORD,WORD",
            help="ring, all_to_all or all_gather: one for all axes, or one for each.",
            rich_help_panel=TUNING,
        ),
    ] = "ring",
    direction: Annotated[
        Direction, typer.Option(help="both: half of every block each way round.", rich_help_panel=TUNING)
    ] = Direction.forward,
    rings: Annotated[
        int,
        typer.Option(
            parser=integer,
            metavar="R",
            help="A part of every block on each of R rings through all chips of a torus, which share no link.",
            rich_help_panel=TUNING,
        ),
    ] = 1,
    implementation: Annotated[
        Implementation | None,
        typer.Option(help="Block kernel; default: the library's choice.", rich_help_panel=TUNING),
    ] = None,
    block_q: BlockQ = None,
    block_kv: BlockKv = None,
    unroll: Annotated[
        int | None,
        typer.Option(parser=integer, help="Hops per iteration of the compiled loop.", rich_help_panel=TUNING),
    ] = None,
    dkv_dtype: Annotated[
        DtypeName, typer.Option(help="Dtype of the sums of dK and dV.", rich_help_panel=TUNING)
    ] = DtypeName.float32,
    device_order: Annotated[
        DeviceOrder,
        typer.Option(help="Order of TPUs on the ring; make_mesh is that of JAX.", rich_help_panel=TUNING),
    ] = DeviceOrder.ring_mesh,
    cycles: Annotated[
        bool,
        typer.Option("--cycles", help="Static estimates of TPU kernels; compiles once more.", rich_help_panel=_REPORT),
    ] = False,
    sweep: Annotated[
        str | None,
        typer.Option(metavar="C1,C2", help="Also compile rings of these sizes.", rich_help_panel=_REPORT),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.", rich_help_panel=_REPORT)] = False,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="PNG", help="Draw the order, and who attends to whom.", rich_help_panel=_REPORT),
    ] = None,
) -> None:
    """Compiles a ring for TPUs or GPUs, without one, and reads it.

    It reads the order of permutes and kernels, memory against its floor, bytes on the wire and the work of every rank.
    """
    from ..inspect import command

    with refusals():
        status = command.main(
            as_json=json,
            picture=picture,
            topology=topology,
            ring=ring,
            axes=command.parse_axes(axes),
            strategy=command.parse_strategy(strategy),
            direction=direction,
            rings=rings,
            seq_len=seq_len,
            batch=batch,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_head_dim=value_head_dim,
            dtype=dtype,
            layout=layout,
            stripe=stripe,
            is_causal=causal,
            window=command.parse_window(window),
            segments=segments,
            max_segment_length=max_segment_length,
            shared_length=command.parse_shared(shared_length),
            documents=documents,
            backward=passes == PassName.backward,
            implementation=implementation,
            block_q=block_q,
            block_kv=block_kv,
            unroll=unroll,
            dkv_dtype=dkv_dtype,
            device_order=device_order,
            cycles=cycles,
            sweep=command.parse_sweep(sweep),
            timeout=timeout,
        )
    raise typer.Exit(status)
