"""What a person sees while a run goes on: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..units import size


class Reporter:
    """Shows records of metrics.jsonl as they come; use it in a `with` statement.

    Args:
      console: where to; only process 0 should have one that is not quiet.
      total: steps of the whole run.
      done: steps done before.
      every: without a terminal, print each `every`-th step, the first and the last.
    """

    def __init__(self, console: Console, *, total: int, done: int, every: int) -> None:
        self._console, self._total, self._first, self._every = console, total, done + 1, every
        self._live: Progress | None = None
        if console.is_terminal:
            self._wide = console.width >= 120
            columns = (MofNCompleteColumn(), BarColumn(12), TextColumn("{task.fields[figures]}"), TimeRemainingColumn())
            self._live = Progress(*columns, console=console)
            self._task = self._live.add_task("", total=total, completed=done, figures="")

    def __enter__(self) -> Reporter:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def step(self, record: dict[str, Any]) -> None:
        """Shows one record."""
        step, figures = record["step"], _figures(record)
        if self._live:
            shown = "  ".join(figures if self._wide else figures[:3])  # 80 columns hold three
            self._live.update(self._task, completed=step, figures=shown)
            if "eval_loss" in record:
                self.say(f"step {step}  {_held_out(record)}")
        elif "eval_loss" in record or step in (self._first, self._total) or step % self._every == 0:
            self.say(f"step {step:>{len(str(self._total))}}/{self._total}  {'  '.join(figures)}")
            if "eval_loss" in record:
                self.say(f"step {step:>{len(str(self._total))}}/{self._total}  {_held_out(record)}")

    def say(self, text: str) -> None:
        """Prints one line as it is."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _held_out(record: dict[str, Any]) -> str:
    return f"held-out loss {record['eval_loss']:.4f}  perplexity {record['eval_perplexity']:.2f}"


def _figures(record: dict[str, Any]) -> list[str]:
    parts = [
        f"loss {record['loss']:.4f}",
        f"{record['tokens_per_second']:,.0f} tokens/s",
        f"{record['step_seconds']:.2f} s/step",
        f"lr {record['learning_rate']:.1e}",
        f"|grad| {record['grad_norm']:.2f}",
    ]
    if record["peak_memory_bytes"] is not None:
        parts.append(f"{size(record['peak_memory_bytes'])} ({record['peak_memory_of']})")
    return parts
