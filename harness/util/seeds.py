"""Independent random streams from one seed, so that a method's draws never shift the head's, the data's or a step's."""

from __future__ import annotations

import hashlib


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed that depends on `seed` and the purpose alone: `derive(0, "step", 17)`."""
    text = ":".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogateescape")).digest()[:8], "big") >> 1
