"""What several test files use: tiny models in folders, texts that try to break out, the variants of the core."""

import importlib.util
import json
import os
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

import torch

from nanogpt_hub.chat import PLAIN
from nanogpt_hub.checkpoint import save_model
from nanogpt_hub.model import GPT, PRESETS, GPTConfig
from nanogpt_hub.tokenizer import Tokenizer, build_tokenizer

ROOT = Path(__file__).parents[1]
HOSTILE = "<img src=x onerror=alert(1)>${alert(2)}{{alert(3)}}</script>"
TEXT = "To be, or not to be: that is the question.\n" + HOSTILE
# Presets and overrides that together take every way through the core; DENSE is what the fast decoders know.
DENSE = [*((name, {}) for name in PRESETS if name != "mixtral"), ("llama", {"n_kv_head": 2}),
         ("nanochat", {"rotary_fraction": 0.5}), ("nanochat", {"n_kv_head": 1, "norm_weight": True}),
         ("gpt2", {"embd_norm": True})]  # fmt: skip
VARIANTS = [*DENSE, ("mixtral", {}), ("gpt2", {"n_expert": 3, "n_expert_per_tok": 1})]


def make_model(folder: Path, seed: int = 0, text: str = TEXT, **config) -> Path:
    """The folder of a tiny random model of characters that never ends a text."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer("char", [text])
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=16, block_size=32, **config))
    with torch.no_grad():  # the logit of end-of-text is -160
        model.ln_f.bias.fill_(1.0)
        model.wte.weight[tokenizer.eot_id] = -10.0
    return save_model(folder, model, tokenizer)


def make_gpt(name: str = "nanogpt", **overrides) -> GPT:
    """A tiny random model, of large weights so that differences show."""
    torch.manual_seed(0)
    shape = dict(n_layer=3, n_head=4, n_embd=96, n_inner=75, block_size=48, vocab_size=51)
    model = GPT(GPTConfig.preset(name, **{**shape, **overrides}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.eval()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def own_package(**settings: str) -> dict[str, str]:
    """The environment of a process that takes the packages of this checkout, and one thread."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **settings}


def import_app() -> ModuleType:
    spec = importlib.util.spec_from_file_location("app", ROOT / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def chat_tokenizer(template: str, special: Sequence[str] = ()) -> Tokenizer:
    """A byte tokenizer with a chat template, and more special tokens behind end-of-text."""
    tokenizer = build_tokenizer("byte", [])
    data = json.loads(tokenizer._json)
    end = data["added_tokens"][-1]
    data["added_tokens"] += [{**end, "id": tokenizer.eot_id + 1 + n, "content": text} for n, text in enumerate(special)]
    return Tokenizer(json.dumps(data), {**tokenizer.config, "chat_template": template})


def make_chat_model(folder: Path, seed: int = 0) -> Path:
    """The folder of a tiny random model of bytes with the plain chat template. Its answers never end by themselves."""
    torch.manual_seed(seed)
    tokenizer = chat_tokenizer(PLAIN)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=16, block_size=192))
    with torch.no_grad():  # letters are drawn, end-of-text has a logit of -160
        model.ln_f.bias.fill_(1.0)
        model.wte.weight[:] *= 0.3
        model.wte.weight[97:123] += 0.5
        model.wte.weight[tokenizer.eot_id] = -10.0
    return save_model(folder, model, tokenizer)


def nanogpt_tensors(args: dict) -> dict[str, torch.Tensor]:
    """Random weights by nanoGPT's names, each matrix (out, in), the head the same tensor as the embedding."""
    generator = torch.Generator().manual_seed(1)
    C = args["n_embd"]
    shapes = {"transformer.wte": (args["vocab_size"], C), "transformer.wpe": (args["block_size"], C)}
    for i in range(args["n_layer"]):
        shapes |= {f"transformer.h.{i}.ln_1": (C,), f"transformer.h.{i}.attn.c_attn": (3 * C, C),
                   f"transformer.h.{i}.attn.c_proj": (C, C), f"transformer.h.{i}.ln_2": (C,),
                   f"transformer.h.{i}.mlp.c_fc": (4 * C, C), f"transformer.h.{i}.mlp.c_proj": (C, 4 * C)}  # fmt: skip
    shapes["transformer.ln_f"] = (C,)
    tensors = {}
    for name, shape in shapes.items():
        tensors[f"{name}.weight"] = torch.randn(shape, generator=generator) * 0.3
        if args["bias"] and not name.endswith(("wte", "wpe")):
            tensors[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.3
    return {**tensors, "lm_head.weight": tensors["transformer.wte.weight"]}


def write_nanogpt(folder: Path, args: dict, characters: Iterable[str], **changes) -> tuple[Path, Path]:
    """The ckpt.pt and meta.pkl that nanoGPT leaves, with random weights; `changes` go into the checkpoint."""
    content = dict(
        model=nanogpt_tensors(args), optimizer={"state": {}, "param_groups": []}, model_args=args, iter_num=2000,
        best_val_loss=torch.tensor(1.5), config={},
    )  # fmt: skip
    torch.save({**content, **changes}, folder / "ckpt.pt")
    itos = dict(enumerate(characters))
    meta = {"vocab_size": len(itos), "itos": itos, "stoi": {c: i for i, c in itos.items()}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder / "ckpt.pt", folder / "meta.pkl"
