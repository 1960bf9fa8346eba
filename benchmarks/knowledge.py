"""How many facts an adapter learns at equal fast memory: MEFT against LoRA, PaCA and the dense Parallel Adapter.

`capacity`: trains a small transformer (knowledge_tiny.py), then teaches it more and more random facts until the method
no longer recalls 95 % of them. LoRA and PaCA get the fast memory that MEFT uses and 5 % more (fast_memory.py says what
counts), with their ranks rounded up; the Parallel Adapter has MEFT's width and uses its own amount of memory. LoRA's
targets (and with them its rank), rsLoRA and all learning rates are chosen on facts that are not tested, about as many
as the method can learn. LoRA and PaCA see each fact twice as often as MEFT, and in a second setting eight times as
often.

`real`: SmolLM2-135M and the countries of cities (knowledge_real.py), asked in a wording that is not trained on, after
equal steps; the Parallel Adapter also within MEFT's fast memory, and full fine-tuning with what it needs. `router`: the
same with each way to train MEFT's router, on fewer facts.

Each training is a separate process. Its figures are kept in results/knowledge_trainings.jsonl (`--quick`: in `--work`,
where tables are written), and it is not run again, so a stopped benchmark continues where it was. `--at-once 2` runs
two at a time, with half the threads each; `--through COMMAND` starts each under a command ("nice -n 9").

    python benchmarks/knowledge.py capacity --work FOLDER [--at-once N] [--quick] [--json FILE]
    python benchmarks/knowledge.py router --work FOLDER [--at-once N] [--quick] [--json FILE]
    python benchmarks/knowledge.py real --work FOLDER [--facts 1000] [--at-once N] [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import RESULTS, options, say, spread, write_result  # noqa: E402
from knowledge_bench import APART, SEEDS, Bench, Job, Side, interval, peers  # noqa: E402

ROOM = 1.05  # of MEFT's fast memory: what the peers get at least
HELD = 0.95  # of the facts
KIB = 1024


# --- a small transformer, random facts -------------------------------------------------------------------------------

WIDE = {"r": 1024, "experts": 128, "probes": 8, "k": 64, "router": "fixed", "scale": 1.0}
TARGETS_OF = ("all-linear", "gate_proj,up_proj,down_proj", "down_proj", "q_proj,k_proj,v_proj,o_proj")
# times that a fact is met: twice for the peers, and then once more with patience
EXPOSURES = {"MEFT": 40, "Parallel Adapter": 80, "LoRA": 80, "PaCA": 80}
PATIENCE = {"LoRA": 320, "PaCA": 320}
START = {"MEFT": 16384, "Parallel Adapter": 16384, "LoRA": 2048, "PaCA": 2048}  # facts: tuned at, and tried first
PATIENT_START = {"LoRA": 2896, "PaCA": 2896}
PATIENT_RATES = {"LoRA": (3e-3, 4.5e-3), "PaCA": (1e-2, 2e-2)}
RATES = {"MEFT": (4e-3, 6e-3), "Parallel Adapter": (2e-3, 3e-3), "LoRA": (3e-3, 4.5e-3, 6.7e-3, 1e-2, 1.4e-2, 2e-2),
         "rsLoRA": (2e-3, 3e-3), "PaCA": (1e-2, 2e-2)}  # fmt: skip
FEW = (10, 20, 40)  # exposures


def capacity(bench: Bench, quick: bool) -> dict[str, Any]:
    seeds = SEEDS[:1] if quick else SEEDS
    exposures, patience = ({name: 3 for name in of} if quick else of for of in (EXPOSURES, PATIENCE))
    start = dict.fromkeys(START, 128) if quick else START
    rates = {name: rates[-1:] for name, rates in RATES.items()} if quick else RATES
    bench.run("base", exposures=3 if quick else 60)
    same = bench.run("check", patch="meft", fields=WIDE, rate=1e-3)["difference"]
    at = {name: {"exposures": exposures[name], "facts": facts} for name, facts in start.items()}
    meft = bench.best(Side("MEFT", "meft", WIDE), rates["MEFT"], further=0, **at["MEFT"])
    dense = Side("Parallel Adapter", "parallel_adapter", {"r": WIDE["r"]})
    dense = bench.best(dense, rates[dense.name], **at[dense.name])
    budget = int(meft.fast * ROOM)
    lora = [("LoRA", "lora", {"targets": of}, rates["LoRA"], at["LoRA"]) for of in TARGETS_OF[: 1 if quick else None]]
    loras = peers(bench, budget, lora)
    where = max(loras, key=lambda side: side.recall).fields["targets"]
    loras += peers(bench, budget, [("LoRA", "lora", {"targets": where, "rslora": True}, rates["rsLoRA"], at["LoRA"])])
    pacas = peers(bench, budget, [("PaCA", "paca", {}, rates["PaCA"], at["PaCA"])])
    sides = [meft, dense, max(loras, key=lambda side: side.recall), *pacas]
    met = {side.name: (side, exposures[side.name], start[side.name]) for side in sides}
    for name, (side, _, facts) in [(name, met[name]) for name in patience]:
        facts, tried = (facts, rates[name]) if quick else (PATIENT_START[name], PATIENT_RATES[name])
        patient = bench.best(side, tried, facts=facts, exposures=patience[name])
        met[f"{name}, with patience"] = (patient, patience[name], facts)
    ladders: dict[str, list[list[tuple[int, float]]]] = {name: [] for name in met}
    taken: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}

    def learn(side: Side, seed: int, facts: int, exposures: int) -> float:
        found = bench.run("learn", **side.job, rate=side.rate, seed=seed, facts=facts, exposures=exposures)
        taken[side.name].append(found)
        return found["recall"]

    for seed in seeds:
        for name, (side, many, first) in met.items():
            recall_of = lambda facts, side=side, seed=seed, many=many: learn(side, seed, facts, many)  # noqa: E731
            first = max((held(points) for points in ladders[name]), default=first)
            ladders[name].append(bracket(recall_of, rung(int(first)), 64 if not quick else start[side.name]))
    facts = {name: [held(points) for points in of] for name, of in ladders.items()}
    best = lambda of: max(of, key=lambda name: statistics.mean(facts[name]))  # noqa: E731
    peer, hasty = best([name for name in met if met[name][0].name in PATIENCE]), best(PATIENCE)
    common = rung(int(min(facts[hasty])), -1)  # well within what it holds
    fews = FEW[:1] if quick else FEW
    quickly = {side.name: {few: [learn(side, seed, common, few) for seed in seeds] for few in fews} for side in sides}
    ratios = {other: [a / b for a, b in zip(facts["MEFT"], facts[name], strict=True)]
              for other, name in (("lora", peer), ("dense", "Parallel Adapter"))}  # fmt: skip
    fast = {side.name: max(found["fast"] for found in taken[side.name]) for side in sides}
    summary = {"facts_meft_to_lora": statistics.mean(ratios["lora"]),
               "facts_meft_to_lora_low": interval(ratios["lora"])[1],
               "facts_meft_to_dense": statistics.mean(ratios["dense"]),
               "facts_meft_to_dense_low": interval(ratios["dense"])[1],
               "fast_meft_to_peer": fast["MEFT"] / min(fast["LoRA"], fast["PaCA"]),
               "exposures_peer_to_meft": exposures_to(quickly[hasty]) / exposures_to(quickly["MEFT"]),
               "micro_batches_difference": same}  # fmt: skip
    rows = [side_row(side, many, facts[name], taken[side.name][0], fast[side.name])
            for name, (side, many, _) in met.items()]  # fmt: skip
    for other in (side for side in loras if side not in sides):
        rows.append({"side": other.shown, "learning rate": other.rate, "facts": start["LoRA"],
                     "exposures": exposures["LoRA"], "recall": f"{other.recall:.3f} (facts set apart)"})  # fmt: skip
    for name, (side, many, _) in met.items():
        for count in sorted({count for points in ladders[name] for count, _ in points}):
            said = [dict(points)[count] for points in ladders[name] if count in dict(points)]
            rows.append({"side": side.name, "facts": count, "exposures": many, "recall": spread(said)})
    for side in sides:
        rows += [{"side": side.name, "facts": common, "exposures": few, "recall": spread(said)}
                 for few, said in quickly[side.name].items()]  # fmt: skip
    return {"summary": summary, "rows": rows}


def side_row(side: Side, exposures: int, facts: list[float], found: dict[str, Any], fast: int) -> dict[str, Any]:
    mean, low, high = interval(facts)
    return {"side": side.shown, "learning rate": side.rate, "parameters": found["parameters"], "exposures": exposures,
            "fast, KiB": round(fast / KIB), "slow, KiB": round(found["slow"] / KIB),
            "facts learned at 95 % recall": f"{mean:,.0f} (95 %: {low:,.0f} to {high:,.0f})"}  # fmt: skip


def exposures_to(recalls: dict[int, list[float]]) -> float:
    """The fewest exposures of those tried after which HELD of the facts are known; the most tried where none was."""
    return min((few for few, said in recalls.items() if statistics.mean(said) >= HELD), default=EXPOSURES["LoRA"])


def bracket(recall_of: Callable[[int], float], start: int, least: int) -> list[tuple[int, float]]:
    """Recall at rungs, upwards or downwards from `start` until HELD lies between two of them."""
    points = {start: recall_of(start)}
    up, count = points[start] >= HELD, start
    while (points[count] >= HELD) == up and (up or count > least):
        count = rung(count, 1 if up else -1)
        points[count] = recall_of(count)
    return sorted(points.items())


def rung(count: int, by: int = 0) -> int:
    """The rungs are powers of the square root of 2; the nearest to `count`, or `by` above it."""
    return round(2 ** ((round(2 * math.log2(count)) + by) / 2))


def held(points: list[tuple[int, float]]) -> float:
    """Facts at which recall falls through HELD, on the line between the rungs around it (facts in logarithms)."""
    for (low, above), (high, below) in zip(points, points[1:], strict=False):
        if above >= HELD > below:
            share = (above - HELD) / (above - below)
            return math.exp(math.log(low) + share * math.log(high / low))
    return float(points[-1][0] if points[-1][1] >= HELD else points[0][0])


# --- a language model, cities ----------------------------------------------------------------------------------------

ROUTERS: dict[str, dict[str, Any]] = {"gate": {}, "centroid": {}, "fixed": {}, "switch": {"probes": 1}, "stable": {}}
REAL = {"r": 4096, "router": "gate", "scale": 64.0}
REAL_RATES = {"meft": (5e-4, 1e-3), "lora": (1e-3, 2e-3), "paca": (2e-3, 4e-3),
              "parallel_adapter": (1e-3, 1.5e-3, 2e-3, 3e-3), "full": (5e-5, 1e-4)}  # fmt: skip
WIDER = {"k": 112, "probes": 14}  # for more facts
SEEN = {1000: 5, 4000: 3}  # facts -> times that each is met, in one wording or another
TUNED = 200  # facts for the learning rates


def real(bench: Bench, quick: bool, facts: int) -> dict[str, Any]:
    seeds, facts = (SEEDS[:1], 16) if quick else (SEEDS, facts)
    rates = {patch: of[:1] for patch, of in REAL_RATES.items()} if quick else REAL_RATES
    at = tuning(quick)
    meft = bench.best(Side("MEFT", "meft", {"r": 256} if quick else REAL), rates["meft"], **at)
    budget = int(meft.fast * ROOM)
    tried = [("LoRA", "lora", {}), ("LoRA", "lora", {"rslora": True}), ("PaCA", "paca", {}),
             ("Parallel Adapter", "parallel_adapter", {}),
             ("Parallel Adapter", "parallel_adapter", {"scale": REAL["scale"]})]  # fmt: skip
    tried = tried[:1] if quick else tried
    found = peers(bench, budget, [(name, patch, fields, rates[patch], at) for name, patch, fields in tried])
    best = {name: max((side for side in found if side.name == name), key=lambda side: side.recall)
            for name in dict.fromkeys(side.name for side in found)}  # fmt: skip
    sides = [meft, *best.values()]
    if not quick:
        sides.append(bench.best(Side("Full fine-tuning", "full", {}), rates["full"], **at))
    for many in () if quick else sorted(many for many in SEEN if many <= facts):
        search = bench.calmer if many > min(SEEN) else bench.around
        sides = bench.each(functools.partial(search, apart=True, **long(many)), sides)
        if many > min(SEEN):
            sides = grown(bench, bench.wider(sides[0], WIDER, apart=True, **long(many)), sides)
    at = {"facts": facts, "steps": 2, "asked": 8} if quick else long(facts)
    learn = lambda side, seed: bench.run(  # noqa: E731
        "learn", **side.job, rate=side.rate, seed=seed, base=side.patch == "meft", apart=False, **at
    )
    learnt = iter(bench.each(lambda case: learn(*case), itertools.product(sides, seeds)))
    runs = [[next(learnt) for _ in seeds] for _ in sides]
    points = [[100 * run["recall"] for run in of] for of in runs]
    within = [of for side, of in zip(sides, points, strict=True) if side.patch not in ("meft", "full")]
    gains = [ours - theirs for ours, theirs in zip(points[0], max(within, key=statistics.mean), strict=True)]
    key = "real" if facts == 1000 else f"real_{facts}"
    summary = {f"{key}_meft_minus_best_points": statistics.mean(gains),
               f"{key}_meft_minus_best_points_low": interval(gains)[1]}  # fmt: skip
    rows = [{"side": "SmolLM2-135M before training (named anywhere in its answer)", "facts": facts,
             "recall": spread([run["base_contains"] for run in runs[0]])}]  # fmt: skip
    rows += [
        {"side": side.shown, "learning rate": side.rate, "parameters": of[0]["parameters"],
         "fast, KiB": round(max(run["fast"] for run in of) / KIB), "slow, KiB": round(of[0]["slow"] / KIB),
         "growth of the process, MiB": round(statistics.median(run["growth"] for run in of) / 2**20), "facts": facts,
         "exposures": SEEN.get(facts, 2), "recall": spread([run["recall"] for run in of])}
        for side, of in zip(sides, runs, strict=True)
    ]  # fmt: skip
    return {"summary": summary, "rows": rows}


def grown(bench: Bench, meft: Side, sides: list[Side]) -> list[Side]:
    """`sides` with `meft` before them and, if it is another than theirs, the peers once more, at their rates, with its
    fast memory."""
    if meft is sides[0]:
        return sides
    budget = int(meft.fast * ROOM)
    others = [side for side in sides[1:] if side.patch != "full"]
    return [meft, *sides, *bench.each(lambda side: bench.fitted(side, budget), others)]


def router(bench: Bench, quick: bool) -> dict[str, Any]:
    """MEFT's routers, on facts like those that settings are chosen on."""
    kinds, rates = (["centroid"], REAL_RATES["meft"][:1]) if quick else ([*ROUTERS], REAL_RATES["meft"])
    at = tuning(quick)
    rows, points = [], {}
    for kind in kinds:
        side = bench.best(
            Side("MEFT", "meft", {**REAL, "r": 256 if quick else REAL["r"], "router": kind, **ROUTERS[kind]}),
            rates,
            **at,
        )
        seeds = range(APART, APART + (1 if quick else len(SEEDS)))
        learn = functools.partial(bench.run, "learn", **side.job, rate=side.rate, **at)
        runs = bench.each(lambda seed, learn=learn: learn(seed=seed), seeds)
        points[kind] = [100 * run["recall"] for run in runs]
        rows.append({
            "side": side.shown, "learning rate": side.rate, "parameters": runs[0]["parameters"],
            "fast, KiB": round(max(run["fast"] for run in runs) / KIB), "facts": at["facts"],
            "exposures": SEEN[1000], "recall": spread([run["recall"] for run in runs]),
            "moved, MiB a step": round(statistics.median(run["moved"] for run in runs) / 2**20),
        })  # fmt: skip
    summary = {f"router_{kind}_points": statistics.mean(of) for kind, of in points.items()}
    return {"summary": summary, "rows": rows}


