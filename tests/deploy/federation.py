"""A small federation made without the engine: folders, settings and sites, for tests of what is above the link."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tests import small_study

from fedmira.config.faults import check_config
from fedmira.config.yaml_text import dump_config
from fedmira.deploy.folders import ServerFolder, SiteFolder
from fedmira.deploy.link import Failure
from fedmira.deploy.settings import Agreement, installed_versions
from fedmira.deploy.site import Site, open_site
from fedmira.deploy.terms import ranks_of
from fedmira.deploy.worker import Worker
from fedmira.disk.files import make_folder, write_json
from fedmira.model.base.load import load_base

SITES = small_study.CLIENTS[:3]


def write_federation(
    folder: Path,
    raw: Mapping[str, Any],
    data: Path,
    *,
    columns: Sequence[str] = ("group",),
    profiles: Sequence[str | None] = (),
    **site: Any,
) -> ServerFolder:
    """Write the folders of a server and its sites, each with its own part of the data. site: more keys of site.yaml."""
    server = ServerFolder(folder)
    make_folder(server.path)
    config = check_config(raw)
    base = load_base(
        config.model.base_model, revision=None, dtype="float32", device="cpu", targets=config.lora.target_modules
    )
    agreement = Agreement(
        federation="small",
        base_model=config.model.base_model,
        base_fingerprint=base.fingerprint,
        architecture=type(base.model).__name__,
        shapes=[(name, int(a), int(b)) for name, a, b in base.shapes],
        width=base.width,
        transposed=base.transposed,
        dtype="float32",
        template="none",
        ranks=ranks_of(config, SITES, [name for name, _, _ in base.shapes]),
        columns=list(columns),
        fedmira=installed_versions()["fedmira"],
        profiles=list(profiles),
    )
    server.settings.write_text(
        json.dumps({"name": "small", "server": {"host": "localhost"}, "sites": list(SITES), "deadline": 60.0})
    )
    server.study_config.write_text(dump_config(config), encoding="utf-8")
    write_json(server.agreement, agreement.as_json())
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    for name in SITES:
        place = server.site(name)
        make_folder(place.path)
        own = place.path / "own.jsonl"
        own.write_text("".join(json.dumps(row) + "\n" for row in rows if row["client"] == name), encoding="utf-8")
        place.settings.write_text(
            json.dumps({"name": name, "data": {"path": str(own), "format": "prompt_completion"}, "threads": 1, **site})
        )
        place.study_config.write_text(dump_config(config), encoding="utf-8")
        write_json(place.agreement, agreement.as_json())
    return server


class Loopback:
    """A link whose sites are workers in this process: bytes in, bytes out. tamper: changes an answer on its way.

    opened: sites with the same data and base, which are not loaded again.
    """

    def __init__(
        self,
        folders: Mapping[str, SiteFolder],
        *,
        tamper: Callable[[str, bytes], bytes | Failure] | None = None,
        opened: Mapping[str, Site] | None = None,
    ) -> None:
        self.folders, self.tamper = folders, tamper
        self.workers = {
            name: Worker(folder, opened[name] if opened else open_site(folder)) for name, folder in folders.items()
        }
        self.bytes: list[tuple[str, int, int]] = []

    @property
    def sites(self) -> frozenset[str]:
        return frozenset(self.workers)

    def call(self, frames: Mapping[str, bytes], seconds: float) -> Iterator[tuple[str, bytes | Failure]]:
        for name, frame in frames.items():
            if name not in self.workers:
                yield name, Failure("late")
                continue
            threads = torch.get_num_threads()
            answer: bytes | Failure = self.workers[name].handle(frame)
            torch.set_num_threads(threads)
            if self.tamper is not None and isinstance(answer, bytes):
                answer = self.tamper(name, answer)
            if isinstance(answer, bytes):
                self.bytes.append((name, len(frame), len(answer)))
            yield name, answer
