"""beyond/memory.py: the plan against real tensors and measured peaks, its answer on the command line; and the
options that save memory, none of which may change what is computed."""
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import worlds
from simulated_cuda import simulated_cuda

import merge
import model as model_module
import rl
import sft
import study
from beyond import memory
from checkpoint import UserError, generator, load_checkpoint, parse
from model import GPT, Cache, ModelConfig, SharedPrompts, completion_logprobs, pack, sample, tokens_at_once

SHAPE = ModelConfig(512, 509, 256, 64, 3, 2, 192)
GROUPED = ModelConfig(512, 509, 256, 64, 3, 4, 192, n_kv_heads=2)        # two heads of queries share keys
SIX_LAYERS = ModelConfig(512, 509, 256, 64, 6, 2, 192)
WIDE = ModelConfig(512, 509, 256, 512, 3, 8, 256)                        # products in bf16
OPTIONS = dict(n_problems=4, rollouts=4, max_new=32, micro_tokens=128, decode_rows=16, eval_problems=2)
PROMPT = 24


@pytest.fixture
def gpu(monkeypatch) -> Iterator[str]:
    """A simulated GPU. It does not record steps of decoding: its recordings would keep every number."""
    monkeypatch.setattr(model_module, "recorded", lambda step, device: step)
    with simulated_cuda():
        yield "cuda:0"


def peak_of(function: Callable, *args) -> int:
    """The most bytes that function(*args) holds at once, by the profiler's list of what is allocated (> 0)
    and released (< 0)."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function(*args)
    events = profile.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(changes))


def make_model(c, shape=SHAPE, device="cpu") -> GPT:
    """A model prepared as rl.py does it."""
    model = GPT(shape, generator(0, "weights")).to(device)
    model.recompute = c.recompute
    model.decode_rows = c.decode_rows
    for weight in (model.embed.weight, model.head.weight):
        weight.requires_grad_(not c.freeze_embeddings)
    return model


def make_batch(c, answer=None) -> rl.Batch:
    """Prompts of PROMPT tokens, answers of half the allowed length, random ids."""
    gen, rows = generator(0, "batch"), c.n_problems * c.rollouts
    ids = torch.randint(0, 500, (rows, PROMPT + c.max_new), generator=gen).tolist()
    completions = [row[:answer or c.max_new // 2] for row in ids]
    return rl.Batch([row[-PROMPT:] for row in ids[:c.n_problems]], completions,
                    [torch.zeros(len(x)) for x in completions], ["wrong"] * rows, [""] * rows,
                    torch.zeros(c.n_problems, c.rollouts), 0., 0.)


def gradients(model, c) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    batch = make_batch(c)
    advantage = torch.randn(len(batch.completions), generator=generator(0, "advantage"))
    rl.policy_gradient(model, None, batch, advantage, range(len(advantage)), c, 511)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def size(tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


# ---- the plan ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("freeze, reference, shape", [
    *itertools.product([False, True], [False, True], [SHAPE]), (False, True, GROUPED)])
def test_weights_gradients_moments_and_reference_are_exact(freeze, reference, shape):
    """The plan's bytes are those of the tensors that are there after one step."""
    c = rl.Config(**OPTIONS, freeze_embeddings=freeze, reference=reference)
    model, parts = make_model(c, shape), memory.plan(shape, c, PROMPT)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    grads = gradients(model, c)
    optimizer.step()
    states = [x for state in optimizer.state.values() for x in state.values() if x.dim() > 0]    # not `step`
    assert parts["always"]["parameters"] == size(model.parameters())
    assert parts["update"]["gradients"] == size(grads.values())
    assert parts["always"]["moments"] == size(states)
    assert parts["always"]["reference"] == reference * size(model.parameters())