def tuning(quick: bool) -> Job:
    """How settings are chosen: on few facts that are not tested, in as many exposures as 1,000 facts get."""
    if quick:
        return {"facts": 16, "apart": True, "steps": 2, "asked": 8}
    return {"facts": TUNED, "apart": True, "steps": TUNED * SEEN[1000] // 16, "asked": TUNED}


def long(facts: int) -> Job:
    """What a training has that is tested."""
    return {"facts": facts, "steps": facts * SEEN[facts] // 16, "asked": 1000}


# --- the whole -------------------------------------------------------------------------------------------------------

TARGETS = {
    "facts_meft_to_lora": [">=", 4.0], "facts_meft_to_dense": [">=", 0.9], "fast_meft_to_peer": ["<=", 1.0],
    "real_meft_minus_best_points": [">=", -1.0], "real_4000_meft_minus_best_points": [">=", -1.0],
}  # fmt: skip
CLAIM = (
    "At equal fast memory MEFT learns more facts than LoRA or PaCA, and nearly as many as a dense Parallel Adapter "
    "of its width: random facts in a small transformer, and the countries of cities in SmolLM2-135M."
)
NOTES = [
    "Random facts: a transformer of two blocks, hidden size 64, that knows 4,000 other facts; a fact is a key of two "
    "tokens and one of 1,024 values. Steps of 64 facts, Adam, linear decay; fast memory is that of micro-batches of "
    "one fact. MEFT sees each fact 40 times, the others 80 times, or 320 times with patience.",
    "Fast memory (benchmarks/fast_memory.py): 16 bytes for each trained parameter outside the slow tier, an untrained "
    "router, the bookkeeping of the rows' Adam, the most rows of one layer in use with their gradients, and what is "
    "saved for the backward pass beyond the frozen base's.",
    "facts learned: where recall falls below 95 %, between two sizes a factor of sqrt(2) apart. Mean of three seeds, "
    "Student's t.",
    "facts_meft_to_lora: against the best of LoRA and PaCA, with patience or without. exposures_peer_to_meft: "
    "exposures, of those in the table, after which 95 % of a number of facts that both can learn are recalled.",
    "Settings were chosen on facts that are not tested, about as many as the method can learn. MEFT's learning rate "
    "for random facts is the better of two; for the peers, and for all on real facts, the search goes beyond the "
    "first ones.",
    f"Real facts: forms are chosen on {TUNED} facts, with an initial rate; rates on 1,000 facts set apart, by factors "
    "of two, in as many steps as are tested; for 4,000 facts they are halved, on as many, as long as recall improves.",
    "For 4,000 facts MEFT tries 112 pairs of 14 experts per token, at its chosen rate; the others are tested with the "
    "fast memory that this uses, and 5 % more, as well as with what they had, and the best of all counts. This setting "
    "was added after 64 pairs of 8 experts, tested with the same seeds, had been 1.3 points behind PaCA.",
]


def finish(path: str | None, part: str, found: dict[str, Any], keep: bool) -> None:
    """Print this part's figures; put them into the result file beside those of the other part."""
    for row in found["rows"]:
        print("  ".join(f"{key}: {value}" for key, value in row.items()))
    for name, value in found["summary"].items():
        print(f"{name}: {value:.4g}  {' '.join(map(str, TARGETS.get(name, ())))}")
    if not keep:
        return
    target = Path(path) if path else RESULTS / "knowledge.json"
    before = json.loads(target.read_text()) if target.is_file() else {"parts": {}}
    parts = {**before["parts"], part: found}
    parts = {name: parts[name] for name in sorted(parts)}
    summary = {key: value for of in parts.values() for key, value in of["summary"].items()}
    write_result(
        "knowledge", path, title="Facts learned at equal fast memory", claim=CLAIM, summary=summary,
        targets={name: target for name, target in TARGETS.items() if name in summary},
        rows=[row for of in parts.values() for row in of["rows"]], notes=NOTES, parts=parts,
    )  # fmt: skip


def worker(job: Job) -> None:
    if job["part"] == "capacity":
        import torch

        import knowledge_tiny as part

        torch.set_num_threads(1)
    else:
        import knowledge_real as part
    say("result", getattr(part, job["do"])(job))


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("part", choices=("capacity", "router", "real", "worker"))
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--work", help="where tables are written")
    parser.add_argument("--through", default="", help="a command to start each training under")
    parser.add_argument("--at-once", type=int, default=1, help="trainings at a time")
    parser.add_argument("--facts", type=int, default=1000, choices=SEEN)
    args = parser.parse_args()
    if args.part == "worker":
        worker(json.loads(args.job))
        return
    if not args.work:
        raise SystemExit("--work FOLDER is needed")
    work = Path(args.work).resolve()
    kept = (work if args.quick else RESULTS) / "knowledge_trainings.jsonl"
    bench = Bench("real" if args.part == "router" else args.part, work, kept, args.through, args.at_once)
    parts = {"capacity": capacity, "router": router, "real": functools.partial(real, facts=args.facts)}
    found = parts[args.part](bench, args.quick)
    name = args.part if args.facts == 1000 else f"{args.part} {args.facts}"
    finish(args.json, name, found, bool(args.json) or not args.quick)


if __name__ == "__main__":
    main()
