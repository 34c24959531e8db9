"""From an empty folder to an evaluated RL model, in small: each script hands its checkpoint to the next,
first from Python, then from the command line."""
import dataclasses
import functools
import hashlib
import json
import math
import re
import shutil
from pathlib import Path
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

BASE = dict(size="0.3M", context=128, batch=4, micro_batch=2, tokens=2_048, checkpoints_at=(512, 2_048),
            warmup=1, eval_every=2, save_every=2)
BRIEF = dict(max_new=12, eval_every=2, eval_problems=2, eval_samples=2, save_every=2)
SFT = BRIEF | dict(epochs=1, batch=8, lr=2e-3)
RL = BRIEF | dict(n_problems=4, rollouts=4, steps=3, updates=2, kl=.01, checkpoints_at=(1,))
MERGE = BRIEF | dict(n_problems=4, rollouts=4, batch=4, steps=2)
EVALUATE = dict(n_problems=2, n_samples=8, k=(1, 8), max_new=32)


def run(module, **options):
    """The result of a script's main function, from Python, with the data set of all tests."""
    function = evaluate.run if module is evaluate else module.train
    return worlds.quietly(function, module.Config(**dict(data=str(worlds.data()), threads=1) | options))


def log_of(stage: str, key: str) -> list[dict]:
    """The lines of a stage's log that have this key."""
    return [line for line in worlds.lines(chain()[stage].parent / "log.jsonl") if key in line]


@functools.cache
def chain() -> dict[str, Path]:
    """Stage -> its final checkpoint. The SFT stages learn to answer 7: RL has something to reinforce."""
    done, sevens = {}, str(worlds.sevens())
    for name, module, options in (
            ("base", pretrain, BASE), ("sft", sft, SFT | dict(epochs=10, lr=8e-3)),
            ("gold", sft, SFT | dict(gold=True, lr=1e-4)), ("rl", rl, RL), ("merge", merge, MERGE)):
        start = dict(init=str([*done.values()][-1]), problem_file=sevens) if done else {}
        done[name] = Path(run(module, out=str(worlds.folder() / "chain" / name), **start, **options))
    return done


# ---- from Python -------------------------------------------------------------------------------------------

def test_the_chain_runs():
    """pretrain, sft, sft --gold, rl and merge start from the checkpoint before, and each one is a model."""
    for path in chain().values():
        model, tokenizer, _ = load_model(path)
        assert model(torch.tensor([tokenizer.encode("Nora")])).isfinite().all()


def test_each_stage_changes_the_model():
    """Nothing is skipped silently: every stage's weights differ from its parent's."""
    stages = [load_checkpoint(path)["model"] for path in chain().values()]
    for parent, child in zip(stages, stages[1:]):
        assert not torch.equal(parent["head.weight"], child["head.weight"])


def test_the_lineage_names_every_stage():
    """Script, options, seed, counts and the parent's sha256: the final file alone tells how it was made."""
    paths = list(chain().values())
    lineage = load_checkpoint(paths[-1])["lineage"]
    assert [stage["script"] for stage in lineage] == ["pretrain.py", "sft.py", "sft.py", "rl.py", "merge.py"]
    assert [stage["config"].get("gold") for stage in lineage] == [None, False, True, None, False]
    for stage in lineage:
        assert stage["tokens"] > 0 and stage["flops"] > 0 and stage["seconds"] > 0 and stage["updates"] > 0
        assert stage["config"]["seed"] == 0
    parents = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths[:-1]]
    assert [stage["parent"] for stage in lineage] == [None, *parents]
    assert lineage[0]["tokens"] == 2_048 and lineage[0]["updates"] == 4


def test_the_data_behind_a_model_is_recorded():
    """The first stage names the sha256 of every data file it may have read."""
    recorded = load_checkpoint(chain()["base"])["lineage"][0]["data"]
    for name in ("train.bin", "tokenizer.json", "val_general.bin"):
        assert recorded[name] == hashlib.sha256((worlds.data() / name).read_bytes()).hexdigest()


def test_pretraining_keeps_every_listed_checkpoint():
    """There is a checkpoint at each token count, holding the model of that moment."""
    early = chain()["base"].with_name("0.000512M.pt")
    assert early.is_file()
    stage = load_checkpoint(early)["lineage"][-1]
    assert (stage["tokens"], stage["updates"]) == (512, 1)
    assert not torch.equal(load_checkpoint(early)["model"]["head.weight"],
                           load_checkpoint(chain()["base"])["model"]["head.weight"])


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


