"""RL and SFT together: the averaging of two optimizers on tiny models, the three modes of merge.py against
rl.py and sft.py alone, and the merging of finished weights."""
import functools
import hashlib
import json
import math
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
import worlds

import evaluate
import merge
import ranks
import rl
import sft
from checkpoint import Run, UserError, generator, load_checkpoint, load_model, save_checkpoint
from data.tokenizer import PATTERN, Tokenizer
from merge import WeightsConfig, merge_tensors, merge_weights, parallel_round
from model import completion_logprobs, pack

# ---- two optimizers over the same tensors -----------------------------------------------------------------


def mlp() -> torch.nn.Module:
    """The same random network of 4, 8 and 3 units every time, in fp32."""
    layers, gen = [torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)], generator(0, "mlp")
    model = torch.nn.Sequential(*layers)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=.3, generator=gen)
    return model


X, Y = (torch.randn(16, n, generator=generator(n, "toy")) for n in (4, 3))
CLASSES = torch.randint(3, (16,), generator=generator(0, "classes"))


def rl_loss(model):
    return ((model(X) - Y) ** 2).mean()


def sft_loss(model):
    return torch.nn.functional.cross_entropy(model(X.flip(0)), CLASSES)


def arm(model, loss, lr=.01, decay=0., clip=1e9, kind=torch.optim.AdamW):
    """An arm with an optimizer of its own, as merge.py's: gradient, clip, step, clear."""
    optimizer = kind(model.parameters(), lr=lr, weight_decay=decay)

    def update(h):
        loss(model).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return update


def alone(n, *options, **kind):
    """The network after n updates of one arm, without averaging."""
    model = mlp()
    update = arm(model, *options, **kind)
    for h in range(n):
        update(h)
    return model


def averaged(n, *arms, inner=1, **kind):
    """The network after n rounds of arms, each of which has a loss and maybe the other options of `arm`."""
    model = mlp()
    updates = [arm(model, *options, **kind) for options in arms]
    for _ in range(n):
        parallel_round(model, updates, [.5, .5], inner)
    return model


