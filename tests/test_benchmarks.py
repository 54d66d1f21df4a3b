"""The benchmarks answer, keep what they found, and the page of their results has the right number in the right cell."""

import importlib
import json
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = sorted(
    str(path.relative_to(BENCHMARKS))
    for path in BENCHMARKS.glob("**/*.py")
    if "__main__" in (text := path.read_text(encoding="utf-8"))
    and ("ArgumentParser(" in text or "evidence.options(" in text)
)
SVG = "{http://www.w3.org/2000/svg}"
DEFAULT_NOTES = (BENCHMARKS / "notes.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def modules_of_their_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget the modules of the scripts afterwards: their names (units, machine, ...) are no package's."""
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    torch.set_num_threads(threads)
    for name, module in list(sys.modules.items()):
        if str(BENCHMARKS) in (getattr(module, "__file__", None) or "") and name != "__main__":
            del sys.modules[name]


@pytest.fixture
def bench() -> ModuleType:
    return importlib.import_module("bench")


def run_script(script: str, *options: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a script as `python benchmarks/SCRIPT OPTIONS` does, here; return its exit status."""
    path = BENCHMARKS / script
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.setattr(sys, "argv", [str(path), *options])
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_says_how_it_is_called(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(script, "--help", monkeypatch=monkeypatch) == 0
    shown = capsys.readouterr().out
    assert f"python benchmarks/{script}" in shown
    assert script == "bench.py" or writes_a_page(script) or "--json" in shown


def writes_a_page(script: str) -> bool:
    """Does a script write a page that is its alone?"""
    pages = ("choosing/", "methods/", "paper/", "federation/", "privacy/", "large/", "ranks/", "questions/")
    return script.startswith(pages) or script in (
        "startup.py",
        "reliability.py",
        "speed/private.py",
        "scale/actors.py",
    )


def test_every_row_runs_a_script_that_is_there(bench: ModuleType) -> None:
    pages = set(filter(writes_a_page, SCRIPTS))
    assert {row.script for row in bench.ROWS} == set(SCRIPTS) - {"bench.py"} - pages
    assert sorted(row.name for row in bench.ROWS) == sorted([*bench.CORE, *bench.FULL])


def test_the_page_on_the_first_answer_shows_medians_in_units_of_the_first_row() -> None:
    startup = importlib.import_module("startup")
    seconds = {startup.YARDSTICK: [0.2, 0.1, 0.3], "fedmira --help": [0.5, 0.2, 9.0]}
    seconds |= {startup.REPORT: [0.6, 0.3, 0.9], startup.ROW_OF_LIBRARIES: [0.4, 0.2, 0.6]}
    text = startup.page({"machine": {"cpu": "a", "cores": 2, "python": "3"}, "seconds": seconds})
    assert "| `fedmira --help` | 0.50 | 0.20 to 9.00 | 2.5 |" in text
    assert "The last row, 2.0 of the 3.0 of a report" in text
    assert "3 processes each" in text


def test_the_page_of_reliability_has_the_newest_figure_of_each_kind(tmp_path: Path) -> None:
    reliability = importlib.import_module("reliability")
    line = {
        "test": "tests/faults/test_x.py::test_y",
        "what": "kills",
        "count": 1000,
        "found": {"lost": 0, "ratio": 1.25},
    }
    (tmp_path / "figures").write_text(json.dumps({**line, "count": 3}) + "\n" + json.dumps(line) + "\n")
    machine = {
        "cpu": "a",
        "cores": 2,
        "memory_gb": 9,
        "python": "3",
        "commit": "c",
        "date": "d",
        "versions": {"torch": "2"},
    }
    text = reliability.page({"machine": machine, "figures": reliability.read_figures(tmp_path / "figures")})
    assert "| kills | 1,000 | lost: 0; ratio: 1.25 | `test_x.py::test_y` |" in text
    assert text.count("| kills |") == 1


@pytest.mark.slow  # products of bfloat16, which many CPUs compute slowly
@pytest.mark.slow
def test_the_gpu_script_runs_on_a_small_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = tmp_path / "gpu.json"
    options = ("--tiny", "--device", "cpu", "--pairs", "1", "--shapes", "gpt2-large", "--json", str(found))
    assert run_script("speed/gpu.py", *options, monkeypatch=monkeypatch) == 0
    (row,) = json.loads(found.read_text(encoding="utf-8"))["rows"]
    assert row["shape"] == "gpt2-large"
    assert len(row["ratio"]) == 1


# ---------------------------------------------------------------- running rows

GOOD = 'import json, sys\njson.dump({"name": "good", "rows": []}, open(sys.argv[-1], "w"))\n'


def script_row(bench: ModuleType, folder: Path, name: str, text: str) -> Any:
    """A row that runs a script with this text."""
    path = folder / f"{name}.py"
    path.write_text(text, encoding="utf-8")
    return bench.Row(name, str(path))


def test_a_row_that_fails_keeps_the_older_result_and_the_others_go_on(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    bench.store(machine() | {"old": True}, results / "bad.json")
    rows = (
        script_row(bench, tmp_path, "bad", f"print('seen', flush=True)\n{GOOD}sys.exit(3)\n"),
        script_row(bench, tmp_path, "good", GOOD),
    )
    monkeypatch.setattr(bench, "ROWS", rows)
    monkeypatch.setattr(bench, "CORE", ("bad", "good"))
    options = ["--results", str(results), "--docs", str(tmp_path / "docs"), "core"]
    assert bench.main(options) == 1
    shown = capfd.readouterr().out
    assert "seen" in shown
    assert "bad: FAILED, exit status 3. An older result stays." in shown
    assert json.loads((results / "bad.json").read_text(encoding="utf-8"))["old"]
    stored = json.loads((results / "good.json").read_text(encoding="utf-8"))
    assert stored["name"] == "good"
    assert stored["command"] == f"python benchmarks/{rows[1].script}"
    assert stored["machine"]["python"] == sys.version.split()[0]
    assert stored["seconds"] >= 0
    assert (tmp_path / "docs" / "results" / "speed.md").is_file()
    assert bench.main([*options, "--only", "good"]) == 0


def test_a_row_without_json_fails(bench: ModuleType, tmp_path: Path) -> None:
    assert bench.run_rows([script_row(bench, tmp_path, "silent", "")], tmp_path / "results") == ["silent"]
    assert not (tmp_path / "results" / "silent.json").exists()


def test_without_cuda_the_row_of_the_gpu_names_its_command(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = (row for row in bench.ROWS if row.gpu)
    assert bench.run_rows([row], tmp_path, cuda=lambda: False) == []
    assert "no CUDA device; on a machine with one run: python benchmarks/speed/gpu.py" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the page

LOOPS = ("plain fp32", "plain bf16", "fedmira fp32", "fedmira bf16")


def machine(**other: Any) -> dict[str, Any]:
    facts = {
        "cpu": "Small CPU",
        "cores": 2,
        "threads": 2,
        "bf16": ["amx_bf16"],
        "memory_gb": 24.0,
        "gpu": None,
        "python": "3.11.7",
        "versions": {"torch": "2.13.0"},
        "commit": "abc1234",
        "date": "2026-11-21",
    }
    return {"machine": facts | other, "seconds": 120.0}


def trained(unit: str, speeds: tuple[float, ...], ratio: list[float], share: float) -> dict[str, Any]:
    row = {"unit": unit, "title": f"base {unit}", "tokens_per_second": dict(zip(LOOPS, speeds, strict=True))}
    row |= {"ratio": ratio, "share": share, "useful_gflops": 120.0, "bf16_matmul_gflops": 480.0, "peak_rss_mb": 2048.4}
    return {**machine(), "rows": [row]}


def evaluated(ratio: float) -> dict[str, Any]:
    names = [f"fedmira {one} to plain {other}" for one in ("bf16", "fp32") for other in ("fp32", "bf16")]
    ratios = {name: [ratio - 1, ratio + place, 90.0] for place, name in enumerate(names)}
    return {"tokens_per_second": dict(zip(LOOPS, (100, 200, 300, 800), strict=True)), "ratio": ratios}


def merged(sampled: int, neighbours: str, merge_s: float, ratio: float, **loop: float) -> dict[str, Any]:
    taken = {"copy": 0.02, "fresh": 0.04, "merge": merge_s, "plain": 2 * merge_s}
    row = {"sampled": sampled, "neighbours": neighbours, "outside": 7, "gb_per_second": 6.5, "seconds": taken}
    return {**row, "to_copy": [ratio] * 3, "plain_to_copy": [ratio] * 3, **loop}


def studied(name: str, clients: int, round_s: float, anon_mb: float) -> dict[str, Any]:
    seconds = ("training_s", "merge_s", "measuring_s", "saving_s", "prepare_s", "score_start_s", "export_s", "report_s")
    row = {"name": name, "clients": clients, "sampled": 8, "round_s": round_s, "round_cpu_s": 2 * round_s}
    row |= {"round_spread_s": [round_s / 2, round_s * 2], **dict.fromkeys(seconds, 1.0)}
    row |= {"anon_rounds": anon_mb * 1e6, "file_rounds": 500e6, "anon_peak": 2 * anon_mb * 1e6, "file_peak": 12e9}
    return row | {"checkpoint_bytes": 9e6 + clients * 45, "changed_bytes": 9e6, "study_bytes": 13e9}


def measured() -> dict[str, dict[str, Any]]:
    """Every row by hand; (a) and the merge of 32 miss their targets."""
    texts = [("tasks", {"1": 100, "2": 190, "4": 350}, 50), ("8 tokens each", {"1": 40, "2": 80, "4": 160}, 20)]
    cohorts = [
        {"text": text, "tokens_per_second": speeds, "plain": {"plain fp32": plain, "plain bf16": plain + 5}}
        for text, speeds, plain in texts
    ]
    shares = {"same_text_fp32": 1.0, "same_text_bf16": 0.9, "same_text_plain_bf16": 0.8, "changed_by_adapters": 0.7}
    written = {"prompts": 160, "prompt_tokens": 12345, "max_new_tokens": 32, "loss_error_fp32": 1e-6, **shares}
    merges = [
        merged(8, "sampled", 0.03, 1.5, loop_s=3.0, joined_loop_s=1.5),
        merged(32, "sampled", 0.5, 2.5, loop_s=40.0, joined_loop_s=10.0),
        merged(8, "stored", 0.04, 1.75),
    ]
    kernel = {"width": 2048, "clients": 10, "rank": 8, "ours_s": 0.01, "dense_s": 2.5, "ratio": [240.0, 250.0, 260.0]}
    kernel["merge"] = {**kernel, "modules": 4, "dense_s": 10.0, "ratio": [90.0, 99.0, 120.0], "difference": 2e-5}
    resumed = {"name": "resume", "killed_after": 3, "resume_s": 40.0, "different": [], "clients": 10_000}
    studies = [
        studied("mira", 10, 2.0, 100),
        studied("mira", 100, 2.0, 110),
        studied("mira", 10_000, 2.2, 400),
        resumed,
        studied("fedavg", 10_000, 1.0, 300),
    ]
    part = {"seconds": 50.0, "RssAnon": 1.25e9, "RssFile": 9e9}
    real = {"clients": 555, "rounds": 30, "sampled": 56, "methods": ["local", "mira"], "seconds": 1200.0}
    real |= {"prepare_s": 9.0, "round_s": 12.0, "training_s": 10.0, "merge_s": 0.05, "study_bytes": 5e8}
    real |= {"anon_peak": 2.5e9, "file_peak": 1e8, "scores": {"base": {"loss": 3.0}, "mira": {"loss": 2.5}}}
    gpu = {"shape": "gpt2-large", "tokens_per_second": {"plain bf16": 1000, "fedmira bf16": 3000}}
    gpu |= {"ratio": [3.0], "useful_tflops": 20.0, "bf16_matmul_tflops": 80.0, "share": 0.25}
    gpu |= {"peak_device_gb": {"plain bf16": 10.0, "fedmira bf16": 30.0}}
    return {
        "training-a": trained("a", (100, 200, 300, 1200), [2.0, 4.0, 9.0], 0.25),
        "training-b": trained("b", (1000, 1500, 2000, 6000), [5.0, 6.0, 7.0], 0.5),
        "training-c": trained("c", (1000, 500, 3000, 8000), [8.0, 8.0, 8.0], 1.1),
        "cohorts": {**machine(), "rows": cohorts},
        "generation": {
            **machine(),
            **written,
            "answers": evaluated(6.5),
            "long": evaluated(8),
            "answer_tokens": {"plain fp32": 1103},
            "losses": evaluated(3),
            "peak_rss_mb": 1500.0,
        },
        "merge": {**machine(commit="def5678-dirty", date="2026-11-22"), "rows": merges},
        "flexlora": {**machine(), **kernel, "difference": 1e-6, "peak_rise_mb": 20.0, "dense_matrix_mb": 256.0},
        "clients": {**machine(), "rows": studies},
        "rows": {**machine(), "clients": 10_000, "rows_bytes": 11_796_480_000, "100 rounds": part, "round_s": [0.5]},
        "natural-instructions": {**machine(), **real},
        "gpu": {**machine(gpu="Large GPU"), "rows": [gpu]},
    }


def make_page(bench: ModuleType, folder: Path, found: dict[str, dict[str, Any]]) -> str:
    """Write the page from these results."""
    for name, result in found.items():
        bench.store(result, folder / "results" / f"{name}.json")
    (folder / "results").mkdir(exist_ok=True)
    assert bench.main(["--results", str(folder / "results"), "--docs", str(folder / "docs"), "page"]) == 0
    return (folder / "docs" / "results" / "speed.md").read_text(encoding="utf-8")


def section(page: str, title: str) -> str:
    return page.split(f"## {title}\n")[1].split("\n## ")[0]


def tables(text: str) -> list[list[dict[str, str]]]:
    """Each table of a text: its lines, by the names of their columns."""
    found = []
    for block in re.findall(r"(?:^\|.*\n?)+", text, flags=re.MULTILINE):
        head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.strip().split("\n")]
        found.append([dict(zip(head, line, strict=True)) for line in lines])
    return found


def aims(page: str) -> dict[str, tuple[str, str]]:
    """What was measured, and whether that reaches the target, by name."""
    (lines,) = tables(section(page, "Targets and measurements"))
    return {line["what"]: (line["measured"], line["reached"]) for line in lines}


@pytest.fixture
def page(bench: ModuleType, tmp_path: Path) -> str:
    return make_page(bench, tmp_path, measured())


def test_training_has_speeds_ratio_with_spread_share_and_memory(page: str) -> None:
    (lines,) = tables(section(page, "Training"))
    assert lines[0] == {
        "unit": "(a) base a",
        "plain fp32, tokens/s": "100",
        "plain bf16, tokens/s": "200",
        "fedmira fp32, tokens/s": "300",
        "fedmira bf16, tokens/s": "1,200",
        "fedmira bf16 to plain fp32": "4.00 (2.00 to 9.00)",
        "to plain bf16": "6.00",
        "useful GFLOP/s": "120",
        "bf16 matmul GFLOP/s": "480",
        "share": "25 %",
        "peak RSS, MiB": "2,048",
    }
    assert [line["to plain bf16"] for line in lines] == ["6.00", "4.00", "16.00"]
    assert "Not measured yet: training-a-random and training-b-random." in section(page, "Training")


def test_targets_stand_beside_what_was_measured_also_where_they_are_missed(page: str) -> None:
    found = aims(page)
    assert found["training (a), times the fp32 yardstick"] == ("4.00 (2.00 to 9.00)", "**no**")
    assert found["training (b), times the fp32 yardstick"] == ("6.00 (5.00 to 7.00)", "yes")
    assert found["training (A), times the fp32 yardstick"] == ("not measured yet", "")
    assert found["training (a), useful FLOP/s of the bf16 matmul rate"] == ("25 %", "**no**")
    assert found["answers in bf16, times `generate` by PEFT in fp32"] == ("6.50 (5.50 to 90.00)", "yes")
    assert found["MIRA's merge of 8, times faster than the loop over files"] == ("100", "yes")
    assert found["MIRA's merge of 32, times faster than the loop over files"] == ("80", "**no**")
    assert found["MIRA's merge of 32, times a copy of the rows"] == ("2.50 (sampled neighbours)", "**no**")
    flexlora = "FlexLoRA's merge, times faster than dense SVD (d = 2,048, 10 clients of rank 8)"
    assert found[flexlora] == ("99 (90 to 120)", "**no**")
    assert found["10,000 clients, anonymous memory above the base"] == (
        "0.80 GB (mira, a study); 0.60 GB (fedavg, a study); 1.25 GB (all rows written)",
        "yes",
    )
    assert found["round at K = 10,000, times that at K = 100"] == ("1.10 in seconds, 1.10 in CPU seconds", "yes")
    assert found["checkpoint, bytes per byte that changed"] == (
        "1.00 (K = 10), 1.00 (K = 100), 1.05 (K = 10,000)",
        "yes",
    )
    assert found["answers of full length in bf16, times `generate` by PEFT in bf16"] == ("9.00 (7.00 to 90.00)", "yes")
    assert found["555 clients of Natural Instructions, a full run of MIRA"][0].startswith("20.0 minutes, 2.50 GB")
    assert found["killed and resumed"] == ("0 files differ (K = 10,000)", "yes")
    assert found["training on a GPU, times the PEFT loop in bf16"] == ("gpt2-large 3.00 (3.00 to 3.00)", "")
    assert found["`make bench`, minutes"] == ("14.0", "yes")  # 7 rows of 2 minutes


def test_a_slow_round_a_greedy_study_and_a_wrong_resume_miss_their_targets(bench: ModuleType, tmp_path: Path) -> None:
    results = measured()
    results["clients"]["rows"] = [
        studied("mira", 100, 2.0, 100),
        studied("mira", 10_000, 2.5, 1600) | {"checkpoint_bytes": 18e6},
        {"name": "resume", "killed_after": 3, "resume_s": 4.0, "different": ["a", "b"], "clients": 10_000},
    ]
    results["flexlora"]["merge"]["width"] = 256  # the target speaks of d = 2,048
    found = aims(make_page(bench, tmp_path, results))
    flexlora = "FlexLoRA's merge, times faster than dense SVD (d = 2,048, 10 clients of rank 8)"
    assert found[flexlora] == ("not measured yet", "")
    assert found["round at K = 10,000, times that at K = 100"] == ("1.25 in seconds, 1.25 in CPU seconds", "**no**")
    assert found["10,000 clients, anonymous memory above the base"][1] == "**no**"  # 3.2 GB in the study
    assert found["checkpoint, bytes per byte that changed"] == ("1.00 (K = 100), 2.00 (K = 10,000)", "**no**")
    assert found["killed and resumed"] == ("2 files differ (K = 10,000)", "**no**")


def test_the_other_tables_have_their_numbers(page: str) -> None:
    (cohorts,) = tables(section(page, "Clients per pass"))
    assert list(cohorts[0].values()) == ["tasks", "100", "190", "350", "50", "55"]
    (evaluation,) = tables(section(page, "Generation and scoring"))
    assert evaluation[0]["fedmira bf16, tokens/s"] == "800"
    assert evaluation[0]["bf16 to bf16"] == "7.50 (5.50 to 90.00)"
    assert evaluation[1]["bf16 to bf16"] == "9.00 (7.00 to 90.00)"
    assert evaluation[2]["fp32 to fp32"] == "5.00 (2.00 to 90.00)"
    (merges,) = tables(section(page, "Server: MIRA's merge"))
    assert (merges[0]["merge, ms"], merges[0]["loop to merge"], merges[0]["to merge"]) == ("30.0", "100", "50")
    assert (merges[2]["neighbours"], merges[2]["loop, s"]) == ("stored (7 not sampled)", "")
    ((step, kernel),) = tables(section(page, "Server: FlexLoRA's merge"))
    assert (step["what"], step["dense SVD, ms"], step["dense to ours"]) == (
        "merge, 4 modules",
        "10,000",
        "99 (90 to 120)",
    )
    assert (kernel["what"], kernel["dense to ours"]) == ("kernel, one module", "250 (240 to 260)")
    times, memory, whole = tables(section(page, "Ten thousand clients"))
    assert [line["K"] for line in times] == ["10", "100", "10,000", "10,000"]
    assert times[2]["round, s"] == "2.20 (1.10 to 4.40)"
    assert memory[2]["RssAnon in rounds, MB"] == "400"
    assert memory[2]["checkpoint, MB"] == "9.45"
    assert list(whole[0].values()) == ["100 rounds", "50.0", "1,250", "9,000"]
    (real,) = tables(section(page, "555 real clients"))
    assert [list(line.values()) for line in real] == [["base", "3.0000"], ["mira", "2.5000"]]
    (gpu,) = tables(section(page, "GPU"))
    assert (gpu[0]["ratio"], gpu[0]["share"], gpu[0]["fedmira bf16, peak GiB"]) == (
        "3.00 (3.00 to 3.00)",
        "25 %",
        "30.0",
    )


def test_a_section_that_was_measured_otherwise_says_so(page: str) -> None:
    assert "Differences, merge: commit def5678 with changes on top, date 2026-11-22." in page
    assert "Differences, gpu: GPU Large GPU." in page
    assert page.count("Differences, ") == 2


def test_each_section_begins_with_a_command_that_measures_it(bench: ModuleType, page: str) -> None:
    module = importlib.import_module("speed_page")
    names = {row.name for row in bench.ROWS}
    assert {name for one in module.SECTIONS for name in one.names} == names
    for one in module.SECTIONS:
        assert section(page, one.title).split("\n")[1] == f"    {one.command}"


def test_the_page_builds_where_nothing_is_measured(bench: ModuleType, tmp_path: Path) -> None:
    page = make_page(bench, tmp_path, {})
    assert page.count("\nNot measured yet.") == 8
    assert {reached for _, reached in aims(page).values()} == {""}
    assert "![" not in page
    assert not (tmp_path / "docs" / "images").exists()
    assert page.endswith(DEFAULT_NOTES.strip() + "\n")


def test_a_stored_file_that_is_no_json_is_named(bench: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "merge.json").write_text("{", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"merge\.json: not JSON .*; measure it again or remove the file"):
        bench.main(["--results", str(tmp_path), "--docs", str(tmp_path / "docs"), "page"])


def test_the_page_in_docs_is_what_the_stored_results_give(bench: ModuleType, tmp_path: Path) -> None:
    assert bench.main(["--docs", str(tmp_path), "page"]) == 0
    stale = [
        str(path.relative_to(tmp_path))
        for path in tmp_path.glob("*/*")
        if not (ROOT / "docs" / path.relative_to(tmp_path)).is_file()
        or (ROOT / "docs" / path.relative_to(tmp_path)).read_bytes() != path.read_bytes()
    ]
    assert stale == [], "write them again: python benchmarks/bench.py page"


# ---------------------------------------------------------------- figures


def drawn(path: Path) -> tuple[list[ElementTree.Element], list[str], int]:
    """The lines, texts and marks of a figure, which has a white ground of its full size."""
    root = ElementTree.parse(path).getroot()
    (ground,) = root.findall(f"{SVG}rect")
    assert (ground.get("width"), ground.get("height")) == (root.get("width"), root.get("height"))
    assert ground.get("fill") == "#FFFFFF"
    marks = [one for one in root.findall(f"{SVG}path") if (one.get("transform") or "").startswith("translate")]
    return root.findall(f"{SVG}polyline"), [one.text or "" for one in root.iter(f"{SVG}text")], len(marks)


def test_the_figure_of_cohorts_names_and_draws_every_series(page: str, tmp_path: Path) -> None:
    lines, texts, marks = drawn(tmp_path / "docs" / "images" / "speed-cohorts.svg")
    names = [f"{kind}, {text}" for text in ("tasks", "8 tokens each") for kind in ("FedMira bf16", "plain fp32 loop")]
    assert set(names) <= set(texts)
    assert {"1", "2", "4", "clients per pass (log scale)", "real tokens per second (log scale)"} <= set(texts)
    assert len(lines) == 2 * 6  # each line, and a piece of it beside its name
    assert marks == 2 * (3 + 1)
    whole = [line.get("points", "").split() for line in lines[:6]]
    assert [len(points) for points in whole] == [3, 2, 2, 3, 2, 2]
    across, down = zip(*[map(float, point.split(",")) for point in whole[3]], strict=True)
    # 40, 80, 160 against 1, 2, 4 is a straight line where both axes are logarithms
    assert across[1] - across[0] == pytest.approx(across[2] - across[1], abs=0.2)
    assert down[0] - down[1] == pytest.approx(down[1] - down[2], abs=0.2)
    assert down[0] > down[1]


def test_the_figure_of_clients_has_time_and_memory_of_mira_only(page: str, tmp_path: Path) -> None:
    lines, texts, _ = drawn(tmp_path / "docs" / "images" / "speed-clients.svg")
    names = {"seconds (least to most)", "CPU seconds, all threads", "RssAnon (anonymous)", "RssFile (mapped files)"}
    assert names <= set(texts)
    assert texts.count("10,000") == 2
    assert sorted(len(line.get("points", "").split()) for line in lines) == [2, 2, 2, 2, 3, 3, 3, 3]


def test_names_of_lines_that_end_together_stay_apart() -> None:
    figures = importlib.import_module("speed_figures")
    places = figures.apart([50.0, 50.0, 52.0, 98.0], 10, 100, 16)
    assert places == [50.0, 66.0, 82.0, 98.0]
    assert figures.apart([100.0, 99.0], 10, 100, 16) == [100.0, 84.0]


def test_one_size_of_cohort_is_drawn_too(bench: ModuleType, tmp_path: Path) -> None:
    results = measured()
    for row in results["cohorts"]["rows"]:
        row["tokens_per_second"] = {"8": 100.0}
    results["clients"]["rows"] = [studied("mira", 10, 2.0, 100)]
    make_page(bench, tmp_path, results)
    for name in ("cohorts", "clients"):
        assert drawn(tmp_path / "docs" / "images" / f"speed-{name}.svg")[0]


def test_bench_runs_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "bench.py"), "--results", str(tmp_path), "--docs", str(tmp_path)]
    ended = subprocess.run([*command, "page"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"wrote {tmp_path / 'results' / 'speed.md'}\n"
