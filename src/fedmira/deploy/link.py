"""The seam between a federation and the engine that carries its bytes: whoever is behind it can be exchanged."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from fedmira.deploy.channel import Data


@dataclass(frozen=True)
class Failure:
    """Why a site gave no answer. kind: `late`, or the type of an error; never a text of the site's."""

    kind: str


class Link(Protocol):
    """The sites as the server reaches them. What a site is called is what its certificate says, not what it sends."""

    @property
    def sites(self) -> frozenset[str]:
        """Which sites are there now."""
        ...

    def call(self, frames: Mapping[str, Data], seconds: float) -> Iterator[tuple[str, Data | Failure]]:
        """Send each site its frame and yield answers as they arrive; `late` for those that did not in time.

        A site that is away may come back until then. A frame may reach a site more than once; it is looked up each
        time that it is sent, so that a mapping may make it then.
        """
        ...
