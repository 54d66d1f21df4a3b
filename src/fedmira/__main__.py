"""`python -m fedmira`, and the command `fedmira`: Ctrl-C has its answer before anything else is imported."""

import os
import signal


def _quit(number: int, frame: object) -> None:
    """End at once: a traceback of imports would say nothing."""
    os.write(2, b"interrupted: no study was begun\n")
    os._exit(130)


def main() -> None:
    """Run the command line."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _quit)
    from fedmira.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
