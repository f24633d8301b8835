"""python -m negmerge_fast, and the console script."""

from __future__ import annotations

import os
import signal

from .cli.main import main

# Until cli.main, which comes next, takes signals in hand: Ctrl-C in the middle of an import is a traceback.
if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

if __name__ == "__main__":
    main()
