"""From an empty folder to an evaluated RL model, in small: each script hands its checkpoint to the next,
first from Python, then from the command line."""
import copy
import dataclasses
import functools
import hashlib
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import worlds

import evaluate
import merge
import pretrain
import rl
import sft
from checkpoint import batch_indices, generator, load_checkpoint, load_model
from data.problems import load_problems
from data.tokenizer import EOS
from test_faults import command_line

BASE = dict(size="0.3M", context=128, batch=4, micro_batch=2, tokens=2_048, checkpoints_at=(512, 2_048),
            warmup=1, eval_every=2, save_every=2)
BRIEF = dict(max_new=12, eval_every=2, eval_problems=2, eval_samples=2, save_every=2)
SFT = BRIEF | dict(epochs=1, batch=8, lr=2e-3)
RL = BRIEF | dict(n_problems=4, rollouts=4, steps=3, updates=2, kl=.01, checkpoints_at=(1,))
MERGE = BRIEF | dict(n_problems=4, rollouts=4, batch=4, steps=2)
EVALUATE = dict(n_problems=2, n_samples=8, k=(1, 8), max_new=32)
STAGES = {      # each starts from the one before; SFT learns to answer 7: RL has something to reinforce
    "base": (pretrain, BASE),
    "sft": (sft, SFT | dict(epochs=10, lr=8e-3)),
    "gold": (sft, SFT | dict(gold=True, lr=1e-4)),
    "rl": (rl, RL),
    "merge": (merge, MERGE)}


def run(module, **options):
    """The result of a script's main function, from Python, with the data set of all tests."""
    function = evaluate.run if module is evaluate else module.train
    options = dict(data=str(worlds.data()), threads=1) | options
    return worlds.quietly(function, module.Config(**options))


def log_of(stage: str, key: str) -> list[dict]:
    """The lines of a stage's log that have this key."""
    return [line for line in worlds.lines(chain()[stage].parent / "log.jsonl") if key in line]


@functools.cache
def chain() -> dict[str, Path]:
    """Stage -> its final checkpoint."""
    done, start = {}, {}
    for name, (module, options) in STAGES.items():
        out = worlds.folder() / "chain" / name
        done[name] = Path(run(module, out=str(out), **start, **options))
        start = dict(init=str(done[name]), problem_file=str(worlds.sevens()))
    return done


def copied(stage: str, folder: Path) -> Path:
    """A copy of a stage's checkpoint: evaluation writes its result beside it."""
    return Path(shutil.copy(chain()[stage], folder / f"{stage}.pt"))


# ---- from Python -------------------------------------------------------------------------------------------

def test_the_chain_runs():
    """pretrain, sft, sft --gold, rl and merge start from the checkpoint before; each one is another model."""
    parent = {}
    for path in chain().values():
        model, tokenizer, _ = load_model(path)
        assert model(torch.tensor([tokenizer.encode("Nora")])).isfinite().all()
        assert not worlds.same(model.state_dict(), parent)
        parent = model.state_dict()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_lineage_names_every_stage():
    """Script, options, seed, counts, sha256 of parent and data: the final file tells how it was made."""
    paths = list(chain().values())
    lineage = load_checkpoint(paths[-1])["lineage"]
    assert [stage["script"] for stage in lineage] == ["pretrain.py", "sft.py", "sft.py", "rl.py", "merge.py"]
    assert [stage["config"].get("gold") for stage in lineage] == [None, False, True, None, False]
    for stage in lineage:
        assert all(stage[count] > 0 for count in ("tokens", "updates", "flops", "seconds"))
        assert stage["config"]["seed"] == 0
    assert [stage["parent"] for stage in lineage] == [None, *map(sha256, paths[:-1])]
    for name in ("train.bin", "tokenizer.json", "val_general.bin"):
        assert lineage[0]["data"][str(worlds.data())][name] == sha256(worlds.data() / name)
    read = {str(path): sha256(path) for path in (worlds.sevens(), worlds.data() / "val.jsonl")}
    assert [stage["data"] for stage in lineage[1:]] == [read] * 4
    assert lineage[0]["tokens"] == 2_048 and lineage[0]["updates"] == 4


