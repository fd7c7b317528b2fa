"""The most memory of a process's own while something runs, for tests that measure a process."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

STATUS = Path("/proc/self/status")


def own_memory() -> int:
    """Bytes of this process's own; pages of mapped files, which the kernel can drop, do not
    count."""
    found = re.search(r"RssAnon:\s+(\d+)", STATUS.read_text())
    assert found is not None
    return int(found[1]) * 1024


class Watch:
    """Within, ``peak`` is the most that :func:`own_memory` was."""

    def __enter__(self) -> Watch:
        self.peak, self._done = 0, False
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done = True
        self._thread.join()

    def _look(self) -> None:
        while not self._done:
            self.peak = max(self.peak, own_memory())
            time.sleep(0.004)
