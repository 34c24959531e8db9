"""beyond/convert.py against the software it writes for: transformers computes the same logits,
lm-evaluation-harness the same scores; and a published layout comes in."""
import json
import math
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import worlds
from test_tokenizers import PLAIN, adversarial, few_letters, publish_tokenizer

from beyond import convert
from checkpoint import load_checkpoint, load_model, save_checkpoint
from data.tokenizer import EOS, PAD, Tokenizer
from evaluate import measure_benchmarks, score_rows
from model import GPT, Rollouts, sample

safetensors_torch = pytest.importorskip("safetensors.torch")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
         "tokenizer_config.json"}
FEW_LETTERS = few_letters()


@pytest.fixture
def saved(make_gpt, tmp_path):
    """saved(**config) -> (path of a checkpoint, its model); a vocabulary without spare rows."""
    def make(tokenizer: Tokenizer = FEW_LETTERS, name: str = "ours.pt", **config) -> tuple[Path, GPT]:
        rows = config.pop("rows", tokenizer.n_vocab)
        model = make_gpt(vocab_size=rows, n_vocab=tokenizer.n_vocab, **config)
        save_checkpoint(tmp_path / name, model, tokenizer, [])
        return tmp_path / name, model
    return make


def refused(*argv: object) -> str:
    """The one line with which convert.py refuses this command."""
    done = worlds.run_here("beyond/convert.py", *argv)
    assert done.status == 2 and len(done.errors) == 1, done
    return done.errors[0]


# ---- export ----------------------------------------------------------------------------------------------

SHAPES = [dict(), dict(d_model=48, n_layers=3, n_heads=3, d_ff=40), dict(d_model=64, n_heads=1, rows=320),
          dict(n_layers=1, n_heads=8, d_ff=200, rope_theta=5e5), dict(context=16, rope_theta=123.),
          dict(n_heads=4, n_kv_heads=2), dict(d_model=48, n_heads=6, n_kv_heads=1)]


