"""`ringjax inspect`: arguments in, report out."""

import argparse
import json
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from . import inspect_ring
from .compile import InspectError
from .hlo import HloError
from .program import DEVICE_ORDERS, DTYPES

_EPILOG = """
If --ring divides the devices of the topology, rings stand side by side, each with a batch of its own. If it does not,
one ring is compiled and the other devices take no part (v5e and v6e refuse that on all but small slices). A permute is
hidden if it is asynchronous and a block kernel is issued between its start and its done. For TPUs needs libtpu, no TPU:
pip install "ringjax[tpu]"; for GPUs the CUDA plugin of JAX, no GPU: pip install "ringjax[cuda]".
"""
_TOPOLOGY = "v5p:8x8x16; v4, v5e, v5p, v6e or v7x. h100:8, h100:4x8; a100, h100, h200 or b200"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ringjax inspect",
        description="Compiles a ring for TPUs or GPUs, without one, and reads its order, memory and wire bytes.",
        epilog=_EPILOG,
    )
    ring = parser.add_argument_group("the ring")
    ring.add_argument("--topology", required=True, metavar="NAME", help=_TOPOLOGY)
    ring.add_argument("--ring", type=int, metavar="C", help="devices on the ring (default: all of the topology)")
    ring.add_argument("--seq-len", type=int, required=True, metavar="T", help="tokens of the whole sequence")
    ring.add_argument("--batch", type=int, default=1, metavar="B", help="sequences of one ring (default %(default)s)")
    ring.add_argument("--heads", type=int, required=True, metavar="N", help="query heads")
    ring.add_argument("--kv-heads", type=int, metavar="K", help="key/value heads (default: --heads)")
    ring.add_argument("--head-dim", type=int, required=True, metavar="H", help="size of a query and key head")
    ring.add_argument("--value-head-dim", type=int, metavar="Hv", help="size of a value head (default: --head-dim)")
    ring.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of query, key, value (default %(default)s)")
    ring.add_argument("--layout", default="zigzag", choices=("contiguous", "zigzag", "striped"), help="default zigzag")
    ring.add_argument("--stripe", type=int, default=1, help="tokens of a stripe, with --layout striped (default 1)")
    ring.add_argument("--causal", action="store_true", help="a query attends to keys at its position and before")
    ring.add_argument("--window", type=_window, metavar="W|L,R", help="keys at most W, or L before and R after; 'none'")
    ring.add_argument("--segments", action="store_true", help="with segment ids, which travel as well")
    ring.add_argument("--backward", action="store_true", help="forward and all gradients in one program")
    tuning = parser.add_argument_group("tuning, as in RingConfig")
    tuning.add_argument(
        "--implementation", help="xla, pallas_tpu, pallas_gpu, pallas_triton (default: the library's choice)"
    )
    tuning.add_argument("--block-q", type=int, help="tile of queries")
    tuning.add_argument("--block-kv", type=int, help="tile of keys")
    tuning.add_argument("--unroll", type=int, help="hops an iteration of the compiled loop")
    tuning.add_argument("--dkv-dtype", default="float32", help="of the sums of dK and dV (default %(default)s)")
    tuning.add_argument(
        "--device-order", choices=DEVICE_ORDERS, default="ring_mesh", help="of TPUs (default ring_mesh)"
    )
    out = parser.add_argument_group("what to report")
    out.add_argument("--cycles", action="store_true", help="static estimates of TPU kernels; compiles once more")
    out.add_argument("--sweep", type=_integers, default=(), metavar="C1,C2", help="also compile rings of these sizes")
    out.add_argument("--json", action="store_true", help="the report as JSON on stdout")
    out.add_argument("--picture", type=Path, metavar="PNG", help="draw the order, and who attends to whom")
    out.add_argument("--timeout", type=float, default=600.0, metavar="S", help="for each compilation (default 600)")
    return parser


def _window(text: str) -> int | tuple[int | None, int | None]:
    parts = [None if part.strip() == "none" else int(part) for part in text.split(",")]
    if len(parts) == 1 and parts[0] is not None:
        return parts[0]
    if len(parts) != 2:
        raise ValueError(text)
    return parts[0], parts[1]


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


_window.__name__, _integers.__name__ = "window", "list of integers"  # as argparse calls them in its errors


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 where the compiler refused, 2 for wrong arguments and a missing compiler."""
    given = vars(_parser().parse_args(argv))
    as_json, picture = given.pop("json"), given.pop("picture")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminated)  # or the compiler, a process of its own, would go on alone
    given["is_causal"] = given.pop("causal")
    try:
        if picture is not None and not picture.absolute().parent.is_dir():
            raise ValueError(f"picture must be a file in a directory that exists. Got {str(picture)!r}.")
        report = inspect_ring(**given)
    except (ValueError, NotImplementedError) as error:
        return _fail(error, 1 if isinstance(error, HloError) else 2)
    except InspectError as error:
        return _fail(error, error.code)
    except KeyboardInterrupt:
        return _fail("interrupted; the compiler was stopped", 130)
    if as_json:
        sys.stdout.write(json.dumps(report.to_json(), indent=1) + "\n")
    else:
        from .text import lines

        sys.stdout.write("\n".join(lines(report)) + "\n")
    if picture is not None:
        from .picture import draw

        draw(report, picture)
        sys.stderr.write(f"wrote {picture}\n")
    return 0


def _terminated(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _fail(error: object, code: int) -> int:
    sys.stderr.write(f"error: {error}\n")
    return code