@pytest.mark.parametrize("prompt, max_new", [(5, 40), (16, 1), (24, 32)])
@pytest.mark.parametrize("shape", [SHAPE, GROUPED, WIDE])
def test_the_cache_is_exact(prompt, max_new, shape, gpu, monkeypatch):
    """The plan's bytes are those of the keys and values. Nine answers at once: the plan counted eight when it
    asked only how many rows a validation (2 x 4) and the first probe (1 x 6) sample, not a step (3 x 3)."""
    made = []
    monkeypatch.setattr(model_module, "Cache", lambda *args: made.append(Cache(*args)) or made[-1])
    c = rl.Config(**OPTIONS | dict(max_new=max_new, rollouts=3, eval_samples=4, decode_rows=10))
    model = make_model(c, shape, gpu)            # id 510 is not in the vocabulary: no answer ever ends
    sample(model, [[1] * prompt] * 6, 3, max_new, 510, 511, generator(0, "u"))
    parts = memory.plan(shape, c, prompt)
    assert [size(x.keys_values) for x in made] == [parts["sampling"]["keys and values"]] * 2
    assert (made[0].keys_values[0].dtype == torch.bfloat16) == (shape is WIDE)


@pytest.mark.parametrize("shape", [SIX_LAYERS, WIDE])
@pytest.mark.parametrize("freeze", [False, True])
def test_the_plan_of_an_update(freeze, shape, gpu):
    """It is 1 to 1.6 times what is alive at once, with and without --recompute, which saves a third of the
    peak or more and gives the same gradient, bitwise, through several micro-batches too."""
    peaks, found = [], []
    for recompute in (False, True):
        c = rl.Config(**OPTIONS, recompute=recompute, freeze_embeddings=freeze)
        model = make_model(c, shape, gpu)
        peaks.append(peak_of(gradients, model, c))
        planned = sum(memory.plan(shape, c, PROMPT)["update"].values())
        assert peaks[-1] <= planned <= 1.6 * peaks[-1]
        found.append(gradients(model, replace(c, micro_tokens=48)))
    assert peaks[1] < .67 * peaks[0]
    assert worlds.same(*found)
    assert ("head.weight" in found[0]) != freeze
    assert any(gradient.any() for gradient in found[0].values())