def test_rl_keeps_every_listed_checkpoint():
    """--checkpoints-at works for RL as for pretraining: the model after that step, with its own counts."""
    stage = load_checkpoint(chain()["rl"].with_name("step1.pt"))["lineage"][-1]
    assert stage["updates"] == 2 and stage["tokens"] < load_checkpoint(chain()["rl"])["lineage"][-1]["tokens"]


def test_pretraining_logs_what_it_promises():
    """Loss, both validation losses, FLOPs and seconds are logged; the loss is near ln 510 at the start."""
    steps, measured = log_of("base", "loss"), log_of("base", "val_general")
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert {"step", "tokens", "loss", "lr", "grad_norm", "flops", "seconds"} <= steps[0].keys()
    assert [line["tokens"] for line in steps] == [512, 1024, 1536, 2048]
    assert len(measured) == 3 and all("val_arithmetic" in line for line in measured)
    assert steps[0]["loss"] == pytest.approx(math.log(512), abs=.3)
    assert measured[-1]["val_general"] < measured[0]["val_general"] - .1


def test_rl_logs_what_it_promises():
    """Each step has reward, signal, unparsed, truncated, length, entropy, KL to the start, ratio, clip
    fraction, gradient norm, tokens, FLOPs and seconds; validation pass@1 at intervals."""
    steps = log_of("rl", "reward")
    assert [line["step"] for line in steps] == [1, 2, 3]
    for line in steps:
        shares = ("reward", "signal", "unparsed", "truncated", "clip_fraction")
        assert {*shares, "length", "entropy", "kl", "ratio", "grad_norm", "tokens", "flops", "seconds",
                "lr"} <= line.keys()
        assert all(0 <= line[key] <= 1 for key in shares)
        assert line["reward"] + line["unparsed"] <= 1 and 1 <= line["length"] <= 12 and line["grad_norm"] > 0
        assert 0 < line["entropy"] < math.log(512) and line["kl"] >= 0
    assert any(line["signal"] > 0 for line in steps)
    assert abs(steps[0]["kl"]) < 1e-6 < max(line["kl"] for line in steps)    # the start, then away from it
    for key in ("tokens", "flops", "seconds"):
        assert [line[key] for line in steps] == sorted({line[key] for line in steps})


def test_sft_logs_what_it_promises():
    """The same keys where the method is the same: loss, gradient norm, learning rate, counts, validation."""
    steps = log_of("sft", "loss")
    assert [line["step"] for line in steps] == list(range(1, 41))   # 32 examples x 10 epochs / 8
    assert {"loss", "grad_norm", "lr", "tokens", "updates", "flops", "seconds"} <= steps[0].keys()
    assert steps[-1]["loss"] < .5 < 3 < steps[0]["loss"]
    assert steps[-1]["lr"] == pytest.approx(8e-3 / 40)   # decays linearly, last step 1/40
    assert log_of("sft", "val_pass@1")


@pytest.mark.parametrize("stage, key, steps", [
    ("base", "val_general", [0, 2, 4]), ("rl", "val_pass@1", [0, 2, 3]), ("merge", "val_pass@1", [0, 2]),
    ("sft", "val_pass@1", list(range(0, 41, 2)))])
def test_a_validation_is_labelled_by_the_updates_done(stage, key, steps):
    """A validation measures the model after `step` steps: 0, 2, ... and the end, each once."""
    assert [line["step"] for line in log_of(stage, key)] == steps


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
def test_transcripts_can_be_read(stage, steps):
    """At every validation the same problems, right answers, two attempts at each, grades: in all scripts."""
    text = (chain()[stage].parent / "samples.txt").read_text()
    parts = re.split(r"^======== step (\d+)\n", text, flags=re.M)[1:]
    assert parts[::2] == list(map(str, steps))
    problems = load_problems(worlds.data() / "val.jsonl", "easy")[:2]
    for part in parts[1::2]:
        assert re.sub(r"^  \[(right|wrong|unparsed)\] (['\"]).*\2$", "-", part, flags=re.M).splitlines() == [
            line for p in problems for line in (f"{p['question']}   (answer {p['answer']})", "-", "-")]


