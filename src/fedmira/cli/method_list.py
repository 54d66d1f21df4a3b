"""What `fedmira methods` prints about each method of the tree, from a file that docs/make_methods.py writes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

FILE = Path(__file__).with_name("method_list.json")


@dataclass(frozen=True)
class MethodFacts:
    """What a method with default settings is, needs and sends. bytes: a formula in S and P; empty: nothing.

    starts: what a client with an adapter to begin with (`lora.start`) begins with.
    """

    about: str
    papers: list[str]
    view: Literal["personal", "global"]
    needs: Literal["each", "sum", "relay", "nothing"]
    weighs: bool
    sends: str
    bytes_up: str
    bytes_down: str
    starts: str

    @property
    def bytes(self) -> str:
        return f"{self.bytes_up} up, {self.bytes_down} down" if self.bytes_up else "nothing"

    @property
    def line(self) -> str:
        """All facts but `about`, on one line."""
        travels = f"sends {self.sends}, {self.bytes}" if self.bytes_up else "sends nothing"
        server = "server forwards each" if self.needs == "relay" else f"server sees {self.needs}"
        papers = ", ".join(self.papers) or "no paper"
        return f"{self.view}; {server}; {travels}; lora.start: {self.starts}; {papers}"


def stored_facts() -> dict[str, MethodFacts]:
    """Return the facts of every method by its id."""
    facts_of = json.loads(FILE.read_text(encoding="utf-8"))
    return {name: MethodFacts(**facts) for name, facts in facts_of.items()}
