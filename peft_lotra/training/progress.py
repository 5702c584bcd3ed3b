"""Shows how far a fit is: a bar in a terminal or a notebook, lines in a log file."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

_SECONDS = 10.0  # between two lines


class Progress:
    """`tqdm` where somebody may look on; elsewhere a line on stderr at most every ten seconds, and one at the end."""

    def __init__(self, shown: bool, first: int, iterations: int) -> None:
        bar = shown and ("ipykernel" in sys.modules or sys.stderr.isatty())
        self.bar = tqdm(total=iterations, initial=first, disable=not bar, unit="iteration", dynamic_ncols=True)
        self.as_lines, self.told, self.text = shown and not bar, time.monotonic(), ""

    def update(self, done: int, loss: float, damping: float) -> None:
        state = f"loss {loss:.2e}, damping {damping:.0e}"
        self.bar.update()
        self.bar.set_postfix_str(state, refresh=False)
        self.text = f"fit_gauss_newton: iteration {done} of {self.bar.total}, {state}"
        if time.monotonic() - self.told >= _SECONDS:
            self._tell()

    def _tell(self) -> None:
        if self.as_lines and self.text:
            print(self.text, file=sys.stderr, flush=True)
        self.told, self.text = time.monotonic(), ""

    def close(self) -> None:
        self.bar.close()
        self._tell()
