"""Records the compiled order of GPU rings for machines without the compiler: python tests/record_gpu_order.py

Every file of tests/data/ is a program of XLA's compiler for GPUs, cut to the lines that the order is read from, which
stand as the compiler wrote them but for their attributes and the operands of what only computes. Needs
pip install "ringjax[cuda]" on Python 3.12 or later, no GPU; takes some minutes.
"""

import re
from pathlib import Path

from ringjax.inspect.compile import compile_ring
from ringjax.inspect.hlo import Computation, Op, parse
from ringjax.inspect.order import read_order
from ringjax.inspect.program import Program

DATA = Path(__file__).parent / "data"
_SIZES = {"heads": 32, "kv_heads": 8, "head_dim": 128, "value_head_dim": 128, "is_causal": True, "backward": True}
_SMALL = {**_SIZES, "heads": 8, "kv_heads": 2}

RECORDINGS = {
    "h100_mosaic": Program("h100:8", 8, 2**15, implementation="pallas_gpu", **_SMALL),
    "h100_triton": Program("h100:8", 8, 2**15, implementation="pallas_triton", **_SMALL),
    "a100_triton": Program("a100:8", 8, 2**15, implementation="pallas_triton", **_SMALL),
    "h100_million": Program("h100:8", 8, 2**20, implementation="pallas_gpu", **_SIZES),
    "h100_documents": Program("h100:8", 8, 2**15, implementation="pallas_gpu", segments=True, **_SMALL),
}

_KEPT = r'custom_call_target="[^"]*"|op_name="[^"]*"|\b(?:index|direction|condition|body|calls)=[%\w.\-]+|"is_sync":\w+'
_MADE_HERE = ("get-tuple-element", "tuple", "bitcast", "copy", "opt-barrier", "while", "parameter", "constant")
_PERMUTES = ("collective-permute", "collective-permute-start", "collective-permute-done", "async-start", "async-done")
_SCALAR = re.compile(r"^(s32|u32|pred)\[\]")


def cut(text: str) -> str:
    """The lines of a scheduled program that its order is read from; it reads the same afterwards.

    Kernels, permutes, groups of them, loops and what leads to their operands are kept, and scalars, as loops count with
    them.
    """
    module = parse(text)
    everything = [op for computation in module.computations.values() for op in computation.ops]
    callers = [op for op in everything if op.opcode in ("while", "async-start")]
    names = {module.entry.name} | {name for op in callers for called in op.called.values() for name in called}
    kept = [computation for computation in module.computations.values() if computation.name in names]
    scalars = {name for one in kept for op in one.ops if _is_scalar(op) for name in op.called.get("calls", ())}
    kept = [one for one in module.computations.values() if one.name in names | scalars]
    whole = "\n\n".join(_computation(one, one is module.entry, one.name in scalars) for one in kept)
    return f"HloModule ring, is_scheduled=true\n\n{whole}\n"


def _is_scalar(op: Op) -> bool:
    return bool(_SCALAR.match(op.type))


def _is_kernel(op: Op) -> bool:
    return op.opcode == "custom-call" and "ringjax_" in op.attributes


def _computation(one: Computation, is_entry: bool, is_scalar: bool) -> str:
    needed: set[str] = set()
    waiting = [op.name for op in one.ops if is_scalar or op.is_root or op.opcode in (*_PERMUTES, "while")]
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            waiting += _operands(one.by_name[name])
    lines = [_line(op) for op in one.ops if op.name in needed or _is_kernel(op) or op.opcode == "parameter"]
    return "\n".join([f"{'ENTRY ' if is_entry else ''}%{one.name} () -> () {{", *lines, "}"])


def _operands(op: Op) -> tuple[str, ...]:
    """Those through which the reader looks; what else an operation computes from does not matter."""
    through = op.opcode in (*_MADE_HERE, *_PERMUTES) or _is_scalar(op)
    return op.operands if through or (op.opcode == "fusion" and len(op.operands) == 1) else ()


def _line(op: Op) -> str:
    inside = ", ".join(f"%{name}" for name in _operands(op)) if op.operands else op.inside
    # The name says which kernel it is, and of a permute which pass.
    left_out = () if _is_kernel(op) or op.opcode in _PERMUTES else ("op_name=",)
    left_out = left_out if _is_scalar(op) or op.opcode == "async-start" else (*left_out, "calls=")
    attributes = [part for part in re.findall(_KEPT, op.attributes) if not part.startswith(left_out)]
    kind = re.sub(r"\{[^}]*\}|/\*[^*]*\*/", "", op.type)
    parts = [f"{'ROOT ' if op.is_root else ''}%{op.name} = {kind} {op.opcode}({inside})", *attributes]
    return "  " + ", ".join(parts)


def record(name: str) -> None:
    """Compiles, cuts and writes one; what was cut must read as the whole did."""
    compiled = compile_ring(RECORDINGS[name])
    text = cut(compiled.text)
    assert read_order(text) == read_order(compiled.text)
    versions = ", ".join(f"{package} {version}" for package, version in compiled.versions.items())
    told = f"// Recorded by python tests/record_gpu_order.py, {versions}"
    head, _, rest = text.partition("\n")
    (DATA / f"{name}.hlo.txt").write_text(f"{head}\n{told}\n{rest}", encoding="utf-8")


if __name__ == "__main__":
    DATA.mkdir(exist_ok=True)
    for each in RECORDINGS:
        record(each)
        print(each)
