"""One line of the self-test's report."""

from __future__ import annotations

from dataclasses import dataclass

GB = 1e9


@dataclass(frozen=True)
class Finding:
    """One line of the report; a missing need is a failure, a missing extra is not."""

    what: str
    good: bool
    text: str
    needed: bool = True

    @property
    def line(self) -> str:
        """`ok`, `FAIL` or `note`, and what was found."""
        mark = "ok  " if self.good else "FAIL" if self.needed else "note"
        return f"{mark} {self.what}: {self.text}"
