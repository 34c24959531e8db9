"""Tokens per second of pretraining by number of threads and by the way in which idle threads wait, on an idle
machine and beside busy processes: the better of two measurements. Prints the table of
results/benchmark/README.md; four minutes, Linux.

    python tests/threads.py
"""
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 5
# name -> threads (0: all cores), environment. PyTorch reads it when it is imported
WAYS = {"one thread": (1, {}), "all cores, OpenMP's default": (0, {}),
        "all cores, passive": (0, {"OMP_WAIT_POLICY": "passive"}),
        "all cores, GOMP_SPINCOUNT=1000 (ranks.py)": (0, {"GOMP_SPINCOUNT": "1000"})}


def measure(threads: int) -> None:
    """Train the default model for SECONDS; print tokens per second."""
    import torch                                 # before our modules, which would set GOMP_SPINCOUNT
    torch.set_num_threads(threads or os.cpu_count())
    sys.path.insert(0, str(ROOT))
    from model import GPT, ModelConfig
    from pretrain import next_token_loss

    model = GPT(ModelConfig())
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    sequences = torch.randint(512, (8, 257))
    updates, start = 0, 0.0
    while not start or time.perf_counter() < start + SECONDS:
        next_token_loss(model, sequences).backward()
        optimizer.step()
        optimizer.zero_grad()
        updates += bool(start)
        start = start or time.perf_counter()     # the first update only warms up
    print(f"{updates * 8 * 256 / (time.perf_counter() - start):.0f}")


def main() -> None:
    print("| threads and waiting | idle machine | beside one busy process | beside two |\n|---|---|---|---|")
    for name, (threads, environment) in WAYS.items():
        row = []
        for busy in range(3):
            others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
            speeds = []
            for _ in range(2):
                done = subprocess.run([sys.executable, __file__, str(threads)], env=os.environ | environment,
                                      capture_output=True, text=True, check=True)
                speeds.append(int(done.stdout))
            for process in others:
                process.kill()
            row.append(f"{max(speeds):,}")
        print(f"| {name} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    measure(int(sys.argv[1])) if sys.argv[1:] else main()