def values(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def distance(a, b) -> float:
    """Largest difference between two models, lists of tensors or weights by name."""
    def tensors(x) -> list[torch.Tensor]:
        return [x[k] for k in sorted(x)] if isinstance(x, dict) else x if isinstance(x, list) else values(x)
    return max(float((x - y).abs().max()) for x, y in zip(tensors(a), tensors(b), strict=True))


def mixed(a, b, weight=.5) -> list[torch.Tensor]:
    """The weighted mean of two models; `weight` is that of the first."""
    return [weight * x + (1 - weight) * y for x, y in zip(values(a), values(b))]


@pytest.mark.parametrize("decay, clip", [(0., 1e9), (.1, 1e9), (0., .3), (.1, .3)])
def test_identical_arms_are_one_adamw(decay, clip):
    """With the same objective, lr, decay and clip both arms are, bitwise, a single AdamW over 20 steps."""
    options = rl_loss, .01, decay, clip
    both = averaged(20, options, options)
    assert distance(both, alone(20, *options)) == 0 < distance(both, mlp())


@pytest.mark.parametrize("n, tolerance, way", [(1, 1e-7, .004), (50, 1e-6, .1)])
def test_with_an_idle_arm_it_is_the_other_at_half_the_rate(n, tolerance, way):
    """RL beside an SFT with lr 0 (its decay is scaled by lr) is RL alone with lr/2, in 1 round and 50."""
    both = averaged(n, (rl_loss, .01, .1), (sft_loss, 0., .1))
    assert distance(both, alone(n, rl_loss, .005, .1)) < tolerance and distance(both, mlp()) > way


@pytest.mark.parametrize("n", [1, 3])
def test_zero_gradients_leave_the_mean_decay(n):
    """With gradients that are zero (not None) a round multiplies by 1 - (.1·.5 + .2·.25)/2 = .95."""
    def nothing(model):
        return 0. * sum((p ** 2).sum() for p in model.parameters())
    model = averaged(n, (nothing, .1, .5), (nothing, .2, .25))
    assert distance(model, [.95 ** n * p for p in values(mlp())]) < 1e-6


def test_the_order_of_the_arms_is_irrelevant():
    """Swapping the two arms changes nothing, bitwise, over 20 rounds with different rates and decays."""
    arms = (rl_loss, .01, .1, .3), (sft_loss, .03, .2, .5)
    a, b = averaged(20, *arms), averaged(20, *arms[::-1])
    assert distance(a, b) == 0 < distance(a, mlp())


def test_the_first_round_moves_at_most_the_mean_rate():
    """AdamW's first step is lr: the average moves by at most (.01 + .03)/2, reached where the signs agree."""
    model = averaged(1, (rl_loss, .01), (sft_loss, .03))
    moved = torch.cat([(a - b).flatten().abs() for a, b in zip(values(model), values(mlp()))])
    assert .0199 < float(moved.max()) <= .02 * (1 + 1e-5)
    assert abs(float(moved.min()) - .01) < 1e-4                          # where the signs differ


def test_with_sgd_it_is_sgd_on_the_sum_at_half_the_rate():
    """Averaging two SGD updates is one on the summed loss with lr/2: the case where nothing is new."""
    sgd = torch.optim.SGD
    both = averaged(20, (rl_loss, .1), (sft_loss, .1), kind=sgd)
    one = alone(20, lambda model: rl_loss(model) + sft_loss(model), .05, kind=sgd)
    assert distance(both, one) < 1e-6 and distance(both, mlp()) > .1


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


def test_both_gradients_are_taken_at_the_snapshot():
    """The second arm starts where the first one did, not where it ended."""
    model, seen = mlp(), []
    watched = [lambda m, f=loss: (seen.append(values(m)), f(m))[1] for loss in (rl_loss, sft_loss)]
    arms = [arm(model, loss, .1) for loss in watched]
    for _ in range(3):
        start = values(model)
        parallel_round(model, arms, [.5, .5])
        assert distance(seen[-2], start) == distance(seen[-1], start) == 0 < distance(model, start)


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_an_exception_leaves_the_snapshot(error, at):
    """Whatever is raised in either arm, in any update: the snapshot is back, and no gradient is left."""
    model, done = mlp(), []
    real = arm(model, rl_loss, .1)

    def fragile(h):
        rl_loss(model).backward()
        if len(done) == at:
            raise error
        done.append(h)
        real(h)
    with pytest.raises(type(error)):
        parallel_round(model, [fragile, fragile], [.5, .5], inner=2)
    assert len(done) == at and distance(model, mlp()) == 0
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
    assert all(p.grad is None for p in model.parameters()) and distance(model, mlp()) == 0


@pytest.mark.parametrize("inner, weight", [(1, .5), (2, .5), (5, .5), (1, 1.), (1, .25), (1, 0.), (3, .25)])
def test_inner_updates_before_averaging(inner, weight):
    """A round is H updates of each arm from the snapshot, numbered 0 to H-1, then the mean: the average of
    two models that were trained apart for H steps; weight 1 is that arm alone, bitwise."""
    model, numbers, losses = mlp(), [], (rl_loss, sft_loss)
    arms = [arm(model, loss, .1) for loss in losses]
    counted = [lambda h, a=a: (numbers.append(h), a(h)) for a in arms]
    parallel_round(model, counted, [weight, 1 - weight], inner)
    assert numbers == 2 * list(range(inner))
    expected = mixed(*(alone(inner, loss, .1) for loss in losses), weight)
    assert distance(model, expected) <= (0 if weight in (0, 1) else 1e-7)


def test_more_inner_updates_are_another_method():
    """Four rounds of one update are not one round of four; moments are carried from round to round."""
    paper, apart = averaged(4, (rl_loss,), (sft_loss,)), averaged(1, (rl_loss,), (sft_loss,), inner=4)
    fresh = mlp()
    for _ in range(4):
        parallel_round(fresh, [arm(fresh, rl_loss), arm(fresh, sft_loss)], [.5, .5])
    assert distance(paper, apart) > 1e-4 and distance(paper, fresh) > 1e-3


def test_an_arm_that_does_nothing_contributes_the_snapshot():
    """Within the average an arm without signal pulls half-way back to the snapshot, as an update of 0."""
    model = mlp()
    parallel_round(model, [lambda h: None, arm(model, sft_loss, .1)], [.5, .5])
    assert distance(model, mixed(mlp(), alone(1, sft_loss, .1))) < 1e-7


# ---- training ----------------------------------------------------------------------------------------------

OPTIONS = dict(max_new=12, eval_every=4, eval_problems=2, eval_samples=2, save_every=1, seed=2)
RL, SFT = dict(n_problems=4, rollouts=4), dict(batch=8)
MODES = [("parallel", 1), ("parallel", 2), ("parallel", 4), ("fused", 1), ("alternating", 1)]


def trained(script, out: Path, start: Path | None = None, **changes) -> Path:
    """Final checkpoint of a run that starts from the parrot: its rewards differ within groups."""
    own = {rl: RL | dict(steps=4), sft: SFT | dict(epochs=1, warmup=0, decay=0.),          # 32 questions / 8
           merge: RL | SFT | dict(steps=4)}[script]
    options = dict(init=str(start or worlds.parrot()), data=str(worlds.data()),
                   problem_file=str(worlds.sevens()), out=str(out), threads=1)
    return Path(worlds.quietly(script.train, script.Config(**options | OPTIONS | own | changes)))


def weights(path: Path) -> dict:
    return load_checkpoint(path)["model"]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def mean(a: dict, b: dict) -> dict:
    return {name: .5 * a[name] + .5 * b[name] for name in a}


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
def of_script(script, **changes) -> dict:
    """Weights after the same four steps of rl.py or sft.py alone."""
    out = worlds.folder() / f"alone-{len(list(worlds.folder().iterdir()))}"
    return weights(trained(script, out, **changes))


def steps_of(path: Path) -> list[dict]:
    return [line for line in worlds.lines(path.parent / "log.jsonl") if "reward" in line]


def it_trains_and_logs(mode, inner, out):
    """The starting weights change; a line per round has RL's and SFT's metrics; the counts are those of the
    steps done (an update of each per step, one for both if fused), validations stand at 0 and 4."""
    path, _ = finished(mode, inner)
    log, steps = worlds.lines(path.parent / "log.jsonl"), steps_of(path)
    assert distance(weights(path), weights(worlds.parrot())) > 1e-3
    assert [line["step"] for line in steps] == list(range(inner, 5, inner))
    norms = {"grad_norm_fused"} if mode == "fused" else {"grad_norm_rl", "grad_norm_sft"}
    for line in steps:
        assert {"step", "reward", "signal", "unparsed", "truncated", "length", "entropy", "kl", "sft_loss",
                "skipped", "tokens", "updates", "flops", "seconds"} | norms == line.keys()
    assert [line["step"] for line in log if "val_pass@1" in line] == [0, 4]
    assert steps[-1]["updates"] == (4 if mode == "fused" else 8) and steps[-1]["skipped"] == 0
    first = next(p for p in worlds.lines(worlds.data() / "val.jsonl") if p["difficulty"] == "easy")
    assert (path.parent / "samples.txt").read_text().count(f"{first['question']}   (answer") == 2


def it_leaves_its_lineage(mode, inner, out):
    """The stage names script, options, parent and counts: of the end and of every listed step."""
    path, _ = finished(mode, inner)
    start, steps = worlds.parrot(), steps_of(path)
    kept = [path.with_name(f"step{n}.pt") for n in range(inner, 5, inner)]
    for file, last in zip([*kept, path], [*steps, steps[-1]], strict=True):
        *before, stage = load_checkpoint(file)["lineage"]
        assert before == load_checkpoint(start)["lineage"] and stage["parent"] == sha256(start)
        assert stage["script"] == "merge.py" and stage["config"]["mode"] == mode
        assert all(stage[name] == last[name] for name in ("tokens", "updates", "flops"))
    assert distance(weights(kept[-1]), weights(path)) == 0
    assert inner == 4 or distance(weights(kept[0]), weights(path)) > 0


def rl_and_sft_see_the_snapshot(mode, inner, out):
    """Rollouts and SFT's gradient are of the same weights in every round; alternating, RL steps between."""
    at_rollouts, at_sft = finished(mode, inner)[1].values()
    assert len(at_rollouts) == len(at_sft) == 4
    assert distance(at_rollouts[0], load_model(worlds.parrot())[0]) == 0
    for step, (a, b) in enumerate(zip(at_rollouts, at_sft)):
        assert (distance(a, b) == 0) == (step % inner == 0 and mode != "alternating")


def a_crashed_run_ends_in_the_same_bits(mode, inner, out):
    """A run that ends in the middle of its last round, RL's update done and SFT's not, and is resumed has the
    weights, both AdamW states, log and transcripts of the uninterrupted run (H = all: from the beginning)."""
    options = dict(mode=mode, inner=inner, checkpoints_at=tuple(range(inner, 5, inner)))
    effects = [mock.DEFAULT] * 3 + [RuntimeError("power cut")]
    with (mock.patch.object(sft, "sft_gradient", wraps=sft.sft_gradient, side_effect=effects),
          pytest.raises(RuntimeError, match="power cut")):
        trained(merge, out, **options)
    assert (out / "last.pt").exists() == (inner < 4) and not (out / "final.pt").exists()
    trained(merge, out, **options)
    worlds.assert_same_run(out, finished(mode, inner)[0].parent)


@pytest.mark.parametrize("mode, inner", MODES)
@pytest.mark.parametrize("holds", [it_trains_and_logs, it_leaves_its_lineage, rl_and_sft_see_the_snapshot,
                                   a_crashed_run_ends_in_the_same_bits])
def test_in_every_mode(holds, mode, inner, tmp_path):
    """Parallel averaging after each step, each second step and once, and the two controls."""
    holds(mode, inner, tmp_path / "run")


def test_averaging_at_the_end_is_merging_two_finished_models():
    """With H = all steps the result is bitwise the mean of the models that rl.py and sft.py make of the same
    start and seed, as `merge.py weights` would: the arms are rl.py and sft.py, unchanged."""
    a, b, result = of_script(rl), of_script(sft), weights(finished("parallel", 4)[0])
    assert distance(result, mean(a, b)) == 0
    assert distance(result, {k: merge_tensors("linear", [a[k], b[k]], [.5, .5]) for k in a}) == 0
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
        start, problems = worlds.base(), dict(problem_file="", n_train=32)      # four solutions of each
    result = weights(trained(merge, tmp_path / "run", start, **changes, **problems))
    assert distance(result, of_script(script, start=start, lr=lr, **problems)) <= tolerance
    assert distance(result, weights(start)) > 1e-4


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
    rows = [batch.prompts[r // 4] for r in range(16)], batch.completions
    logp = completion_logprobs(model, *pack(*rows, tokenizer.pad))
    advantage = rl.advantages(batch.rewards).flatten()
    each = torch.cat([a.expand(len(text)) for a, text in zip(advantage, batch.completions)])
    examples = [sft.make_examples(tokenizer, problems, False, 2)[i] for i in shown[:8]]
    nats = -completion_logprobs(model, *pack(*map(list, zip(*examples)), tokenizer.pad))
    (-(logp * each).mean() + nats.mean()).backward()
    norm = sum(float((p.grad ** 2).sum()) for p in model.parameters()) ** .5
    assert norm > 1 and steps_of(path)[0]["grad_norm_fused"] == pytest.approx(norm, rel=1e-4)
    after, large = weights(path), 0
    for name, p in model.named_parameters():
        g, moved = p.grad / norm, after[name] - p.detach()
        sure = g.abs() > 1e-4                                            # beyond rounding
        assert torch.allclose(moved[sure], -5.22015e-4 * g[sure].sign(), rtol=2e-3, atol=1e-7), name
        large += int(sure.sum())
    assert large > 10_000


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
    assert distance(weights(path), mean(weights(start), end)) == 0
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


@pytest.mark.parametrize("changes, line", [
    (dict(inner=3), "--inner 3"), (dict(inner=2, checkpoints_at=(1,)), "--inner 2"),
    (dict(inner=2, mode="fused"), "--inner 2"), (dict(inner=2, mode="alternating"), "--inner 2")])
def test_what_cannot_be_averaged_is_refused(changes, line, tmp_path):
    """Options that contradict each other are refused before anything is loaded or written."""
    with pytest.raises(UserError, match=line):
        merge.train(merge.Config(init="none.pt", out=str(tmp_path / "run"), **dict(steps=4) | changes))
    assert list(tmp_path.iterdir()) == []


# ---- merging tensors ---------------------------------------------------------------------------------------

BASE = torch.tensor([[10., 20., 30., 40.]])
DELTAS = [torch.tensor([[1., -2, .1, 3]]), torch.tensor([[.5, 1, -.2, -4]])]


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
    merged = merge_tensors("task", [BASE + d for d in DELTAS], [.5, 2.], BASE, factor)
    assert torch.allclose(merged, BASE + factor * torch.tensor([[1.5, 1., -.35, -6.5]]))


@pytest.mark.parametrize("density, expected", [(.5, [0., -2, 0, -4]), (1., [.75, -2, -.2, -4])])
@pytest.mark.parametrize("factor", [1., .3])
def test_ties_values(density, expected, factor):
    """TIES on [1, -2, .1, 3] and [.5, 1, -.2, -4]: trim, elect the sign, average who agrees."""
    for base in (BASE, torch.zeros_like(BASE)):
        merged = merge_tensors("ties", [base + d for d in DELTAS], [.5, .5], base, factor, density)
        assert torch.allclose(merged, base + factor * torch.tensor([expected]), atol=1e-5)


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


def test_ties_elects_by_weight_and_cancels():
    """TIES: a heavier model wins the sign; equal pulls cancel; a tensor without differences stays."""
    def one(a, b, weights):
        return float(merge_tensors("ties", [torch.tensor([a]), torch.tensor([b])], weights, torch.zeros(1)))
    assert one(1., -2., [3., 1.]) == 1 and one(1., -2., [1., 1.]) == -2 and one(2., -2., [.5, .5]) == 0
    assert one(0., 0., [.5, .5]) == 0 and one(0., 3., [.5, .5]) == 3


@pytest.mark.parametrize("method", ["linear", "task", "ties"])
def test_merging_leaves_its_inputs_alone(method):
    """A function must not write into its arguments, whatever it trims inside."""
    tensors, base = [BASE + d for d in DELTAS], BASE.clone()
    before = [t.clone() for t in tensors]
    merge_tensors(method, tensors, [.5, .5], base, 1., .5)
    assert torch.equal(base, BASE) and all(torch.equal(a, b) for a, b in zip(tensors, before))


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
        stage = {"script": script, "config": {"seed": seed}, "tokens": tokens, "updates": tokens // 10,
                 "flops": 100 * tokens, "seconds": tokens / 2, "parent": parent and sha256(paths[parent])}
        lineage[name] = lineage.get(parent, []) + [stage]
        paths[name] = tmp_path / f"{name}.pt"
        save_checkpoint(paths[name], make_gpt(seed, **SHAPE), TOKENIZER, lineage[name])
    return paths


def merged(family, names: str, tmp_path, base="", **options) -> Path:
    """The file that merge_weights wrote for these members of the family."""
    (path,) = merge_weights(WeightsConfig(
        tuple(str(family[name]) for name in names.split()), str(family[base]) if base else "",
        **dict(out=str(tmp_path / "merged.pt"), device="cpu", threads=1) | options))
    return path


@pytest.mark.parametrize("method, base, given, mix", [
    ("linear", "", (), [1 / 3] * 3), ("linear", "", (.5, .2, .3), [.5, .2, .3]),
    ("task", "base", (.5, .2, .3), [.5, .2, .3]), ("ties", "base", (.5, .2, .3), [.5, .2, .3])])
def test_checkpoints_are_merged_tensor_by_tensor(family, tmp_path, method, base, given, mix):
    """Every option reaches every tensor; the file is a usable checkpoint; the inputs keep their bytes."""
    before = {name: path.read_bytes() for name, path in family.items()}
    path = merged(family, "a b c", tmp_path, base, method=method, weights=given, factor=.6, density=.2)
    assert path == tmp_path / "merged.pt"
    a, b, c, m = (weights(family[name]) for name in ("a", "b", "c", "base"))
    expected = {k: merge_tensors(method, [a[k], b[k], c[k]], mix, m[k], .6, .2) for k in a}
    assert distance(weights(path), expected) == 0 and distance(expected, m) > .01
    model, tokenizer, _ = load_model(path)
    assert tokenizer.spec == TOKENIZER.spec and model(torch.tensor([[1, 2]])).isfinite().all()
    assert {name: path.read_bytes() for name, path in family.items()} == before


def test_the_lineage_of_a_merge(family, tmp_path):
    """The common part of both, then one stage: options, weights, what was merged, cost of both branches."""
    lineage = load_checkpoint(merged(family, "b c", tmp_path, base="base", method="task"))["lineage"]
    assert lineage[:-1] == load_checkpoint(family["base"])["lineage"]
    last = lineage[-1]
    assert last["script"] == "merge.py weights" and last["config"]["weights"] == [.5, .5]
    assert last["config"]["checkpoints"] == [str(family["b"]), str(family["c"])]
    assert last["parent"] == sha256(family["base"])
    assert last["merged"] == [sha256(family["b"]), sha256(family["c"])]
    assert (last["tokens"], last["updates"], last["flops"], last["seconds"]) == (137, 13, 13_700, 68.5)


@pytest.mark.parametrize("names, base, related", [
    ("a b", "", True), ("a b", "base", True), ("a c", "", True), ("base c", "", True), ("b c", "base", True),
    ("a b c", "", True), ("earlier c", "", True), ("once c", "", True),
    ("a stranger", "", False), ("a b stranger", "", False), ("a b", "stranger", False)])
def test_strangers_are_merged_with_a_warning(family, tmp_path, capsys, names, base, related):
    """Relatives have a common ancestor, be it the initial weights of one pretraining, or a merge's models.
    Where there is none (of the base too), one line says so and the merge is done."""
    if "once" in names:
        family["once"] = merged(family, "a b", tmp_path, out=str(tmp_path / "once.pt"))
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
def test_what_does_not_fit_together_is_refused(family, make_gpt, tmp_path, changes, tokenizer, fault, names,
                                               base):
    """Another shape, also if only heads or rotary angles differ (the average would be a model that nobody
    trained), and another tokenizer, also if id 256 alone means other bytes; the line names the file."""
    family["odd"] = tmp_path / "odd.pt"
    save_checkpoint(family["odd"], make_gpt(**SHAPE | changes), tokenizer, [])
    with pytest.raises(UserError, match=f"odd.pt: {fault}"):
        merged(family, names, tmp_path, base)
    assert not (tmp_path / "merged.pt").exists()


def test_a_sweep_measures_every_mixture(tmp_path, monkeypatch):
    """Every mixture has a file, a measurement, a line; at 0 and 1 they are the inputs' own, bitwise."""
    real = evaluate.measure_benchmarks                                   # of a few items: they take time
    monkeypatch.setattr(evaluate, "measure_benchmarks", lambda m, t, items: real(m, t, items[::90]))
    a, b = (Path(shutil.copy(path, tmp_path / name))
            for path, name in ((worlds.base(), "a.pt"), (worlds.parrot(), "b.pt")))
    outcome = worlds.run_here("merge.py", "weights", a, b, "--sweep", "0,.25,1", "-o", tmp_path / "mix.pt",
                              "--data", worlds.data(), "--n-problems", 1, "--threads", 1)
    assert outcome.status == 0 and not outcome.errors, outcome.errors
    x, y = weights(a), weights(b)
    for mix in (0, .25, 1):
        expected = {k: (1 - mix) * x[k] + mix * y[k] for k in x}
        assert distance(weights(tmp_path / f"mix-{mix:g}.pt"), expected) <= (1e-7 if mix == .25 else 0)
        measured = json.loads((tmp_path / f"mix-{mix:g}.val.0shot.json").read_text())
        for name, d in measured["problems"].items():
            found = [line for line in outcome.out.splitlines()
                     if line.startswith(f"weight {mix:4g} of {b}: {name} pass@1 {d['pass@1']['mean']:.1%}")]
            assert len(found) == 1 and f"general mean {measured['general_mean']:.1%}" in found[0]
    c = evaluate.Config((str(b),), data=str(worlds.data()), n_problems=1, threads=1)
    direct = json.loads(json.dumps(worlds.quietly(evaluate.run, c)[0]))
    assert all(direct[key] == measured[key] for key in ("problems", "benchmarks", "bits_per_byte"))


@pytest.mark.parametrize("sweep", [(.25, .5), (.5, .5000001)])
def test_every_mixture_of_a_sweep_has_its_own_files(sweep, tmp_path, monkeypatch):
    """Two weights make two checkpoints and two results, however close they are."""
    stubs = {"measure_problems": {}, "measure_benchmarks": {"x": {"accuracy": .5}}, "table": ""}
    for name, result in stubs.items():
        monkeypatch.setattr(evaluate, name, mock.Mock(return_value=result))
    written = merge_weights(WeightsConfig(2 * (str(worlds.base()),), sweep=sweep, data=str(worlds.data()),
                                          out=str(tmp_path / "mix.pt"), threads=1))
    assert len(set(written)) == 2 and len(list(tmp_path.glob("*.json"))) == 2


def test_the_command_line(family, tmp_path):
    """The command with --base, --method and -o writes the same weights as from Python; the path is said."""
    path, out = merged(family, "a b", tmp_path, method="ties", base="base"), tmp_path / "new" / "out.pt"
    outcome = worlds.run_here("merge.py", "weights", family["a"], family["b"], "--base", family["base"],
                              "--method", "ties", "-o", out)
    assert outcome.status == 0 and str(out) in outcome.out
    assert distance(weights(out), weights(path)) == 0
