"""Our targets for speed and memory beside the measurements, as a table."""

import statistics
from dataclasses import dataclass

from stored import CORE, GB, Results, resume_row, row_parts, spread, study_rows, table, unit_row


@dataclass(frozen=True)
class Aim:
    """A target. measured: None if nothing is stored; reached: None if the target is not a number."""

    what: str
    target: str
    measured: str | None = None
    reached: bool | None = None


def training_aims(results: Results) -> list[Aim]:
    aims = []
    for unit, least, hoped in (("a", 6, 10), ("A", 6, 10), ("b", 4, 8), ("B", 4, 8), ("c", 4, 8)):
        what, target = f"training ({unit}), times the fp32 yardstick", f"at least {least}, aiming at {hoped}"
        row = unit_row(results, unit)
        ratio = statistics.median(row["ratio"]) if row else 0.0
        aims.append(Aim(what, target, spread(row["ratio"]), ratio >= least) if row else Aim(what, target))
    for unit in "aA":
        row = unit_row(results, unit)
        what, target = f"training ({unit}), useful FLOP/s of the bf16 matmul rate", "at least 50 %, aiming at 75 %"
        aims.append(Aim(what, target, f"{100 * row['share']:.0f} %", row["share"] >= 0.5) if row else Aim(what, target))
    return aims


def generation_aims(results: Results) -> list[Aim]:
    aims = []
    for kind, title in (("answers", "answers in bf16"), ("long", "answers of full length in bf16")):
        for dtype in ("fp32", "bf16"):
            what = f"{title}, times `generate` by PEFT in {dtype}"
            if "generation" not in results:
                aims.append(Aim(what, "at least 6"))
                continue
            ratio = results["generation"][kind]["ratio"][f"fedmira bf16 to plain {dtype}"]
            aims.append(Aim(what, "at least 6", spread(ratio), statistics.median(ratio) >= 6))
    return aims


def merge_aims(results: Results) -> list[Aim]:
    aims = []
    for sampled, least in ((8, 50), (32, 100)):
        rows = [row for row in results.get("merge", {}).get("rows", []) if row["sampled"] == sampled]
        what, target = f"MIRA's merge of {sampled}, times a copy of the rows", "at most 2"
        if rows:
            ratios = {row["neighbours"]: statistics.median(row["to_copy"]) for row in rows}
            words = ", ".join(f"{value:.2f} ({name} neighbours)" for name, value in ratios.items())
            aims.append(Aim(what, target, words, max(ratios.values()) <= 2))
        else:
            aims.append(Aim(what, target))
        what, target = f"MIRA's merge of {sampled}, times faster than the loop over files", f"at least {least}"
        looped = [row["loop_s"] / row["seconds"]["merge"] for row in rows if "loop_s" in row]
        aims.append(Aim(what, target, f"{looped[0]:,.0f}", looped[0] >= least) if looped else Aim(what, target))
    return aims


def flexlora_aims(results: Results) -> list[Aim]:
    what, target = "FlexLoRA's step", "no dense d x d"
    fast, least = "FlexLoRA's merge, times faster than dense SVD (d = 2,048, 10 clients of rank 8)", 100
    row = results.get("flexlora")
    if row is None:
        return [Aim(what, target), Aim(fast, f"at least {least}")]
    words = f"memory rises by {row['peak_rise_mb']:.0f} MiB, one d x d is {row['dense_matrix_mb']:.0f} MiB"
    aims = [Aim(what, target, words, row["peak_rise_mb"] < row["dense_matrix_mb"])]
    merge = row.get("merge", {})
    if (merge.get("width"), merge.get("clients"), merge.get("rank")) != (
        2048,
        10,
        8,
    ):  # measured with other sizes, or not at all
        return [*aims, Aim(fast, f"at least {least}")]
    ratio = merge["ratio"]
    words = f"{statistics.median(ratio):.0f} ({min(ratio):.0f} to {max(ratio):.0f})"
    return [*aims, Aim(fast, f"at least {least}", words, statistics.median(ratio) >= least)]


