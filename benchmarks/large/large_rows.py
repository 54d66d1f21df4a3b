"""The rows of the page on large bases."""

import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
STUDY = "estimate"  # the row of a dry run against the study itself


@dataclass(frozen=True)
class Row:
    """What is measured on both sides: so many clients with one text of so many tokens each."""

    base: str
    clients: int
    tokens: int
    nf4: bool
    recompute: bool

    @property
    def name(self) -> str:
        words = ["nf4" if self.nf4 else "plain", "recomputed" if self.recompute else "kept"]
        return "-".join([self.base, f"{self.clients}x{self.tokens}", *words])

    def command(self, side: str, *, device: str, folder: Path) -> list[str]:
        words = ["--base", self.base, "--side", side, "--clients", str(self.clients), "--tokens", str(self.tokens)]
        words += ["--nf4"] * self.nf4 + ["--recompute"] * self.recompute
        return [sys.executable, str(HERE / "one.py"), *words, "--device", device, "--folder", str(folder)]


ROWS = (
    *(Row("0.5B", 1, tokens, nf4=False, recompute=True) for tokens in (512, 2048)),
    *(
        Row("0.5B", clients, 256, nf4=nf4, recompute=recompute)
        for nf4 in (False, True)
        for recompute in (True, False)
        for clients in (1, 4, 8)
    ),
    *(Row("1.5B", clients, 256, nf4=nf4, recompute=True) for nf4 in (False, True) for clients in (1, 8)),
)
