"""beyond/convert.py against the software it writes for: transformers computes the same logits,
lm-evaluation-harness the same scores; and a published layout comes in."""
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import worlds
from test_tokenizers import adversarial, few_letters, publish_tokenizer

from beyond import convert
from checkpoint import UserError, load_checkpoint, load_model, save_checkpoint
from data.tokenizer import EOS, PAD, Tokenizer
from evaluate import measure_benchmarks, score_rows
from model import GPT, ModelConfig, sample

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


# ---- export ----------------------------------------------------------------------------------------------

SHAPES = [dict(), dict(d_model=48, n_layers=3, n_heads=3, d_ff=40), dict(d_model=64, n_heads=1, rows=320),
          dict(n_layers=1, n_heads=8, d_ff=200, rope_theta=5e5), dict(context=16, rope_theta=123.),
          dict(n_heads=4, n_kv_heads=2), dict(d_model=48, n_heads=6, n_kv_heads=1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_those_of_transformers(saved, tmp_path, shape):
    """Olmo2ForCausalLM reads an export and computes what our model computes."""
    path, model = saved(**shape)
    convert.export_folder(path, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(theirs) is transformers.Olmo2ForCausalLM and theirs.dtype == torch.float32
    assert theirs.config.vocab_size == model.config.vocab_size
    ids = torch.randint(model.config.n_vocab, (3, model.config.context))
    with torch.no_grad():
        logits, ours = theirs(ids).logits[..., :model.config.n_vocab], model(ids)
        other = GPT(ModelConfig(**vars(model.config) | {"rope_theta": 1e3}))
        other.load_state_dict(model.state_dict())
        assert (other(ids)[..., :model.config.n_vocab] - ours).abs().max() > 1e-2      # positions matter
    assert ours.std() > .5
    torch.testing.assert_close(logits, ours, atol=1e-5, rtol=1e-5)


def test_theta_is_named_in_both_ways(saved, tmp_path):
    """transformers 4.57 takes 10,000 if it finds rope_parameters alone; 5 reads rope_parameters."""
    folder = convert.export_folder(saved(rope_theta=5e5)[0], tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5


PROMPTS = ("a", "ab b", "1", "c\nc", "bab", "1 é", "aab", "cc")


def with_likelier_end(saved, times: float, **shape) -> tuple[Path, GPT, Tokenizer]:
    """A checkpoint whose head has EOS's row `times` as large, so that some greedy answers to PROMPTS end."""
    path, model = saved(**shape)
    tokenizer = load_model(path)[1]
    with torch.no_grad():
        model.head.weight[tokenizer.eos] *= times
    save_checkpoint(path, model, tokenizer, [])
    return path, model, tokenizer


def test_generation_equals_our_greedy_decoding(saved, tmp_path):
    """generation_config.json: transformers' generate() stops at EOS as we do, and takes the tokenizer's
    output as it is (no token_type_ids, which the model would refuse)."""
    path, model, tokenizer = with_likelier_end(saved, 8)
    folder = convert.export_folder(path, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.generation_config.pad_token_id == their_tokenizer.pad_token_id == tokenizer.pad
    assert (theirs.config.eos_token_id, theirs.config.pad_token_id) == (tokenizer.eos, tokenizer.pad)
    wanted = json.loads((folder / "tokenizer_config.json").read_text())["model_input_names"]
    assert "token_type_ids" not in wanted                                # 4.57 makes them if not told
    ended = 0
    for prompt in PROMPTS:
        out = sample(model, [tokenizer.encode(prompt)], 1, 20, tokenizer.eos, tokenizer.pad,
                     torch.Generator().manual_seed(0), 0.)
        inputs = their_tokenizer(prompt, return_tensors="pt")
        assert set(inputs) == {"input_ids", "attention_mask"}
        got = theirs.generate(**inputs, max_new_tokens=20, do_sample=False)
        assert got[0].tolist() == tokenizer.encode(prompt) + out.completions()[0]
        ended += int(out.finished)
    assert 0 < ended < 8


def test_vllm_answers_alike(saved, tmp_path):
    """vLLM (if it is installed) reads an export with grouped queries, splits texts as we do, and answers
    greedily with the same tokens and log-probabilities; some answers end, some are cut."""
    vllm = pytest.importorskip("vllm")
    # its heads: 32 numbers at least
    path, model, tokenizer = with_likelier_end(saved, 3, d_model=64, n_heads=2, n_kv_heads=1)
    theirs = vllm.LLM(str(convert.export_folder(path, tmp_path / "out")), dtype="float32", enforce_eager=True,
                      max_model_len=64)
    answers = theirs.generate(list(PROMPTS), vllm.SamplingParams(temperature=0, max_tokens=20, logprobs=0))
    ours = sample(model, [tokenizer.encode(p) for p in PROMPTS], 1, 20, tokenizer.eos, tokenizer.pad,
                  torch.Generator().manual_seed(0), 0.)
    assert 0 < ours.finished.sum() < 8
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
    for text in adversarial(8, 1_000):
        if EOS not in text and PAD not in text:
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


def test_import_writes_a_first_stage_of_lineage(saved, tmp_path):
    """No history is made up: nothing was trained here. sample.py shows the stage."""
    path, _ = saved(context=128)
    convert.export_folder(path, tmp_path / "out")
    convert.import_folder(str(tmp_path / "out"), tmp_path / "deep/er/again.pt")
    [stage] = load_model(tmp_path / "deep/er/again.pt")[2]
    assert stage == {"script": "convert.py import", "tokens": 0, "updates": 0, "flops": 0, "seconds": 0.0,
                     "parent": None, "config": {"source": str(tmp_path / "out"), "revision": "",
                                                "dtype": "float32", "seed": 0}}
    done = worlds.run_here("sample.py", tmp_path / "deep/er/again.pt", "--threads", "1", stdin="ab\n")
    assert done.status == 0 and "convert.py import: 0 tokens" in done.out


def test_command_line(saved, tmp_path):
    """Both directions as a user types them, --dtype included; a wrong command is explained."""
    path, _ = saved()
    out, again = tmp_path / "out", tmp_path / "again.pt"
    assert worlds.run_here("beyond/convert.py", "export", path, out).status == 0
    assert worlds.run_here("beyond/convert.py", "import", out, again, "--dtype", "bf16").status == 0
    assert load_checkpoint(again)["model"]["head.weight"].dtype == torch.bfloat16
    assert {p.name for p in out.iterdir()} == FILES
    for argv in (["export", path], ["exprot", path, out], ["export", path, out, "--list-revisions"], [],
                 ["import", out, again, "--dtype", "fp16"], ["import", out, again, "--list-revisions"]):
        done = worlds.run_here("beyond/convert.py", *argv)
        assert done.status == 2 and len(done.errors) == 1, argv


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
    return SimpleNamespace(folder=folder, model=model, n_vocab=n + 6, n=n)


def test_published_layout_comes_in(published, tmp_path):
    """Sharded, bf16; the logits are transformers', the ids tokenizers'. Stored as fp32 if not told
    otherwise."""
    assert len(list(published.folder.glob("*.safetensors"))) > 2
    assert not (published.folder / "model.safetensors").exists()
    convert.import_folder(published.folder, tmp_path / "ours.pt")
    model, tokenizer, _ = load_model(tmp_path / "ours.pt")
    assert {w.dtype for w in load_checkpoint(tmp_path / "ours.pt")["model"].values()} == {torch.float32}
    assert (model.config.vocab_size, model.config.n_vocab) == (640, published.n_vocab)
    assert (tokenizer.eos, tokenizer.pad) == (published.n + 1, published.n + 5)
    assert tokenizer.encode("!") == [0]                                  # not 33
    ids = torch.randint(published.n_vocab, (2, 64))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(published.folder, dtype=torch.float32)
    with torch.no_grad():
        logits, ours = theirs(ids).logits[..., :published.n_vocab], model(ids)
    assert ours.std() > .5
    torch.testing.assert_close(logits, ours, atol=1e-5, rtol=1e-5)
    published_tokenizer = tokenizers.Tokenizer.from_file(str(published.folder / "tokenizer.json"))
    published_tokenizer.encode_special_tokens = True
    for text in adversarial(9, 1_000):
        if not any(x in text for x in ("<|extra_id_0|>", "|||PHONE_NUMBER|||")):
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
    for text in adversarial(10, 1_000):
        if not any(x in text for x in ours.spec["special"]):
            assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs(f"2025{EOS}")["input_ids"] == [*ours.encode("2025"), ours.eos]


def fake_cache(published, root: Path, branch: str) -> str:
    """The model in huggingface_hub's cache, as after a download; returns the commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = root / "models--someone--tiny"
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / branch).write_text(commit)
    for file in published.folder.iterdir():
        (repo / "snapshots" / commit / file.name).write_bytes(file.read_bytes())
    return commit


def test_revision_of_the_hub_is_imported(published, tmp_path, monkeypatch):
    """owner/name@branch from huggingface_hub's cache, without a network; the lineage names the commit. What
    is not in the cache is one line, which says that this may be for want of a network."""
    hub = pytest.importorskip("huggingface_hub")
    commit = fake_cache(published, tmp_path / "hub", "stage1-step10000-tokens21B")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    name = "someone/tiny@stage1-step10000-tokens21B"
    done = worlds.run_here("beyond/convert.py", "import", name, tmp_path / "ours.pt")
    assert done.status == 0, done.errors
    [stage] = load_model(tmp_path / "ours.pt")[2]
    assert (stage["config"]["source"], stage["config"]["revision"]) == (name, commit)
    for argv in (["someone/tiny@other", tmp_path / "no.pt"], ["someone/tiny", "--list-revisions"],
                 ["someone/other", tmp_path / "no.pt"], ["some one/tiny", tmp_path / "no.pt"]):
        done = worlds.run_here("beyond/convert.py", "import", *argv)
        assert done.status == 2 and len(done.errors) == 1 and "offline" in done.errors[0]
        assert argv[0] in done.errors[0]
    assert not (tmp_path / "no.pt").exists()


def test_revisions_are_listed(monkeypatch, capsys):
    """Names of intermediate checkpoints are listed, never computed."""
    hub = pytest.importorskip("huggingface_hub")
    refs = SimpleNamespace(branches=[SimpleNamespace(name="main", target_commit="a" * 40),
                                     SimpleNamespace(name="stage1-step0-tokens0B", target_commit="b" * 40)],
                           tags=[SimpleNamespace(name="v1", target_commit="c" * 40)])
    asked = []
    monkeypatch.setattr(hub, "list_repo_refs", lambda name: asked.append(name) or refs)
    convert.convert(convert.Config(("import", "someone/tiny@main"), list_revisions=True))
    assert asked == ["someone/tiny"]
    assert capsys.readouterr().out.splitlines() == ["aaaaaaaa  main", "bbbbbbbb  stage1-step0-tokens0B",
                                                    "cccccccc  v1"]


# ---- refusals --------------------------------------------------------------------------------------------

def change(folder: Path, name: str, **changes) -> None:
    content = json.loads((folder / name).read_text())
    for key, value in changes.items():
        content.pop(key, None) if value is ... else content.update({key: value})
    (folder / name).write_text(json.dumps(content))


def change_tokenizer(folder: Path, edit) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    edit(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))


def change_weights(folder: Path, edit) -> None:
    weights = safetensors_torch.load_file(folder / "model.safetensors")
    edit(weights)
    safetensors_torch.save_file(weights, folder / "model.safetensors")


def swap_merges(t: dict) -> None:
    t["model"]["merges"][0], t["model"]["merges"][1] = t["model"]["merges"][1], t["model"]["merges"][0]


Q, K = (f"model.layers.1.self_attn.{x}_proj.weight" for x in "qk")
REFUSED = {
    "architecture": (lambda f: change(f, "config.json", model_type="llama"), "model_type"),
    "olmo3": (lambda f: change(f, "config.json", model_type="olmo3"), "olmo3"),
    "grouped": (lambda f: change(f, "config.json", num_key_value_heads=1), "do not fit"),
    "odd groups": (lambda f: change(f, "config.json", num_key_value_heads=3), "must divide"),
    "text groups": (lambda f: change(f, "config.json", num_key_value_heads="2"), "num_key_value_heads"),
    "eps": (lambda f: change(f, "config.json", rms_norm_eps=1e-5), "rms_norm_eps"),
    "eps default": (lambda f: change(f, "config.json", rms_norm_eps=...), "rms_norm_eps"),   # theirs is 1e-5
    "tied": (lambda f: change(f, "config.json", tie_word_embeddings=True), "tie_word_embeddings"),
    "activation": (lambda f: change(f, "config.json", hidden_act="gelu"), "hidden_act"),
    "biases": (lambda f: change(f, "config.json", attention_bias=True), "attention_bias"),
    "two thetas": (lambda f: change(f, "config.json", rope_theta=1.0), "rope_theta"),
    "no theta": (lambda f: change(f, "config.json", rope_theta=..., rope_parameters=...), "rope_theta"),
    "scaled": (lambda f: change(f, "config.json", rope_parameters={"rope_theta": 1e4, "rope_type": "yarn"}),
               "scaling"),
    "scaled 4": (lambda f: change(f, "config.json", rope_scaling={"type": "linear"}), "rope_scaling"),
    "odd rope": (lambda f: change(f, "config.json", rope_parameters=[1]), "rope_theta"),
    "no width": (lambda f: change(f, "config.json", hidden_size=...), "hidden_size"),
    "text width": (lambda f: change(f, "config.json", hidden_size="32"), "hidden_size"),
    "no layers": (lambda f: change(f, "config.json", num_hidden_layers=0), "num_hidden_layers"),
    "heads": (lambda f: change(f, "config.json", num_attention_heads=3, num_key_value_heads=3), "3 heads"),
    "few rows": (lambda f: change(f, "config.json", vocab_size=299), "vocab_size"),
    "other rows": (lambda f: change(f, "config.json", vocab_size=301), "do not fit"),
    "more layers": (lambda f: change(f, "config.json", num_hidden_layers=3), "do not fit"),
    "fewer layers": (lambda f: change(f, "config.json", num_hidden_layers=1), "do not fit"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "truncated"),
    "array config": (lambda f: (f / "config.json").write_text("[1]"), "JSON object"),
    "bytes config": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\0"), "config.json"),
    "deep tokenizer": (lambda f: (f / "tokenizer.json").write_text("[" * 100_000), "tokenizer.json"),
    "no special": (lambda f: change(f, "tokenizer.json", added_tokens=[]), "tokenizer.json"),
    "normalizer": (lambda f: change(f, "tokenizer.json", normalizer={"type": "NFC"}), "normalizer"),
    "wordpiece": (lambda f: change(f, "tokenizer.json", model={"type": "WordPiece", "vocab": {}}),
                  "tokenizer.json"),
    "gpt2 splitting": (lambda f: change(f, "tokenizer.json", pre_tokenizer={
        "type": "ByteLevel", "add_prefix_space": False, "use_regex": True}), "tokenizer.json"),
    "merges": (lambda f: change_tokenizer(f, swap_merges), "ids"),
    "gap in the ids": (lambda f: change_tokenizer(f, lambda t: t["added_tokens"][1].update(id=400)), "ids"),
    "prefix": (lambda f: change_tokenizer(
        f, lambda t: t["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True)), "splitting"),
    "shape": (lambda f: change_weights(f, lambda w: w.update({Q: torch.zeros(31, 32)})), "do not fit"),
    "shapes that add up": (lambda f: change_weights(
        f, lambda w: w.update({Q: torch.zeros(40, 32), K: torch.zeros(24, 32)})), "do not fit"),
    "missing tensor": (lambda f: change_weights(f, lambda w: w.pop(Q)), Q),
    "extra tensor": (lambda f: change_weights(f, lambda w: w.update({"score.bias": torch.zeros(1)})),
                     "score.bias"),
    "fp16": (lambda f: change_weights(f, lambda w: w.update({Q: w[Q].half()})), "float16"),
    "nan": (lambda f: change_weights(f, lambda w: w[Q].fill_(math.nan)), "finite"),
    "truncated": (lambda f: (f / "model.safetensors").write_bytes(
        (f / "model.safetensors").read_bytes()[:-7]), "truncated"),
    "not weights": (lambda f: (f / "model.safetensors").write_text("weights, honestly"), "safetensors file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_import_refuses_in_one_line_and_writes_nothing(saved, tmp_path, case):
    """A clear refusal that names the file or folder and what is wrong."""
    path, _ = saved(d_ff=48)
    folder = convert.export_folder(path, tmp_path / "out")
    edit, said = REFUSED[case]
    edit(folder)
    (tmp_path / "there.pt").write_text("an earlier file")
    before = worlds.snapshot(tmp_path)
    done = worlds.run_here("beyond/convert.py", "import", folder, tmp_path / "there.pt")
    assert done.status == 2 and len(done.errors) == 1
    assert str(folder) in done.errors[0] and said in done.errors[0]
    assert worlds.snapshot(tmp_path) == before


def test_missing_shard_is_named(published, tmp_path):
    """A download that broke off, and an index that is no index."""
    for file in published.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        convert.import_folder(tmp_path, tmp_path / "ours.pt")
    change(tmp_path, "model.safetensors.index.json", weight_map=...)
    with pytest.raises(UserError, match="weight_map"):
        convert.import_folder(tmp_path, tmp_path / "ours.pt")


def test_a_source_that_is_nothing_is_explained(tmp_path):
    for source in ("nowhere", "./no/where", "a/b/c@d"):
        with pytest.raises(UserError, match="no such folder, and no name of the hub"):
            convert.import_folder(source, tmp_path / "ours.pt")


def test_a_missing_package_is_one_line(saved, tmp_path, monkeypatch):
    """convert.py alone needs safetensors, and huggingface_hub for names of the hub alone."""
    path, _ = saved()
    for package in ("safetensors.torch", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match="pip install safetensors$"):
        convert.export_folder(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="pip install huggingface_hub$"):
        convert.import_folder("someone/tiny", tmp_path / "ours.pt")


# ---- nothing half-written --------------------------------------------------------------------------------

def test_export_does_not_touch_a_folder_with_other_files(saved, tmp_path):
    """A run folder has a config.json too: exporting into it must not replace that."""
    path, _ = saved()
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "log.jsonl").write_text("")
    before = worlds.snapshot(folder)
    with pytest.raises(UserError, match="log.jsonl"):
        convert.export_folder(path, folder)
    assert worlds.snapshot(folder) == before


@pytest.mark.parametrize("stop", range(5))
def test_interrupted_export_does_not_open(saved, tmp_path, monkeypatch, stop):
    """Over an earlier export of another model: whichever file was the last to be written, the folder has no
    config.json, so nothing opens it as a mixture; the next call makes it whole, and removes litter."""
    other, _ = saved(name="other.pt", seed=5)
    path, _ = saved(seed=6)
    folder = convert.export_folder(other, tmp_path / "out")
    write, count = convert.atomic_write, []

    def failing(target: Path, data: bytes) -> None:
        if len(count) == stop:
            (folder / f".{target.name}.abc").write_text("half")          # as a kill leaves it
            raise KeyboardInterrupt
        count.append(target)
        write(target, data)
    monkeypatch.setattr(convert, "atomic_write", failing)
    with pytest.raises(KeyboardInterrupt):
        convert.export_folder(path, folder)
    with pytest.raises((OSError, ValueError), match="config.json"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    monkeypatch.setattr(convert, "atomic_write", write)
    convert.export_folder(path, folder)
    convert.export_folder(path, tmp_path / "fresh")
    assert worlds.snapshot(folder) == worlds.snapshot(tmp_path / "fresh")


# ---- lm-evaluation-harness -------------------------------------------------------------------------------

@pytest.fixture
def harness(saved, tmp_path):
    """(our model, its tokenizer, the benchmarks, lm-evaluation-harness around the export of that model)."""
    models = pytest.importorskip("lm_eval.models.huggingface")
    tokenizer = Tokenizer.load(worlds.data() / "tokenizer.json")
    path, model = saved(tokenizer, context=128)
    folder = convert.export_folder(path, tmp_path / "out")
    theirs = models.HFLM(pretrained=transformers.AutoModelForCausalLM.from_pretrained(folder), device="cpu",
                         tokenizer=transformers.AutoTokenizer.from_pretrained(folder), batch_size=8)
    return model, tokenizer, worlds.lines(worlds.data() / "benchmarks.jsonl"), theirs


def test_scores_equal_those_of_lm_evaluation_harness(harness):
    """Log-likelihoods and greedy flags of our benchmarks' items, and from them acc and acc_norm, are the
    harness's for the exported model."""
    from lm_eval.api.instance import Instance
    model, tokenizer, items, theirs = harness
    rows = [(EOS + item["context"], choice) for item in items[::40] for choice in item["choices"]]
    wanted = theirs.loglikelihood([Instance("loglikelihood", {}, row, i) for i, row in enumerate(rows)],
                                  disable_tqdm=True)
    contexts = [[tokenizer.eos, *tokenizer.encode(text.removeprefix(EOS))] for text, _ in rows]
    sums, exact = score_rows(model, contexts, [tokenizer.encode(choice) for _, choice in rows], tokenizer.pad)
    assert len(rows) > 50
    assert sums == pytest.approx([score for score, _ in wanted], abs=1e-3, rel=1e-5)
    assert exact == [greedy for _, greedy in wanted]


def test_accuracy_of_a_task_equals_that_of_lm_evaluation_harness(harness, tmp_path):
    """The same through a task of the harness: its acc and acc_norm are our measure_benchmarks'."""
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    model, tokenizer, items, theirs = harness
    items = [item for item in items if len(item["choices"]) > 2]
    name = items[0]["task"]
    items = [item for item in items if item["task"] == name][:60]
    assert all(choice.startswith(" ") for item in items for choice in item["choices"])
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    task = ConfigurableTask(config={
        "task": "ours", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.jsonl")},
                           "cache_dir": str(tmp_path / "cache")},
        "output_type": "multiple_choice", "doc_to_text": EOS + "{{context}}", "doc_to_target": "answer",
        "doc_to_choice": "{{choices | map('trim') | list}}", "target_delimiter": " ",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]})
    wanted = lm_eval.evaluate(lm=theirs, task_dict={"ours": task}, bootstrap_iters=0)["results"]["ours"]
    ours = measure_benchmarks(model, tokenizer, items)[name]
    assert 0 < ours["acc"] < 1
    assert wanted["acc,none"] == pytest.approx(ours["acc"])
    assert wanted["acc_norm,none"] == pytest.approx(ours["acc_norm"])
