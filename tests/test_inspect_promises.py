"""`ringjax inspect` of rings whose documents keep a promise: arguments, and what is compiled for TPUs that are absent."""

from typing import Any

import pytest
from tpu import needs_libtpu
from typer.testing import CliRunner

from ringjax.cli import app
from ringjax.inspect import command, inspect_ring
from ringjax.usage import UsageError


@needs_libtpu
def test_compiled_for_tpus_it_is_the_same() -> None:
    """Shards of 2048 tokens. Both promises: of the first 300 tokens those that documents of 1900 may reach."""
    report = inspect_ring(
        "v5e:2x4", seq_len=16384, layout="contiguous", is_causal=True, segments=True, backward=True, heads=4,
        kv_heads=2, head_dim=128, implementation="xla", max_segment_length=1900, shared_length=300,
    )  # fmt: skip
    assert (report.hops_made, report.hops_elided) == (2, 6)
    keys, block = 384 - 128, 2 * 128  # the last 1899 of 2048 tokens begin in the second tile, and 300 end in the third
    assert sorted((p.carries, p.times, p.bytes) for p in report.payloads) == [
        ("K", 2, keys * block * 2),
        ("V", 2, keys * block * 2),
        ("dK, dV", 2, keys * block * 4),
        ("segments", 2, keys * 4),
    ]
    assert report.floor_bytes <= report.held_bytes < 2 * report.floor_bytes


@needs_libtpu
def test_the_floor_holds_where_an_inner_ring_has_a_part_of_a_block() -> None:
    report = inspect_ring(
        "v5e:2x2", axes=(2, 2), seq_len=8192, segments=True, backward=True, heads=2, kv_heads=2, head_dim=128,
        implementation="xla", shared_length=(256, 1024),
    )  # fmt: skip
    assert report.floor_bytes <= report.held_bytes < 2 * report.floor_bytes
    sent = {"K": 0, "V": 0}
    for payload in report.payloads:
        if payload.carries in sent:
            sent[payload.carries] += payload.times * payload.bytes
    # The other outer place's first 256 tokens, over its axis and once within; of the own one's neighbour 1024. Twice.
    assert set(sent.values()) == {2 * (2 * 256 + 1024) * 2 * 128 * 2}


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
