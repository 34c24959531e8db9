"""scale.py: the plan against real tensors and measured peaks; AdamW, checkpointing, frozen embeddings."""
import contextlib
import copy
import itertools
import json
import weakref
from types import SimpleNamespace

import pytest
import torch
import worlds
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as model_module
import rl
import scale
from checkpoint import Run, UserError, generator, load_checkpoint
from model import GPT, Cache, ModelConfig, SharedPrompts, completion_logprobs, sample

SHAPE = ModelConfig(512, 509, 256, 64, 3, 2, 192)
GROUPED = ModelConfig(512, 509, 256, 64, 3, 4, 192, n_kv_heads=2)        # two heads of queries share keys
OPTIONS = dict(n_problems=4, rollouts=4, max_new=32, micro_batch=256, decode_rows=16, eval_problems=2)
PROMPT = 24


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors made inside and still alive: `live`, and the most there ever were."""

    def __init__(self):
        super().__init__()
        self.live, self.most, self.known = 0, 0, weakref.WeakValueDictionary()

    def forget(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            storage = x.untyped_storage() if torch.is_tensor(x) else None
            if storage is not None and storage._cdata not in self.known and storage._cdata not in given:
                self.known[storage._cdata] = storage
                self.live += storage.nbytes()
                weakref.finalize(storage, self.forget, storage.nbytes())
        self.most = max(self.most, self.live)
        return out


def products(half: bool):
    """Matrix products in bf16, as on a GPU, or as they are."""
    return torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext()


def make_model(c, shape=SHAPE) -> GPT:
    model = GPT(shape, generator(0, "weights"))
    scale.fit(c, model, PROMPT, torch.device("cpu"))
    return model


def make_batch(c, answer=None) -> rl.Batch:
    """Prompts of PROMPT tokens, answers of half the allowed length, random ids."""
    gen, rows = generator(0, "batch"), c.n_problems * c.rollouts
    ids = torch.randint(0, 500, (rows, PROMPT + c.max_new), generator=gen).tolist()
    completions = [row[:answer or c.max_new // 2] for row in ids]
    return rl.Batch([row[-PROMPT:] for row in ids[:c.n_problems]], completions,
                    [torch.zeros(len(x)) for x in completions], ["wrong"] * rows, [""] * rows,
                    torch.zeros(c.n_problems, c.rollouts), 0., 0.)


def gradients(model, c, reference=None) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    batch = make_batch(c)
    advantage = torch.randn(len(batch.completions), generator=generator(0, "advantage"))
    rl.policy_gradient(model, reference, batch, advantage, range(len(advantage)), c, 511)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def size(tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


# ---- the plan ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("freeze, moments, reference, shape", [*itertools.product(
    [False, True], ["fp32", "bf16"], ["fp32", "bf16", "none"], [SHAPE]), (False, "fp32", "bf16", GROUPED)])
def test_weights_gradients_moments_and_reference_are_exact(freeze, moments, reference, shape):
    """The plan's bytes are those of the tensors that are there after one step."""
    c = rl.Config(**OPTIONS, freeze_embeddings=freeze, moments=moments, reference=reference)
    model, parts = make_model(c, shape), scale.plan(shape, c, PROMPT, False)
    start, optimizer = scale.keep_start(model, c), scale.make_optimizer(model, c, 1e-3)
    grads = gradients(model, c)
    optimizer.step()
    states = [x for state in optimizer.state.values() for name, x in state.items() if name != "step"]
    assert parts["parameters"] == size(model.parameters())
    assert parts["gradients"] == size(grads.values())
    assert parts["moments"] == size(states)
    assert parts["reference"] == (size(start.parameters()) if start else 0)


@pytest.mark.parametrize("prompt, max_new", [(5, 4), (5, 40), (16, 1), (24, 32), (30, 17)])
@pytest.mark.parametrize("half, shape", [(False, SHAPE), (True, SHAPE), (True, GROUPED)])
def test_the_cache_is_exact(prompt, max_new, half, shape, monkeypatch):
    """The plan's bytes are those of the keys and values after the longest possible answers."""
    made = []
    monkeypatch.setattr(model_module, "Cache", lambda *args: made.append(Cache(*args)) or made[-1])
    c = rl.Config(**OPTIONS | dict(max_new=max_new, rollouts=2, eval_samples=4, decode_rows=8))
    with products(half):                         # id 510 is not in the vocabulary: no answer ever ends
        sample(make_model(c, shape), [[1] * prompt] * 4, 4, max_new, 510, 511, generator(0, "u"), block=8)
    parts = scale.plan(shape, c, prompt, half)
    assert [size([x.k, x.v]) for x in made] == [parts["cache"]] * 2
    assert made[0].k.dtype == (torch.bfloat16 if half else torch.float32)


