"""Model cards: what stands in them is what the run's own files say, and nothing that should stay where it is."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tests import small_study, tiny
from tests.small_study import CLIENTS, command

import fedmira
from fedmira.config.faults import check_config
from fedmira.data.partition import shown_name
from fedmira.export.card import LICENCES, USE, Card, licence_of, merged_card, model_card
from fedmira.reports.paths import without_folders

LICENSED = {"ada": "CC BY-SA 4.0", "bo": "Unknown", "cy": "Our own terms: `ask` us"}  # 007 has two, the others none


def save_rows(path: Path) -> Path:
    """Data that say which split a row is in, and under which licence some clients' rows stand."""
    rows = [json.loads(line) for line in small_study.save_data(path).read_text().splitlines()]
    for index, row in enumerate(rows):
        row["split"] = ("train", "train", "validation", "test")[index % 4]
        if row["client"] in LICENSED:
            row["license"] = LICENSED[row["client"]]
        elif row["client"] == "007":
            row["license"] = ("MIT", "Apache 2.0")[index % 2]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished study whose config names everything from there, and one whose config does not."""
    folder = tmp_path_factory.mktemp("here")
    small_study.save_base(folder / "base")
    save_rows(folder / "rows.jsonl")
    (folder / "graph.csv").write_text("client,neighbour,weight\n007,eve,1\nada,bo,1\n")
    graph = {"kind": "file", "path": str(folder / "graph.csv")}
    for name, place in (("near", Path()), ("far", folder)):
        raw = small_study.settings(
            place / "base",
            place / "rows.jsonl",
            place / name,
            data={"split_column": "split"},
            methods=[{"name": "fedavg"}, {"name": "mira", "lambda": 0.25, "graph": graph}],
        )
        small_study.save_config(folder / f"{name}.yaml", raw)
        ended = command("run", folder / f"{name}.yaml", "-q", folder=folder)
        assert ended.code == 0, ended.err
    return folder


def card(here: Path, client: str, *, study: str = "near", method: str = "mira") -> str:
    return (here / study / method / "seed-3" / "adapters" / client / "README.md").read_text(encoding="utf-8")


def front(text: str) -> dict[str, Any]:
    found = yaml.safe_load(text.split("---\n", 2)[1])
    assert isinstance(found, dict)
    return found


def facts(text: str) -> dict[str, str]:
    """The list of a card."""
    return dict(line[2:].split(": ", 1) for line in text.split("---\n", 2)[2].splitlines() if line[:2] == "- ")


def test_the_front_matter_is_what_the_hub_reads(here: Path) -> None:
    assert front(card(here, "eve")) == {
        "base_model": "base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "federated-learning", "fedmira"],
    }


def test_a_card_says_what_the_runs_own_files_say(here: Path) -> None:
    run = here / "near" / "mira" / "seed-3"
    own = json.loads((run / "run.json").read_text())
    table = json.loads((run / "clients.json").read_text())
    rounds = [json.loads(line)["clients"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    for client in CLIENTS:
        found = facts(card(here, client))
        assert (found["client"], found["group"]) == (client, f"`{table[client]['group']}`")
        assert (found["seed"], found["base"], found["adapter"]) == ("3", "`base`", "this client's own")
        drawn = sum(client in names for names in rounds)
        assert found["rounds"] == f"4, of which this client trained in {drawn}"
        assert found["base sha256"].split()[0] == own["base_fingerprint"]
        assert found["LoRA"] == "rank 2, alpha 4 on 4 layers (q_proj, v_proj)"
        counts = table[client]
        tokens = counts["trained_tokens"]
        assert found["trained on"] == f"{counts['examples']['train']} examples, {tokens} tokens with a loss"
        made = f"By FedMira {own['versions']['fedmira']}, in a run started on {own['started'][:10]}."
        assert f"{made} `fedmira run config.yaml`" in card(here, client)


def test_a_card_gives_the_scores_of_results_csv_beside_those_of_the_untouched_base(here: Path) -> None:
    for method in ("fedavg", "mira"):
        with (here / "near" / method / "seed-3" / "results.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
        for client in CLIENTS:
            value = {(row["metric"], row["round"]): float(row["value"]) for row in rows if row["client"] == client}
            lines = card(here, client, method=method).splitlines()
            for name, metric in (("loss (nats per token)", "loss"), ("exact_match", "exact_match")):
                assert f"| {name} | {value[metric, '0']:.4f} | {value[metric, '4']:.4f} |" in lines


def test_the_loss_of_a_card_is_that_of_the_adapter_loaded_as_the_card_says(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program of the card is run as it stands, and transformers computes the loss on the client's test rows."""
    monkeypatch.chdir(here)
    rows = [json.loads(line) for line in (here / "rows.jsonl").read_text().splitlines()]
    for client in ("007", "ada"):
        text = card(here, client)
        program = text.split(USE)[1].split("```python\n")[1].split("```")[0]
        names: dict[str, Any] = {}
        exec(program.replace("path/to/this/folder", f"near/mira/seed-3/adapters/{client}"), names)
        losses = []
        for row in rows:
            if row["client"] == client and row["split"] == "test":
                prompt, answer = (tiny.tokenizer()(row[key])["input_ids"] for key in ("prompt", "completion"))
                ids = [*prompt, *answer, tiny.END]
                labels = [-100] * len(prompt) + ids[len(prompt) :]
                with torch.no_grad():
                    losses.append(names["model"](input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss)
        (line,) = [line for line in text.splitlines() if line.startswith("| loss")]
        assert line.endswith(f"| {float(torch.stack(losses).mean()):.4f} |")


def test_the_card_of_a_client_that_was_never_drawn_says_that_its_adapter_changes_nothing(here: Path) -> None:
    said = "its adapter is the common start and changes nothing"
    unchanged = [client for client in CLIENTS if said in card(here, client)]
    assert unchanged == [client for client in CLIENTS if facts(card(here, client))["rounds"].endswith(" in 0")]
    assert unchanged
    assert not any(said in card(here, client, method="fedavg") for client in CLIENTS)


def test_the_card_of_a_shared_adapter_says_so(here: Path) -> None:
    assert facts(card(here, "ada", method="fedavg"))["adapter"] == "shared by all clients of the run"


@pytest.mark.slow
def test_the_card_of_a_shared_adapter_cut_to_a_rank_says_so(here: Path) -> None:
    raw = small_study.settings(
        here / "base",
        here / "rows.jsonl",
        here / "ranks",
        data={"split_column": "split"},
        lora={"r": 8, "ranks": [1, 2, 2, 1, 2, 3]},
        methods=[{"name": "flexlora"}],
    )
    fedmira.run(check_config(raw, "test"))
    for client, rank in (("ada", 1), ("eve", 3)):
        said = facts((here / "ranks/flexlora/seed-3/adapters" / client / "README.md").read_text(encoding="utf-8"))
        assert said["adapter"] == "shared by all clients of the run, cut to this client's rank"
        assert said["LoRA"].startswith(f"rank {rank},")


@pytest.mark.parametrize(
    ("client", "lines", "said"),
    [
        ("ada", {"license": "cc-by-sa-4.0"}, "`CC BY-SA 4.0`"),
        ("bo", {}, "not stated"),
        ("cy", {"license": "other", "license_name": "Our own terms: `ask` us"}, "`Our own terms: ?ask? us`"),
        ("007", {}, "not stated"),
        ("no", {}, "not stated"),
    ],
)
def test_a_licence_is_named_where_all_rows_of_the_client_name_it(
    client: str, lines: dict[str, str], said: str, here: Path
) -> None:
    text = card(here, client)
    assert {key: value for key, value in front(text).items() if key.startswith("license")} == lines
    assert facts(text)["licence of the data"] == said


def test_licences_are_found_under_both_spellings_and_unknown_is_none() -> None:
    assert licence_of({"Licence": "MIT", "task": "x"}) == "MIT"
    assert licence_of({"license": "n/a", "LICENSE": "ODbL"}) == "ODbL"
    assert licence_of({"license": " ", "licensee": "me"}) is None
    assert {"mit", "apache-2.0", "cc-by-nc-sa-4.0", "odc-by"} <= LICENCES
    assert all(re.fullmatch(r"[a-z0-9.-]+", name) for name in LICENCES)


def test_a_card_contains_no_folder_of_any_path(here: Path) -> None:
    for study in ("near", "far"):
        for path in (here / study).rglob("adapters/*/README.md"):
            text = path.read_text(encoding="utf-8")
            assert str(here) not in text
            assert str(here.parent) not in text
            assert '"path": "graph.csv"' in text or "fedavg" in text
    far = card(here, "ada", study="far")
    assert front(far)["base_model"] == "base"
    assert "from_pretrained('path/to/base')  # the folder with the sha256 above" in far


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("run /home/u/a.yaml x=/tmp/b", "run a.yaml x=b"),
        ("~/a/b.yaml", "b.yaml"),
        ({"graph": {"path": "/srv/x y/graph.csv"}, "n": [1, "/a/b"]}, {"graph": {"path": "graph.csv"}, "n": [1, "b"]}),
        ("data={path: /d/e.jsonl, by: x}", "data={path: e.jsonl, by: x}"),
        ("methods=[/a/b,/c/d]", "methods=[b,d]"),
        ("../shared/model and a/b/c and bundled:model", "../shared/model and a/b/c and bundled:model"),
        ("/", ""),
        ("https://x.org/a", "https://x.org/a"),
        ("3 / 4 and 1/2", "3 / 4 and 1/2"),
        (r"C:\Users\me\x.jsonl", "x.jsonl"),
        (r"data.path=C:\Users\me\x.jsonl", "data.path=x.jsonl"),
        ("see file:///home/u/x y", "see x y"),
        ("~user/a/b", "b"),
    ],
)
def test_absolute_paths_are_cut_to_their_last_name_and_others_stay(text: Any, left: Any) -> None:
    assert without_folders(text) == left


