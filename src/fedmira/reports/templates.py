"""The page's templates, compiled once: their code is kept in __pycache__, beside that of this module."""

import os
import sys
from contextlib import suppress
from functools import cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

from jinja2 import BytecodeCache, Environment, FunctionLoader, StrictUndefined, Template, compiler
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
        bytecode_cache=CompiledTemplates(__spec__.cached),
    )
    environment.filters |= {
        "number": wording.number,
        "signed": wording.signed,
        "interval": wording.interval,
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


class CompiledTemplates(BytecodeCache):
    """Keeps the code of templates in files named after `module`, the file with a module's code; None: keeps nothing.

    Code is used for the same text alone, by the same Python, and until this file or Jinja's compiler changes. A file
    that cannot be read or written costs time only: the template is compiled again.
    """

    def __init__(self, module: str | None) -> None:
        self.module = None if module is None else Path(module)

    def get_source_checksum(self, source: str) -> str:
        stats = [os.stat(file) for file in (__file__, compiler.__file__)] if self.module else []
        stamps = [(file.st_mtime_ns, file.st_size) for file in stats]
        return sha256(f"{stamps} {source}".encode()).hexdigest()

    def load_bytecode(self, bucket: Bucket) -> None:
        if self.module is None:
            return
        try:
            with self._file(self.module, bucket).open("rb") as file:
                bucket.load_bytecode(file)
        except Exception:  # no file, or a damaged one, in which pickle may find anything
            bucket.reset()

    def dump_bytecode(self, bucket: Bucket) -> None:
        if self.module is None or sys.dont_write_bytecode:
            return
        target = self._file(self.module, bucket)
        temporary = target.with_suffix(f".{os.getpid()}.tmp")
        with suppress(OSError):  # a package that only the system's owner may write to
            temporary.write_bytes(bucket.bytecode_to_string())
            os.replace(temporary, target)

    def _file(self, module: Path, bucket: Bucket) -> Path:
        return module.with_suffix(f".{bucket.key[:16]}.jinja")
