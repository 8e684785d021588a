"""`ringjax bench cpu|gpu|hops|ring|tpu-static`."""

from pathlib import Path
from typing import Annotated

import typer

from .errors import refusals
from .options import (
    BlockKv,
    BlockQ,
    Choice,
    Devices,
    Dtype,
    DtypeName,
    HeadDim,
    Heads,
    JsonFile,
    LayoutName,
    OptionalDevices,
    PassName,
    Rounds,
    SeqLen,
    Timeout,
    WriteDocs,
    integer,
    number,
)

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Times attention on CPU or GPU, or estimates its cycles on TPU.",
)


class MaskName(Choice):
    full = "full"
    causal = "causal"


class GpuImplementation(Choice):
    pallas_gpu = "pallas_gpu"
    pallas_triton = "pallas_triton"
    xla = "xla"


class RingImplementation(Choice):
    xla = "xla"
    pallas_tpu = "pallas_tpu"
    pallas_gpu = "pallas_gpu"
    pallas_triton = "pallas_triton"


class PeerName(Choice):
    flash_attention_3 = "flash_attention_3"
    cudnn = "cudnn"
    xla = "xla"


class Generation(Choice):
    v5e = "v5e"
    v6e = "v6e"


FlashAttention = Annotated[
    Path | None,
    typer.Option(
        "--flash-attention",
        metavar="FILE",
        help="FlashAttention-3's library. Default: that of the package dew-flash-attn-cu13.",
    ),
]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        metavar="B,T,N,K,H",
        help="Sequences, tokens, query heads, key/value heads, size of a head. Repeatable; default, if no mask is "
        "given either: eight shapes with a mask each.",
    ),
]
Masks = Annotated[
    list[str] | None,
    typer.Option(
        "--mask",
        metavar="full|causal|W",
        help="Which keys a query attends to; W: at most W before it, causal. Repeatable; default: full and causal.",
    ),
]


@app.command()
def cpu(
    seq_len: SeqLen = 8192,
    heads: Heads = 4,
    head_dim: HeadDim = 64,
    dtype: Dtype = DtypeName.float32,
    devices: Devices = 8,
    rounds: Rounds = 5,
    layout: Annotated[
        list[LayoutName] | None,
        typer.Option(help="Layout of the ring; full attention is timed in the first alone. Repeatable; default: all."),
    ] = None,
    mask: Annotated[
        list[MaskName] | None, typer.Option(help="Which keys a query attends to. Repeatable; default: both.")
    ] = None,
    passes: Annotated[
        list[PassName] | None,
        typer.Option("--pass", help="backward: forward and all gradients in one program. Repeatable; default: both."),
    ] = None,
    block_q: BlockQ = None,
    block_kv: BlockKv = None,
    json: JsonFile = None,
    write_docs: WriteDocs = None,
) -> None:
    """Times the ring on simulated devices beside dense attention.

    Both run on the same cores in turns, and a figure is the median over the rounds.
    """
    from ..bench import cpu as command

    with refusals():
        command.main(
            shape=command.Shape(1, seq_len, heads, head_dim, dtype),
            num_devices=devices,
            rounds=rounds,
            layouts=layout or list(LayoutName),
            masks=mask or list(MaskName),
            passes=passes or list(PassName),
            block_q=block_q,
            block_kv=block_kv,
            json_file=json,
            docs=write_docs,
        )


