"""Arguments and options that several commands have. Annotations of commands are evaluated: see main.py."""

from typing import Annotated

import typer

Overrides = Annotated[list[str] | None, typer.Argument(help="a.b=c, applied to the config", show_default=False)]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="no progress")]
AsJson = Annotated[bool, typer.Option("--json", help="print machine-readable JSON")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="show what the log file gets")]
Debug = Annotated[bool, typer.Option("--debug", help="show tracebacks")]