@pytest.mark.parametrize("stage, name, updates", [("base", "0.000512M.pt", 1), ("rl", "step1.pt", 2)])
def test_every_listed_checkpoint_is_kept(stage, name, updates):
    """--checkpoints-at keeps the model of that moment, with its own counts."""
    early = load_checkpoint(chain()[stage].with_name(name))
    counts = early["lineage"][-1]
    first, *_, last = log_of(stage, "tokens")
    assert counts["updates"] == updates
    assert counts["tokens"] == first["tokens"] < last["tokens"]
    assert not worlds.same(early["model"], load_checkpoint(chain()[stage])["model"])


@pytest.mark.parametrize("counts", [(256, 512), (512, 256), (300, 301)])
def test_token_counts_within_one_update_all_get_a_file(counts, tmp_path):
    """Each listed token count has its checkpoint, even two of the same update or out of order."""
    path = run(pretrain, out=str(tmp_path), **BASE | dict(tokens=512, checkpoints_at=counts))
    assert Path(path).is_file()
    assert all((tmp_path / f"{n / 1e6:g}M.pt").is_file() for n in counts)


def test_pretraining_reads_every_block_once(tmp_path):
    """An epoch visits every block of the shard once, in the order of the stream "text" alone."""
    tokens = 3_000 // 64 * 64
    with mock.patch.object(pretrain, "blocks", wraps=pretrain.blocks) as blocks:
        run(pretrain, data=str(worlds.other_data()), out=str(tmp_path), **BASE | dict(
            context=64, batch=1, micro_batch=1, tokens=tokens, checkpoints_at=(tokens,), eval_every=1_000,
            save_every=1_000))
    numbers = [call.args[1] for call in blocks.call_args_list]
    read = sum((some for some in numbers if isinstance(some, list)), [])     # validation asks for a range
    assert len(read) == tokens // 64 and sorted(read) == list(range(len(read)))
    assert read == batch_indices(len(read), len(read), 0, 0, "text")


def test_pretraining_logs_what_it_promises():
    """Loss, both validation losses, FLOPs and seconds are logged; the loss is near ln 510 at the start."""
    steps, measured = log_of("base", "loss"), log_of("base", "val_general")
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert {"lr", "grad_norm", "flops", "seconds"} <= steps[0].keys()
    assert [line["tokens"] for line in steps] == [512, 1024, 1536, 2048]
    assert [line["step"] for line in measured] == [0, 2, 4]
    assert all("val_arithmetic" in line for line in measured)
    assert steps[0]["loss"] == pytest.approx(math.log(512), abs=.3)
    assert measured[-1]["val_general"] < measured[0]["val_general"] - .1


def test_rl_logs_what_it_promises():
    """Each step has all metrics, each in its range; the KL is 0 at the start; the totals grow. The shares of
    styles add up to 1; the gradient's noise is measured every second step, before the update."""
    steps = log_of("rl", "reward")
    assert [line["step"] for line in steps] == [1, 2, 3]
    for line in steps:
        shares = ("reward", "signal", "unparsed", "truncated", "clip_fraction")
        assert all(0 <= line[key] <= 1 for key in shares)
        assert line["reward"] + line["unparsed"] <= 1
        assert 1 <= line["length"] <= 12
        assert 0 < line["entropy"] < math.log(512)
        assert line["kl"] >= 0 and line["grad_norm"] > 0
        assert {"ratio", "lr"} <= line.keys()
        assert sum(line[key] for key in line if key.startswith("style ")) == pytest.approx(1)
    for key in ("gradient_square", "gradient_trace"):
        assert [key in line for line in steps] == [True, False, True]
    assert any(line["signal"] > 0 for line in steps)
    assert abs(steps[0]["kl"]) < 1e-6 < max(line["kl"] for line in steps)    # the start, then away from it
    for key in ("tokens", "flops", "seconds"):
        assert [line[key] for line in steps] == sorted({line[key] for line in steps})


def test_sft_logs_what_it_promises():
    """The same keys where the method is the same: loss, gradient norm, learning rate, counts, validation."""
    steps = log_of("sft", "loss")
    assert [line["step"] for line in steps] == list(range(1, 41))   # 32 examples x 10 epochs / 8
    assert {"grad_norm", "tokens", "updates", "flops", "seconds"} <= steps[0].keys()
    assert steps[-1]["loss"] < .5 < 3 < steps[0]["loss"]
    assert steps[-1]["lr"] == pytest.approx(8e-3 / 40)   # decays linearly, last step 1/40


