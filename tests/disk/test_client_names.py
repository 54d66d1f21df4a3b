"""A client is found by its name or its id, and never the wrong one."""

import csv
import io
import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmira.data.partition import client_ids
from fedmira.disk.client_names import as_cell, from_cell, read_client_names
from fedmira.errors import StoreError
from fedmira.names import ClientNames, folded, lookalikes, plain_line, spoken, told_apart

HOSPITALS = ["Charité", "Klinik Zürich", "東京", "ada", "007", "St. Mary's", "ﬁle"]


def names_of(*names: str) -> ClientNames:
    return ClientNames({client_id: name for name, client_id in client_ids(names).items()})


words = st.text(min_size=1, max_size=12).filter(lambda name: name.strip())
names = st.lists(words, min_size=1, max_size=8, unique=True)


@given(names)
def test_every_client_is_found_by_its_exact_name_and_by_its_id(names: list[str]) -> None:
    clients = names_of(*names)
    for client_id, name in clients.by_id.items():
        assert clients.find(name, clients.by_id) == client_id
        assert clients.find(client_id, clients.by_id) == client_id


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
@pytest.mark.parametrize("change", [str, str.upper, str.lower, lambda name: f"  {name} ", str.title])
def test_a_name_is_found_as_a_person_types_it(form: str, change: object) -> None:
    clients = names_of(*HOSPITALS)
    for client_id, name in clients.by_id.items():
        typed = unicodedata.normalize(form, change(name))  # type: ignore[operator, arg-type]
        assert clients.find(typed, clients.by_id) == client_id


def test_a_name_that_may_be_two_clients_is_refused_with_both() -> None:
    clients = names_of("Ada", "ADA", "eve")
    assert clients.by_id[str(clients.find("ADA", clients.by_id))] == "ADA"
    with pytest.raises(StoreError, match=r"'ada' may be one of 2: A(DA|da) \(A\S+\), A(DA|da) \(A\S+\); give the id"):
        clients.find("ada", clients.by_id)


def test_a_name_that_is_another_clients_id_is_refused_with_both() -> None:
    clients = ClientNames({"a": "b", "b": "c"})
    with pytest.raises(StoreError, match=r"may be one of 2: b \(a\), c \(b\)"):
        clients.find("b", clients.by_id)


@pytest.mark.parametrize("wanted", ["../ada", "", " ", "ad", "ada2", "/", ".", "*"])
def test_what_is_no_clients_name_finds_nobody(wanted: str) -> None:
    clients = names_of(*HOSPITALS)
    assert clients.find(wanted, clients.by_id) is None


def test_a_list_shows_names_and_the_ids_that_differ() -> None:
    clients = names_of("Charité", "ada")
    assert clients.listed(clients.by_id) == "Charité (Charit--32dd02a2), ada"
    assert clients.near("charite", clients.by_id) == " (did you mean Charité (Charit--32dd02a2)?)"


def test_labels_are_names_and_ids_only_where_names_look_the_same() -> None:
    composed, apart = "Zürich", unicodedata.normalize("NFD", "Zürich")
    clients = names_of("Charité", composed, apart)
    labels = sorted(clients.labels.values())
    assert labels[0] == "Charité"
    assert all(label.endswith(")") and ("Z-rich" in label or "Zu-rich" in label) for label in labels[1:])


@given(st.text(max_size=20))
def test_a_name_in_a_cell_of_csv_is_one_line_that_no_spreadsheet_runs_and_reads_back(name: str) -> None:
    cell = as_cell(name)
    assert cell[:1] not in ("=", "+", "-", "@", "\t", "\r")
    assert cell.isprintable()
    assert from_cell(cell) == plain_line(name)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow([cell, "x"])
    assert text.getvalue().count("\n") == 1
    assert next(csv.reader([text.getvalue()], strict=True)) == [cell, "x"]


def test_an_apostrophe_in_front_of_a_town_stays_one() -> None:
    assert as_cell("'s-Hertogenbosch") == "'s-Hertogenbosch"


def test_the_names_of_a_run_without_clients_json_are_its_ids(tmp_path: Path) -> None:
    assert read_client_names(tmp_path).name("ada") == "ada"
    (tmp_path / "clients.json").write_text(json.dumps({"ada": {}, "eve": 5, "x-1": {"name": "é"}}))
    assert dict(read_client_names(tmp_path).by_id) == {"ada": "ada", "eve": "eve", "x-1": "é"}
    (tmp_path / "clients.json").write_text("[]")
    with pytest.raises(StoreError, match=r"clients\.json is an object"):
        read_client_names(tmp_path)


# ---------------------------------------------------------------- names that look alike


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1", "1.0"),
        ("1", "01"),
        ("7", "007"),
        ("-3", "-3.0"),
        ("0", "-0.0"),
        ("ada", "Ada"),
        ("ada", " ada"),
        ("ada", "ada\t"),
        ("St Mary", "St  Mary"),
        ("St Mary", "StMary"),
        ("St Mary", "St\u00a0Mary"),
        ("Zürich", unicodedata.normalize("NFD", "Zürich")),
        ("\uff21\uff24\uff21", "ADA"),
        ("Straße", "STRASSE"),
        ("St. Mary's", "St. Mary\u2019s"),
        ("north-east", "north\u2013east"),
        ("a\u200bb", "ab"),
        ("True", "true"),
        ("2024-05-01", "2024-05-01 00:00:00"),
        ("2024-05-01", "2024-05-01T00:00:00Z"),
    ],
)
def test_two_spellings_of_one_client_look_alike(one: str, other: str) -> None:
    assert folded(one) == folded(other)
    assert lookalikes([one, "somebody else", other]) == [(one, other)]
    shown = told_apart([one, other])
    assert len({unicodedata.normalize("NFC", name) for name in shown}) == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [("1", "10"), ("1.5", "15"), ("1.0", "1.01"), ("-3", "3"), ("ada", "adah"), ("Zürich", "Zurich"), ("a1", "a01")],
)
def test_two_clients_do_not(one: str, other: str) -> None:
    assert lookalikes([one, other]) == []


@given(names)
def test_names_that_look_alike_are_distinct_and_each_is_in_one_group(names: list[str]) -> None:
    grouped = [name for group in lookalikes([*names, *names]) for name in group]
    assert len(grouped) == len(set(grouped))
    assert {folded(name) for name in names} == {folded(spoken(name)) for name in names}
