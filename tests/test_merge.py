"""RL and SFT together: the averaging of two optimizers on tiny models, the three modes of merge.py against
rl.py and sft.py alone, and the merging of finished weights."""
import copy
import functools
import math
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
import worlds
from conftest import on_every_device

import merge
import ranks
import rl
import sft
from checkpoint import (
    Run, UserError, file_sha256, generator, load_checkpoint, load_model, save_checkpoint)
from data.tokenizer import PATTERN, Tokenizer
from merge import WeightsConfig, merge_tensors, merge_weights, parallel_round
from model import completion_logprobs, pack

# ---- two optimizers over the same tensors -----------------------------------------------------------------


def mlp(device="cpu") -> torch.nn.Module:
    """The same random network of 4, 8 and 3 units every time, in fp32."""
    layers, gen = [torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)], generator(0, "mlp")
    model = torch.nn.Sequential(*layers)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=.3, generator=gen)
    return model.to(device)


X, Y = (torch.randn(16, n, generator=generator(n, "toy")) for n in (4, 3))
CLASSES = torch.randint(3, (16,), generator=generator(0, "classes"))


def rl_loss(model):
    device = model[0].weight.device
    return ((model(X.to(device)) - Y.to(device)) ** 2).mean()


def sft_loss(model):
    device = model[0].weight.device
    return torch.nn.functional.cross_entropy(model(X.flip(0).to(device)), CLASSES.to(device))


def arm(model, loss, lr=.01, decay=0., clip=1e9, kind=torch.optim.AdamW):
    """An arm with an optimizer of its own, as merge.py's: gradient, clip, step, clear."""
    optimizer = kind(model.parameters(), lr=lr, weight_decay=decay)

    def update(h):
        loss(model).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return update


def values(model) -> torch.Tensor:
    """All weights in one vector."""
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().cpu()


def alone(n, *options, device="cpu", **kind) -> torch.Tensor:
    """The weights after n updates of one arm, without averaging."""
    model = mlp(device)
    update = arm(model, *options, **kind)
    for h in range(n):
        update(h)
    return values(model)


def averaged(n, *arms, inner=1, device="cpu", **kind) -> torch.Tensor:
    """The weights after n rounds of arms, each of which has a loss and maybe the other options of `arm`."""
    model = mlp(device)
    updates = [arm(model, *options, **kind) for options in arms]
    for _ in range(n):
        parallel_round(model, updates, [.5, .5], inner)
    return values(model)


def distance(a, b) -> float:
    return float((a - b).abs().max())


START = values(mlp())


@on_every_device
@pytest.mark.parametrize("decay, clip", [(0., 1e9), (.1, 1e9), (0., .3), (.1, .3)])
def test_identical_arms_are_one_adamw(decay, clip, device):
    """With the same objective, lr, decay and clip both arms are, bitwise, a single AdamW over 20 steps."""
    options = rl_loss, .01, decay, clip
    both = averaged(20, options, options, device=device)
    assert distance(both, alone(20, *options, device=device)) == 0 < distance(both, START)


@pytest.mark.parametrize("n, tolerance, way", [(1, 1e-7, .004), (50, 1e-6, .1)])
def test_with_an_idle_arm_it_is_the_other_at_half_the_rate(n, tolerance, way):
    """RL beside an SFT with lr 0 (its decay is scaled by lr) is RL alone with lr/2, in 1 round and 50."""
    both = averaged(n, (rl_loss, .01, .1), (sft_loss, 0., .1))
    assert distance(both, alone(n, rl_loss, .005, .1)) < tolerance and distance(both, START) > way


@pytest.mark.parametrize("n", [1, 3])
def test_zero_gradients_leave_the_mean_decay(n):
    """With gradients that are zero (not None) a round multiplies by 1 - (.1·.5 + .2·.25)/2 = .95."""
    def nothing(model):
        return 0. * sum((p ** 2).sum() for p in model.parameters())
    assert distance(averaged(n, (nothing, .1, .5), (nothing, .2, .25)), .95 ** n * START) < 1e-6


def test_the_order_of_the_arms_is_irrelevant():
    """Swapping the two arms changes nothing, bitwise, over 20 rounds with different rates and decays."""
    arms = (rl_loss, .01, .1, .3), (sft_loss, .03, .2, .5)
    a, b = averaged(20, *arms), averaged(20, *arms[::-1])
    assert distance(a, b) == 0 < distance(a, START)


