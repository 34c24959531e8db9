"""The recipes of README.md's "Change it", each tried as it is written there: a copy of the project gets the
edits that the text shows, and runs the commands that it shows, with small options behind them."""
import functools
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
import worlds

from checkpoint import generator, load_checkpoint

BRIEF = "--max-new 8 --eval-problems 2 --eval-samples 2 --threads 1"
SMALL = f"--n-problems 4 --rollouts 4 --steps 2 --checkpoints-at 1 {BRIEF}".split()
SMALL_SFT = f"--epochs 14 --batch 16 --lr 8e-3 --warmup 2 --n-train 32 --eval-every 1000 {BRIEF}".split()
SMALL_EVALUATION = "--n-problems 2 --n-samples 8 --k 1 --max-new 8 --no-benchmarks --threads 1".split()


def recipe(title: str) -> tuple[list[str], list[list[str]]]:
    """(code in the text, commands without 'python') of one recipe of README.md."""
    readme = Path(__file__).parents[1].joinpath("README.md").read_text()
    text = re.search(rf"\n\*\*{title}\.\*\*(.*?)\n(\*\*|## )", readme, re.S)[1]
    commands = re.findall(r"^    python (.*)$", text, re.M)
    return re.findall(r"`([^`]+)`", text), [shlex.split(command) for command in commands]


def replace(path: str, pattern: str, new: str) -> None:
    text, times = re.subn(pattern, new, Path(path).read_text(), flags=re.M | re.S)
    assert times == 1
    Path(path).write_text(text)


def end_with(path: str, function: str, code: list[str]) -> None:
    """Replace the last statement of a function by the `return` in a recipe's code."""
    new, = (line for line in code if line.startswith("return"))
    replace(path, rf"(^def {function}\(.*?\n)    return [^\n]*\n\n", rf"\1    {new}\n\n")


def run(command: list[str], *options: object) -> str:
    """Standard output of a command with further options, of which the last of a name counts."""
    outcome = worlds.run_here(*command, "--data", worlds.data(), *options)
    assert outcome.status == 0, outcome.errors
    return outcome.out


def rl(command: list[str], *options: object) -> str:
    """RL in small from the parrot, which says 7: the right answer to half of the problems."""
    path = worlds.folder() / "half.jsonl"
    half = [p | {"answer": "78"[i % 2]} for i, p in enumerate(worlds.lines(worlds.sevens()))]
    path.write_text("\n".join(map(json.dumps, half)))
    return run(command, "--init", worlds.parrot(), "--problem-file", path, *SMALL, *options)


@functools.cache
def unchanged() -> tuple[Path, str]:
    """(run folder, standard output) of rl.py as it is."""
    out = worlds.folder() / "unchanged"
    return out, rl(["rl.py"], "--out", out)


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """The working folder is a copy of the project; imports, and the scripts that `worlds` runs, are its."""
    here = worlds.ROOT
    unchanged()                                  # and the checkpoints it needs: made by the project itself
    for path in [*here.glob("*.py"), *here.glob("data/*.*")]:
        name = path.relative_to(here)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / name)
        module = ".".join(name.with_suffix("").parts).removesuffix(".__init__")
        monkeypatch.setitem(sys.modules, module, None)           # undone later, whatever the copy imports
        del sys.modules[module]
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(worlds, "ROOT", tmp_path)


def listed(command: list[str], script: str) -> list[list[str]]:
    """Commands of a script in the list of a study."""
    lines = worlds.run_here(*command, "--list").out.splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith(f"python {script} ")]


def first_steps(folder: str) -> tuple[dict, dict]:
    """The log of the first step as it is and of a run in a folder, whose final weights are others."""
    folders = unchanged()[0], Path(folder)
    heads = [load_checkpoint(path / "final.pt")["model"]["head.weight"] for path in folders]
    assert not torch.equal(*heads)
    return tuple(worlds.lines(path / "log.jsonl")[1] for path in folders)


def test_a_loss(copy):
    """The run has the same rewards at first, and other weights."""
    code, (command,) = recipe("A loss")
    end_with("rl.py", "policy_loss", code)
    rl(command)
    before, after = first_steps("runs/my-loss")
    assert before["reward"] == after["reward"] and before["loss"] != after["loss"]


def test_a_reward(copy):
    """The shaped mean is logged and counts in training; at the start right answers are counted as before."""
    code, (command,) = recipe("A reward")
    end_with("rl.py", "reward", code)
    said = rl(command)
    plain, step = first_steps("runs/shaped")
    wrong = 1 - plain["reward"] - plain["unparsed"]
    assert step["reward"] == pytest.approx(plain["reward"] + .1 * wrong) and wrong > 0
    assert 16 * step["reward"] % 1 > .05                         # of 16 rollouts
    assert said.split(" answers right")[0] == unchanged()[1].split(" answers right")[0]