def client_aims(results: Results) -> list[Aim]:
    """Memory, time, checkpoints and resume at 10,000 clients."""
    rows = study_rows(results)
    by_clients = {row["clients"]: row for row in rows if row["name"] == "mira"}
    many, few = by_clients.get(10_000), by_clients.get(100)
    anon = {f"{row['name']}, a study": row["anon_peak"] for row in rows if row["clients"] == 10_000}
    if results.get("rows", {}).get("clients") == 10_000:
        anon["all rows written"] = max(part["RssAnon"] for part in row_parts(results["rows"]).values())
    aims = [
        Aim(
            "10,000 clients, anonymous memory above the base",
            "under 3 GB",
            "; ".join(f"{value / GB:.2f} GB ({name})" for name, value in anon.items()) or None,
            max(anon.values()) < 3 * GB if anon else None,
        )
    ]
    what, target = "round at K = 10,000, times that at K = 100", "at most 1.20"
    if many and few and many["sampled"] == few["sampled"]:
        ratio, cpu = many["round_s"] / few["round_s"], many["round_cpu_s"] / few["round_cpu_s"]
        aims.append(Aim(what, target, f"{ratio:.2f} in seconds, {cpu:.2f} in CPU seconds", ratio <= 1.2))
    else:
        aims.append(Aim(what, target))
    what, target = "checkpoint, bytes per byte that changed", "the same at any K (within 20 %)"
    if len(by_clients) > 1:
        shares = {
            clients: row["checkpoint_bytes"] / row["changed_bytes"] for clients, row in sorted(by_clients.items())
        }
        words = ", ".join(f"{share:.2f} (K = {clients:,})" for clients, share in shares.items())
        aims.append(Aim(what, target, words, max(shares.values()) <= 1.2 * min(shares.values())))
    else:
        aims.append(Aim(what, target))
    ended = resume_row(results)
    what, target = "killed and resumed", "as if not stopped"
    if ended:
        different = len(ended["different"])
        words = f"{different} files differ (K = {ended['clients']:,})"
        return [*aims, Aim(what, target, words, different == 0)]
    return [*aims, Aim(what, target)]


def real_aim(results: Results) -> Aim:
    what, target = "555 clients of Natural Instructions, a full run of MIRA", "time and memory"
    row = results.get("natural-instructions")
    if row is None:
        return Aim(what, target)
    words = f"{row['seconds'] / 60:.1f} minutes, {row['anon_peak'] / GB:.2f} GB anonymous ({row['clients']} clients)"
    return Aim(what, target, words)


def gpu_aim(results: Results) -> Aim:
    rows = results.get("gpu", {}).get("rows", [])
    ratios = "; ".join(f"{row['shape']} {spread(row['ratio'])}" for row in rows) or None
    return Aim("training on a GPU, times the PEFT loop in bf16", "a figure where a GPU is at hand", ratios)


def bench_aim(results: Results) -> Aim:
    """Minutes of `make bench`: the sum of its rows."""
    what, target = "`make bench`, minutes", "under 20"
    if not all("seconds" in results.get(name, {}) for name in CORE):
        return Aim(what, target)
    minutes = sum(results[name]["seconds"] for name in CORE) / 60
    return Aim(what, target, f"{minutes:.1f}", minutes < 20)


def aims_table(results: Results) -> str:
    """Every target beside what was measured."""
    aims = [*training_aims(results), *generation_aims(results), *merge_aims(results), *flexlora_aims(results)]
    aims += [*client_aims(results), real_aim(results), gpu_aim(results), bench_aim(results)]
    verdict = {True: "yes", False: "**no**", None: ""}
    rows = [[aim.what, aim.target, aim.measured or "not measured yet", verdict[aim.reached]] for aim in aims]
    return table(["what", "target", "measured", "reached"], rows)