def test_a_card_without_facts_still_says_base_and_how_to_load_it() -> None:
    text = model_card("bundled:model", {})
    assert front(text)["base_model"] == "bundled:model"
    assert "AutoModelForCausalLM.from_pretrained(fedmira.bundled.resolve('bundled:model'))" in text
    assert "## On this client's own test examples" not in text
    assert "## How it was made" not in text


def test_a_revision_of_the_base_stands_in_the_program_that_loads_it() -> None:
    assert "from_pretrained('some/one', revision='v2')" in model_card("some/one", {}, revision="v2")


def test_scores_that_are_not_finite_are_shown_as_none() -> None:
    given: Card = {"scores": {"loss": (None, float("nan")), "rouge_l": (float("inf"), 0.5)}}
    text = model_card("x", given)
    assert "| loss (nats per token) | n/a | n/a |" in text
    assert "| rouge_l | n/a | 0.5000 |" in text


def test_hostile_words_do_not_leave_their_line() -> None:
    given: Card = {
        "client": "ada",
        "group": "a`b\n---\n# x",
        "method": "mira",
        "settings": {"graph": {"column": "`\n- client: bo"}},
        "licence": 'x"\n---\nlicense: mit\x1b[2J',
        "version": "1",
        "date": "2026-01-01",
    }
    text = model_card("x", given)
    assert front(text)["license"] == "other"
    assert [line for line in text.splitlines() if line.startswith("- client")] == ["- client: ada"]
    assert "- group: `a?b?---?# x`" in text.splitlines()
    assert all(letter.isprintable() or letter == "\n" for letter in text)