def test_own_answers_are_demonstrations(tmp_path):
    """Self-SFT learns from the model's right answers, all '#### 7' here, and counts what it sampled; the
    foreignness of the demonstrations is logged first: that of its own answers is low."""
    options = SFT | dict(init=str(worlds.parrot()), problem_file=str(worlds.sevens()))
    own = worlds.lines(run(sft, out=str(tmp_path / "own"), own=8, **options).parent / "log.jsonl")
    given = worlds.lines(run(sft, out=str(tmp_path / "given"), **options).parent / "log.jsonl")
    assert own[0]["demonstration_nll"] == pytest.approx(given[0]["demonstration_nll"], abs=1e-5)
    assert own[-2]["tokens"] > given[-2]["tokens"] + 32 * 8 * 3          # at least '####', ' 7', EOS each
    foreign = SFT | dict(init=str(worlds.parrot()), teacher="prose")
    strange = run(sft, out=str(tmp_path / "strange"), **foreign)
    assert worlds.lines(strange.parent / "log.jsonl")[0]["demonstration_nll"] > 2


def test_pretraining_continues_from_a_checkpoint(tmp_path):
    """512 tokens and then 512 from there read the same blocks, in the same order, as 1,024 at once; without
    momentum and at a constant rate the weights are the same."""
    def blocks_of(**options):
        with mock.patch.object(pretrain, "blocks", wraps=pretrain.blocks) as spy:
            path = run(pretrain, **BASE | dict(checkpoints_at=(512,), eval_every=99) | options)
        return path, [call.args[1] for call in spy.call_args_list if len(call.args[1]) == 4]
    _, whole = blocks_of(tokens=1_024, out=str(tmp_path / "whole"))
    first, one = blocks_of(tokens=512, out=str(tmp_path / "first"))
    second, two = blocks_of(tokens=512, init=str(first), out=str(tmp_path / "second"))
    assert one + two == whole
    lineage = load_checkpoint(second)["lineage"]
    assert [stage["tokens"] for stage in lineage] == [512, 512]
    assert lineage[1]["parent"] == hashlib.sha256(first.read_bytes()).hexdigest()


def test_all_solutions_make_more_examples(tmp_path):
    """With --gold sft.py trains on every solution of each question, else on one."""
    problems = worlds.lines(worlds.data() / "train.jsonl")[:10]
    _, tokenizer, _ = load_model(chain()["base"])
    one = sft.make_examples(tokenizer, problems, False, 0)
    gold = sft.make_examples(tokenizer, problems, True, 0)
    assert len(one) == 10 and len(gold) == sum(len(p["solutions"]) for p in problems)
    texts = [(tokenizer.decode(prompt), tokenizer.decode(solution[:-1])) for prompt, solution in gold]
    assert texts == [(f"{EOS}{p['question']}\n", s) for p in problems for s in p["solutions"]]
    assert all(solution[-1] == tokenizer.eos for _, solution in one + gold)
    assert {tuple(solution) for _, solution in one} <= {tuple(solution) for _, solution in gold}
    assert one != sft.make_examples(tokenizer, problems, False, 1)   # the choice depends on the seed


@pytest.mark.parametrize("stage, steps", [("sft", range(0, 41, 2)), ("rl", (0, 2, 3)), ("merge", (0, 2))])
def test_validations_can_be_read(stage, steps):
    """After 0, 2, ... steps and at the end, each once, a line in the log and a transcript: the same problems,
    right answers, two attempts at each, grades; in all scripts."""
    assert [line["step"] for line in log_of(stage, "val_pass@1")] == [*steps]
    text = (chain()[stage].parent / "samples.txt").read_text(encoding="utf-8")
    parts = re.split(r"^======== step (\d+)\n", text, flags=re.M)[1:]
    assert parts[::2] == list(map(str, steps))
    problems = load_problems(worlds.data() / "val.jsonl", "easy")[:2]
    for part in parts[1::2]:
        assert re.sub(r"^  \[(right|wrong|unparsed)\] (['\"]).*\2$", "-", part, flags=re.M).splitlines() == [
            line for p in problems for line in (f"{p['question']}   (answer {p['answer']})", "-", "-")]