def assert_same_logits(theirs: transformers.PreTrainedModel, model: GPT) -> None:
    ids = torch.randint(model.config.n_vocab, (3, model.config.context))
    with torch.no_grad():
        logits = theirs(ids).logits[..., :model.config.n_vocab]
        ours = model(ids)
    assert ours.std() > .5
    torch.testing.assert_close(logits, ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_those_of_transformers(saved, tmp_path, shape):
    """Olmo2ForCausalLM reads an export and computes our logits, which another theta changes. Theta is there
    twice: transformers 4.57 takes 10,000 if it finds rope_parameters alone; 5 reads these."""
    path, model = saved(**shape)
    convert.export_folder(path, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == model.config.rope_theta
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(theirs) is transformers.Olmo2ForCausalLM and theirs.dtype == torch.float32
    assert theirs.config.vocab_size == model.config.vocab_size
    assert_same_logits(theirs, model)
    other = GPT(replace(model.config, rope_theta=1e3))
    other.load_state_dict(model.state_dict())
    with pytest.raises(AssertionError, match="not close"):
        assert_same_logits(theirs, other)


PROMPTS = ("a", "ab b", "1", "c\nc", "bab", "1 é", "aab", "cc")


def greedy(saved, tmp_path, times: float, **shape) -> tuple[Path, Tokenizer, Rollouts]:
    """An export with EOS's row of the head `times` as large, so that some of our greedy answers end."""
    path, model = saved(**shape)
    tokenizer = load_model(path)[1]
    model.head.weight.data[tokenizer.eos] *= times
    save_checkpoint(path, model, tokenizer, [])
    ours = sample(model, [tokenizer.encode(p) for p in PROMPTS], 1, 20, tokenizer.eos, tokenizer.pad,
                  torch.Generator().manual_seed(0), 0.)
    assert 0 < ours.finished.sum() < len(PROMPTS)
    return convert.export_folder(path, tmp_path / "out"), tokenizer, ours


def test_generation_equals_our_greedy_decoding(saved, tmp_path):
    """generate() stops at EOS as we do, and takes the tokenizer's output as it is (no token_type_ids)."""
    folder, tokenizer, ours = greedy(saved, tmp_path, 8)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.generation_config.pad_token_id == their_tokenizer.pad_token_id == tokenizer.pad
    assert (theirs.config.eos_token_id, theirs.config.pad_token_id) == (tokenizer.eos, tokenizer.pad)
    wanted = json.loads((folder / "tokenizer_config.json").read_text())["model_input_names"]
    assert "token_type_ids" not in wanted                                # 4.57 makes them if not told
    for prompt, tokens in zip(PROMPTS, ours.completions()):
        inputs = their_tokenizer(prompt, return_tensors="pt")
        assert set(inputs) == {"input_ids", "attention_mask"}
        got = theirs.generate(**inputs, max_new_tokens=20, do_sample=False)
        assert got[0].tolist() == tokenizer.encode(prompt) + tokens


def test_vllm_answers_alike(saved, tmp_path):
    """vLLM (if it is installed) reads an export with grouped queries, splits texts as we do, and answers
    greedily with the same tokens and log-probabilities; some answers end, some are cut."""
    vllm = pytest.importorskip("vllm")
    folder, _, ours = greedy(saved, tmp_path, 3, d_model=64, n_heads=2, n_kv_heads=1)    # heads of 32 or more
    theirs = vllm.LLM(str(folder), dtype="float32", enforce_eager=True, max_model_len=64)
    answers = theirs.generate(list(PROMPTS), vllm.SamplingParams(temperature=0, max_tokens=20, logprobs=0))
    for answer, tokens, logprobs in zip(answers, ours.completions(), ours.logprobs):
        got = answer.outputs[0]
        assert list(got.token_ids) == tokens
        found = [at[token].logprob for at, token in zip(got.logprobs, tokens)]
        torch.testing.assert_close(torch.tensor(found), logprobs[:len(tokens)], atol=1e-4, rtol=0)


def test_transformers_tokenizes_an_export_alike(saved, tmp_path):
    """AutoTokenizer takes tokenizer.json as it is (GPT2Tokenizer, on 5.x, does not): no other splitting, no
    cleaning of blanks, no token added. A special token spelled out is that token, by their rule."""
    ours = load_model(saved()[0])[1]
    convert.export_folder(tmp_path / "ours.pt", tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in adversarial(8, 1_000, without=(EOS, PAD)):
        assert theirs(text)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert theirs(f"a{EOS}b{PAD}")["input_ids"] == [97, ours.eos, 98, ours.pad]
    assert theirs.bos_token_id is None and len(theirs) == ours.n_vocab


# ---- there and back --------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [300, 320])
def test_export_import_export_is_identical(saved, tmp_path, dtype, rows):
    """Byte for byte, rows without a token included; in fp32 the checkpoint comes back bitwise."""
    path, model = saved(rows=rows)
    convert.export_folder(path, tmp_path / "a", dtype)
    convert.import_folder(tmp_path / "a", tmp_path / "again.pt", dtype)
    convert.export_folder(tmp_path / "again.pt", tmp_path / "b", dtype)
    first, second = worlds.snapshot(tmp_path / "a"), worlds.snapshot(tmp_path / "b")
    assert first == second and first.keys() == FILES
    again, tokenizer, _ = load_model(tmp_path / "again.pt")
    content = load_checkpoint(tmp_path / "again.pt")
    assert again.config == model.config
    assert tokenizer.sha256 == load_model(path)[1].sha256
    for name, weight in model.state_dict().items():
        assert content["model"][name].dtype == dtype
        assert torch.equal(content["model"][name], weight.to(dtype))


def test_command_line(saved, tmp_path):
    """Both directions as a user types them, --dtype included; a wrong command is explained. An import is a
    first stage of lineage without a history, as nothing was trained here; sample.py shows it."""
    path, _ = saved(context=128)
    out, again = tmp_path / "out", tmp_path / "deep/er/again.pt"
    assert worlds.run_here("beyond/convert.py", "export", path, out).status == 0
    assert {p.name for p in out.iterdir()} == FILES
    assert worlds.run_here("beyond/convert.py", "import", out, again, "--dtype", "bf16").status == 0
    assert load_checkpoint(again)["model"]["head.weight"].dtype == torch.bfloat16
    given = {"source": str(out), "revision": "", "dtype": "bfloat16", "seed": 0}
    assert load_model(again)[2] == [{"script": "convert.py import", "config": given, "parent": None,
                                     "tokens": 0, "updates": 0, "flops": 0, "seconds": 0.0}]
    done = worlds.run_here("sample.py", again, "--threads", "1", stdin="ab\n")
    assert done.status == 0 and "convert.py import: 0 tokens" in done.out
    for argv in (["export", path], ["exprot", path, out], [], ["import", out, again, "--dtype", "fp16"]):
        refused(*argv)


# ---- what others publish ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def published(tmp_path_factory) -> SimpleNamespace:
    """A folder as OLMo-2's are on the hub: a random model of transformers, bf16, sharded, with spare rows."""
    folder = tmp_path_factory.mktemp("published")
    n = publish_tokenizer(folder)
    torch.manual_seed(1)
    model = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(
        vocab_size=640, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-6, initializer_range=.3,
        tie_word_embeddings=False, pad_token_id=n + 5, eos_token_id=n + 1, bos_token_id=None))
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="40KB")
    return SimpleNamespace(folder=folder, model=model, n=n)


def test_published_layout_comes_in(published, tmp_path):
    """Sharded, bf16; the logits are transformers', the ids tokenizers'. Stored as fp32 if not told
    otherwise. Refused if one of the shards is missing."""
    half = shutil.copytree(published.folder, tmp_path / "half")
    shards = sorted(half.glob("*.safetensors"))
    assert len(shards) > 2 and not (half / "model.safetensors").exists()
    shards[1].unlink()
    assert str(half) in refused("import", half, tmp_path / "ours.pt")
    convert.import_folder(published.folder, tmp_path / "ours.pt")
    model, tokenizer, _ = load_model(tmp_path / "ours.pt")
    assert {w.dtype for w in load_checkpoint(tmp_path / "ours.pt")["model"].values()} == {torch.float32}
    assert (model.config.vocab_size, model.config.n_vocab) == (640, published.n + 6)
    assert (tokenizer.eos, tokenizer.pad) == (published.n + 1, published.n + 5)
    assert tokenizer.encode("!") == [0]                                  # not 33
    theirs = transformers.AutoModelForCausalLM.from_pretrained(published.folder, dtype=torch.float32)
    assert_same_logits(theirs, model)
    published_tokenizer = tokenizers.Tokenizer.from_file(str(published.folder / "tokenizer.json"))
    published_tokenizer.encode_special_tokens = True
    for text in adversarial(9, 1_000, without=PLAIN):
        assert tokenizer.encode(text) == published_tokenizer.encode(text).ids
    assert tokenizer.decode([published.n + 3]) == "|||PHONE_NUMBER|||"   # a model may say it


def test_published_layout_goes_out_again(published, tmp_path):
    """A foreign tokenizer keeps its ids, so the exported model is the published one. In transformers 5 the
    class GPT2Tokenizer would split this tokenizer's digits otherwise, whatever tokenizer.json says, unless
    (5.23) config.json says that the model is an OLMo-2; so that is taken away first."""
    convert.import_folder(published.folder, tmp_path / "ours.pt", torch.bfloat16)
    convert.export_folder(tmp_path / "ours.pt", tmp_path / "out", torch.bfloat16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    for name, weight in published.model.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], weight)
    (tmp_path / "out/config.json").unlink()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = load_model(tmp_path / "ours.pt")[1]
    assert len(ours.encode("2025")) < 4                                  # digits are merged here
    for text in adversarial(10, 1_000, without=ours.spec["special"]):
        assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs(f"2025{EOS}")["input_ids"] == [*ours.encode("2025"), ours.eos]