def test_the_first_round_moves_at_most_the_mean_rate():
    """AdamW's first step is lr: the average moves by at most (.01 + .03)/2, reached where the signs agree."""
    moved = (averaged(1, (rl_loss, .01), (sft_loss, .03)) - START).abs()
    assert .0199 < float(moved.max()) <= .02 * (1 + 1e-5)
    assert abs(float(moved.min()) - .01) < 1e-4                          # where the signs differ


def test_with_sgd_it_is_sgd_on_the_sum_at_half_the_rate():
    """Averaging two SGD updates is one on the summed loss with lr/2: the case where nothing is new."""
    sgd = torch.optim.SGD
    both = averaged(20, (rl_loss, .1), (sft_loss, .1), kind=sgd)
    one = alone(20, lambda model: rl_loss(model) + sft_loss(model), .05, kind=sgd)
    assert distance(both, one) < 1e-6 and distance(both, START) > .1


def test_with_adamw_it_is_not_adamw_on_the_mean_loss():
    """With AdamW each arm is scaled by its own second moments, which one optimizer on the mean cannot do."""
    one = alone(20, lambda model: (rl_loss(model) + sft_loss(model)) / 2)
    assert distance(averaged(20, (rl_loss,), (sft_loss,)), one) > .01


def test_the_scale_of_a_loss_is_irrelevant():
    """The SFT loss times 1000 changes nothing; with one shared AdamW the SFT loss would take over."""
    def large(model):
        return 1000 * sft_loss(model)
    assert distance(averaged(20, (rl_loss,), (sft_loss,)), averaged(20, (rl_loss,), (large,))) < 1e-5
    shared = [alone(20, lambda model, loss=loss: rl_loss(model) + loss(model)) for loss in (sft_loss, large)]
    assert distance(*shared) > .01


@on_every_device
@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_an_exception_leaves_the_snapshot(error, at, device):
    """Whatever is raised in either arm, in any update: the snapshot is back, and no gradient is left."""
    model, done = mlp(device), []
    real = arm(model, rl_loss, .1)

    def fragile(h):
        rl_loss(model).backward()
        if len(done) == at:
            raise error
        done.append(h)
        real(h)
    with pytest.raises(type(error)):
        parallel_round(model, [fragile, fragile], [.5, .5], inner=2)
    assert len(done) == at and distance(values(model), START) == 0
    assert all(p.grad is None for p in model.parameters())


def test_no_gradient_leaks_between_the_arms():
    """A gradient that an arm leaves behind adds nothing to the other arm's; none is left after the round."""
    model, found = mlp(), []

    def careless(h):
        found.append([p.grad for p in model.parameters()])
        rl_loss(model).backward()
    for _ in range(2):
        parallel_round(model, [careless, careless], [.5, .5])
    assert len(found) == 4 and all(g is None for grads in found for g in grads)
    assert all(p.grad is None for p in model.parameters()) and distance(values(model), START) == 0


@on_every_device
@pytest.mark.parametrize("inner, weight", [(1, .5), (2, .5), (5, .5), (1, 1.), (1, .25), (1, 0.), (3, .25)])
def test_inner_updates_before_averaging(inner, weight, device):
    """A round is H updates of each arm from the snapshot, numbered 0 to H-1, then the mean: the average of
    two models that were trained apart for H steps; weight 1 is that arm alone, bitwise."""
    model, numbers, losses = mlp(device), [], (rl_loss, sft_loss)
    arms = [arm(model, loss, .1) for loss in losses]
    counted = [lambda h, a=a: (numbers.append(h), a(h)) for a in arms]
    parallel_round(model, counted, [weight, 1 - weight], inner)
    assert numbers == 2 * list(range(inner))
    a, b = (alone(inner, loss, .1, device=device) for loss in losses)
    assert distance(values(model), weight * a + (1 - weight) * b) <= (0 if weight in (0, 1) else 1e-7)


def test_more_inner_updates_are_another_method():
    """Four rounds of one update are not one round of four; moments are carried from round to round."""
    paper, apart = averaged(4, (rl_loss,), (sft_loss,)), averaged(1, (rl_loss,), (sft_loss,), inner=4)
    fresh = mlp()
    for _ in range(4):
        parallel_round(fresh, [arm(fresh, rl_loss), arm(fresh, sft_loss)], [.5, .5])
    assert distance(paper, apart) > 1e-4 and distance(paper, values(fresh)) > 1e-3


