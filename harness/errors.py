"""The one exception a user can cause, and the "did you mean" that goes into it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend: one line that names the file or flag, the value and the remedy.

    The command line prints it without a traceback and exits with 2.
    """


def did_you_mean(name: str, known: Iterable[str], limit: int = 3) -> str:
    """A sentence that offers the nearest of the known names, or lists them where there are few."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=limit, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(near)}?"
    if len(known) <= 30:
        return f"known: {', '.join(known) or 'none'}"
    return f"{len(known)} names are known, and `harness list` prints them"