def test_revision_of_the_hub_is_imported(published, tmp_path, monkeypatch):
    """owner/name@branch from huggingface_hub's cache, without a network; the lineage names the commit. A name
    that is not in the cache, or is none, is one line, which says that this may be for want of a network."""
    hub = pytest.importorskip("huggingface_hub")
    commit = "0123456789abcdef0123456789abcdef01234567"
    branch = "stage1-step10000-tokens21B"
    repo = tmp_path / "hub/models--someone--tiny"
    shutil.copytree(published.folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / branch).write_text(commit)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    done = worlds.run_here("beyond/convert.py", "import", f"someone/tiny@{branch}", tmp_path / "ours.pt")
    assert done.status == 0, done.errors
    [stage] = load_model(tmp_path / "ours.pt")[2]
    assert (stage["config"]["source"], stage["config"]["revision"]) == (f"someone/tiny@{branch}", commit)
    for source in ("someone/tiny@other", "someone/tiny", "some one/tiny", "nowhere", "./no/where", "a/b/c@d"):
        line = refused("import", source, tmp_path / "no.pt")
        assert source in line and "offline" in line
    assert not (tmp_path / "no.pt").exists()


# ---- refusals --------------------------------------------------------------------------------------------

def change(key: str, value: object = ...):
    """folder -> None: puts a value into config.json, or takes away what is there."""
    def edit(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text()) | {key: value}
        kept = {k: v for k, v in content.items() if v is not ...}
        (folder / "config.json").write_text(json.dumps(kept))
    return edit


