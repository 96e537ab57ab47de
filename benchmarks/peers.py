"""How we and the others are made to do the same work: each a class whose objects are called with prompts and the number
of new tokens for each, from the same folder.

nanoGPT comes from the user's own checkout; transformers, ctranslate2 and xllamacpp (which is llama.cpp) from `make
peers`. What is not there is left out of the tables.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nanogpt_hub.checkpoint import load_model, save_model
from nanogpt_hub.engine.int8 import quantize_int8
from nanogpt_hub.engine.select import preparation
from nanogpt_hub.exporters.gguf import export_gguf
from nanogpt_hub.generate import stream_tokens
from nanogpt_hub.model import GPT, GPTConfig
from nanogpt_hub.sampling import SamplingConfig
from nanogpt_hub.tokenizer import build_tokenizer

TEMPERATURE, TOP_K = 0.8, 200  # those of nanoGPT's sample.py, for everyone
Prompts = list[list[int]]  # token ids; those of a batch are equally long


def installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in packages)


def nanogpt_module(checkout: Path) -> Any:
    """nanoGPT's model.py, from the user's own checkout."""
    path = checkout / "model.py"
    if not path.is_file():
        sys.exit(f"--nanogpt {checkout}: there is no model.py; give the folder of a nanoGPT checkout")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = sys.modules["nanogpt_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_folder(folder: Path, **shape: int) -> Path:
    """A model folder with random weights, GPT-2's architecture and a tokenizer of as few or fewer tokens."""
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset("gpt2", **shape))
    letters = "".join(chr(ord("0") + i) for i in range(model.config.vocab_size - 1))
    tokenizer = build_tokenizer("byte", []) if model.config.vocab_size > 256 else build_tokenizer("char", [letters])
    return save_model(folder, model, tokenizer)


class Ours:
    """This project, in float32 or 8 bits, by one of its engines."""

    def __init__(self, folder: Path, int8: bool = False, engine: str = "numba"):
        model, _ = load_model(folder)
        self.model, self.engine = quantize_int8(model) if int8 else model, engine
        if engine == "numba" and preparation.wait() is None:
            sys.exit("the compiled engine is not available here: python -m nanogpt_hub.engine.prepare says why")

    def __call__(self, prompts: Prompts, n: int) -> None:
        config = SamplingConfig(n, temperature=TEMPERATURE, top_k=TOP_K, seed=0)
        for _ in stream_tokens(self.model, None, prompts, config, engine=self.engine):
            pass


class NanoGPT:
    """generate() of its model.py, as its sample.py calls it."""

    def __init__(self, folder: Path, checkout: Path):
        module, config = nanogpt_module(checkout), load_model(folder)[0].config
        names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
        sizes = {name: getattr(config, name) for name in names}
        self.model = module.GPT(module.GPTConfig(**sizes, dropout=0.0, bias=False)).eval()

    @torch.no_grad()
    def __call__(self, prompts: Prompts, n: int) -> None:
        self.model.generate(torch.tensor(prompts), n, temperature=TEMPERATURE, top_k=TOP_K)


class Transformers:
    """generate() with its cache."""

    def __init__(self, folder: Path):
        import transformers

        transformers.logging.set_verbosity_error()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()

    def __call__(self, prompts: Prompts, n: int) -> None:
        idx = torch.tensor(prompts)
        self.model.generate(
            idx, attention_mask=torch.ones_like(idx), max_new_tokens=n, min_new_tokens=n, do_sample=True,
            temperature=TEMPERATURE, top_k=TOP_K, pad_token_id=0,
        )  # fmt: skip


class CTranslate2:
    """generate_batch() of the same weights, converted by its own converter."""

    def __init__(self, folder: Path, compute_type: str, threads: int):
        import ctranslate2

        converted = folder / f"ctranslate2-{compute_type}"
        spec = self._spec(ctranslate2, folder)
        if compute_type != "float32":
            spec.optimize(quantization=compute_type)
        converted.mkdir(exist_ok=True)
        spec.save(str(converted))
        self.model = ctranslate2.Generator(
            str(converted), device="cpu", compute_type=compute_type, inter_threads=1, intra_threads=threads
        )

    @staticmethod
    def _spec(ctranslate2: Any, folder: Path) -> Any:
        """The model as CTranslate2 describes it. Its converter asks for a tokenizer, of which only the names count."""
        import transformers
        from ctranslate2.converters.transformers import GPT2Loader

        loader, model = GPT2Loader(), transformers.AutoModelForCausalLM.from_pretrained(folder)
        spec = loader.get_model_spec(model)
        spec.register_vocabulary([str(id) for id in range(model.config.vocab_size)])
        spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
        spec.validate()
        return spec

    def __call__(self, prompts: Prompts, n: int) -> None:
        names = [[str(id) for id in prompt] for prompt in prompts]
        self.model.generate_batch(
            names, max_length=n, min_length=n, sampling_topk=TOP_K, sampling_temperature=TEMPERATURE,
            include_prompt_in_result=False,
        )  # fmt: skip


class LlamaCpp:
    """The same weights as a GGUF file, f32 or q8_0, behind llama.cpp's own server, called in its process."""

    def __init__(self, folder: Path, kind: str, threads: int):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(export_gguf(folder, folder / f"model-{kind}.gguf", kind))
        params.n_ctx = params.n_batch = params.n_ubatch = 1024
        params.n_parallel = 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.no_extra_bufts = True  # its AMX kernels have ended the process on a machine with AMX
        params.warmup = params.cache_prompt = params.fit_params = False
        params.verbosity = 0
        self.server = xllamacpp.Server(params)

    def __call__(self, prompts: Prompts, n: int) -> None:
        settings = {"temperature": TEMPERATURE, "top_k": TOP_K, "samplers": ["top_k", "temperature"]}
        for prompt in prompts:
            request = {"prompt": prompt, "n_predict": n, "ignore_eos": True, "cache_prompt": False, **settings}
            answer = self.server.handle_completions(request)
            if answer.get("tokens_predicted", answer.get("usage", {}).get("completion_tokens")) != n:
                raise RuntimeError(f"llama.cpp did not write {n} tokens: {str(answer)[:200]}")


def ways(folder: Path, nanogpt: Path | None, threads: int) -> dict[str, tuple[Callable, ...]]:
    """Everyone who can write from a folder with GPT-2's architecture here: a class and its arguments."""
    found: dict[str, tuple[Callable, ...]] = {
        "ours": (Ours, folder),
        "ours, int8": (Ours, folder, True),
        "ours by PyTorch": (Ours, folder, False, "torch"),
        "ours by PyTorch, int8": (Ours, folder, True, "torch"),
        "ours by model.py": (Ours, folder, False, "plain"),
    }
    if nanogpt:
        found["nanoGPT"] = (NanoGPT, folder, nanogpt)
    if installed("transformers"):
        found["transformers"] = (Transformers, folder)
    if installed("ctranslate2", "transformers"):
        found["CTranslate2"] = (CTranslate2, folder, "float32", threads)
        found["CTranslate2, int8"] = (CTranslate2, folder, "int8", threads)
    if installed("xllamacpp", "gguf"):
        found["llama.cpp, f32"] = (LlamaCpp, folder, "f32", threads)
        found["llama.cpp, q8_0"] = (LlamaCpp, folder, "q8_0", threads)
    return found


def counterpart(name: str) -> str:
    """Which of ours a program of `ways` is compared with: the one in 8 bits with those in 8 bits."""
    return "ours, int8" if name.endswith(("int8", "q8_0")) else "ours"
