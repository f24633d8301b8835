"""Entry point of python -m negmerge_fast and of the console script."""

from __future__ import annotations

import os
import signal

from .cli.main import main

# Until main installs its handlers: without one, Ctrl-C during an import prints a traceback.
if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

if __name__ == "__main__":
    main()