# ---- training ----------------------------------------------------------------------------------------------

OPTIONS = dict(max_new=12, eval_every=4, eval_problems=2, eval_samples=2, save_every=1, seed=2)
RL, SFT = dict(n_problems=4, rollouts=4), dict(batch=8)
in_every_mode = pytest.mark.parametrize("mode, inner", [
    ("parallel", 1), ("parallel", 2), ("parallel", 4), ("fused", 1), ("alternating", 1)])


def trained(script, out: Path, start: Path | None = None, **changes) -> Path:
    """Final checkpoint of a run that starts from the parrot: its rewards differ within groups."""
    own = {rl: RL | dict(steps=4, lr=3e-4), sft: SFT | dict(epochs=1, warmup=0, decay=0.),  # 32 questions / 8
           merge: RL | SFT | dict(steps=4, lr_rl=3e-4)}[script]
    options = dict(init=str(start or worlds.parrot()), data=str(worlds.data()),
                   problem_file=str(worlds.sevens()), out=str(out), threads=1)
    return Path(worlds.quietly(script.train, script.Config(**options | OPTIONS | own | changes)))


def weights(path: Path) -> torch.Tensor:
    return values(load_model(path)[0])


@functools.cache
def finished(mode: str, inner: int) -> tuple[Path, dict[str, list]]:
    """A run of four steps in a mode, and the weights that rl.py's and sft.py's functions saw."""
    seen, start = {"collect": [], "sft_gradient": []}, worlds.parrot()

    def watched(script, name):
        def see(model, *args):
            seen[name].append(values(model))
            return mock.DEFAULT
        return mock.patch.object(script, name, wraps=getattr(script, name), side_effect=see)
    with watched(rl, "collect"), watched(sft, "sft_gradient"):
        path = trained(merge, worlds.folder() / f"merge-{mode}-{inner}", start, mode=mode, inner=inner,
                       checkpoints_at=tuple(range(inner, 5, inner)))
    del seen["collect"][0]                                               # the probe before the first step
    return path, seen


@functools.cache
def of_script(script, **changes) -> torch.Tensor:
    """Weights after the same four steps of rl.py or sft.py alone."""
    out = worlds.folder() / f"alone-{len(list(worlds.folder().iterdir()))}"
    return weights(trained(script, out, **changes))


def steps_of(path: Path) -> list[dict]:
    return [line for line in worlds.lines(path.parent / "log.jsonl") if "reward" in line]


@in_every_mode
def test_it_trains_and_logs(mode, inner):
    """The starting weights change; a line per round has RL's and SFT's metrics; the counts are those of the
    steps done (an update of each per step, one for both if fused), validations stand at 0 and 4."""
    path, _ = finished(mode, inner)
    log, steps = worlds.lines(path.parent / "log.jsonl"), steps_of(path)
    assert distance(weights(path), weights(worlds.parrot())) > 1e-3
    assert [line["step"] for line in steps] == list(range(inner, 5, inner))
    norms = {"grad_norm_fused"} if mode == "fused" else {"grad_norm_rl", "grad_norm_sft"}
    for line in steps:
        styles = {key for key in line if key.startswith("style ")}
        assert {"step", "reward", "right", "sound", "signal", "unparsed", "truncated", "length", "entropy",
                "kl", "sft_loss", "skipped", "tokens", "updates", "flops", "seconds"} | norms == (
                    line.keys() - styles)
        assert sum(line[style] for style in styles) == pytest.approx(1)
    assert [line["step"] for line in log if "val_pass@1" in line] == [0, 4]
    assert steps[-1]["updates"] == (4 if mode == "fused" else 8) and steps[-1]["skipped"] == 0
    first = next(p for p in worlds.lines(worlds.data() / "val.jsonl") if p["difficulty"] == "easy")
    assert (path.parent / "samples.txt").read_text().count(f"{first['question']}   (answer") == 2


