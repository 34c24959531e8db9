"""Run a grid of the other scripts' commands, several at once, and draw the figures from what they measured.

    python study.py                    run what is missing, then write results/pipeline/
    python study.py --list             print every command instead, e.g. for a cluster's queue
    python study.py --report           redraw figure and table from results/pipeline/results.jsonl, in seconds

A cell of the grid is one command that makes one file; it is not run again if the file exists, and what was
interrupted goes on. One grid so far: a base model, RL and SFT on three of its checkpoints, three seeds.
"""
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from checkpoint import main, require
from evaluate import bootstrap_means, interval, pass_at_k

TOKENS = ("1M", "2M", "3M", "4M", "5M", "6M", "8M")       # checkpoints of the base model
SEEDS = (0, 1, 2)                                          # of RL and SFT
# Chosen on validation problems: README, "The search".
RECIPES = {
    "RL": {"8M": "rl.py", "6M": "rl.py", "5M": "rl.py --steps 100"},
    "SFT": {"8M": "sft.py", "6M": "sft.py", "5M": "sft.py"},
}
COLORS = {"base": "0.5", "RL": "tab:blue", "SFT": "tab:orange"}


@dataclass
class Config:
    data: str = "data/tiny"         # folder made by data/prepare.py (made if missing)
    runs: str = "runs"              # where the runs go
    out: str = "results/pipeline"   # where results.jsonl, the table and the figure go
    jobs: int = 0                   # cells at once, one thread each; 0 = one per core
    list: bool = False              # print the commands, run nothing
    report: bool = False            # only redraw from results.jsonl


def grid(c: Config) -> list[dict]:
    """Cells {"name", "command", "makes", "needs"} in an order in which they can run."""
    def cell(name: str, command: str, makes: str, needs: str = "") -> dict:
        return {"name": name, "command": command.split(), "makes": Path(makes), "needs": Path(needs)}

    def evaluation(name: str, checkpoint: str) -> dict:
        return cell(f"evaluate {name}", f"evaluate.py {checkpoint} --data {c.data} --split test",
                    checkpoint.replace(".pt", ".test.0shot.json"), checkpoint)
    base = f"{c.runs}/base"
    cells = [cell("data", f"data/prepare.py --out {c.data}", f"{c.data}/manifest.json"),
             cell("base", f"pretrain.py --data {c.data} --out {base} --checkpoints-at {','.join(TOKENS)}",
                  f"{base}/8M.pt", f"{c.data}/manifest.json")]
    for recipe, settings in RECIPES.items():
        for tokens, command in settings.items():
            for seed in SEEDS:
                out = f"{c.runs}/{recipe.lower()}-{tokens}-seed{seed}"
                cells.append(cell(f"{recipe} {tokens} {seed}", f"{command} --data {c.data} --init "
                                  f"{base}/{tokens}.pt --out {out} --seed {seed}", f"{out}/final.pt",
                                  f"{base}/{tokens}.pt"))
    cells += [evaluation(f"base {tokens} 0", f"{base}/{tokens}.pt") for tokens in TOKENS]
    cells += [evaluation(x["name"], str(x["makes"])) for x in cells if x["name"].split()[0] in RECIPES]
    return cells


def run_cells(cells: list[dict], runs: Path, jobs: int) -> list[str]:
    """Run every cell whose file is missing as soon as what it needs exists; returns the names that failed."""
    waiting = [x for x in cells if not x["makes"].exists()]
    running: dict[str, tuple[subprocess.Popen, dict]] = {}
    failed: list[str] = []
    (runs / "logs").mkdir(parents=True, exist_ok=True)
    quiet = os.environ | {"TQDM_MININTERVAL": "30"}       # progress bars of cells go to log files
    bar = tqdm(total=len(cells), initial=len(cells) - len(waiting), unit="cell")
    try:
        while waiting or running:
            ready = [x for x in waiting if x["needs"].exists()]
            while ready and len(running) < jobs:
                x = ready.pop(0)
                waiting.remove(x)
                command = [sys.executable, *x["command"]]
                if x["name"] != "data":
                    command += ["--threads", "1"]
                with open(runs / "logs" / f"{x['name'].replace(' ', '-')}.log", "ab") as log:
                    running[x["name"]] = (subprocess.Popen(command, stdout=log, stderr=log, env=quiet), x)
            if not running:                      # what is still waiting needs something that failed
                failed += [x["name"] for x in waiting]
                break
            bar.set_postfix_str(", ".join(running), refresh=False)
            time.sleep(1)
            for name, (process, x) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    bar.update(1)
                    if process.returncode or not x["makes"].exists():
                        failed.append(name)
                        bar.write(f"FAILED: {name}, see {runs / 'logs'}/{name.replace(' ', '-')}.log")
    except KeyboardInterrupt:
        for process, _ in running.values():      # they have received Ctrl-C too, and save before they stop
            process.wait()
        raise
    bar.close()
    return failed