def test_evaluation_measures_and_writes(tmp_path):
    """Evaluation gives a table on the screen and JSON beside the checkpoint, easy and hard apart."""
    path = Path(shutil.copy(chain()["rl"], tmp_path))
    result = run(evaluate, checkpoints=(str(path),), **EVALUATE)[0]
    result = json.loads(json.dumps(result))      # tuples become lists, as in the file
    assert json.loads(path.with_suffix(".val.0shot.json").read_text()) == result
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
        assert task["stderr"] == pytest.approx(
            math.sqrt(task["accuracy"] * (1 - task["accuracy"]) / (task["items"] - 1)))
    shown = [task["accuracy"] for task in result["benchmarks"].values()]
    assert result["general_mean"] == pytest.approx(sum(shown) / 7)
    assert 2 < result["bits_per_byte"] < 8
    assert result["lineage"] == load_checkpoint(path)["lineage"]


def test_two_checkpoints_are_compared(tmp_path, capsys):
    """Two checkpoints give the paired difference; of one with itself it is 0 with interval [0, 0]."""
    path = shutil.copy(chain()["rl"], tmp_path)
    config = evaluate.Config((path, path), data=str(worlds.data()), threads=1, benchmarks=False, **EVALUATE)
    evaluate.run(config)
    printed = capsys.readouterr().out.split("minus")[1]
    assert printed.count("+0.0 points  [+0.0, +0.0]") == 4   # easy and hard, pass@1 and pass@8


def test_evaluating_with_examples_before_the_question(tmp_path):
    """The k-shot results have a file of their own and do not replace the 0-shot ones."""
    path = Path(shutil.copy(chain()["rl"], tmp_path))
    run(evaluate, checkpoints=(str(path),), shots=1, benchmarks=False, **EVALUATE | dict(max_new=8))
    assert path.with_suffix(".val.1shot.json").is_file() and not path.with_suffix(".val.0shot.json").exists()


def test_the_kl_is_from_the_evaluated_model_to_the_reference(tmp_path):
    """--reference: 0 to itself; to another model, not the same as the other way round."""
    rl_path, base_path = (str(shutil.copy(chain()[name], tmp_path / f"{name}.pt")) for name in ("rl", "base"))

    def kl(path: str, reference: str) -> float:
        result, = run(evaluate, checkpoints=(path,), benchmarks=False, reference=reference, **EVALUATE)
        return result["problems"]["easy"]["kl"]
    models = [load_model(path)[:2] for path in (rl_path, base_path)]
    problems = load_problems(worlds.data() / "val.jsonl", "easy")[:2]
    config = evaluate.Config((rl_path,), **EVALUATE)
    expected = evaluate.kl_divergence(models[0][0], models[1][0], models[0][1], problems, config, [])
    assert kl(rl_path, base_path) == pytest.approx(expected) and expected > 0
    assert kl(base_path, rl_path) != pytest.approx(expected)
    assert abs(kl(rl_path, rl_path)) < 1e-6


@pytest.mark.parametrize("stage, module", [("base", pretrain), ("sft", sft), ("rl", rl), ("merge", merge)])
def test_a_finished_run_says_so_and_changes_nothing(stage, module, capsys):
    """The second call with the same --out says so and leaves every byte, the logs' last lines too."""
    path = chain()[stage]
    there = json.loads((path.parent / "config.json").read_text())
    there = {k: tuple(v) if isinstance(v, list) else v for k, v in there.items()}
    before, times = worlds.snapshot(path.parent), path.stat().st_mtime_ns
    result = module.train(module.Config(**there))
    assert "finished" in capsys.readouterr().out
    assert Path(result) == path
    assert worlds.snapshot(path.parent) == before and path.stat().st_mtime_ns == times


@pytest.mark.parametrize("stage", ["base", "parrot"])
def test_rl_measures_before_it_trains(stage, capsys):
    """First rl.py prints the success rate and the share of groups with a signal; a warning if it is 0."""
    model, tokenizer, _ = load_model(chain()["base" if stage == "base" else "gold"])
    rl.probe(model, tokenizer, worlds.lines(worlds.sevens())[:4], rl.Config(**RL))
    said = capsys.readouterr().out
    assert "% of 32 answers right" in said and "groups of 4" in said   # 2 x 4 answers to 4 problems
    assert ("WARNING" in said and "later checkpoint" in said) == (stage == "base")