@pytest.mark.parametrize("half, checkpointing, freeze", [
    (False, False, False), (False, True, False), (True, False, True), (True, True, True)])
def test_the_plan_of_an_update_is_a_little_above_the_measured_peak(half, checkpointing, freeze):
    """Everything that comes and goes in an update: the plan is 1 to 1.8 times what is alive at once."""
    c = rl.Config(**OPTIONS, checkpointing=checkpointing, freeze_embeddings=freeze)
    model, peak = make_model(c), Peak()
    with products(half), peak:
        gradients(model, c)
    parts = scale.plan(SHAPE, c, PROMPT, half)
    planned = sum(parts[name] for name in scale.PHASES["update"])
    assert peak.most <= planned <= 1.8 * peak.most


@pytest.mark.parametrize("half", [False, True])
def test_the_plan_of_sampling_is_a_little_above_the_measured_peak(half):
    """The same for decoding; kl_to_start, the other measurement of that phase, must fit too."""
    c = rl.Config(**OPTIONS)
    model, batch = make_model(c), make_batch(c, c.max_new)
    parts = scale.plan(SHAPE, c, PROMPT, half)
    decoding, scoring = Peak(), Peak()
    with products(half), decoding:
        sample(model, batch.prompts, c.rollouts, c.max_new, 510, 511, generator(0, "u"))
    with products(half), scoring:
        rl.kl_to_start(model.requires_grad_(False), batch, c, 511)
    rows = 20 * SHAPE.n_vocab * c.decode_rows
    planned = parts["weights in bf16"] + parts["cache"] + parts["growing"] + rows
    assert decoding.most <= planned <= 1.6 * decoding.most
    assert scoring.most <= sum(parts[name] for name in scale.PHASES["sampling"])


def test_checkpointing_keeps_less():
    """Else it would be for nothing: below half of the peak with six layers."""
    shape, peaks = ModelConfig(512, 509, 256, 64, 6, 2, 192), []
    for checkpointing in (False, True):
        c = rl.Config(**OPTIONS, checkpointing=checkpointing)
        model = make_model(c, shape)
        with Peak() as peak:
            gradients(model, c)
        peaks.append(peak.most)
    assert peaks[1] < .5 * peaks[0]


def test_olmo_by_hand():
    """1.485 G weights: 5.94 GB in fp32, of which 1.64 GB embedding and head; 131 kB of keys and values in
    bf16 per token and row."""
    c = rl.Config(max_new=256, decode_rows=64)
    parts = scale.plan(scale.MODELS["olmo-1b"], c, 145, True)
    assert parts["parameters"] == 4 * 1_484_916_736
    frozen = scale.plan(scale.MODELS["olmo-1b"], rl.Config(freeze_embeddings=True), 145, True)
    assert parts["gradients"] - frozen["gradients"] == 4 * 2 * 100_352 * 2048
    assert parts["cache"] == 64 * (145 + 256) * 16 * 2 * 2048 * 2


# ---- the refusal -----------------------------------------------------------------------------------------

def test_too_little_memory_is_refused_with_the_arithmetic(tmp_path):
    """One line: how much there is, the sum, and what every option would save; no folder is made."""
    out = worlds.run_here("rl.py", "--init", worlds.parrot(), "--data", worlds.data(), "--memory", ".05",
                          "--out", tmp_path / "run", "--max-new", 40)
    assert out.status == 2 and len(out.errors) == 1 and not (tmp_path / "run").exists()
    for words in ("0.05 GiB are not enough", "parameters 0.00", "cache 0.", "--decode-rows 64 0."):
        assert words in out.errors[0]


def test_enough_memory_is_not_refused(capsys):
    """The limit is the plan itself: a hair above is accepted, a hair below is not."""
    c = rl.Config(**OPTIONS)
    total = scale.needed(scale.plan(SHAPE, c, PROMPT, False))
    for factor, fits in ((1.001, True), (.999, False)):
        c.memory = factor * total
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match="not enough"):
            make_model(c)
        assert f"= {total:.2f} GiB" in capsys.readouterr().out


