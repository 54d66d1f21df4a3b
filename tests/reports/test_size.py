"""Reports of large studies stay small."""

from pathlib import Path

import pytest
from tests.reports.hand_made import Page
from tests.reports.made_study import make_study

from fedmira.graphs.graph import group_graph
from fedmira.reports.render import write_report

MOST_BYTES = 3_000_000


@pytest.mark.slow
def test_two_thousand_clients_make_a_small_page(tmp_path: Path):
    names = [f"client-{place}" for place in range(2000)]
    groups = [f"group {place % 40}" for place in range(2000)]
    study = make_study(tmp_path / "big", names, groups=groups, graph=group_graph(groups), rounds=10, sampled=200)
    path = write_report(study)
    assert path.stat().st_size < MOST_BYTES / 5  # so that ten thousand fit as well: nothing on the page grows with them
    read = Page(path.read_text(encoding="utf-8"))
    assert len(read.table("Test split at the last round").lines) == 51
    assert "<dd>2,000 in 40 groups</dd>" in read.text
    assert len([one for one in read.all("svg") if one.attributes.get("aria-label", "").startswith("Task graph")]) == 2
