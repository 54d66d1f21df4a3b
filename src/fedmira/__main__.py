"""`python -m fedmira`, and the command `fedmira`: Ctrl-C has its answer before anything else is imported.

Importing this module sets the signal's handler: nobody imports it but to run the command line.
"""

import gc
import os
import signal


def _quit(number: int, frame: object) -> None:
    """End at once: a traceback of imports would say nothing."""
    os.write(2, b"interrupted: no study was begun\n")
    os._exit(130)


if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, _quit)


def main() -> None:
    """Run the command line."""
    gc.disable()  # modules stay: looking for garbage among them costs a tenth of the time to a first answer
    from fedmira.cli.main import main as run

    gc.freeze()
    gc.enable()
    run()


if __name__ == "__main__":
    main()