def test_evaluation_measures_and_writes(tmp_path):
    """Evaluation gives a table on the screen and JSON beside the checkpoint, easy and hard apart."""
    path = copied("rl", tmp_path)
    result = run(evaluate, checkpoints=(str(path),), **EVALUATE)[0]
    result = json.loads(json.dumps(result))      # tuples become lists, as in the file
    written, = path.parent.glob("*.val.0shot-*.json")
    assert json.loads(written.read_text()) == result
    assert result["problems"].keys() == {"easy", "hard"}
    for numbers in result["problems"].values():
        for key in ("pass@1", "pass@8"):
            low, high = numbers[key]["interval"]
            assert 0 <= low <= numbers[key]["mean"] <= high <= 1
        assert numbers["problems"] == 2 and numbers["samples"] == 8
    assert len(result["benchmarks"]) == 7
    for name, task in result["benchmarks"].items():
        assert task["items"] >= 200
        assert abs(task["accuracy"] - task["chance"]) < .25 or name == "dialogue"    # it knows nothing
    shown = [task["accuracy"] for task in result["benchmarks"].values()]
    assert result["general_mean"] == pytest.approx(sum(shown) / 7)
    assert 2 < result["bits_per_byte"] < 8
    assert result["lineage"] == load_checkpoint(path)["lineage"]


def test_two_checkpoints_are_compared(tmp_path):
    """Two checkpoints give the paired difference; of one with itself it is 0 with interval [0, 0]."""
    path = copied("rl", tmp_path)
    options = command_line(SimpleNamespace(data=worlds.data(), threads=1, **EVALUATE))
    said = worlds.run_here("evaluate.py", path, path, "--no-benchmarks", *options).out
    assert said.split("minus")[1].count("+0.0 points  [+0.0, +0.0]") == 8   # easy, hard; pass, sound; 1, 8
def test_evaluating_with_examples_before_the_question(tmp_path):
    """The k-shot results have a file of their own and do not replace the 0-shot ones."""
    path = copied("rl", tmp_path)
    run(evaluate, checkpoints=(str(path),), shots=1, benchmarks=False, **EVALUATE | dict(max_new=8))
    assert len(list(path.parent.glob("*.val.1shot-*.json"))) == 1 and not list(path.parent.glob("*.0shot*"))


