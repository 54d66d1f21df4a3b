"""The page's templates, compiled once: their code is kept in __pycache__, beside that of this module."""

import os
import sys
from contextlib import suppress
from functools import cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, FileSystemBytecodeCache, FunctionLoader, StrictUndefined, Template, compiler
from jinja2.bccache import Bucket

from fedmira.reports import wording

LONGEST_TEXT = 4000  # characters of an example that are shown


@cache
def page_template() -> Template:
    """Return the report's template."""
    # Client names come from data that others wrote: autoescape stays on, and nothing is marked safe.
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(lambda name: files(__package__).joinpath(name).read_text(encoding="utf-8")),
        bytecode_cache=CompiledTemplates(__spec__.cached) if __spec__.cached else None,
    )
    environment.filters |= {
        "number": wording.number,
        "signed": wording.signed,
        "interval": wording.interval,
        "seeds": wording.seeds,
        "seconds": wording.seconds,
        "size": wording.size,
        "chance": wording.chance,
        "clean": wording.clean,
        "short": wording.short,
        "plural": wording.plural,
        "count": wording.count,
        "unbroken": wording.unbroken,
        "pretty": wording.pretty,
        "phrase": wording.phrase,
        "cut": lambda text: text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " […]",
    }
    return environment.get_template("report.html.j2")


class CompiledTemplates(FileSystemBytecodeCache):
    """Keeps the code of templates in files named after `module`, the file with a module's code.

    Code is used for the same text alone, by the same Python, and until this file or Jinja's compiler changes. A file
    that cannot be read or written costs time only: the template is compiled again.
    """

    def __init__(self, module: str) -> None:
        super().__init__(str(Path(module).parent), f"{Path(module).stem}.%s.jinja")

    def get_source_checksum(self, source: str) -> str:
        stats = [os.stat(file) for file in (__file__, compiler.__file__)]
        stamps = [(file.st_mtime_ns, file.st_size) for file in stats]
        return sha256(f"{stamps} {source}".encode()).hexdigest()

    def load_bytecode(self, bucket: Bucket) -> None:
        try:
            super().load_bytecode(bucket)
        except Exception:  # a damaged file, in which pickle may find anything
            bucket.reset()

    def dump_bytecode(self, bucket: Bucket) -> None:
        if not sys.dont_write_bytecode:
            with suppress(OSError):  # a package that only the system's owner may write to
                super().dump_bytecode(bucket)
