"""A program, not a module: runs commands of NVFlare one after another, so that they import it once.

kits.py runs it and reads its lines of JSON, one for each command; it ends at the first that fails, with its exit code.
"""

import json
import sys


def main() -> None:
    """Run the commands in the first argument, a JSON list of lists of words."""
    from nvflare.cli import main as run_command

    for words in json.loads(sys.argv[1]):
        sys.argv = ["nvflare", "--format", "json", *words]
        try:
            run_command()
        except SystemExit as end:
            if end.code:
                raise


if __name__ == "__main__":
    main()
