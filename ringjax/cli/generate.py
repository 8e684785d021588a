"""`ringjax generate`."""

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from .errors import fail
from .options import DtypeName, OptionalDevices, integer, number


def generate(
    model: Annotated[
        Path, typer.Option(metavar="PATH", help="A Hugging Face directory or a GGUF file.", show_default=False)
    ],
    prompt: Annotated[
        list[str], typer.Option(metavar="TEXT", help="To continue. Repeatable: a batch.", show_default=False)
    ],
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", parser=integer, metavar="N", help="The most tokens per prompt.")
    ] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", parser=number, metavar="X", help="0: the most probable token.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", parser=number, metavar="P", help="Draw from the most probable ones up to P.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", parser=integer, help="Of the draws.")] = 0,
    devices: OptionalDevices = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is what a user says to the model.")] = False,
    dtype: Annotated[DtypeName, typer.Option("--dtype", help="Dtype of parameters, computation and cache.")] = (
        DtypeName.float32
    ),
) -> None:  # fmt: skip
    """Continues a text with a pretrained model.

    Streams the text, from a cache that is sharded over the ring, then says
    what it took. Needs pip install "ringjax[models]"; nothing is downloaded.
    """
    if devices is not None and devices < 1:
        fail(ValueError(f"--devices must be at least 1. Got {devices}."))
    from ..simulate import set_cpu_devices

    if devices is not None:
        set_cpu_devices(devices)
    from ..models.command import run
    from ..models.errors import ModelError
    from ..models.generation import Sampling

    say = lambda text: typer.echo(text, err=True)  # noqa: E731  the text alone is on stdout

    def out(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
        run(
            model,
            prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            chat=chat,
            dtype=dtype.value,
            out=out,
            say=say,
        )
    except ModelError as error:
        fail(error)
    except ValueError as error:  # names an option, by its name in Python
        fail(ValueError(f"--{str(error).replace('_', '-', 1)}"))
    except KeyboardInterrupt:
        raise typer.Exit(128 + signal.SIGINT) from None
