"""torch.compile: when it is used, and its gradients: the plain ones (skipped where no compiler works)."""
import functools
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import checkpoint
import model
import pretrain
from checkpoint import UserError, compile_if_it_pays, generator
from test_faults import TRAINERS, config_of


@functools.cache
def compiler_works() -> bool:
    try:
        torch.compile(torch.cos)(torch.zeros(8))
    except Exception:                            # of a dozen types, as compilers fail
        return False
    return True


needs_compiler = pytest.mark.skipif("not compiler_works()", reason="torch.compile finds no compiler")


def gradient(gpt: model.GPT, compiled: bool, backward) -> torch.Tensor:
    gpt.compiled = compiled
    gpt.zero_grad()
    backward()
    return torch.cat([p.grad.flatten() for p in gpt.parameters()])


def agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(0 < a.norm() and (a - b).norm() < 1e-5 * a.norm())


@pytest.mark.parametrize("T", [1, 64, 100, 192])
def test_causal_products_are_causal_attention(T):
    """In blocks of queries and all at once."""
    q, k, v = torch.randn(3, 2, 3, T, 8, generator=generator(0, "weights"))
    assert torch.allclose(model.causal_products(q, k, v), model.attention(q, k, v, None), atol=1e-6)


@needs_compiler
def test_compiled_pretraining_has_the_plain_gradient(make_gpt):
    gpt = make_gpt(n_layers=1, context=128)
    sequences = torch.randint(0, 61, (2, 129), generator=generator(0, "weights"))
    loss = functools.partial(pretrain.next_token_loss, gpt, sequences)
    plain, compiled = (gradient(gpt, c, lambda: loss().backward()) for c in (False, True))
    assert agree(plain, compiled) and not torch.equal(plain, compiled)
    with torch.no_grad():                        # a measurement runs in plain PyTorch
        compiled = loss()
        gpt.compiled = False
        assert torch.equal(loss(), compiled)


def backward(gpt: model.GPT, prompts: model.Ids, rows: list[int], answers: model.Ids) -> None:
    """Of a loss of answers to prompts that are computed once, as in rl.py."""
    shared = model.SharedPrompts(gpt, prompts, 0)
    model.shared_logprobs(gpt, shared, rows, answers, 0, .7).sin().sum().backward()
    shared.backward()


def check_one_code(gpt: model.GPT, works: list) -> None:
    """Each has the plain gradient when it is compiled, and the first makes the only code."""
    made = torch._dynamo.utils.counters["stats"]
    before = made["unique_graphs"]
    for work in works:
        assert agree(*(gradient(gpt, compiled, work) for compiled in (False, True)))
        assert made["unique_graphs"] == before + 1


@needs_compiler
def test_one_code_has_the_plain_gradient_for_rollouts_of_all_shapes(make_gpt):
    """Any number of prompts, of rows and of tokens (sizes that are equal in the first are taken for one, so
    none are); one row, or one token, runs as it is."""
    gpt = make_gpt(n_layers=1)
    check_one_code(gpt, [functools.partial(backward, gpt, *batch) for batch in (
        ([[1, 2], [3, 4, 5], [6] * 12] * 2, [0, 0, 1, 5, 4], [[6, 7, 8], [9, 10], [11], [1], [2]]),
        ([[1] * 9, [3, 4, 5], [7, 7]], [2, 1, 0, 0, 1], [[6] * 12, [9], [11], [5, 4], [7, 7, 7]]),
        ([[8] * 20, [9, 8]] * 4, [7, 0, 0, 3], [[1] * 30, [2] * 31, [5] * 7, [1, 2]]),
        ([[8] * 20, [9, 8]], [1], [[1] * 30]),
        ([[8] * 20, [9, 8]], [1, 1, 0], [[1], [2], [3]]))])


@needs_compiler
def test_one_code_has_the_plain_gradient_for_examples_of_all_shapes(make_gpt):
    """Also for a length that could be cut into blocks of queries."""
    gpt = make_gpt(n_layers=1, context=128)

    def score(width: int, more: int) -> None:
        prompts = [[1, 2]] + [[3]] * more
        solutions = [[5] * (width - 1)] + [[7, 8]] * more
        examples = model.pack(prompts, solutions, 0)
        assert examples[0].shape == (1 + more, width)
        model.completion_logprobs(gpt, *examples, temperature=.7).sin().sum().backward()

    check_one_code(gpt, [functools.partial(score, *shape) for shape in (
        (71, 2), (64, 4), (100, 3), (128, 1), (5, 9), (64, 0))])


LONG, SHORT = 2.01e13, 1.99e13


@pytest.mark.parametrize("choice, device, flops, works, asked, expected", [
    ("auto", "cpu", LONG, True, True, "about 402 s of training, 20% less with torch.compile"),
    ("auto", "cpu", SHORT, True, False, "about 398 s of training: too few for torch.compile"),
    ("auto", "cuda", LONG, True, False, ""), ("auto", "cpu", LONG, False, True, ""),
    ("off", "cpu", LONG, True, False, ""),
    ("on", "cpu", SHORT, True, False, "40 s before"), ("on", "cuda", SHORT, True, False, "40 s before")])
def test_it_is_used_where_it_pays_and_works(choice, device, flops, works, asked, expected, capsys):
    """One line says so; a machine without a compiler stays silent, and a short training asks for none."""
    gpt = SimpleNamespace(device=SimpleNamespace(type=device), compiled=False)
    broken = None if works else RuntimeError("no compiler")
    with (mock.patch.object(torch, "compile", return_value=mock.Mock(side_effect=broken)) as compiler,
          mock.patch.object(torch, "zeros")):
        compile_if_it_pays(gpt, choice, flops, gain=.2)
    said = capsys.readouterr().out
    assert said.count("\n") == bool(expected) and expected in said
    assert gpt.compiled == ("less" in said or choice == "on")
    assert compiler.called == asked


@pytest.mark.parametrize("flops, expected", [(2 * LONG, True), (2 * SHORT, False)])
def test_two_codes_must_pay_for_both(flops, expected):
    gpt = SimpleNamespace(device=torch.device("cpu"), compiled=False)
    with mock.patch.object(checkpoint, "compiler_fault", return_value=""):
        compile_if_it_pays(gpt, "auto", flops, gain=.2, codes=2)
    assert gpt.compiled == expected


@pytest.mark.parametrize("script", TRAINERS)
def test_no_compiler_is_an_error_where_it_was_asked_for(script, tmp_path):
    """One line says to leave the option out, before the run folder exists."""
    broken = mock.Mock(side_effect=RuntimeError("no working C++ compiler\nsecond line"))
    config = replace(config_of(script, tmp_path / "run"), compile="on")
    with mock.patch.object(torch, "compile", return_value=broken):
        with pytest.raises(UserError, match="--compile on: .*no working C.. compiler.*leave the option out"):
            TRAINERS[script][0].train(config)
    assert not (tmp_path / "run").exists()
