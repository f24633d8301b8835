"""Entry point of python -m negmerge_fast and of the console script."""

import os
import signal

# Until main, which is imported next, installs its handlers: without one, Ctrl-C during an import prints a traceback.
if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from .cli.main import main

if __name__ == "__main__":
    main()
