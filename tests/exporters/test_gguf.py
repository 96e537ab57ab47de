"""GGUF files: what is in them, computed and cut into tokens as llama.cpp does it, is what our model does."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import regex
import torch
import torch.nn.functional as F

from nanogpt_hub import cli
from nanogpt_hub.checkpoint import load_model, save_model
from nanogpt_hub.exporters.gguf import export_gguf
from nanogpt_hub.model import GPT, GPTConfig
from nanogpt_hub.tokenizer import LETTERS, build_tokenizer

gguf = pytest.importorskip("gguf")

TEXT = "To be, or not to be: naïve 日本 😀 is it?\nThe end, the end.\n" * 9
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # llama.cpp's "gpt-2"


def model_folder(folder: Path, preset: str, tokenizer: str = "bpe:300", **changes) -> Path:
    torch.manual_seed(1)
    made = build_tokenizer(tokenizer, [TEXT])
    size = dict(vocab_size=made.vocab_size + 3, n_layer=2, n_head=4, n_embd=64, block_size=32)
    model = GPT(GPTConfig.preset(preset, "1m", **{**size, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return save_model(folder, model, made)


class File:
    """A GGUF file as llama.cpp sees it."""

    def __init__(self, path: Path):
        reader = gguf.GGUFReader(path)
        self.tensors = {
            t.name: torch.from_numpy(np.array(gguf.quants.dequantize(t.data, t.tensor_type))) for t in reader.tensors
        }
        self.facts = {name.partition(".")[2]: field.contents() for name, field in reader.fields.items()}
        self.arch = reader.fields["general.architecture"].contents()

    def linear(self, x, name: str):
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def norm(self, x, name: str):
        weight, bias = self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")
        if self.arch == "llama":
            return F.rms_norm(x, x.shape[-1:], weight, self.facts["attention.layer_norm_rms_epsilon"])
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.facts["attention.layer_norm_epsilon"])

    def rope(self, x):
        """x (T, heads, D). llama turns neighbours, gptneox the halves."""
        if "rope.dimension_count" not in self.facts:
            return x
        n = self.facts["rope.dimension_count"]
        angle = torch.arange(len(x))[:, None] / self.facts["rope.freq_base"] ** (torch.arange(0, n, 2) / n)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        part = x[..., :n]
        a, b = (part[..., 0::2], part[..., 1::2]) if self.arch == "llama" else part.chunk(2, dim=-1)
        turned = (a * cos - b * sin, a * sin + b * cos)
        turned = torch.stack(turned, dim=-1).flatten(-2) if self.arch == "llama" else torch.cat(turned, dim=-1)
        return torch.cat((turned, x[..., n:]), dim=-1)

    def attention(self, x, block: str):
        H, G = self.facts["attention.head_count"], self.facts["attention.head_count_kv"]
        D = x.shape[-1] // H
        if self.arch == "llama":
            q, k, v = (self.linear(x, f"{block}.attn_{letter}") for letter in "qkv")
        else:
            q, k, v = self.linear(x, f"{block}.attn_qkv").split((H * D, G * D, G * D), dim=-1)
        q, k, v = (part.unflatten(-1, (-1, D)) for part in (q, k, v))
        q, k, v = (part.transpose(0, 1) for part in (self.rope(q), self.rope(k), v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.linear(y.transpose(0, 1).flatten(1), f"{block}.attn_output")

    def feed_forward(self, x, block: str):
        if "expert_count" in self.facts:
            return torch.stack([self.experts(token, block) for token in x])
        up = self.linear(x, f"{block}.ffn_up")
        if self.arch == "llama":
            inner = F.silu(self.linear(x, f"{block}.ffn_gate")) * up
        else:
            inner = F.gelu(up, approximate="tanh")
        return self.linear(inner, f"{block}.ffn_down")

    def experts(self, x, block: str):
        """The weighted mean of the experts that one token x (C,) takes."""
        probs, chosen = self.linear(x, f"{block}.ffn_gate_inp").softmax(-1).topk(self.facts["expert_used_count"])
        up, gate, down = (self.tensors[f"{block}.ffn_{name}_exps.weight"][chosen] for name in ("up", "gate", "down"))
        inner = F.silu(gate @ x) * (up @ x)  # (k, F)
        return ((probs / probs.sum())[:, None] * (down @ inner[..., None])[..., 0]).sum(0)

    def logits(self, ids: list[int]):
        x = self.tensors["token_embd.weight"][ids]
        if self.arch == "gpt2":
            x = x + self.tensors["position_embd.weight"][: len(ids)]
        for layer in range(self.facts["block_count"]):
            block = f"blk.{layer}"
            attended = self.attention(self.norm(x, f"{block}.attn_norm"), block)
            if self.facts.get("use_parallel_residual"):
                x = x + attended + self.feed_forward(self.norm(x, f"{block}.ffn_norm"), block)
            else:
                x = x + attended
                x = x + self.feed_forward(self.norm(x, f"{block}.ffn_norm"), block)
        head = self.tensors.get("output.weight", self.tensors["token_embd.weight"])
        return F.linear(self.norm(x, "output_norm"), head)

    def tokenize(self, text: str) -> list[int]:
        """llama.cpp's BPE: the pair of the earliest merge first; what is no token then, sign by sign, else dropped."""
        ids = {token: i for i, token in enumerate(self.facts["ggml.tokens"])}
        ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(self.facts["ggml.merges"])}
        found = []
        for word in regex.findall(PATTERN, text):
            parts = [LETTERS[byte] for byte in word.encode()]
            while pairs := [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(parts)) if pair in ranks]:
                _, i = min(pairs)
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            for part in parts:
                found += [ids[part]] if part in ids else [ids[sign] for sign in part if sign.isascii() and sign in ids]
        return found