def test_a_task(copy):
    """Words as answers, capitals ignored: SFT on the solutions, then RL with rewards, then an evaluation."""
    code, (sft, grpo, evaluate) = recipe("A task")
    pattern, = (line for line in code if line.startswith("ANSWER ="))
    replace("data/arithmetic.py", r'^ANSWER = r"[^"]*"', pattern)
    end_with("data/arithmetic.py", "grade", code)
    cat = {"question": "Nora has a pet. Which?", "answer": "cat", "solutions": ["#### Cat"]}
    for name in ("my.jsonl", "my-test.jsonl"):
        Path(name).write_text(32 * (json.dumps(cat) + "\n"))
    run(sft, "--init", worlds.base(), *SMALL_SFT)
    run(grpo, *SMALL)
    assert worlds.lines(Path("runs/task/log.jsonl"))[1]["reward"] > 0
    run(evaluate, *SMALL_EVALUATION)
    measured = json.loads(next(Path("runs/task").glob("final.val.0shot-*.json")).read_text())["problems"]
    assert sum(measured["all"]["right_per_problem"]) > 0


def test_a_recipe(copy):
    """The quick study lists a run of the new script; it makes a checkpoint that the study can evaluate."""
    code, (command,) = recipe("A recipe")
    shutil.copy("sft.py", "mine.py")
    line, table, name, preset = code
    replace("study.py", f"^{table} = {{", f"{table} = {{\n    {line}")
    replace("study.py", f'(^    {preset}: Study.*?"parallel")', rf"\1, {name}")
    cell, = listed(command, "mine.py")
    run(cell, "--init", worlds.base(), *SMALL_SFT, "--out", "mine")
    assert load_checkpoint("mine/final.pt")["lineage"][-1]["script"] == "mine.py"
    made = cell[cell.index("--out") + 1] + "/final.pt"
    measure, = (x for x in listed(command, "evaluate.py") if made in x)
    run([x.replace(made, "mine/final.pt") for x in measure], "--reference", worlds.base(), *SMALL_EVALUATION)


def test_the_contract_of_a_model():
    """The generator sets the weights; sampled tokens have the log-probabilities of both ways of scoring."""
    import model                                 # in test_a_model: the copy's
    config = model.ModelConfig(64, 61, 64, 32, 2, 2, 64)
    gpt, twin = (model.GPT(config, generator(0, "weights")) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(gpt.parameters(), twin.parameters()))
    prompts, rows = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5, 8]], [0] * 4 + [1] * 4 + [2] * 4
    with torch.inference_mode():
        gpt.head.weight.mul_(10)                 # lively: else a mistake hardly shows
        out = model.sample(gpt, prompts, 4, 9, 7, 60, generator(0, "rollouts"))
        answers = out.completions()
        ids, *where = model.pack([prompts[p] for p in rows], answers, 60)
        shared = model.shared_logprobs(gpt, model.SharedPrompts(gpt, prompts, 60), rows, answers, 60)
        plain = model.completion_logprobs(gpt, ids, *where)
        assert gpt(ids).shape == (*ids.shape, 61) and gpt.flops_per_token(8) > 0 and plain.std() > .1
    recorded = torch.cat([logp[:len(answer)] for logp, answer in zip(out.logprobs, answers)])
    assert torch.allclose(plain, recorded, atol=1e-5) and torch.allclose(shared, recorded, atol=1e-5)


def test_a_model(copy):
    """A class written from scratch takes the place of GPT: it meets the contract, and every script runs."""
    code, (check, pretrain) = recipe("A model")
    assert code[-1] == "GPT = Mine" and check[3:] == ["tests/test_change_it.py", "-k", "contract"]
    mine = Path(__file__).with_name("own_gpt.py").read_text().partition("\nclass ")[2]
    with open("model.py", "a") as file:
        file.write(f"\nclass {mine}\nGPT = Mine\n")
    test_the_contract_of_a_model()
    run(pretrain, *"--size 0.3M --context 128 --batch 4 --micro-batch 2 --tokens 1024 --threads 1".split())
    run(["sft.py"], "--init", "runs/my-model/0.001024M.pt", "--problem-file", worlds.sevens(), *SMALL_SFT)
    rl(["rl.py"], "--init", "runs/sft/final.pt")
    assert "positions.weight" in load_checkpoint("runs/rl/final.pt")["model"]
    assert worlds.lines(Path("runs/rl/log.jsonl"))[1]["signal"] > 0
    run(["evaluate.py", "runs/rl/final.pt"], *SMALL_EVALUATION)
    assert "of 8 right" in run(["sample.py", "runs/sft/final.pt", "runs/rl/final.pt"], *SMALL_EVALUATION[:4])