def change_weights(edit):
    def change_file(folder: Path) -> None:
        weights = safetensors_torch.load_file(folder / "model.safetensors")
        edit(weights)
        safetensors_torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return change_file


Q, K = (f"model.layers.1.self_attn.{x}_proj.weight" for x in "qk")
FILES_READ = "config.json", "tokenizer.json", "model.safetensors"
REFUSED = {     # case -> (edit of a good folder, text that the line must contain)
    **{f"{key} {value}": (change(key, value), said) for key, value, said in (
        ("model_type", "llama", "model_type is llama"), ("model_type", "olmo3", "model_type is olmo3"),
        ("rms_norm_eps", 1e-5, "rms_norm_eps"), ("rms_norm_eps", ..., "rms_norm_eps"),   # theirs is 1e-5
        ("hidden_act", "gelu", "hidden_act"), ("attention_bias", True, "attention_bias"),
        ("tie_word_embeddings", True, "tie_word_embeddings"), ("head_dim", 8, "k_norm"),
        ("num_key_value_heads", 1, "k_proj"), ("num_key_value_heads", 3, "k_proj"),
        ("num_key_value_heads", "2", "num_key_value_heads"), ("num_attention_heads", 3, "config.json"),
        ("hidden_size", "32", "hidden_size"), ("hidden_size", ..., "config.json"),
        ("num_hidden_layers", 3, "model.layers.2"), ("num_hidden_layers", 0, "model.layers.0"),
        ("vocab_size", 299, "vocab_size"), ("vocab_size", 301, "embed_tokens"),
        ("rope_scaling", {"type": "linear", "factor": 2.}, "rope_type"), ("rope_parameters", [1], "rope_"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.}, "yarn"))},
    **{f"no {name}": (lambda folder, name=name: (folder / name).unlink(), name) for name in FILES_READ},
    **{f"another {name}": (lambda folder, name=name: (folder / name).write_text("[1]"), "no whole")
       for name in FILES_READ},
    "truncated": (lambda folder: os.truncate(folder / "model.safetensors", 20_000), "Safetensor"),
    **{name: (change_weights(edit), said) for name, edit, said in (
        ("shape", lambda w: w.update({Q: torch.zeros(31, 32)}), Q),
        ("shapes that add up", lambda w: w.update({Q: torch.zeros(40, 32), K: torch.zeros(24, 32)}), K),
        ("missing tensor", lambda w: w.pop(Q), Q),
        ("extra tensor", lambda w: w.update({"score.bias": torch.zeros(1)}), "score.bias"),
        ("nan", lambda w: w[Q].fill_(math.nan), "finite"))}}


@pytest.mark.parametrize("case", REFUSED)
def test_import_refuses_in_one_line_and_writes_nothing(saved, tmp_path, case):
    """The line names the folder; where the refusal is one of ours, it says which value is wrong."""
    folder = convert.export_folder(saved(d_ff=48)[0], tmp_path / "out")
    edit, said = REFUSED[case]
    edit(folder)
    (tmp_path / "there.pt").write_text("an earlier file")
    before = worlds.snapshot(tmp_path)
    line = refused("import", folder, tmp_path / "there.pt")
    assert f"{folder}: " in line and said in line
    assert worlds.snapshot(tmp_path) == before


