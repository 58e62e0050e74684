"""SeRA against the loss alone, in the playground: what the README's results section says.

    python experiments/claims.py                                    DPO, seeds 0 1 2
    python experiments/claims.py --losses ipo slic simpo --seeds 0  the other losses

Both methods take as many optimizer steps, with the same β and learning rate. A run that has been made is read from
experiments/results/claims.json and not made again: delete the file after a change of the code. One process a core.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
METHODS = {"loss alone": {"keep": 1.0, "bootstrap": 0.0}, "SeRA": {}}
SHOWN = "gold/reward gold/win_rate select/precision bootstrap/precision data/label_accuracy gold/length".split()


def one_run(loss: str, method: str, seed: int) -> dict:
    sys.path.insert(0, str(ROOT))
    import torch

    import train

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as silent:
        sys.stdout = sys.stderr = silent
        out = str(Path(folder) / "run")
        final = train.main(train.Config(loss_type=loss, seed=seed, output_dir=out, device="cpu", **METHODS[method]))
        first = json.loads((Path(out) / "metrics.jsonl").read_text().splitlines()[0])
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    return {**{key: final[key] for key in SHOWN}, "sft/reward": first["gold/reward"], "torch": torch.__version__}


def cell(values: list[float | None]) -> str:
    numbers = [v for v in values if v is not None]
    if not numbers:
        return "–"
    spread = f" ± {statistics.stdev(numbers):.3f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.3f}{spread}"


def table(runs: dict[str, dict]) -> str:
    """Mean ± standard deviation over the seeds of every loss and method, as Markdown."""
    columns = "loss, method, seeds, SFT's reward, true reward, win rate, precision, own precision, right labels, words"
    lines = ["| " + columns.replace(", ", " | ") + " |", "|" + "---|" * len(columns.split(", "))]
    for loss in ("dpo", "ipo", "slic", "simpo"):
        for method in METHODS:
            some = {key: run for key, run in sorted(runs.items()) if key.startswith(f"{loss}, {method}, ")}
            if some:
                seeds = " ".join(key.split()[-1] for key in some)
                cells = [cell([run[key] for run in some.values()]) for key in ["sft/reward", *SHOWN]]
                lines.append(f"| {loss} | {method} | {seeds} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", default=["dpo"], choices=["dpo", "ipo", "slic", "simpo"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    file = RESULTS / "claims.json"
    runs = json.loads(file.read_text())["runs"] if file.exists() else {}
    wanted = [(loss, method, seed) for loss in arguments.losses for seed in arguments.seeds for method in METHODS]
    missing = [w for w in wanted if f"{w[0]}, {w[1]}, seed {w[2]}" not in runs]
    cores = os.cpu_count() or 1
    print(f"{len(missing)} runs to make, {cores} at a time, a few minutes each")
    with ProcessPoolExecutor(cores) as pool:
        futures = {pool.submit(one_run, *w): w for w in missing}
        for done, future in enumerate(as_completed(futures), 1):
            loss, method, seed = futures[future]
            runs[f"{loss}, {method}, seed {seed}"] = future.result()
            win_rate = future.result()["gold/win_rate"]
            print(f"{done}/{len(missing)}: {loss}, {method}, seed {seed}: win rate {win_rate:.3f}", flush=True)
            RESULTS.mkdir(exist_ok=True)
            machine = f"{cores} CPU cores, {platform.machine()}, one thread a run"
            file.write_text(json.dumps({"machine": machine, "runs": dict(sorted(runs.items()))}, indent=1) + "\n")
    (RESULTS / "claims.md").write_text(table(runs) + "\n")
    print(table(runs))


if __name__ == "__main__":
    main()