def test_what_every_option_saves_is_the_difference(capsys):
    """Fitting after all: the plan with the option is smaller by what the refusal promised."""
    shape = ModelConfig(8192, 8192, 256, 256, 4, 4, 704)
    c = rl.Config(**OPTIONS | dict(decode_rows=1024, n_problems=64, micro_batch=4096), memory=.01)
    with pytest.raises(UserError) as refusal:
        make_model(c, shape)
    promised = dict(x.rsplit(" ", 1) for x in str(refusal.value).split("would save: ")[1].split(", "))
    assert "--moments bf16" in promised and "--checkpointing" in promised
    before = scale.needed(scale.plan(shape, c, PROMPT, False))
    c.moments = "bf16"
    after = scale.needed(scale.plan(shape, c, PROMPT, False))
    assert abs(before - after - float(promised["--moments bf16"])) < .006


@pytest.mark.parametrize("options, named", [
    (dict(moments="fp8"), "--moments fp8"), (dict(reference="gone"), "--reference gone"),
    (dict(reference="none", kl=.1), "--kl"), (dict(decode_rows=0), "--decode-rows 0"),
    (dict(memory=-1.), "--memory -1")])
def test_options_that_make_no_sense_are_refused(options, named):
    with pytest.raises(UserError, match=named):
        make_model(rl.Config(**OPTIONS | options))


def test_a_small_run_on_a_cpu_says_nothing(capsys):
    make_model(rl.Config(**OPTIONS))
    assert capsys.readouterr().out == ""


# ---- AdamW -------------------------------------------------------------------------------------------------

def steps_of(optimizer, parameters, steps, seed=0, size=1.):
    """Random gradients, whose scale differs between weights by orders of magnitude."""
    gen = generator(seed, "gradients")
    for _ in range(steps):
        for p in parameters:
            p.grad = size * torch.randn(p.shape, generator=gen) * torch.logspace(-4, 0, p.numel()).view_as(p)
        optimizer.step()


def two_parameters():
    gen = generator(0, "parameters")
    return [torch.nn.Parameter(torch.randn(shape, generator=gen)) for shape in ((13, 7), (5,))]


def test_adamw_in_fp32_is_torchs_bitwise(monkeypatch):
    """Also in slices that do not divide the tensor, with decay, at a learning rate that changes."""
    monkeypatch.setattr(scale, "SLICE", 8)
    ours, theirs = two_parameters(), two_parameters()
    a = scale.AdamW(ours, 1e-2, .1, torch.float32)
    b = torch.optim.AdamW(theirs, 1e-2, weight_decay=.1, foreach=False)
    for lr in (1e-2, 3e-3):
        a.param_groups[0]["lr"] = b.param_groups[0]["lr"] = lr
        steps_of(a, ours, 10)
        steps_of(b, theirs, 10)
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs))


def test_adamw_in_bf16_is_close_to_torchs():
    """After 200 steps the weights differ by 2 % of the way they went."""
    start, ours, theirs = two_parameters(), two_parameters(), two_parameters()
    steps_of(scale.AdamW(ours, 1e-3, 0.), ours, 200)
    steps_of(torch.optim.AdamW(theirs, 1e-3, weight_decay=0.), theirs, 200)
    for p, q, s in zip(*(map(torch.Tensor.detach, x) for x in (ours, theirs, start))):
        assert 0 < float((p - q).norm()) < .02 * float((q - s).norm())


def test_the_second_moment_decays_in_bf16():
    """1,000 steps without gradient leave .999^1000 = 37 % of it; rounded to nearest it would never fall."""
    p = torch.nn.Parameter(torch.ones(4096))
    optimizer = scale.AdamW([p], 0.)
    p.grad = torch.ones(4096)
    optimizer.step()
    before = optimizer.state[p]["v"].float().mean()
    p.grad = torch.zeros(4096)
    for _ in range(1000):
        optimizer.step()
    assert abs(float(optimizer.state[p]["v"].float().mean() / before) - .999 ** 1000) < .01
    assert torch.tensor(1., dtype=torch.bfloat16) * .999 == 1             # the reason


