"""What each axis of the sequence does with its part: which tokens a device has in the end, and what then goes round.

Pure Python, known at trace time; the call, the inspector and the planner ask here.
"""

import dataclasses
import functools

from .deal import Deal
from .layout import Layout
from .schedule import Schedule, plan_rings


@dataclasses.dataclass(frozen=True)
class Sharing:
    """How the axes share the work.

    Attributes:
      words: of the axes, as they are carried out.
      queries, keys: what a device has once all exchanges are done.
      schedule: of the rings that are left, the outermost first; None: there is none.
    """

    words: tuple[str, ...]
    queries: Deal
    keys: Deal
    schedule: Schedule | None

    @property
    def several_ways(self) -> bool:
        """Whether parts of a block may take several routes. Under a window each block takes the shortest one."""
        return self.schedule is not None and self.schedule.is_full


@functools.lru_cache(maxsize=4096)
def share(
    layout: Layout,
    sizes: tuple[int, ...],
    words: tuple[str, ...],
    query_length: int,
    key_length: int,
    left: int | None,
    right: int | None,
    shared: tuple[int, ...] | None = None,
) -> Sharing:
    """Deals out queries and keys as the words say, and plans the rings of the axes that are left.

    Args:
      layout: of the sequence, over the devices of all axes.
      sizes: of the axes, outermost first.
      words: the strategy of each.
      query_length, key_length: tokens of a shard.
      left, right: a query at p sees keys in [p - left, p + right]; None is no bound, or none known before run time.
      shared: for each axis, only so many tokens of a shard, the first ones, have to do with tokens at other places on
        that axis; None: all of them may.
    """
    words = tuple("ring" if size == 1 else word for word, size in zip(words, sizes, strict=True))
    deal = functools.partial(Deal, layout, sizes)
    queries = deal(tuple(word == "all_to_all" for word in words), query_length)

    def plan(words: tuple[str, ...]) -> tuple[Deal, Schedule]:
        keys = deal(tuple(word != "ring" for word in words), key_length)
        return keys, plan_rings(queries, keys, left, right, shared)

    if ((left is not None and right is not None) or shared is not None) and "all_gather" in words:
        # Where a window or a promise leaves keys out, what is needed is fetched from the others; nothing is gathered.
        sparing = tuple("ring" if word == "all_gather" else word for word in words)
        keys, schedule = plan(sparing)
        if not schedule.is_full:
            return Sharing(words=sparing, queries=queries, keys=keys, schedule=schedule)
    keys, schedule = plan(words)
    return Sharing(words=words, queries=queries, keys=keys, schedule=schedule if keys.ring_sizes else None)
