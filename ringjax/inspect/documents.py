"""What becomes of given documents in a program, and once they are packed."""

from typing import Any

import jax.numpy as jnp

from ..planner.documents import Documents, deal_documents
from ..planner.estimate import Problem, Way
from ..planner.lengths import document_lengths
from .program import Program


def deal(program: Program, documents: Any) -> Documents:
    """See :func:`ringjax.planner.documents.deal_documents`.

    Raises:
      ValueError: for a program without segments, or one whose promises differ by axis; for documents that are none.
    """
    if not program.segments:
        raise ValueError("segments must be True with documents, which are segments. Got False.")
    if isinstance(program.shared_length, tuple) and len(set(program.shared_length)) > 1:
        raise ValueError(
            "shared_length must be the same for all axes with documents, which are packed for all devices alike. "
            f"Got {program.shared_length}."
        )
    shared = program.shared_length if not isinstance(program.shared_length, tuple) else program.shared_length[0]
    left, right = program.bounds
    problem = Problem(
        query_length=program.shard_length,
        key_length=program.shard_length,
        batch=program.batch,
        num_heads=program.heads,
        num_kv_heads=program.kv_heads,
        head_size=program.head_dim,
        value_size=program.value_head_dim,
        item_bytes=program.item_bytes,
        left=left,
        right=right,
        backward=program.backward,
        sum_bytes=jnp.dtype(program.dkv_dtype).itemsize,
        max_segment_length=program.max_segment_length,
        shared_length=shared,
        segments=True,
    )
    way = Way(program.words, program.axes, program.direction, program.layout_object)
    return deal_documents(document_lengths(documents, program.seq_len), problem, way)