def test_the_kl_is_from_the_evaluated_model_to_the_reference(tmp_path):
    """--reference: 0 to itself; to another model, not the same as the other way round, which is there too."""
    paths = {stage: str(copied(stage, tmp_path)) for stage in ("rl", "base")}

    def kl(stage: str, reference: str) -> tuple[float, float]:
        options = dict(checkpoints=(paths[stage],), reference=paths[reference], benchmarks=False)
        result, = run(evaluate, **options, **EVALUATE)
        return result["problems"]["easy"]["kl"], result["problems"]["easy"]["kl_reverse"]
    policy, tokenizer, _ = load_model(paths["rl"])
    reference, *_ = load_model(paths["base"])
    problems = load_problems(worlds.data() / "val.jsonl", "easy")[:2]
    config = evaluate.Config((paths["rl"],), **EVALUATE)
    expected = evaluate.kl_divergence(policy, reference, tokenizer, problems, config, [])
    forward, reverse = kl("rl", "base")
    assert forward == pytest.approx(expected) and expected > 0 and reverse != pytest.approx(expected)
    assert kl("base", "rl") == (reverse, forward)
    assert kl("rl", "rl") == pytest.approx((0, 0), abs=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_run_says_so_and_changes_nothing(stage, capsys):
    """The second call with the same --out says so and leaves every byte, the logs' last lines too."""
    path, (module, _) = chain()[stage], STAGES[stage]
    there = json.loads((path.parent / "config.json").read_text())
    before, times = worlds.snapshot(path.parent), path.stat().st_mtime_ns
    result = module.train(module.Config(**there))
    assert "finished" in capsys.readouterr().out
    assert Path(result) == path
    assert worlds.snapshot(path.parent) == before and path.stat().st_mtime_ns == times


def test_the_probe_leaves_the_run_alone():
    """Measuring first changes neither the weights nor the rollouts' numbers."""
    model, tokenizer, _ = load_model(chain()["gold"])
    problems, config = worlds.lines(worlds.sevens())[:4], rl.Config(**RL)

    def rollouts() -> list:
        gen = generator(0, "rollouts", 0)
        return rl.collect(model, tokenizer, problems, 4, config, gen).completions
    weights, alone = copy.deepcopy(model.state_dict()), rollouts()
    rl.probe(model, tokenizer, problems, config)
    assert alone == rollouts()
    assert worlds.same(weights, model.state_dict())


def test_measurements_leave_a_run_alone(tmp_path):
    """Validation and the gradient's noise at every step or at the first alone: the same weights, moments and
    counts, bit for bit."""
    start = dict(init=str(worlds.parrot()), problem_file=str(worlds.sevens()))
    states, traces = [], []
    for n in (1, 99):
        path = run(rl, out=str(tmp_path / str(n)), **start, **RL | dict(eval_every=n))
        last = load_checkpoint(path.with_name("last.pt"))
        states.append([last[name] for name in ("model", "optimizers", "counts")])
        log = worlds.lines(path.with_name("log.jsonl"))
        traces.append([line["gradient_trace"] for line in log if "gradient_trace" in line])
    assert worlds.same(*states)
    assert traces[1] == traces[0][:1] and len(traces[0]) == 3 and min(traces[0]) > 0


# ---- from the command line ---------------------------------------------------------------------------------

def test_the_command_lines_chained(tmp_path):
    """The commands, chained as a person chains them, give the same bits as from Python."""
    data, sevens = tmp_path / "data", str(worlds.sevens())

    def said_by(script, *argv, **changes) -> str:
        outcome = worlds.run_here(script, *argv, *command_line(SimpleNamespace(**changes)))
        assert outcome.status == 0, outcome.errors
        return outcome.out
    said = said_by("data/prepare.py", out=data, **worlds.TINY_OPTIONS | dict(vocab_size=512))
    assert f"python pretrain.py --data {data}" in said
    base, finals = tmp_path / "base" / "0.002048M.pt", {}
    said = said_by("pretrain.py", data=data, out=base.parent, threads=1, **BASE)
    assert base.is_file() and str(base) in said
    assert re.search(rf"^next: python pretrain\.py .*--data {data}\b.* --decay 1\b", said, re.M)
    for name, changes in (("sft", SFT), ("rl", RL), ("merge", MERGE)):
        final = finals[name] = tmp_path / name / "final.pt"
        said = said_by(f"{name}.py", init=base, data=data, problem_file=sevens, out=final.parent, threads=1,
                       **changes)
        assert str(final) in said and ("WARNING" in said and "later checkpoint" in said or name != "rl")
        assert f"python evaluate.py {final} {base}" in said or name == "sft"
    said_by("merge.py", "weights", finals["rl"], finals["sft"], "--base", base, "--method", "ties",
            "-o", tmp_path / "out.pt")
    assert load_checkpoint(tmp_path / "out.pt")["lineage"][-1]["script"] == "merge.py weights"
    said = said_by("evaluate.py", finals["rl"], base, data=data, threads=1, **EVALUATE | dict(max_new=8))
    assert all(part in said for part in ("pass@1", "pass@8", "chance", "bits per byte", "minus", "paired"))
    again = load_checkpoint(run(pretrain, data=str(data), out=str(tmp_path / "again"), **BASE))["model"]
    assert worlds.same(again, load_checkpoint(base)["model"])


@pytest.mark.parametrize("command", ["data/prepare.py", "pretrain.py", "sft.py", "rl.py", "merge.py",
                                     "merge.py weights", "evaluate.py", "sample.py", "study.py"])
def test_help_is_printed(command):
    """Every script has --help, which explains the script and ends well."""
    outcome = worlds.run_here(*command.split(), "--help")
    assert outcome.status == 0 and f"python {command}" in outcome.out and not outcome.errors


def test_defaults_are_consistent():
    """The scripts find each other's output by default: same data folder, and the run folders differ."""
    defaults = {m.__name__: {f.name: f.default for f in dataclasses.fields(m.Config)}
                for m in (pretrain, sft, rl, merge, evaluate)}
    assert len({d["data"] for d in defaults.values()}) == 1
    assert len({defaults[m]["out"] for m in ("pretrain", "sft", "rl", "merge")}) == 4
    for name in ("difficulty", "max_new", "micro_tokens", "eval_problems", "eval_samples",
                 "grad_clip"):
        assert defaults["sft"][name] == defaults["rl"][name] == defaults["merge"][name], name
    for name in ("n_train", "n_problems", "rollouts", "temperature", "std", "steps"):
        assert defaults["rl"][name] == defaults["merge"][name], name
    for name in ("teacher", "gold", "batch"):
        assert defaults["sft"][name] == defaults["merge"][name], name
    assert defaults["merge"]["demonstrated"] == defaults["sft"]["n_train"]
    assert defaults["merge"]["lr_rl"] == defaults["rl"]["lr"]
    assert defaults["merge"]["lr_sft"] == defaults["sft"]["lr"]
    assert defaults["merge"]["inner"] == 1