def test_the_card_of_a_merged_model_keeps_the_facts_and_loads_without_peft(here: Path) -> None:
    text = merged_card(card(here, "ada"), base_model="/a/base", dtype="bfloat16", difference=0.0123)
    assert {key: front(text)[key] for key in ("base_model", "library_name", "base_model_relation", "license")} == {
        "base_model": "base",
        "library_name": "transformers",
        "base_model_relation": "finetune",
        "license": "cc-by-sa-4.0",
    }
    assert facts(text) == facts(card(here, "ada"))
    assert "in bfloat16. On random tokens" in text
    assert "by at most 1.2e-02 of the largest" in text
    assert "peft" not in text.split(USE)[1].lower()
    assert text.count(USE) == 1
    assert "/a/" not in text


def test_the_card_of_a_prompt_says_what_it_is_and_that_its_encoder_is_elsewhere() -> None:
    text = model_card("some/base", {"client": "ada", "virtual_tokens": 20, "hidden": 128})
    assert front(text)["tags"] == ["p-tuning", "federated-learning", "fedmira"]
    assert "# P-tuned prompt of client ada, made with FedMira" in text.splitlines()
    assert facts(text)["virtual tokens"] == "20, made by an MLP of width 128"
    assert "training continues there, with `fedmira resume`, and not from this folder" in text
    assert "  # 20 logits precede those of the text" in text.split(USE)[1]
    assert "lora" not in text.lower()
    lora = model_card("some/base", {"client": "ada", "rank": 2, "alpha": 4.0})
    assert not any(word in lora for word in ("virtual", "MLP", "resume", "prompt", "# 20"))


def test_a_prompt_that_was_never_drawn_is_not_said_to_change_nothing() -> None:
    """Virtual tokens move the base before any of them is trained."""
    given: Card = {"personal": True, "drawn": 0, "scores": {"loss": (2.0, 3.0)}}
    assert "is the common start and changes nothing." in model_card("x", given)
    assert "is the common start.\n" in model_card("x", {**given, "virtual_tokens": 2, "hidden": 4})


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=12))
def test_the_front_matter_is_read_back_to_the_letter_whatever_a_licence_is_called(text: str) -> None:
    """U+0085, U+2028, quotes, colons, a byte order mark, control characters: as the hub's own reader sees them."""
    read = huggingface_hub.ModelCard(model_card(f"some/{text}", {"licence": text})).data.to_dict()
    assert read["base_model"] == f"some/{text}"
    assert read["license"] == "other" or read["license"] in LICENCES
    if read["license"] == "other":
        assert read["license_name"] == shown_name(text)
    assert read["tags"] == ["lora", "federated-learning", "fedmira"]


@pytest.mark.parametrize(
    "letter", ["\x85", "\u2028", "\u2029", "\ufeff", "\x07", "\t", "'", '"', "\\", ": ", " #", "\U0001f600"]
)
def test_an_odd_character_of_a_base_survives_the_front_matter(letter: str) -> None:
    assert huggingface_hub.ModelCard(model_card(f"some/a{letter}b", {})).data.base_model == f"some/a{letter}b"


def test_a_card_says_that_a_tokenizer_alone_reads_special_tokens_otherwise() -> None:
    card: Card = {"template": "none", "chat_template": True}
    said = "`data.special_tokens: text`"
    assert said not in model_card("base", {**card, "special_text": False})
    assert said in model_card("base", {**card, "special_text": True})
    assert said in model_card("base", {**card, "special_text": True, "chat_template": False})
