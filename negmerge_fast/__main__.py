"""python -m negmerge_fast, and the console script."""

import os
import signal

# Until cli.main, which comes next, takes signals in hand: Ctrl-C in the middle of an import is a traceback.
if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from .cli import main

if __name__ == "__main__":
    main()
