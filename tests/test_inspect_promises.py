"""`ringjax inspect` of rings whose documents keep a promise: arguments, floor, and what is compiled for absent TPUs."""

from typing import Any

import pytest
from tpu import needs_libtpu
from typer.testing import CliRunner

from ringjax.cli import app
from ringjax.inspect import command, inspect_ring
from ringjax.inspect.memory import floor_terms
from ringjax.inspect.program import Program
from ringjax.usage import UsageError


@needs_libtpu
def test_compiled_for_tpus_only_what_both_promises_allow_travels() -> None:
    """Shards of 2048 tokens on 2 x 2 devices, causal: of the one before, what is among its last 1899 and its first."""
    report = inspect_ring(
        "v5e:2x2", axes=(2, 2), seq_len=8192, layout="contiguous", is_causal=True, segments=True, backward=True,
        heads=2, kv_heads=2, head_dim=128, implementation="xla", max_segment_length=1900, shared_length=(256, 1024),
    )  # fmt: skip
    # The neighbour within is one place on, that of the other outer place one on along both axes; nobody needs the rest.
    assert (report.hops_made, report.hops_elided) == (3, 1)
    sent: dict[str, list[int]] = {}
    for payload in report.payloads:
        sent.setdefault(payload.carries, []).extend([payload.bytes] * payload.times)
    within, outside = 1024 - 128, 256 - 128  # keys; the last 1899 of 2048 begin in the second tile of 128
    keys = [outside] * 4 + [within] * 2  # over the outer axis and once within; in forward and in backward
    assert sorted(sent["K"]) == sorted(sent["V"]) == [n * 2 * 128 * 2 for n in keys]
    assert sorted(sent["segments"]) == [n * 4 for n in keys]
    assert sorted(sent["dK, dV"]) == [n * 2 * 128 * 4 for n in [outside] * 4 + [within] * 2]
    assert report.floor_bytes <= report.held_bytes < 2 * report.floor_bytes


def test_floor_of_a_part_of_a_block_within_a_ring_by_hand() -> None:
    """Of the own block's neighbour 1024 tokens are there, and 256 arrive over the outer axis: the hop that needs most.

    Its sums of dK and dV are for as many, and those of the own block wait.
    """
    rows, heads, size = 2048, 2, 128
    case = Program(
        "v5e:2x2", 4, 4 * rows, heads, heads, size, size, segments=True, backward=True, axes=(2, 2),
        shared_length=(256, 1024),
    )  # fmt: skip
    found = {term.name: term.bytes for term in floor_terms(case)}
    token = heads * 2 * size  # of key and value
    assert found["receive buffers (2)"] == (1024 + 256) * (token * 2 + 4)
    assert found["dkey, dvalue sums (2), float32"] == (rows + 1024) * token * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_segment_length": 5}, "segments must be True with max_segment_length.*False"),
        ({"shared_length": 0}, "segments must be True with shared_length.*False"),
        ({"segments": True, "max_segment_length": 0}, "max_segment_length must be a positive integer.*0"),
        ({"segments": True, "shared_length": 4096}, "shared_length must be at most 2048.*4096"),
        ({"segments": True, "shared_length": (1, 2)}, r"shared_length must be .* or 1, one for each.*\(1, 2\)"),
    ],
)
def test_the_inspector_refuses_what_the_call_would(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inspect_ring("v5e:2x4", seq_len=16384, heads=4, head_dim=128, **options)


def test_the_command_takes_promises() -> None:
    assert command.parse_shared(None) is None
    assert command.parse_shared("0") == 0 and command.parse_shared("8,16") == (8, 16)
    with pytest.raises(UsageError, match=r"--shared-length must be G1,G2,\.\.\.: numbers of at least 0\. Got '8,-1'"):
        command.parse_shared("8,-1")
    sizes = ["--seq-len", "16384", "--heads", "4", "--head-dim", "128", "--max-segment-length", "99"]
    result = CliRunner().invoke(app, ["inspect", "--topology", "v5e:2x4", *sizes])
    assert result.exit_code == 2 and "--segments must be True with --max-segment-length" in result.output