@app.command()
def gpu(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="B,T,N,K,H",
            help="Sequences, tokens, query heads, key/value heads, size of a head. Repeatable; default: four shapes.",
        ),
    ] = None,
    cached: Annotated[
        list[str] | None,
        typer.Option(
            metavar="B,S,N,K,H",
            help="A cache of S tokens, against which one is decoded; with two GPUs also over both. Repeatable; "
            "default: four.",
        ),
    ] = None,
    dtype: Dtype = DtypeName.bfloat16,
    implementation: Annotated[GpuImplementation, typer.Option(help="Block kernel.")] = GpuImplementation.pallas_gpu,
    reference: Annotated[
        PeerName,
        typer.Option(help="Whose attention to compare with; flash_attention_3: with packed documents, without caches."),
    ] = PeerName.cudnn,
    flash_attention: FlashAttention = None,
    num_shards: Annotated[
        int, typer.Option(parser=integer, metavar="C", help="Shards of the ring's loop, all on this GPU.")
    ] = 8,
    rounds: Rounds = 7,
    ceiling: Annotated[
        int,
        typer.Option(
            parser=integer, metavar="N", help="Side of the matrix product that shows what the GPU can do at most."
        ),
    ] = 8192,
    json: JsonFile = None,
    write_docs: WriteDocs = None,
) -> None:
    """Times the kernels and the ring's own cost beside cuDNN.

    On one GPU, all programs are compiled first and then called in turns; a figure is the median over the rounds. What
    the GPU can do at most, a matrix product, is measured in the same run.
    """
    from ..bench import gpu as command

    with refusals():
        request = command.Request(
            shapes=tuple(map(command.parse_shape, shape or ())) or command.SHAPES,
            cached=tuple(command.parse_shape(x, "--cached") for x in cached or ())
            or (() if reference is PeerName.flash_attention_3 else command.CACHED),
            dtype=dtype,
            implementation=implementation,
            reference=reference,
            flash_attention=flash_attention,
            num_shards=num_shards,
            rounds=rounds,
            ceiling=ceiling,
        )
        command.main(request, json_file=json, docs=write_docs)


@app.command()
def hops(
    shape: Shapes = None,
    mask: Masks = None,
    passes: Annotated[
        list[PassName] | None,
        typer.Option("--pass", help="backward: the gradients alone. Repeatable; default: both."),
    ] = None,
    ranks: Annotated[int, typer.Option(parser=integer, metavar="C", help="Of the ring, all on this device.")] = 2,
    documents: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|NAME:NUMBERS",
            help="Lengths of documents, as in ringjax plan; the first sequence that ringjax.pack makes of them.",
        ),
    ] = None,
    dtype: Dtype = DtypeName.bfloat16,
    implementation: Annotated[
        RingImplementation | None, typer.Option(help="Our block kernel. Default: the best one.")
    ] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="As ringjax train does: the same bits on every run.")
    ] = False,
    rounds: Rounds = 4,
    json: JsonFile = None,
) -> None:
    """Times the block kernel of every hop of a ring by itself.

    On one device and without a wire, beside one call over the whole sequence, in turns; a figure is the median over the
    rounds. So one device shows whether ranks have equal work, hop by hop, and what the kernel loses in pieces.
    """
    from ..bench import hops as command
    from ..bench.ring import parse_problems

    with refusals():
        request = command.Request(
            problems=parse_problems(shape or (), mask or ()),
            num_ranks=ranks,
            passes=tuple(passes or PassName),
            documents=documents,
            dtype=dtype,
            implementation=implementation,
            deterministic=deterministic,
            rounds=rounds,
        )
        command.main(request, json_file=json)


