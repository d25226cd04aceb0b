"""What a person sees while a run goes on: a progress bar on a terminal, plain lines in a pipe."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 5.0  # the least time between two plain progress lines


class Display:
    """Progress of a run on standard output. ``silent`` (ranks after the first): shows nothing."""

    def __init__(self, silent: bool = False):
        self.silent, self.progress, self.total, self.shown = silent, None, 0, 0.0
        self.started, self.first_step = 0.0, 0

    def start(self, step: int, total: int) -> None:
        """Progress begins at ``step`` of ``total``."""
        self.total, self.started, self.first_step = total, time.monotonic(), step
        if not self.silent and sys.stdout.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
            self.progress = Progress(*columns, TextColumn("{task.fields[text]}"), TimeRemainingColumn(), console=Console())
            self.task = self.progress.add_task("training", total=total, completed=step, text="")
            self.progress.start()

    def update(self, step: int, epoch: int, loss: float, rate: float, images_per_second: float) -> None:
        """The state after a step."""
        if self.silent:
            return
        text = f"loss {loss:.3f}  rate {rate:.2e}  {images_per_second:.1f} images/s"
        if self.progress:
            self.progress.update(self.task, completed=step, description=f"epoch {epoch}", text=text)
        elif (now := time.monotonic()) - self.shown >= PLAIN_SECONDS:
            self.shown = now
            left = (now - self.started) / max(1, step - self.first_step) * (self.total - step)
            print(f"step {step}/{self.total}  epoch {epoch}  {text}  {left / 60:.1f} min left", flush=True)

    def line(self, text: str) -> None:
        """A line that stays."""
        if self.silent:
            return
        if self.progress:
            self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Ends the bar and gives the terminal back as it was."""
        if self.progress:
            self.progress.stop()
            self.progress = None