@in_every_mode
def test_it_leaves_its_lineage(mode, inner):
    """The stage names script, options, parent and counts: of the end and of every listed step."""
    path, _ = finished(mode, inner)
    start, steps = worlds.parrot(), steps_of(path)
    kept = [path.with_name(f"step{n}.pt") for n in range(inner, 5, inner)]
    for file, last in zip([*kept, path], [*steps, steps[-1]], strict=True):
        *before, stage = load_checkpoint(file)["lineage"]
        assert before == load_checkpoint(start)["lineage"] and stage["parent"] == file_sha256(start)
        assert stage["script"] == "merge.py" and stage["config"]["mode"] == mode
        assert all(stage[name] == last[name] for name in ("tokens", "updates", "flops"))
    assert distance(weights(kept[-1]), weights(path)) == 0
    assert inner == 4 or distance(weights(kept[0]), weights(path)) > 0


@in_every_mode
def test_rl_and_sft_see_the_snapshot(mode, inner):
    """Rollouts and SFT's gradient are of the same weights in every round; alternating, RL steps between."""
    at_rollouts, at_sft = finished(mode, inner)[1].values()
    assert len(at_rollouts) == len(at_sft) == 4
    assert distance(at_rollouts[0], weights(worlds.parrot())) == 0
    for step, (a, b) in enumerate(zip(at_rollouts, at_sft)):
        assert (distance(a, b) == 0) == (step % inner == 0 and mode != "alternating")


@in_every_mode
def test_a_crashed_run_ends_in_the_same_bits(mode, inner, tmp_path):
    """A run that ends in the middle of its last round, RL's update done and SFT's not, and is resumed has the
    weights, both AdamW states, log and transcripts of the uninterrupted run (H = all: from the beginning)."""
    options = dict(mode=mode, inner=inner, checkpoints_at=tuple(range(inner, 5, inner)))
    out = tmp_path / "run"
    effects = [mock.DEFAULT] * 3 + [RuntimeError("power cut")]
    with (mock.patch.object(sft, "sft_gradient", wraps=sft.sft_gradient, side_effect=effects),
          pytest.raises(RuntimeError, match="power cut")):
        trained(merge, out, **options)
    assert (out / "last.pt").exists() == (inner < 4) and not (out / "final.pt").exists()
    trained(merge, out, **options)
    worlds.assert_same_run(out, finished(mode, inner)[0].parent)


def test_averaging_at_the_end_is_merging_two_finished_models():
    """With H = all steps the result is bitwise the mean of the models that rl.py and sft.py make of the same
    start and seed, as `merge.py weights` would: the arms are rl.py and sft.py, unchanged."""
    a, b, result = of_script(rl), of_script(sft), weights(finished("parallel", 4)[0])
    assert distance(result, .5 * a + .5 * b) == 0
    assert distance(result, merge_tensors("linear", [a, b], [.5, .5])) == 0
    assert distance(result, weights(worlds.parrot())) > 1e-3


@pytest.mark.parametrize("changes, script, lr, tolerance", [
    (dict(weight_rl=1.), rl, 3e-4, 0), (dict(weight_rl=0.), sft, 1e-3, 0),
    (dict(lr_sft=0.), rl, 1.5e-4, 1e-6), (dict(lr_rl=0.), sft, 5e-4, 1e-6),
    (dict(mode="alternating", lr_sft=0.), rl, 1.5e-4, 0), (dict(mode="alternating", lr_rl=0.), sft, 5e-4, 0),
    (dict(mode="fused", weight_rl=.25), sft, math.hypot(.25 * 3e-4, .75 * 1e-3), 0)])
def test_with_one_arm_it_is_the_script_of_that_arm(changes, script, lr, tolerance, tmp_path):
    """With weight 1 an arm makes the run of its own script, bitwise. With lr 0 in one arm, parallel averaging
    and alternating steps go as far as the other script with lr/2: the controls differ in method, not in step
    size. Without any right answer the fused gradient is SFT's, its lr that of two steps at right angles."""
    start, problems = worlds.parrot(), {}
    if "fused" in changes.values():
        start, problems = worlds.base(), dict(problem_file="", n_train=32)      # many solutions of each
    result = weights(trained(merge, tmp_path / "run", start, **changes, **problems))
    assert distance(result, of_script(script, start=start, lr=lr, **problems)) <= tolerance
    assert distance(result, weights(start)) > 1e-4