def test_a_missing_package_is_one_line(saved, tmp_path, monkeypatch):
    path, _ = saved()
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert refused("export", path, tmp_path / "out").endswith("pip install -r beyond/requirements.txt")
    assert not (tmp_path / "out").exists()


# ---- nothing half-written --------------------------------------------------------------------------------

def test_export_does_not_touch_a_folder_with_files(saved, tmp_path):
    """A run folder has a config.json too: exporting into it must not replace that. An empty one will do."""
    path, _ = saved()
    (tmp_path / "run").mkdir()
    convert.export_folder(path, tmp_path / "run")
    before = worlds.snapshot(tmp_path)
    for place in (tmp_path / "run", path):
        assert str(place) in refused("export", path, place)
    assert worlds.snapshot(tmp_path) == before


@pytest.mark.parametrize("stop", range(4))
def test_an_interrupted_export_leaves_nothing(saved, tmp_path, stop):
    """Whichever step is the last one: one of our three files, or the name. The next call makes it whole."""
    path, _ = saved()
    steps = [None] * stop + [KeyboardInterrupt]
    with (mock.patch.object(Path, "write_text", side_effect=steps) as written,
          mock.patch("os.replace", side_effect=KeyboardInterrupt),
          pytest.raises(KeyboardInterrupt)):
        convert.export_folder(path, tmp_path / "out")
    assert written.call_count == min(stop + 1, 3)
    assert {p.name for p in tmp_path.iterdir()} == {path.name}
    convert.export_folder(path, tmp_path / "out")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() > 0


# ---- lm-evaluation-harness -------------------------------------------------------------------------------

def test_scores_equal_those_of_lm_evaluation_harness(saved, tmp_path):
    """Log-likelihoods and greedy flags are the harness's for the export; so are acc and acc_norm."""
    lm_eval = pytest.importorskip("lm_eval")
    from datasets import Dataset
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    tokenizer = Tokenizer.load(worlds.data() / "tokenizer.json")
    path, model = saved(tokenizer, context=128)
    folder = convert.export_folder(path, tmp_path / "out")
    theirs = HFLM(pretrained=transformers.AutoModelForCausalLM.from_pretrained(folder), device="cpu",
                  tokenizer=transformers.AutoTokenizer.from_pretrained(folder), batch_size=8)
    items = worlds.lines(worlds.data() / "benchmarks.jsonl")
    rows = [(EOS + item["context"], choice) for item in items[::40] for choice in item["choices"]]
    wanted = theirs.loglikelihood([Instance("loglikelihood", {}, row, i) for i, row in enumerate(rows)],
                                  disable_tqdm=True)
    contexts = [[tokenizer.eos, *tokenizer.encode(text.removeprefix(EOS))] for text, _ in rows]
    sums, exact = score_rows(model, contexts, [tokenizer.encode(choice) for _, choice in rows], tokenizer.pad)
    assert len(rows) > 50
    assert sums == pytest.approx([score for score, _ in wanted], abs=1e-3, rel=1e-5)
    assert exact == [greedy for _, greedy in wanted]

    name = next(item["task"] for item in items if len(item["choices"]) > 2)
    items = [item for item in items if item["task"] == name][:60]
    assert all(choice.startswith(" ") for item in items for choice in item["choices"])
    task = ConfigurableTask(config={
        "task": "ours", "custom_dataset": lambda: {"test": Dataset.from_list(items)}, "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": EOS + "{{context}}", "doc_to_target": "answer",
        "doc_to_choice": "{{choices | map('trim') | list}}", "target_delimiter": " ",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]})
    wanted = lm_eval.evaluate(lm=theirs, task_dict={"ours": task}, bootstrap_iters=0)["results"]["ours"]
    ours = measure_benchmarks(model, tokenizer, items)[name]
    assert 0 < ours["acc"] < 1
    assert [wanted["acc,none"], wanted["acc_norm,none"]] == pytest.approx([ours["acc"], ours["acc_norm"]])
