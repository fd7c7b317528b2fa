"""The text of this folder's C++ sources."""

from __future__ import annotations

import re
from pathlib import Path


def inlined(name: str) -> str:
    """The text of a file, with this folder's headers in the place of their includes; but for
    ``vectors.h``, which stands for that of an instruction set."""
    text = Path(__file__).with_name(name).read_text()
    return re.sub(
        r'^#include "(?!vectors)(.*)"\n', lambda found: inlined(found[1]), text, flags=re.M
    )
