"""A model folder as one GGUF file, which llama.cpp and the programs around it run.

    export_gguf("out/mine/best", "mine.gguf", kind="q8_0")

Families: gpt2, gpt_neox, llama and mixtral, whose computations llama.cpp has; nanochat's it has not. Tokenizers: char,
byte, bpe:N and gpt2. llama.cpp has no tokenizer of characters, but a byte-level BPE whose merges join the bytes of each
known character gives the same ids. Needs the package `gguf`.
"""

from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt_hub.checkpoint import clean_state, load_model, read_json
from nanogpt_hub.model import GPT, GPTConfig
from nanogpt_hub.system.files import replacing
from nanogpt_hub.tokenizer import LETTERS, Tokenizer

ARCHITECTURES = {"gpt2": "gpt2", "gpt_neox": "gptneox", "llama": "llama", "mixtral": "llama"}  # model_type -> theirs
KINDS = ("f32", "f16", "q8_0")  # of the matrices; norms and biases are always f32
NORMAL, CONTROL, UNUSED = 1, 3, 5  # types of tokens
NAMES = {
    "wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output", "ln_1": "attn_norm",
    "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up",
    "mlp.c_gate": "ffn_gate", "mlp.c_proj": "ffn_down", "mlp.router": "ffn_gate_inp", "mlp.experts.c_fc": "ffn_up_exps",
    "mlp.experts.c_gate": "ffn_gate_exps", "mlp.experts.c_proj": "ffn_down_exps",
}  # fmt: skip
FULL_PRECISION = ("position_embd.weight", "ffn_gate_inp.weight")  # a little error in a router sends a token elsewhere
# llama.cpp wants a list of merges that is not empty. This one does nothing: its result is no token, so that the two
# signs are looked up one by one again.
NO_MERGE = "~ `"


def export_gguf(folder: str | PathLike[str], out: str | Path, kind: str = "f32") -> Path:
    """Writes a model folder as a GGUF file and returns its path.

    kind: how matrices are stored, one of `KINDS`. Raises ValueError for a family or tokenizer that llama.cpp cannot
    run, CheckpointError for a folder that is no model, ImportError where the package gguf is missing.
    """
    folder, out = Path(folder), Path(out)
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; choose one of {', '.join(KINDS)}")
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"llama.cpp has no {model_type} as it is trained here; it runs {', '.join(ARCHITECTURES)}: train with "
            "--model.preset nanogpt, gpt2, pythia, llama or mixtral for it"
        )
    model, tokenizer = load_model(folder)
    if model.config.activation == "relu2":
        raise ValueError(f"llama.cpp has no {model_type} with the activation relu2; train with gelu for it")
    tokens, merges = vocabulary(tokenizer, model.config.vocab_size)
    assert tokenizer is not None  # `vocabulary` has checked it
    with replacing(out) as aside:
        write(aside, ARCHITECTURES[model_type], model, tokenizer, tokens, merges, kind)
    return out


def write(
    path: Path, arch: str, model: GPT, tokenizer: Tokenizer, tokens: list[str], merges: list[str], kind: str
) -> None:
    """The file itself: facts, vocabulary, tensors."""
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    for name, value in facts(arch, model.config, kind).items():
        getattr(writer, f"add_{name}")(value)
    types = [NORMAL] * len(tokens)
    types[tokenizer.vocab_size :] = [UNUSED] * (len(tokens) - tokenizer.vocab_size)
    if tokenizer.eot_id is not None:
        types[tokenizer.eot_id] = CONTROL
        writer.add_bos_token_id(tokenizer.eot_id)
        writer.add_eos_token_id(tokenizer.eot_id)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges or [NO_MERGE])
    writer.add_add_bos_token(False)
    for name, tensor in tensors(arch, model):
        data = tensor.detach().float().contiguous().numpy()
        matrix = data.ndim >= 2 and not name.endswith(FULL_PRECISION)
        stored = kind if matrix and (kind != "q8_0" or data.shape[-1] % 32 == 0) else "f32"
        quantized = gguf.GGMLQuantizationType[stored.upper()]
        writer.add_tensor(name, gguf.quants.quantize(data, quantized), raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def facts(arch: str, c: GPTConfig, kind: str) -> dict[str, Any]:
    """The shape, by the names of the writer's methods."""
    found: dict[str, Any] = {
        "file_type": {"f32": 0, "f16": 1, "q8_0": 7}[kind],
        "context_length": c.block_size, "embedding_length": c.n_embd, "block_count": c.n_layer,
        "feed_forward_length": c.ffn_width, "head_count": c.n_head, "head_count_kv": c.kv_heads,
        "vocab_size": c.vocab_size,
    }  # fmt: skip
    found["layer_norm_rms_eps" if arch == "llama" else "layer_norm_eps"] = c.norm_eps
    if c.position == "rotary":
        found |= {"rope_dimension_count": int(c.head_dim * c.rotary_fraction), "rope_freq_base": c.rope_theta}
    if c.n_expert:
        found |= {"expert_count": c.n_expert, "expert_used_count": c.n_expert_per_tok}
    if arch == "gptneox":
        found["parallel_residual"] = c.parallel_residual
    return found


# ---- tensors ---------------------------------------------------------------------------------------------------------


def tensors(arch: str, model: GPT) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) as llama.cpp has them: rows are outputs; what a family always has is filled in."""
    config, state = model.config, stacked_experts(model.config, clean_state(model))
    if config.tie_word_embeddings and arch != "gptneox":
        del state["lm_head.weight"]  # the others take the embedding where there is no head
    for module, layer in module_names(config, state):
        inside = f"h.{layer}.{module}" if layer is not None else module
        prefix = f"blk.{layer}." if layer is not None else ""
        for part in ("weight", "bias"):
            tensor = state.get(f"{inside}.{part}")
            if tensor is None:
                tensor = filled(arch, config, module, part, state)
            if tensor is None:
                continue
            if arch == "llama" and module == "attn.c_attn":
                for letter, rows in zip("qkv", split_heads(config, tensor), strict=True):
                    yield f"{prefix}attn_{letter}.{part}", rows
            else:
                yield f"{prefix}{NAMES[module]}.{part}", tensor


def stacked_experts(config: GPTConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state in which each kind of the experts' weights is one tensor (E, ...) of all experts of a layer, such as
    h.0.mlp.experts.c_fc.weight; that of a dense model as it is."""
    state = dict(state)
    for name in [name for name in state if ".mlp.experts.0." in name]:
        mlp, _, part = name.partition(".experts.0.")
        experts = [state.pop(f"{mlp}.experts.{e}.{part}") for e in range(config.n_expert)]
        state[f"{mlp}.experts.{part}"] = torch.stack(experts)
    return state


