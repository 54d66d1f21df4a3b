"""People read and type the names of clients; ids are for folders."""

import csv
import json
import unicodedata
from pathlib import Path

import pytest
import yaml
from tests import small_study
from tests.small_study import Ended, command

import fedmira
from fedmira.disk.folders import RunFolder
from fedmira.errors import StoreError
from fedmira.reports.results import read_results
from fedmira.study.face import Study

NAMES = ["Charité", "Klinik Zürich", "東京", "=1+1", "ada"]
ZURICH = "Klinik-Z-rich-"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of local and of mira on a graph of all, run by the command."""
    folder = tmp_path_factory.mktemp("names")
    rows = [
        {"prompt": "w2 w3 w4", "completion": f"w{5 + index}", "client": name} for name in NAMES for index in range(4)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    raw = small_study.settings(
        small_study.save_base(folder / "base"),
        folder / "rows.jsonl",
        folder / "study",
        data={"clients": {"by": "client"}, "split": {"validation": 0.25, "test": 0.25}},
        methods=[{"name": "local"}, {"name": "mira", "graph": {"kind": "uniform"}}],
        federation={"rounds": 1, "participation": 1.0},
    )
    raw["report"] = {"examples": True}
    ended = command("run", small_study.save_config(folder / "config.yaml", raw))
    assert ended.code == 0, ended.err
    (folder / "out").write_text(ended.out, encoding="utf-8")
    return folder


def run_of(home: Path, method: str = "local") -> fedmira.Run:
    return fedmira.load_run(home / "study" / method / "seed-3")


def ids(home: Path) -> dict[str, str]:
    return {name: client_id for client_id, name in run_of(home).clients.items()}


def test_the_tables_of_the_terminal_have_names(home: Path) -> None:
    out = (home / "out").read_text(encoding="utf-8")
    for name, client_id in ids(home).items():
        assert name in out
        assert name == client_id or client_id not in out


def test_the_report_has_names_in_every_place(home: Path) -> None:
    page = (home / "study" / "report.html").read_text(encoding="utf-8")
    for name, client_id in ids(home).items():
        assert page.count(name) >= 5  # gains, graph, merges, table, examples
        assert name == client_id or client_id not in page


def test_results_csv_has_names_beside_ids_and_a_spreadsheet_runs_none(home: Path) -> None:
    run = run_of(home)
    with (run.path / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    shown = {row["client"]: row["name"] for row in rows}
    assert shown == {client_id: "'=1+1" if name == "=1+1" else name for client_id, name in run.clients.items()}
    assert set(Study(home / "study").results["name"]) == set(NAMES)


def test_the_results_of_an_earlier_version_are_read_and_continued_with_names(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "study" / "local" / "seed-3"
    path.mkdir(parents=True)
    source = run_of(home).path
    for name in ("run.json", "clients.json", "metrics.jsonl"):
        (path / name).write_bytes((source / name).read_bytes())
    with (source / "results.csv").open(newline="", encoding="utf-8") as file:
        lines = [line[:-1] for line in csv.reader(file)]
    (path / "results.csv").write_text("".join(",".join(line) + "\n" for line in lines), encoding="utf-8")
    before = read_results(tmp_path / "study").rows
    assert {row.name for row in before} == set(NAMES)
    RunFolder(path).cut_back(1)
    after = read_results(tmp_path / "study").rows
    assert after == [row for row in before if row.round == 0 or row.split != "test"]
    assert (path / "results.csv").read_text(encoding="utf-8").startswith(f"{','.join(lines[0])},name\n")


def export(home: Path, out: Path, *arguments: object) -> Ended:
    return command("export", home / "study" / "mira" / "seed-3", "--out", out, "--json", *arguments)


@pytest.mark.parametrize("typed", ["東京", "Klinik Zürich", unicodedata.normalize("NFD", "klinik  zürich")])
def test_export_takes_a_name_and_writes_the_folder_of_its_id(typed: str, home: Path, tmp_path: Path) -> None:
    ended = export(home, tmp_path / "out", "--client", typed)
    assert ended.code == 0, ended.err
    (path,) = json.loads(ended.out)["adapters"]
    name = "東京" if typed == "東京" else "Klinik Zürich"
    assert Path(path) == tmp_path / "out" / ids(home)[name]
    card = (Path(path) / "README.md").read_text(encoding="utf-8")
    assert f"# LoRA adapter of client `{name}`, made with FedMira" in card
    assert f"- client: `{name}` ({ids(home)[name]})" in card


def test_a_whole_model_is_merged_by_name(home: Path, tmp_path: Path) -> None:
    ended = command("export", run_of(home).path, "--merge", "--client", "Charité", "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert ended.out.strip() == str(tmp_path / "out" / "Charit--32dd02a2")
    assert "Charité: logits differ by" in ended.err


def test_chat_takes_a_name_or_an_id_and_speaks_of_the_name(home: Path) -> None:
    run = run_of(home).path
    for typed in ("Klinik Zürich", ids(home)["Klinik Zürich"]):
        ended = command("chat", run, "--client", typed, "-p", "w2", "--max-new-tokens", 2, "--json")
        assert ended.code == 0, ended.err
        assert list(json.loads(ended.out)) == ["base", "Klinik Zürich"]
    beside = command("chat", "--adapter", run / "adapters" / "Charit--32dd02a2", "-p", "w2", "--max-new-tokens", 2)
    assert "Charité of local:" in beside.out


def test_an_adapter_is_found_by_name_from_python(home: Path) -> None:
    run = run_of(home)
    assert run.adapters("Charité") == run.adapters("Charit--32dd02a2") == run.path / "adapters" / "Charit--32dd02a2"
    with pytest.raises(StoreError, match=r"no adapter of client 'Charite'.*did you mean Charité \(Charit--32dd02a2\)"):
        run.adapters("Charite")


@pytest.mark.parametrize("arguments", [["chat"], ["chat", "--client", "x"], ["export", "--client", "x"]])
def test_a_refusal_lists_names_with_their_ids(arguments: list[str], home: Path) -> None:
    ended = command(arguments[0], run_of(home).path, *arguments[1:])
    assert ended.code == 2
    assert "Charité (Charit--32dd02a2)" in ended.err
    assert "ada" in ended.err


def test_a_graph_file_takes_names_and_the_log_has_them(home: Path, tmp_path: Path) -> None:
    """Three clients are joined, one by its id; the two others learn alone, and are named with their ids."""
    by_name = ids(home)
    lines = ["client,neighbour,weight", "klinik zürich,東京,1", f"{by_name['東京']},ada,1"]
    (tmp_path / "graph.csv").write_text("\n".join(lines), encoding="utf-8")
    method = {"name": "mira", "graph": {"kind": "file", "path": str(tmp_path / "graph.csv")}}
    raw = yaml.safe_load((home / "config.yaml").read_text(encoding="utf-8"))
    raw |= {"methods": [method], "output_dir": str(tmp_path / "study")}
    ended = command("run", small_study.save_config(tmp_path / "config.yaml", raw))
    assert ended.code == 0, ended.err
    run = tmp_path / "study" / "mira" / "seed-3"
    graph = json.loads((run / "graph.json").read_text(encoding="utf-8"))
    joined = {(graph["clients"][first], graph["clients"][second]) for first, second, _ in graph["edges"]}
    pairs = {(by_name["Klinik Zürich"], by_name["東京"]), (by_name["東京"], by_name["ada"])}
    assert joined == pairs | {(second, first) for first, second in pairs}
    log = (run / "log.txt").read_text(encoding="utf-8")
    assert "2 of 5 clients have no neighbour in the graph and learn alone: " in log
    assert f"'Charité ({by_name['Charité']})'" in log
    assert f"'=1+1 ({by_name['=1+1']})'" in log


def test_a_refused_upload_is_logged_under_the_clients_name(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    charite = ids(home)["Charité"]
    monkeypatch.setattr(
        "fedmira.engine.gate.refusal", lambda upload, expected: "norm" if upload.header.client == charite else None
    )
    raw = yaml.safe_load((home / "config.yaml").read_text(encoding="utf-8"))
    raw |= {"methods": [{"name": "fedavg"}], "output_dir": str(tmp_path / "study")}
    fedmira.run(fedmira.load_config(small_study.save_config(tmp_path / "config.yaml", raw)))
    log = (tmp_path / "study" / "fedavg" / "seed-3" / "log.txt").read_text(encoding="utf-8")
    assert f"round 1: the upload of client 'Charité ({charite})' was refused: norm" in log


def test_an_example_and_a_plan_are_shown_under_names(home: Path, tmp_path: Path) -> None:
    config = home / "config.yaml"
    shown = command("run", config, "--show-example", f"output_dir={tmp_path / 'new'}")
    assert "--- Charité: " in shown.out
    assert "Charit--" not in shown.out
    lines = command("run", config, "--dry-run", f"output_dir={tmp_path / 'new'}").out.splitlines()
    assert [line.split("  ")[0] for line in lines[-len(NAMES) :]] == NAMES