SHAPES = [
    ("gpt2", {}), ("gpt2", {"attn_bias": False, "mlp_bias": False, "norm_bias": False}), ("nanogpt", {}),
    ("nanogpt", {"norm_weight": False, "norm_bias": False, "mlp_bias": False}), ("pythia", {}), ("llama", {}),
    ("llama", {"n_kv_head": 2, "tie_word_embeddings": True, "attn_bias": True}), ("mixtral", {"n_inner": 96}),
]  # fmt: skip


@pytest.mark.parametrize(("preset", "changes"), SHAPES)
def test_the_file_computes_what_the_model_does(tmp_path, preset, changes):
    folder = model_folder(tmp_path / "model", preset, **changes)
    model, tokenizer = load_model(folder)
    found = File(export_gguf(folder, tmp_path / "model.gguf"))
    ids = tokenizer.encode(TEXT)[:32]
    with torch.inference_mode():
        ours = model(torch.tensor([ids]))[0][0]
        theirs = found.logits(ids)
    assert theirs.shape == ours.shape
    allowed = 3e-2 if preset in ("nanogpt", "pythia") else 1e-4  # llama.cpp has the tanh approximation of gelu alone
    assert (theirs - ours).abs().max() < allowed * ours.abs().max()


@pytest.mark.parametrize("kind", ["char", "byte", "bpe:300"])
def test_the_file_cuts_text_as_the_tokenizer_does(tmp_path, kind):
    folder = model_folder(tmp_path / "model", "gpt2", kind)
    _, tokenizer = load_model(folder)
    found = File(export_gguf(folder, tmp_path / "model.gguf"))
    for text in (TEXT, "~`~ ``", "日本\n\n  😀", "e"):
        if kind != "char" or set(text) <= set(TEXT):
            assert found.tokenize(text) == tokenizer.encode(text)
    assert found.facts["ggml.eos_token_id"] == tokenizer.eot_id
    assert len(found.facts["ggml.tokens"]) == tokenizer.vocab_size + 3


def test_the_command_and_smaller_kinds(tmp_path, capsys):
    folder = model_folder(tmp_path / "model", "mixtral")
    sizes = []
    for kind in ("f32", "f16", "q8_0"):
        out = tmp_path / f"{kind}.gguf"
        assert cli.main(["gguf", str(folder), str(out), "--type", kind]) == 0
        assert capsys.readouterr().out.startswith(str(out))
        sizes.append(out.stat().st_size)
    assert sizes[0] > sizes[1] > sizes[2]
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_what_llama_cpp_does_not_have_is_refused(tmp_path, capsys):
    assert cli.main(["gguf", str(model_folder(tmp_path / "nano", "nanochat")), str(tmp_path / "x.gguf")]) == 2
    assert "llama.cpp has no nanochat" in capsys.readouterr().err
    assert cli.main(["gguf", str(model_folder(tmp_path / "odd", "gpt2", activation="relu2")), "x.gguf"]) == 2
    assert "relu2" in capsys.readouterr().err
    assert not (tmp_path / "x.gguf").exists()