def module_names(config: GPTConfig, state: dict[str, Tensor]) -> Iterator[tuple[str, int | None]]:
    """Each module of the model that has parameters, or would have them in the family, and its layer."""
    for module in ("wte", "wpe", "ln_f", "lm_head"):
        if module == "ln_f" or f"{module}.weight" in state:
            yield module, None
    mlp = "mlp.experts" if config.n_expert else "mlp"
    inside = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", f"{mlp}.c_fc", f"{mlp}.c_proj"]
    inside += [f"{mlp}.c_gate"] if config.activation == "swiglu" else []
    inside += ["mlp.router"] if config.n_expert else []
    for layer in range(config.n_layer):
        yield from ((module, layer) for module in inside)


def filled(arch: str, config: GPTConfig, module: str, part: str, state: dict[str, Tensor]) -> Tensor | None:
    """What the family has and our config leaves out, without effect; None for what may be missing."""
    if module in ("wte", "wpe", "lm_head"):
        return None
    if module.startswith("ln_"):
        if part == "weight":
            return torch.ones(config.n_embd)
        return None if arch == "llama" else torch.zeros(config.n_embd)
    return None if arch == "llama" else torch.zeros(len(state[f"h.0.{module}.weight"]))


def split_heads(config: GPTConfig, tensor: Tensor) -> list[Tensor]:
    """Rows of q, k and v; those of q and k so that the two that turn together are neighbours, as llama's rotation here
    has them."""
    parts = tensor.split([n * config.head_dim for n in (config.n_head, config.kv_heads, config.kv_heads)])
    turned = [part.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2) for part in parts[:2]]
    return [*turned, parts[2]]


# ---- vocabulary ------------------------------------------------------------------------------------------------------


def vocabulary(tokenizer: Tokenizer | None, vocab_size: int) -> tuple[list[str], list[str]]:
    """The tokens spelled in byte letters, padded to the model's ids, and the merges that make them of bytes.

    Raises ValueError for a tokenizer that llama.cpp does not have.
    """
    if tokenizer is None or tokenizer.kind == "custom":
        raise ValueError(
            "this model has a tokenizer of another kind, or none: files for llama.cpp are made with char, byte, bpe:N "
            "and gpt2"
        )
    tokens = [f"[unused {i}]" for i in range(vocab_size)]
    for i in range(tokenizer.vocab_size):
        data = tokenizer.token_bytes(i)
        tokens[i] = tokenizer.token_str(i) if i == tokenizer.eot_id else "".join(LETTERS[byte] for byte in data)
    if tokenizer.kind != "char":
        return tokens, [" ".join(pair) for pair in tokenizer.merges]
    characters = [token for i, token in enumerate(tokens[: tokenizer.vocab_size]) if i != tokenizer.eot_id]
    joins = (f"{token[:i]} {token[i]}" for token in characters for i in range(1, len(token)))
    return tokens, [*dict.fromkeys(joins)]  # characters begin alike
