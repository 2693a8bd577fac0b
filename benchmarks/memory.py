"""Peak memory of one extraction above the loaded model: python memory.py DATA PAIRS -> JSON.

The model is loaded and run on a few texts first, so that its weights, the libraries' code and
buffers are all there. Then a thread looks at the process's resident size every few milliseconds
while the extraction runs; what counts is the highest it saw, less the size before. (The system's
own record of the peak would not do: loading has a higher one.)
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
from clock import one_thread

WARM_UP_PAIRS = 2
LOOK_EVERY_SECONDS = 0.002


def main() -> None:
    data, pairs = Path(sys.argv[1]), int(sys.argv[2])
    one_thread()
    import texts
    from extraction import METHODS

    import trimtab as tt

    lm = tt.load("smollm2-135m-instruct", device="cpu")
    contrast = texts.copa(data, pairs)
    tt.fit(METHODS, lm, contrast.take(WARM_UP_PAIRS))
    before, peak = peak_during(lambda: tt.fit(METHODS, lm, contrast))
    numbers = {"before_mb": before, "peak_mb": peak, "above_model_mb": peak - before}
    print(json.dumps({"pairs": len(contrast), **numbers}))


def peak_during(work: Callable[[], object]) -> tuple[float, float]:
    """Resident size in MB before `work`, and the highest while it ran."""
    process, done = psutil.Process(), threading.Event()
    sizes = [process.memory_info().rss]

    def look() -> None:
        while not done.wait(LOOK_EVERY_SECONDS):
            sizes.append(process.memory_info().rss)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return sizes[0] / 2**20, max(sizes) / 2**20


if __name__ == "__main__":
    main()
