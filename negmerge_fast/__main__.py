"""Entry point of python -m negmerge_fast and of the console script. Importing it does nothing."""

import os
import signal


def main() -> None:
    """Run the command and exit with its status."""
    # Until the command has handlers of its own: without one, Ctrl-C during an import prints a traceback.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))

    from .cli.main import main as command

    command()


if __name__ == "__main__":
    main()