@pytest.mark.parametrize("shape, group", [(SIX_LAYERS, 4), (SIX_LAYERS, 1), (WIDE, 4)])
def test_the_plan_of_sampling_is_a_little_above_the_measured_peak(shape, group, gpu):
    """Decoding, in which a fifth of the rows end soon, so that the others are copied (or, of one answer to a
    prompt, all prompts are). kl_to_reference takes less than an update."""
    sampled = dict(n_problems=5, decode_rows=20, eval_problems=20, eval_samples=group)
    c = rl.Config(**OPTIONS | sampled)
    model = make_model(c, shape, gpu)
    batch = make_batch(c, c.max_new)
    prompts = batch.prompts * (4 // group)
    greedy = dict(group=group, max_new=c.max_new, pad=511, generator=generator(0, "u"), temperature=0.)
    first, *others = sample(model, batch.prompts, eos=510, **greedy | dict(group=1)).tokens[:, 1:].tolist()
    eos = next(token for token in first if token not in sum(others, []))
    plan = memory.plan(shape, c, PROMPT)
    parts = plan["sampling"]
    decoding = peak_of(lambda: sample(model, prompts, eos=eos, **greedy))
    copying = parts["weights in bf16"] + parts["keys and values"] + parts["copied"]
    assert copying <= decoding <= copying + 20 * 20 * shape.n_vocab          # as large as rows' distributions
    scoring = peak_of(rl.kl_to_reference, model.requires_grad_(False), batch, c, 511)
    assert scoring <= sum(plan["update"].values())


def test_plans_by_hand():
    """OLMo-2 1B has 1.485 G weights: 5.94 GB in fp32, of which 1.64 GB embedding and head; 131 kB of keys and
    values in bf16 per row and column, of which 145 + 256 tokens get 416. SFT keeps no reference; parallel
    averaging has two optimizers and two copies of the weights more."""
    def olmo(c) -> dict:
        return memory.plan(memory.MODELS["olmo-1b"], c, 145)
    options = dict(max_new=256, decode_rows=64)
    plain = olmo(rl.Config(**options))
    always = plain["always"]
    assert always["parameters"] == always["reference"] == 4 * 1_484_916_736 and always["snapshots"] == 0
    frozen = olmo(rl.Config(**options, freeze_embeddings=True))["update"]
    assert plain["update"]["gradients"] - frozen["gradients"] == 4 * 2 * 100_352 * 2048
    assert plain["sampling"]["keys and values"] == 64 * 416 * 16 * 2 * 2048 * 2
    assert olmo(sft.Config(**options))["always"]["reference"] == 0
    two = olmo(merge.Config(**options))["always"]
    assert (two["moments"], two["snapshots"]) == (2 * always["moments"], 2 * always["parameters"])


@pytest.mark.parametrize("gib", [8, 12, 24])
def test_the_gpu_presets_fit_by_the_plan(gib):
    """RL, and parallel averaging with its two optimizers, as the grid calls them; a size more would not fit a
    card of 8 GB, so that the plan decides something."""
    cells = study.grid(study.STUDIES[f"gpu-{gib}"], study.Config())
    base = next(x.command for x in cells if x.recipe == "base" and not x.evaluation)
    name = base[base.index("--size") + 1]
    for script in (rl, merge):
        command = next(x.command for x in cells if x.command[0] == f"{script.__name__}.py")
        config = parse(script.Config, command[1:])
        assert tokens_at_once(config.micro_tokens, memory.GPU) >= 8192
        assert memory.total(memory.plan(memory.MODELS[name], config, 64))[0] <= memory.CARD * gib
        assert memory.total(memory.plan(memory.MODELS["124M"], config, 64))[0] > memory.CARD * 8


# ---- the answer ------------------------------------------------------------------------------------------

def test_the_limit_is_the_plan():
    """A hair more memory is accepted, a hair less refused in one line with every saving and the sum."""
    options = "--decode-rows 32 --micro-tokens 256 --recompute --no-reference --freeze-embeddings"
    plan = memory.plan(memory.MODELS["3M"], parse(rl.Config, options.split()), 160)
    gib, summed = memory.total(plan)
    for factor, status in ((1.001, 0), (.999, 2)):
        argv = ("--size", "3M", "--memory", factor * gib / memory.CARD, "--run", f"rl.py {options}")
        done = worlds.run_here("beyond/memory.py", *argv)
        assert done.status == status and len(done.errors) == (status > 0)
        line = " ".join(done.out.split()) or done.errors[0]
        assert f"GB ({factor * gib:.2f} GiB)" in line and f"{options} {summed}" in line
    assert "1 for CUDA + (parameters 0.01, moments 0.02)" in summed and "in sampling" in summed


SMALL = "--decode-rows 64 --micro-tokens 512"
OWN = "--decode-rows 16 --micro-tokens 400"


@pytest.mark.parametrize("gib, run, expected", [
    (160, "rl.py", "--decode-rows 1024 --micro-tokens 16384"),
    (120, "rl.py", "--decode-rows 1024 --micro-tokens 2048"),
    (60, "rl.py", "--decode-rows 128 --micro-tokens 2048"),
    (45, "rl.py", SMALL), (36, "rl.py", f"{SMALL} --recompute"),
    (30, "rl.py", f"{SMALL} --recompute --no-reference"),
    (24, "rl.py", f"{SMALL} --recompute --no-reference --freeze-embeddings"),
    (24, f"rl.py {OWN} --freeze-embeddings", f"{OWN} --recompute --no-reference --freeze-embeddings"),
    (24, "sft.py", f"{SMALL} --recompute --freeze-embeddings")])
def test_only_the_savings_that_are_needed_are_taken(gib, run, expected, capsys):
    """With less memory, one option after the other joins: first those that cost time, last the one that
    trains another model. Options given stay, no saving makes a number larger, each is one of that script."""
    memory.show(memory.Config(size="olmo-1b", memory=gib, run=f"{run} --max-new 256"))
    first, summed = capsys.readouterr().out.splitlines()
    assert first == f"olmo-1b on {gib} GB ({.97 * gib:.2f} GiB): fits with {expected}"
    assert (" 22.54 GiB = " in summed) == (gib == 24 and run == "rl.py")
    parse((sft if run == "sft.py" else rl).Config, expected.split())


@pytest.mark.parametrize("run", ["", "pretrain.py", "sft.py --steps 3", "rl.py --rollouts 1"])
def test_another_command_is_refused(run):
    with pytest.raises(UserError, match=" ".join(run.split()[1:]) or "--run"):
        memory.show(memory.Config(run=run))


def test_the_table_of_all_sizes():
    """Two lines per size and card; a larger card never needs more savings; a checkpoint has its own shape."""
    out = worlds.run_here("beyond/memory.py")
    assert out.status == 0 and out.errors == []
    for name in memory.MODELS:
        lines = [line for line in out.out.splitlines() if line.startswith(f"{name} on ")]
        options = [line.count(" --") for line in lines]
        assert len(lines) == 3 and options == sorted(options, reverse=True)
    for option in (["--init", worlds.base()], ["--run", f"merge.py --init {worlds.base()}"]):
        own = worlds.run_here("beyond/memory.py", *option)
        assert own.status == 0 and own.out.count(f"{worlds.base()} on ") == 3


# ---- the options that save memory ------------------------------------------------------------------------

def test_prompts_are_stored_once():
    """SharedPrompts stores keys and values as a side effect of a forward pass that --recompute repeats."""
    model = make_model(rl.Config(**OPTIONS, recompute=True))
    shared = SharedPrompts(model, [[1, 2, 3], [4, 5]], 511)
    assert len(shared.graph) == 2 * SHAPE.n_layers
    for x in shared.keys_values:
        x.grad = torch.ones_like(x)
    shared.backward()
    assert len(shared.graph) == 2 * SHAPE.n_layers and model.blocks[0].qkv.weight.grad is not None


def test_sampled_and_scored_logprobs_agree_in_bf16(gpu):
    """The logits are fp32, so recorded log-probabilities are the trainer's but for the rounding of keys and
    values (a probability is off by some thousandths)."""
    model = make_model(rl.Config(**OPTIONS), WIDE, gpu)
    with torch.no_grad():
        model.head.weight.mul_(5)
    prompts = [[1, 2, 3], [4, 5, 6]]
    out = sample(model, prompts, 2, 8, 510, 511, generator(0, "u"))
    ids, *where = pack([prompts[row // 2] for row in range(4)], out.tokens.tolist(), 511, gpu)
    scored = completion_logprobs(model, ids, *where).detach().cpu()
    assert model.logits(model.hidden(ids)).dtype == torch.float32
    assert 1e-5 < float((out.logprobs.flatten() - scored).abs().max()) < .05


FRUGAL = dict(freeze_embeddings=True, recompute=True, reference=False, decode_rows=4)


def run_rl(out, **changes):
    options = dict(init=str(worlds.parrot()), data=str(worlds.data()), problem_file=str(worlds.sevens()),
                   max_new=12, eval_problems=2, eval_samples=2, n_problems=4, rollouts=4, steps=2,
                   save_every=1, threads=1)
    return worlds.quietly(rl.train, rl.Config(out=str(out), **options | changes))


def test_a_frugal_run(tmp_path, monkeypatch):
    """Two steps with every option: embedding and head stay bit for bit and have no moments, every matrix of a
    block moves. Stopped in the second step and started again, the run ends in the same files."""
    before = load_checkpoint(worlds.parrot())["model"]
    after = load_checkpoint(run_rl(tmp_path / "whole", **FRUGAL))["model"]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == before.keys() - {"embed.weight", "head.weight"}
    [optimizer] = load_checkpoint(tmp_path / "whole" / "last.pt")["optimizers"]
    assert len(optimizer["state"]) == len(before) - 2
    collect, last = rl.collect, tmp_path / "stopped" / "last.pt"

    def stop_if_saved(*args, **kwargs):
        if last.exists():
            raise KeyboardInterrupt
        return collect(*args, **kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(rl, "collect", stop_if_saved)
        with pytest.raises(KeyboardInterrupt):
            run_rl(tmp_path / "stopped", **FRUGAL)
    assert load_checkpoint(last)["step"] == 1
    run_rl(tmp_path / "stopped", **FRUGAL)
    worlds.assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_the_reference_changes_the_logged_kl_only(tmp_path):
    """With and without it: the same weights; the KL is a number, or null."""
    kls = []
    finals = []
    for reference in (True, False):
        path = run_rl(tmp_path / str(reference), reference=reference)
        finals.append(load_checkpoint(path)["model"])
        kls.append([x["kl"] for x in worlds.lines(path.with_name("log.jsonl")) if "kl" in x])
    assert worlds.same(*finals)
    assert len(kls[0]) == 2 and None not in kls[0] and kls[1] == [None, None]