@app.command()
def ring(
    shape: Shapes = None,
    mask: Masks = None,
    passes: Annotated[
        list[PassName] | None,
        typer.Option("--pass", help="backward: forward and all gradients in one program. Repeatable; default: both."),
    ] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WORD[,WORD]",
            help="As in RingConfig; two words: of two axes, outermost first, of all sizes there are. Repeatable; "
            "default: all that fit.",
        ),
    ] = None,
    peer: Annotated[
        list[PeerName] | None,
        typer.Option(help="Whose kernel runs under plain collectives. Repeatable; default: all but xla, on CPU all."),
    ] = None,
    flash_attention: FlashAttention = None,
    torch: Annotated[
        bool, typer.Option("--torch", help="Also time PyTorch's context parallelism, first and in its own processes.")
    ] = False,
    dtype: Dtype = DtypeName.bfloat16,
    implementation: Annotated[
        RingImplementation | None, typer.Option(help="Our block kernel. Default: the best one.")
    ] = None,
    devices: OptionalDevices = None,
    rounds: Rounds = 4,
    seconds_per_row: Annotated[
        float, typer.Option(parser=number, metavar="S", help="Time for the calls of one program, all rounds together.")
    ] = 0.25,
    time_limit: Annotated[
        float | None, typer.Option(parser=number, metavar="S", help="Begin no further problem after so many seconds.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Also mark the strategy that the planner chooses.")] = False,
    documents: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|NAME:NUMBERS",
            help="Lengths of documents, as in ringjax plan. The first sequence that ringjax.pack makes of them is "
            "timed, its documents one after another, and dealt.",
        ),
    ] = None,
    json: JsonFile = None,
    write_docs: WriteDocs = None,
) -> None:
    """Times every strategy on all devices beside other kernels.

    Those run under plain collectives. All programs of a problem are compiled together, checked against each other and
    called in turns; a figure is the median over the rounds. What cannot be timed is named, and why.
    """
    from ..bench import ring as command

    with refusals():
        request = command.Request(
            problems=command.parse_problems(shape or (), mask or ()),
            passes=tuple(passes or PassName),
            strategies=tuple(map(command.parse_strategy, strategy or ())),
            peers=tuple(peer or ()),
            flash_attention=flash_attention,
            torch=torch,
            dtype=dtype,
            implementation=implementation,
            devices=devices,
            rounds=rounds,
            seconds=seconds_per_row,
            time_limit=time_limit,
            plan=plan,
            documents=documents,
        )
        command.main(request, json_file=json, docs=write_docs)


@app.command()
def serve(
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME|V,E,N,K,H,M,L",
            help="llama3-8b, or vocabulary, width, query heads, key/value heads, size of a head, width of the MLP, "
            "layers.",
        ),
    ] = "llama3-8b",
    prompt_length: Annotated[
        list[int] | None,
        typer.Option(
            parser=integer,
            metavar="N",
            help="Tokens of a prompt. Repeatable; default: 131072 and 1048576.",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(parser=integer, metavar="B", help="Prompts that are continued side by side.")
    ] = 1,
    new_tokens: Annotated[
        int, typer.Option(parser=integer, metavar="N", help="Tokens that are timed after the first.")
    ] = 32,
    dtype: Dtype = DtypeName.bfloat16,
    devices: OptionalDevices = None,
    head_devices: Annotated[
        int, typer.Option(parser=integer, metavar="N", help="Devices that share the heads; others share the sequence.")
    ] = 1,
    json: JsonFile = None,
) -> None:
    """Times the first token of long prompts and the tokens after it.

    By a decoder of random parameters, from a cache that is sharded over all devices. Programs are compiled before
    anything is timed. A prompt that does not fit is named, with what the devices said.
    """
    from ..bench import serve as command

    with refusals():
        request = command.Request(
            model=model,
            prompts=tuple(prompt_length or command.PROMPTS),
            batch_size=batch_size,
            new_tokens=new_tokens,
            dtype=dtype.value,
            devices=devices,
            head_devices=head_devices,
        )
        command.main(request, json_file=json)


@app.command("tpu-static")
def tpu_static(
    generation: Annotated[
        list[Generation] | None, typer.Option(help="Generation of TPU. Repeatable; default: both.")
    ] = None,
    head_dim: Annotated[
        list[int] | None,
        typer.Option(parser=integer, metavar="H", help="Size of a head. Repeatable; default: 128 and 64."),
    ] = None,
    passes: Annotated[
        list[PassName] | None,
        typer.Option("--pass", help="backward: the gradients alone. Repeatable; default: both."),
    ] = None,
    seq_len: SeqLen = 4096,
    timeout: Timeout = 600.0,
    json: JsonFile = None,
    write_docs: WriteDocs = None,
) -> None:
    """Adds up the compiler's cycle estimates of TPU kernels.

    Those of ringjax stand beside JAX's own, splash and flash, forward or backward alone. Needs libtpu, no TPU:
    pip install "ringjax[tpu]".
    """
    from ..bench import tpu as command

    with refusals():
        command.main(
            generations=generation or list(Generation),
            head_sizes=head_dim or command.HEAD_SIZES,
            directions=passes or list(PassName),
            length=seq_len,
            timeout=timeout,
            json_file=json,
            docs=write_docs,
        )
