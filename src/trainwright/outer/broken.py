"""Exchanges between groups that fail again and again."""

from __future__ import annotations

import time
import warnings

from trainwright.errors import LaunchError

_SAY_AFTER_S = 60.0
_ONCE_MORE = 2


class Broken:
    """How long the exchanges of an outer step have failed. That of a group that has died is made again without it, seconds
    later; where groups reach the lighthouse but not one another, none ever lands."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s, self._said = patience_s, False
        self._since_s: float | None = None
        self._times = 0
        self._last = "a rank of this group could not"

    def note(self, error: object) -> None:
        """After one that failed. Raises LaunchError where that has gone on for too long."""
        if error is not None:
            text = str(getattr(error, "original_exception", error)).strip()
            self._last = text.splitlines()[0] if text else type(error).__name__
        self._times += 1
        if self._since_s is None:
            self._since_s = time.monotonic()
        lasted_s = time.monotonic() - self._since_s
        if lasted_s > self._patience_s and self._times > _ONCE_MORE:
            raise LaunchError(
                f"no outer step for {lasted_s:,.0f} s, with the lighthouse there: {self._last}",
                "groups reach one another directly, at the address of each, on any port",
                "outer.address=ADDRESS that the other hosts can reach, and ports open between the hosts",
            )
        if lasted_s > _SAY_AFTER_S and not self._said:
            self._said = True
            warnings.warn(
                f"the lighthouse is there, but this group cannot exchange with the others since {lasted_s:,.0f} s ({self._last}); it "
                f"goes on trying for outer.patience ({self._patience_s:g} s)",
                stacklevel=2,
            )