def test_rounding_at_random_is_unbiased():
    """1 + 1/512 lies a quarter of the way between the bf16 numbers 1 and 1 + 1/128."""
    x = torch.full((100_000,), 1 + 2 ** -9)
    rounded = scale.round_at_random(x, generator(0, "test")).float()
    assert set(rounded.unique().tolist()) == {1., 1 + 2 ** -7}
    assert abs(float((rounded > 1).float().mean()) - .25) < .01
    exact = torch.tensor([0., 1., -3.5, 2. ** -130, 1e38]).bfloat16()
    assert torch.equal(scale.round_at_random(exact.float(), generator(1, "test")), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_goes_on_where_it_was(dtype, tmp_path):
    """R5: moments come back in their own dtype, which torch's load_state_dict alone would change."""
    whole, parts = two_parameters(), two_parameters()
    a, b = scale.AdamW(whole, 1e-2, .1, dtype), scale.AdamW(parts, 1e-2, .1, dtype)
    steps_of(a, whole, 3)
    steps_of(b, parts, 3)
    torch.save(b.state_dict(), tmp_path / "state.pt")
    c = scale.AdamW(parts, 1e-2, .1, dtype)
    c.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert {x.dtype for state in c.state.values() for x in state.values()} == {dtype}
    steps_of(a, whole, 3, seed=1)
    steps_of(c, parts, 3, seed=1)
    assert all(torch.equal(p, q) for p, q in zip(whole, parts))


# ---- checkpointing, reference, rows ----------------------------------------------------------------------

@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("freeze", [False, True])
def test_checkpointing_gives_the_same_gradient(half, freeze):
    """Bitwise, through shared prompts and several micro-batches."""
    found = []
    for checkpointing in (False, True):
        c = rl.Config(**OPTIONS | dict(micro_batch=48), checkpointing=checkpointing, freeze_embeddings=freeze)
        with products(half):
            found.append(gradients(make_model(c), c))
    assert found[0].keys() == found[1].keys() and ("head.weight" in found[0]) != freeze
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert max(float(g.abs().max()) for g in found[0].values()) > 0


def test_prompts_are_stored_once():
    """SharedPrompts stores keys and values as a side effect of a forward pass that checkpointing repeats."""
    c = rl.Config(**OPTIONS, checkpointing=True)
    model = make_model(c)
    shared = SharedPrompts(model, [[1, 2, 3], [4, 5]], 511)
    assert len(shared.graph) == 2 * SHAPE.n_layers
    for x in shared.keys_values:
        x.grad = torch.ones_like(x)
    shared.backward()
    assert len(shared.graph) == 2 * SHAPE.n_layers and model.blocks[0].qkv.weight.grad is not None


def test_a_reference_in_bf16_gives_the_same_logprobs_nearly():
    """Matrices in bf16, gains in fp32: off by some hundredths of a nat, without a change to the model."""
    c = rl.Config(**OPTIONS, reference="bf16")
    model = make_model(c)
    model.head.weight.data.mul_(10)
    before = copy.deepcopy(model.state_dict())
    start = scale.keep_start(model, c)
    ids = torch.randint(0, 500, (4, 30), generator=generator(0, "ids"))
    target = torch.ones_like(ids, dtype=torch.bool)
    exact, rough = (completion_logprobs(m, ids, target).detach() for m in (model, start))
    assert 0 < float((exact - rough).abs().mean()) < .02 and float(exact.std()) > .5
    assert {p.dtype for p in start.parameters() if p.dim() == 1} == {torch.float32}
    assert worlds.same(before, model.state_dict())


@pytest.mark.parametrize("rows", [1, 8, 12, 1024])
def test_no_more_rows_at_once_than_allowed(rows):
    """--decode-rows bounds every batch that is decoded, down to one prompt's group, and changes no token."""
    c = rl.Config(**OPTIONS | dict(decode_rows=rows))
    model, drawn = make_model(c), []
    original, shapes = model.hidden, []
    prompts = [[i, i + 1] for i in range(6)]
    model.hidden = lambda ids, *args: shapes.append(len(ids)) or original(ids, *args)
    for block in (0, 1024):
        drawn.append(sample(model, prompts, 4, 6, 510, 511, generator(0, "u"), block=block))
        if not block:
            assert max(shapes) == min(24, max(4, rows // 4 * 4))
    assert torch.equal(drawn[0].tokens, drawn[1].tokens)


@pytest.mark.parametrize("half", [False, True])
def test_sampled_and_scored_logprobs_agree(half):
    """G8 with products in bf16 too: the logits are fp32, so recorded log-probabilities are the trainer's but
    for the rounding of keys and values (a probability is off by some thousandths)."""
    c = rl.Config(**OPTIONS)
    model = make_model(c)
    model.head.weight.data.mul_(10)
    prompts = [[1, 2, 3], [4, 5, 6]]
    with products(half):
        out = sample(model, prompts, 2, 8, 510, 511, generator(0, "u"))
        ids = torch.cat((torch.tensor(prompts).repeat_interleave(2, 0), out.tokens), dim=1)
        target = torch.arange(11).expand(4, 11) >= 3
        scored = completion_logprobs(model, ids, target).detach()
        assert model.logits(torch.ones(2, 64)).dtype == torch.float32
    assert float((out.logprobs.flatten() - scored).abs().max()) < (.05 if half else 1e-4)


# ---- whole runs --------------------------------------------------------------------------------------------

FRUGAL = dict(freeze_embeddings=True, moments="bf16", checkpointing=True, reference="bf16", decode_rows=4)


def run_rl(out, **changes):
    options = dict(init=str(worlds.parrot()), data=str(worlds.data()), problems=str(worlds.sevens()),
                   max_new=12, eval_problems=2, eval_samples=2, n_problems=4, rollouts=4, steps=2,
                   save_every=1, threads=1)
    return worlds.quietly(rl.train, rl.Config(out=str(out), **options | changes))


def test_a_frugal_run_trains_the_blocks_only(tmp_path):
    """Two steps with every option: embedding and head stay bit for bit, every matrix of a block moves."""
    before, after = (load_checkpoint(path)["model"] for path in (worlds.parrot(), run_rl(tmp_path, **FRUGAL)))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == before.keys() - {"embed.weight", "head.weight"}
    moments = load_checkpoint(tmp_path / "last.pt")["optimizers"][0]["state"]
    assert {x.dtype for state in moments.values() for x in state.values()} == {torch.bfloat16}
    assert len(moments) == len(before) - 2


def test_a_frugal_run_resumes_bitwise(tmp_path, monkeypatch):
    """R5: stopped after the first step and started again, it ends in the same files."""
    run_rl(tmp_path / "whole", **FRUGAL)
    save = Run.save_last

    def save_and_stop(self, *args, **kwargs):
        save(self, *args, **kwargs)
        raise KeyboardInterrupt
    monkeypatch.setattr(Run, "save_last", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run_rl(tmp_path / "stopped", **FRUGAL)
    monkeypatch.undo()
    run_rl(tmp_path / "stopped", **FRUGAL)
    worlds.assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_the_reference_changes_the_logged_kl_only(tmp_path):
    """fp32, bf16, none: the same weights; the KL is a little off, or null."""
    kls, finals = [], []
    for reference in ("fp32", "bf16", "none"):
        finals.append(load_checkpoint(run_rl(tmp_path / reference, reference=reference))["model"])
        kls.append([x["kl"] for x in worlds.lines(tmp_path / reference / "log.jsonl") if "kl" in x])
    assert worlds.same(finals[0], finals[1]) and worlds.same(finals[0], finals[2])
    assert kls[2] == [None, None]
    assert kls[0] != kls[1] and all(abs(a - b) < .01 for a, b in zip(kls[0], kls[1]))


def test_a_run_from_before_the_options_existed_goes_on(tmp_path):
    """Its config.json lacks them: it had their defaults, and nothing else."""
    run_rl(tmp_path)
    path = tmp_path / "config.json"
    old = {k: v for k, v in json.loads(path.read_text()).items() if k not in FRUGAL and k != "memory"}
    path.write_text(json.dumps(old))
    run_rl(tmp_path)
    path.write_text(json.dumps(old))
    with pytest.raises(UserError, match="moments=fp32 there, bf16 asked"):
        run_rl(tmp_path, moments="bf16")


# ---- the table ---------------------------------------------------------------------------------------------

def test_the_table_of_all_sizes():
    """A line per size and GPU; what fits in 8 GiB fits in 24."""
    out = worlds.run_here("scale.py")
    assert out.status == 0 and out.errors == []
    for name in scale.MODELS:
        assert f"\n{name}, " in out.out
    assert out.out.count(" GiB: ") == 3 * len(scale.MODELS)


def test_the_table_of_a_checkpoint():
    """Its own shape and every combination: 3 x 2 x 2 of them, in three columns."""
    out = worlds.run_here("scale.py", "--init", worlds.base(), "--memory", "0.5")
    assert out.status == 0 and f"{worlds.base()}, 0." in out.out and "\n  0.5 GiB: " in out.out
    rows = [line.split() for line in out.out.splitlines() if line.startswith("    ") and line.count(".") > 2]
    assert len(rows) == 12 and all(float(plain) >= float(frugal) for plain, _, frugal, *_ in rows)


def test_a_wrong_size_is_one_line():
    out = worlds.run_here("scale.py", "--size", "7B")
    assert out.status == 2 and len(out.errors) == 1 and "olmo-1b" in out.errors[0]


def test_plans_of_sft_and_merging_count_what_these_have():
    """SFT keeps no reference; parallel averaging has two optimizers and two copies of the weights more."""
    sft, merge = (SimpleNamespace(**vars(rl.Config()) | x) for x in ({"rollouts": 0}, {"mode": "parallel"}))
    one, alone, two = (scale.plan(SHAPE, c, PROMPT, False) for c in (rl.Config(), sft, merge))
    assert alone["reference"] == 0 and two["moments"] == 2 * one["moments"]
    assert two["snapshots"] == 2 * one["parameters"] and one["snapshots"] == 0
