"""Seeds made of several numbers."""

from __future__ import annotations

import random


def mixed(*numbers: int) -> int:
    """Make one seed of several; 32 bits, for torch's CPU generator looks at no more."""
    return random.Random(" ".join(map(str, numbers))).getrandbits(32)
