"""Tokenizers of others: Hugging Face's tokenizer.json, both ways.

A spec is what Tokenizer takes (data/tokenizer.py). Left out: tokenizers that are not byte-level BPE.
"""
import json
from pathlib import Path

from checkpoint import UserError, load_checkpoint
from data.tokenizer import EOS, PAD, Tokenizer

HIDDEN = [b for b in range(256) if b == 32 or not chr(b).isprintable()]
# byte -> the letter for it in tokenizer.json (GPT-2): itself if that can be seen, else one beyond Latin-1
LETTERS = [chr(256 + HIDDEN.index(b) if b in HIDDEN else b) for b in range(256)]


def to_huggingface(spec: dict) -> dict:
    """A spec as tokenizer.json. Special tokens stand in its vocabulary too, which fixes their ids."""
    tokens = [LETTERS[b] for b in spec.get("bytes", range(256))]
    merges = []
    for left, right in spec["merges"]:
        merges.append([tokens[left], tokens[right]])
        tokens.append(tokens[left] + tokens[right])
    special = spec.get("special", {EOS: len(tokens), PAD: len(tokens) + 1})
    vocab = {token: i for i, token in enumerate(tokens)} | special
    split = {"type": "Split", "pattern": {"Regex": spec["pattern"]}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
            "added_tokens": [{"id": i, "content": token, **added} for token, i in special.items()],
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}, "decoder": level,
            "model": {"type": "BPE", "vocab": vocab, "merges": merges}}


def from_huggingface(content: dict) -> dict:
    """The spec of a tokenizer.json in which merge i makes token 256+i, as in OLMo-2's and in ours. ValueError
    (or whatever a failed lookup raises) for any other kind: text would be split into other tokens."""
    split, level = content["pre_tokenizer"]["pretokenizers"]
    if (split["behavior"], split["invert"]) == ("Removed", True):
        split = split | {"behavior": "Isolated", "invert": False}        # the same, as the pattern covers all
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    vocab = content["model"]["vocab"] | special
    tokens = sorted(vocab, key=vocab.get)
    pairs = [x.split(" ") if isinstance(x, str) else x for x in content["model"]["merges"]]
    spec = {"pattern": split["pattern"]["Regex"], "merges": [[vocab[a], vocab[b]] for a, b in pairs],
            "bytes": [LETTERS.index(token) for token in tokens[:256]], "special": special}
    again = to_huggingface(spec)
    if again["model"]["vocab"] != vocab or sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError("ids are not those of the bytes, then the merges, then the special tokens")
    if again["pre_tokenizer"]["pretokenizers"] != [split, level] or content["normalizer"] is not None:
        raise ValueError("another normalizer or another splitting")
    n = 256 + len(pairs)
    ours = {"bytes": list(range(256)), "special": {EOS: n, PAD: n + 1}}          # which our own leave unsaid
    return {key: value for key, value in spec.items() if value != ours.get(key)}


def open_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a checkpoint (.pt) or of a tokenizer.json, ours or one such as OLMo-2's."""
    try:
        if path.endswith(".pt"):
            return Tokenizer(load_checkpoint(path)["tokenizer"])
        spec = json.loads(Path(path).read_bytes())
        return Tokenizer(from_huggingface(spec) if "model" in spec else spec)
    except Exception as error:                   # anything that a foreign file may raise
        raise UserError(f"--tokenizer {path}: no checkpoint (.pt) and no tokenizer.json of a byte-level BPE "
                        f"({type(error).__name__}: {error})"[:400]) from None
