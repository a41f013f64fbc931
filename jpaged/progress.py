"""Progress bars: one small wrapper, so that a library call stays silent where nobody looks."""

import sys

from tqdm import tqdm


class Progress:
    """A progress bar with an estimate of the time left, on a terminal's standard error; silent elsewhere.

    Args:
      label: what is going on.
      total: steps or bytes; None: learnt later.
      unit: "B" counts bytes.
    """

    def __init__(self, label: str, total: int | None = None, unit: str = "it", disable: bool | None = None) -> None:
        hidden = not sys.stderr.isatty() if disable is None else disable
        self._bar = tqdm(
            total=total,
            desc=label,
            unit=unit,
            unit_scale=unit == "B",
            unit_divisor=1024,
            disable=hidden,
            leave=True,
            dynamic_ncols=True,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()

    def advance(self, count: int = 1) -> None:
        self._bar.update(count)

    def note(self, text: str) -> None:
        self._bar.set_postfix_str(text)

    def weights(self, done: int, total: int, name: str) -> None:
        """The callback of `checkpoints.load`."""
        self._bar.total = total
        self._bar.update(done - self._bar.n)