def test_the_probe_leaves_the_run_alone():
    """Measuring first changes neither the weights nor the rollouts' numbers."""
    model, tokenizer, _ = load_model(chain()["gold"])
    problems, config = worlds.lines(worlds.sevens())[:4], rl.Config(**RL)

    def rollouts() -> list:
        gen = generator(0, "rollouts", 0)
        return rl.collect(model, tokenizer, problems, 4, config, gen).completions
    weights, alone = {k: v.clone() for k, v in model.state_dict().items()}, rollouts()
    worlds.quietly(lambda c: rl.probe(model, tokenizer, problems, c), config)
    assert alone == rollouts() and worlds.same(weights, dict(model.state_dict()))


# ---- from the command line ---------------------------------------------------------------------------------

def options(changes: dict) -> list[str]:
    """The command line of these fields."""
    argv = []
    for name, value in changes.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no-{name}")
        else:
            value = ",".join(map(str, value)) if isinstance(value, tuple) else value
            argv.append(f"--{name}={value}")
    return argv


def test_the_command_lines_chained(tmp_path):
    """The commands, chained as a person chains them, give the same bits as from Python."""
    data, sevens = tmp_path / "data", str(worlds.sevens())

    def said_by(script, *argv, **changes) -> str:
        outcome = worlds.run_here(script, *argv, *options(changes))
        assert outcome.status == 0, outcome.errors
        return outcome.out
    said = said_by("data/prepare.py", out=data, **worlds.TINY_OPTIONS | dict(vocab_size=512))
    assert f"python pretrain.py --data {data}" in said
    base, finals = tmp_path / "base" / "0.002048M.pt", {}
    said = said_by("pretrain.py", data=data, out=base.parent, threads=1, **BASE)
    assert base.is_file() and str(base) in said
    for name, changes in (("sft", SFT | dict(gold=True)), ("rl", RL), ("merge", MERGE)):
        final = finals[name] = tmp_path / name / "final.pt"
        said = said_by(f"{name}.py", init=base, data=data, problem_file=sevens, out=final.parent, threads=1,
                       **changes)
        assert str(final) in said and ("WARNING" in said or name != "rl")
        assert f"python evaluate.py {final} {base}" in said or name == "sft"
    said_by("merge.py", "weights", finals["rl"], finals["sft"], "--base", base, "--method", "ties",
            "-o", tmp_path / "out.pt")
    assert load_checkpoint(tmp_path / "out.pt")["lineage"][-1]["script"] == "merge.py weights"
    said = said_by("evaluate.py", finals["rl"], base, data=data, threads=1, **EVALUATE | dict(max_new=8))
    assert all(part in said for part in ("pass@1", "pass@8", "chance", "bits per byte", "minus", "paired"))
    again = load_checkpoint(run(pretrain, data=str(data), out=str(tmp_path / "again"), **BASE))["model"]
    assert worlds.same(again, load_checkpoint(base)["model"])


def test_the_printed_next_command_is_complete(tmp_path):
    """The printed next command works when pasted: it names a data folder that is not the default one."""
    data = tmp_path / "elsewhere"
    worlds.run_here("data/prepare.py", *options(worlds.TINY_OPTIONS | dict(out=data)))
    argv = options(BASE | dict(data=data, out=tmp_path / "base", threads=1))
    said = worlds.run_here("pretrain.py", *argv).out
    command = said.split("next: python rl.py ")[1].splitlines()[0]
    assert str(data) in command


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
    for name in ("difficulty", "n_train", "max_new", "micro_tokens", "eval_problems", "eval_samples",
                 "grad_clip"):
        assert defaults["sft"][name] == defaults["rl"][name] == defaults["merge"][name], name
    for name in ("n_problems", "rollouts", "temperature", "std", "steps"):
        assert defaults["rl"][name] == defaults["merge"][name], name
    assert (defaults["merge"]["lr_rl"], defaults["merge"]["lr_sft"]) == (defaults["rl"]["lr"],
                                                                         defaults["sft"]["lr"])
    assert defaults["merge"]["batch"] == defaults["sft"]["batch"] and defaults["merge"]["inner"] == 1