def gather(cells: list[dict]) -> list[dict]:
    """One record per evaluation: recipe, tokens, seed, cost, and everything measured."""
    records = []
    for x in cells:
        if x["name"].startswith("evaluate ") and x["makes"].exists():
            recipe, tokens, seed = x["name"].split()[1:]
            result = json.loads(x["makes"].read_text())
            last = result.pop("lineage")[-1]
            del result["checkpoint"]
            cost = {k: last[k] for k in ("tokens", "updates", "flops", "seconds")}
            records.append({"recipe": recipe, "at": tokens, "seed": int(seed), "cost": cost, **result})
    return records


def report(out: Path, records: list[dict]) -> str:
    """Write table.md and figure.png; returns the table. Intervals: 95 % over problems, paired for gains."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def passes(r: dict, k: int, difficulty: str = "easy") -> np.ndarray:
        d = r["problems"][difficulty]
        return np.array([pass_at_k(d["samples"], right, k) for right in d["right_per_problem"]])
    base = {r["at"]: r for r in records if r["recipe"] == "base"}
    records = [r for r in records if r["at"] in base]    # without its base a run cannot be judged
    lines = ["| from | recipe | seed | easy pass@1 | gain over base (95 %) | pass@8 | pass@32 | gain (95 %) "
             "| hard pass@1 | general mean | bits per byte | minutes |", "|" + "---|" * 12]
    for r in sorted(records, key=lambda r: (float(r["at"][:-1]), r["recipe"] != "base", r["recipe"],
                                            r["seed"])):
        row = [r["at"], r["recipe"], str(r["seed"])]
        for k in (1, 8, 32):
            row.append(f"{100 * passes(r, k).mean():.1f}")
            if k != 8:
                gap = passes(r, k) - passes(base[r["at"]], k)
                low, high = interval(bootstrap_means(gap, 0))
                row.append("" if r["recipe"] == "base" else
                           f"{100 * gap.mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]")
        row += [f"{100 * passes(r, 1, 'hard').mean():.1f}", f"{100 * r['general_mean']:.1f}",
                f"{r['bits_per_byte']:.4f}", f"{r['cost']['seconds'] / 60:.1f}"]
        lines.append("| " + " | ".join(row) + " |")
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    x = [float(t[:-1]) for t in base]
    for axis, k in zip(axes, (1, 32)):
        bands = [interval(bootstrap_means(passes(r, k), 0)) for r in base.values()]
        axis.plot(x, [100 * passes(r, k).mean() for r in base.values()], "o-", color=COLORS["base"],
                  label="base")
        axis.fill_between(x, *(100 * np.array(b) for b in zip(*bands)), color=COLORS["base"], alpha=.2)
        axis.set_title(f"easy test problems, pass@{k} (%)")
    axes[2].plot(x, [100 * r["general_mean"] for r in base.values()], "o-", color=COLORS["base"])
    axes[2].set_title("mean of seven general benchmarks (%)")
    for recipe in RECIPES:
        group = [r for r in records if r["recipe"] == recipe]
        at = [float(r["at"][:-1]) + .12 * (r["seed"] - 1) for r in group]
        for axis, k in zip(axes, (1, 32)):
            means = [100 * passes(r, k).mean() for r in group]
            ends = np.array([interval(bootstrap_means(passes(r, k), 0))
                             for r in group]).reshape(-1, 2).T * 100
            axis.errorbar(at, means, abs(ends - means), fmt="o", color=COLORS[recipe], label=recipe,
                          capsize=2, lw=1)
        axes[2].plot(at, [100 * r["general_mean"] for r in group], "o", color=COLORS[recipe])
    for axis in axes:
        axis.set_xlabel("pretraining tokens (millions)")
        axis.grid(alpha=.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(out / "figure.png", dpi=130)
    table = "\n".join(lines)
    (out / "table.md").write_text(table + "\n")
    return table


def study(c: Config) -> None:
    """Run the grid (or print it) and report."""
    require(c.jobs >= 0, f"--jobs {c.jobs}: must be 0 (one per core) or more")
    cells, out = grid(c), Path(c.out)
    if c.list:
        for x in cells:
            print("python", *x["command"])
        return
    stored, failed = out / "results.jsonl", []
    if not c.report:
        failed = run_cells(cells, Path(c.runs), c.jobs or os.cpu_count() or 1)
        records = gather(cells)
        out.mkdir(parents=True, exist_ok=True)
        stored.write_text("".join(json.dumps(r) + "\n" for r in records))
    require(stored.is_file(), f"{stored}: not found; run the study first, without --report")
    print(report(out, [json.loads(line) for line in stored.read_text().splitlines()]))
    require(not failed, f"{len(failed)} cells failed or could not start: {', '.join(failed)}")


if __name__ == "__main__":
    main(study, Config)