def test_sft_has_the_first_problems_and_rl_all(tmp_path):
    """--demonstrated 8 of 32: the SFT arm alone makes the run of sft.py on 8 questions, four times over; the
    RL arm alone that of rl.py on all."""
    options = dict(demonstrated=8, start=worlds.parrot())
    shown = weights(trained(merge, tmp_path / "sft", weight_rl=0., **options))
    asked = weights(trained(merge, tmp_path / "rl", weight_rl=1., **options))
    assert distance(shown, of_script(sft, n_train=8, epochs=4)) == 0
    assert distance(asked, of_script(rl)) == 0 < distance(asked, of_script(rl, n_train=8))


def test_fused_is_one_adamw_on_the_summed_loss(tmp_path):
    """Control: AdamW's first step by hand: -lr·g/|g| (with eps 1e-8) for the gradient of RL's loss plus
    SFT's, clipped as a whole to 1; lr² = (.5·3e-4)² + (.5·1e-3)². RL and SFT have orders of their own."""
    path = trained(merge, tmp_path / "run", mode="fused", steps=1)
    model, tokenizer, _ = load_model(worlds.parrot())
    problems = worlds.lines(worlds.sevens())
    asked, shown = (torch.randperm(32, generator=generator(2, name)).tolist() for name in ("rl", "sft"))
    assert asked != shown
    c = rl.Config(max_new=12)
    batch = rl.collect(model, tokenizer, [problems[i] for i in asked[:4]], 4, c, generator(2, "rollouts", 0))
    prompts = [batch.prompts[r // 4] for r in range(16)]
    logp = completion_logprobs(model, *pack(prompts, batch.completions, tokenizer.pad))
    lengths = torch.tensor([len(completion) for completion in batch.completions])
    advantage = rl.advantages(batch.rewards).flatten().repeat_interleave(lengths)
    examples = [sft.make_examples(tokenizer, problems, False, 2)[i] for i in shown[:8]]
    nats = -completion_logprobs(model, *pack(*map(list, zip(*examples)), tokenizer.pad))
    (-(logp * advantage).mean() + nats.mean()).backward()
    g = torch.nn.utils.parameters_to_vector(p.grad for p in model.parameters())
    assert g.norm() > 1 and steps_of(path)[0]["grad_norm_fused"] == pytest.approx(float(g.norm()), rel=1e-4)
    sure = (g / g.norm()).abs() > 1e-4                                   # beyond rounding
    moved = (weights(path) - values(model))[sure]
    assert torch.allclose(moved, -5.22015e-4 * g[sure].sign(), rtol=2e-3, atol=1e-7) and len(moved) > 10_000


@pytest.mark.parametrize("idle, steps, cause", [(0, 1, "no signal"), (0, 2, "no signal"),
                                                (0, 1, "NaN"), (1, 1, "NaN")])
def test_an_idle_arm_contributes_the_snapshot(idle, steps, cause, tmp_path, monkeypatch):
    """Without a right answer there is no RL update, not even momentum; one with a NaN is skipped, and logged.
    The result is half the start; the idle arm's AdamW has no state, only the other's updates count."""
    start, calls = worlds.base() if cause == "no signal" else worlds.parrot(), []

    def poison(model):
        calls.append(model)
        if cause == "NaN" and len(calls) == 1 + idle:
            model.norm.grad[3] = float("nan")
    with monkeypatch.context() as patch:
        patch.setattr(ranks, "sum_gradients", poison)
        path = trained(merge, tmp_path / "run", start, steps=steps, inner=steps, weight_decay=.1)
    other = trained((sft, rl)[idle], tmp_path / "other", start, checkpoints_at=(steps,), weight_decay=.1)
    end = weights(other.with_name(f"step{steps}.pt"))
    assert distance(weights(path), .5 * weights(start) + .5 * end) == 0
    states = load_checkpoint(path.with_name("last.pt"))["optimizers"]
    assert states[idle]["state"] == {} and states[1 - idle]["state"][0]["step"] == steps
    assert load_checkpoint(path)["lineage"][-1]["updates"] == steps
    (line,) = steps_of(path)
    assert line["skipped"] == (cause == "NaN") == ("grad_norm_rl" in line) and "grad_norm_sft" in line


def test_a_step_without_a_signal_logs_no_norm_of_an_earlier_one(tmp_path, monkeypatch):
    """The second step's answers all get the reward 0 (the probe grades 2 x 16 before, the first step 16)."""
    graded = []

    def reward(problem: dict, text: str, grade: str) -> float:
        graded.append(grade)
        return float(grade == "right") if len(graded) <= 48 else 0.0
    monkeypatch.setattr(rl, "reward", reward)
    first, second = steps_of(trained(merge, tmp_path, worlds.parrot(), steps=2, n_problems=4, rollouts=4))
    assert "grad_norm_rl" in first and "grad_norm_rl" not in second and len(graded) == 64


def test_save_every_is_kept_with_inner_updates(tmp_path):
    """With H = 2 and --save-every 3 a state is saved after the round in which each third step fell."""
    with mock.patch.object(Run, "_save_last", autospec=True, side_effect=Run._save_last) as save:
        trained(merge, tmp_path / "run", steps=8, inner=2, save_every=3, eval_every=8)
    saved = [call.args[1] for call in save.call_args_list if not call.kwargs.get("done")]
    assert saved == [4, 6, 8]                                            # steps 3, 6, and the end


def test_a_control_has_no_inner_updates(tmp_path):
    """That is refused before anything is loaded or written (other such refusals: test_bad_input.py)."""
    c = merge.Config(init="none.pt", out=str(tmp_path / "run"), steps=4, inner=2, mode="alternating")
    with pytest.raises(UserError, match="--inner 2"):
        merge.train(c)
    assert list(tmp_path.iterdir()) == []


# ---- merging tensors ---------------------------------------------------------------------------------------

BASE = torch.tensor([[10., 20., 30., 40.]])
DELTAS = torch.tensor([[[1., -2, .1, 3]], [[.5, 1, -.2, -4]]])


@pytest.mark.parametrize("weights, expected", [
    ([.5, .5], [2., 5.]), ([1., 1.], [2., 5.]), ([1., 0.], [1., 2.]), ([1., 3.], [2.5, 6.5]),
    ([2., -1.], [-1., -4.])])
def test_linear_merging(weights, expected):
    """Linear merging is the weighted mean; weights need not add up to 1, and may extrapolate."""
    merged = merge_tensors("linear", [torch.tensor([1., 2.]), torch.tensor([3., 8.])], weights)
    assert torch.allclose(merged, torch.tensor(expected))


@pytest.mark.parametrize("factor", [0., .5, 1., -1.])
def test_task_arithmetic(factor):
    """Task arithmetic is base + λ·Σ wᵢ(θᵢ − base): here [1, -2, .1, 3]·.5 + [.5, 1, -.2, -4]·2."""
    merged = merge_tensors("task", list(BASE + DELTAS), [.5, 2.], BASE, factor)
    assert torch.allclose(merged, BASE + factor * torch.tensor([[1.5, 1., -.35, -6.5]]))


@pytest.mark.parametrize("deltas, weights, density, expected", [
    pytest.param(DELTAS, [.5, .5], .5, [0., -2, 0, -4], id="half is kept"),
    pytest.param(DELTAS, [.5, .5], 1., [.75, -2, -.2, -4], id="all is kept"),
    pytest.param([[1.], [-2.]], [3., 1.], 1., [1.], id="a heavier model wins the sign"),
    pytest.param([[1., 2, 0], [-2., -2, 3]], [.5, .5], 1., [-2., 0, 3], id="equal pulls cancel"),
    pytest.param([[0.], [0.]], [.5, .5], 1., [0.], id="without differences the base stays")])
@pytest.mark.parametrize("factor", [1., .3])
@pytest.mark.parametrize("base", [0., 20.])
def test_ties_values(deltas, weights, density, expected, factor, base):
    """TIES: trim, elect the sign, average who agrees."""
    deltas = torch.as_tensor(deltas)
    base = torch.full_like(deltas[0], base)
    merged = merge_tensors("ties", list(base + deltas), weights, base, factor, density)
    assert torch.allclose(merged, base + factor * torch.tensor(expected), atol=1e-5)


def naive_ties(base, tensors, weights, factor, density):
    """Yadav et al. 2023, section 4, one number at a time."""
    kept = []
    for tensor in tensors:
        deltas = [t - b for t, b in zip(tensor, base)]
        largest = sorted(deltas, key=abs, reverse=True)[:round(density * len(base))]
        kept.append([d if d in largest else 0. for d in deltas])
    out = []
    for i, b in enumerate(base):
        total = sum(w * d[i] for w, d in zip(weights, kept))
        agreeing = [(w, d[i]) for w, d in zip(weights, kept) if d[i] * total > 0]
        mean = sum(w * d for w, d in agreeing) / sum(w for w, _ in agreeing) if agreeing else 0.
        out.append(b + factor * mean)
    return out


@pytest.mark.parametrize("n, weights", [(2, [.5, .5]), (3, [.2, .3, .5]), (3, [1., 1., 3.])])
def test_ties_is_the_paper_in_loops(n, weights):
    """TIES of random tensors equals a loop over single numbers, for every density."""
    gen = generator(n, "ties")
    base, *tensors = torch.randn(n + 1, 40, generator=gen)
    for density in (.05, .25, .5, .9, 1.):
        merged = merge_tensors("ties", list(tensors), weights, base, .7, density)
        expected = naive_ties(base.tolist(), [t.tolist() for t in tensors], weights, .7, density)
        assert torch.allclose(merged, torch.tensor(expected), atol=1e-5), density


@pytest.mark.parametrize("method", ["linear", "task", "ties"])
def test_merging_leaves_its_inputs_alone(method):
    """A function must not write into its arguments, whatever it trims inside."""
    tensors, base = BASE + DELTAS, BASE.clone()
    merge_tensors(method, list(tensors), [.5, .5], base, 1., .5)
    assert torch.equal(base, BASE) and torch.equal(tensors, BASE + DELTAS)


# ---- merging checkpoints -----------------------------------------------------------------------------------

TOKENIZER, OTHER = (Tokenizer({"pattern": PATTERN, "merges": [pair]}) for pair in ([97, 98], [97, 99]))
SHAPE = dict(vocab_size=320, n_vocab=TOKENIZER.n_vocab)


@pytest.fixture
def family(make_gpt, tmp_path):
    """Name -> path: a base, an earlier moment of it, two models trained from it, a grandchild, a stranger."""
    paths, lineage = {}, {}
    for name, seed, script, tokens, parent in (
            ("base", 0, "pretrain.py", 1_000, None), ("earlier", 0, "pretrain.py", 500, None),
            ("a", 1, "rl.py", 100, "base"), ("b", 2, "sft.py", 30, "base"), ("c", 3, "sft.py", 7, "a"),
            ("stranger", 4, "pretrain.py", 500, None)):
        stage = {"script": script, "config": {"seed": seed}, "parent": parent and file_sha256(paths[parent]),
                 "tokens": tokens, "updates": tokens // 10, "flops": 100 * tokens, "seconds": tokens / 2}
        lineage[name] = lineage.get(parent, []) + [stage]
        paths[name] = tmp_path / f"{name}.pt"
        save_checkpoint(paths[name], make_gpt(seed, **SHAPE), TOKENIZER, lineage[name])
    return paths


def merged(family, names: str, tmp_path, base="", **options) -> Path:
    """The file that merge_weights wrote for these members of the family."""
    return merge_weights(WeightsConfig(
        tuple(str(family[name]) for name in names.split()), str(family[base]) if base else "",
        **dict(out=str(tmp_path / "merged.pt"), threads=1) | options))


@pytest.mark.parametrize("method, base, given, mix", [
    ("linear", "", "", [1 / 3] * 3), ("linear", "", ".5,.2,.3", [.5, .2, .3]),
    ("task", "base", ".5,.2,.3", [.5, .2, .3]), ("ties", "base", ".5,.2,.3", [.5, .2, .3])])
def test_checkpoints_are_merged(family, tmp_path, method, base, given, mix):
    """All weights as one vector, and every option reaches it; the file, whose path is said, is a usable
    checkpoint, in a new folder; the inputs keep their bytes."""
    before, out = worlds.snapshot(tmp_path), tmp_path / "new" / "out.pt"
    outcome = worlds.run_here("merge.py", "weights", *(family[name] for name in "abc"), "-o", out,
                              f"--base={family.get(base, '')}", "--method", method, f"--weights={given}",
                              "--factor", .6, "--density", .2, "--threads", 1)
    assert outcome.status == 0 and str(out) in outcome.out
    model, tokenizer, _ = load_model(out)
    a, b, c, m = (weights(family[name]) for name in ("a", "b", "c", "base"))
    assert distance(values(model), merge_tensors(method, [a, b, c], mix, m, .6, .2)) == 0
    assert distance(values(model), m) > .01
    assert tokenizer.spec == TOKENIZER.spec and model(torch.tensor([[1, 2]])).isfinite().all()
    shutil.rmtree(out.parent)
    assert worlds.snapshot(tmp_path) == before


def test_ties_trims_the_whole_model(family, tmp_path):
    """Of the fifth that is kept: the embedding, a quarter of all weights, moved a thousand times as far as
    the rest, which keeps nothing and is the base's again. (Each tensor alone kept its fifth.)"""
    model, _, lineage = load_model(family["base"])
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for name, p in model.named_parameters():
            far = 1. if name == "embed.weight" else .001
            p.add_(far * (.5 + torch.rand(p.shape, generator=generator(0, name))))
    family["far"] = tmp_path / "far.pt"
    save_checkpoint(family["far"], model, TOKENIZER, lineage)
    after = load_model(merged(family, "far base", tmp_path, method="ties", base="base"))[0].state_dict()
    changed = {name: int((after[name] != w).sum()) for name, w in before.items()}
    total = sum(w.numel() for w in before.values())
    assert changed.pop("embed.weight") == round(.2 * total) and not any(changed.values())


def test_the_lineage_of_a_merge(family, tmp_path):
    """The common part of both, then one stage: options, weights, what was merged, cost of both branches."""
    lineage = load_checkpoint(merged(family, "b c", tmp_path, base="base", method="task"))["lineage"]
    assert lineage[:-1] == load_checkpoint(family["base"])["lineage"]
    last = lineage[-1]
    assert last["script"] == "merge.py weights" and last["config"]["weights"] == [.5, .5]
    assert last["config"]["checkpoints"] == [str(family["b"]), str(family["c"])]
    assert last["parent"] == file_sha256(family["base"])
    assert last["merged"] == [file_sha256(family["b"]), file_sha256(family["c"])]
    assert (last["tokens"], last["updates"], last["flops"], last["seconds"]) == (137, 13, 13_700, 68.5)


@pytest.mark.parametrize("names, base, related", [
    ("a b", "", True), ("a b", "base", True), ("a c", "", True), ("base c", "", True), ("b c", "base", True),
    ("a b c", "", True), ("earlier c", "", True), ("once c", "", True),
    ("a stranger", "", False), ("a foundling", "", False), ("a b stranger", "", False),
    ("a b", "stranger", False)])
def test_strangers_are_merged_with_a_warning(family, make_gpt, tmp_path, capsys, names, base, related):
    """Relatives have a common ancestor, be it the initial weights of one pretraining, or a merge's models.
    Where there is none (of the base too), one line says so and the merge is done. Without any lineage the
    origin is unknown: it was a traceback."""
    if "once" in names:
        family["once"] = merged(family, "a b", tmp_path, out=str(tmp_path / "once.pt"))
    family["foundling"] = tmp_path / "foundling.pt"
    save_checkpoint(family["foundling"], make_gpt(5, **SHAPE), TOKENIZER, [])
    path = merged(family, names, tmp_path, base=base)
    said = capsys.readouterr().err.splitlines()
    assert path.exists() and len(said) == (not related)
    assert all(line.startswith("WARNING") and "ancestor" in line for line in said)


def test_an_input_is_not_overwritten(family, tmp_path):
    """Writing `-o a.pt` beside the inputs a.pt and b.pt, a slip of the hand, must not cost a run."""
    before = family["a"].read_bytes()
    with pytest.raises(UserError, match="a.pt"):
        merged(family, "a b", tmp_path, out=str(family["a"]))
    assert family["a"].read_bytes() == before


@pytest.mark.parametrize("changes, tokenizer, fault", [
    *((changes, TOKENIZER, "another shape") for changes in (
        dict(d_ff=48), dict(n_layers=1), dict(n_heads=1), dict(rope_theta=500.), dict(context=32))),
    (dict(), OTHER, "another tokenizer")])
@pytest.mark.parametrize("names, base", [("a odd", ""), ("a b", "odd")])
def test_what_does_not_fit_is_refused(family, make_gpt, tmp_path, changes, tokenizer, fault, names, base):
    """Another shape, also if only heads or rotary angles differ (the average would be a model that nobody
    trained), and another tokenizer, also if id 256 alone means other bytes; the line names the file."""
    family["odd"] = tmp_path / "odd.pt"
    save_checkpoint(family["odd"], make_gpt(**SHAPE | changes), tokenizer, [])
    with pytest.raises(UserError, match=f"odd.pt: {fault}"):
        merged(family, names, tmp_path, base)
    assert not (tmp_path / "merged.pt").exists()
