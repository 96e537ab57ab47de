"""The table of docs/programs.md, made anew: `python docs/programs.py` (after `make peers`).

For each preset a small model with random weights is saved as training saves it. Each program loads that folder by its
own means, cuts a prompt into tokens and goes on greedily; what it writes is compared with `nanogpt-hub generate`.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from tqdm import tqdm

from nanogpt_hub.checkpoint import load_model, save_model
from nanogpt_hub.exporters.gguf import export_gguf
from nanogpt_hub.generate import generate_naive
from nanogpt_hub.model import GPT, PRESETS, GPTConfig
from nanogpt_hub.sampling import SamplingConfig
from nanogpt_hub.tokenizer import build_tokenizer

PAGE = Path(__file__).with_suffix(".md")
MARK = "<!-- made by docs/programs.py -->\n"
TEXT = "Once upon a time there was a small model that wanted to be read by every program.\n" * 20
PROMPT, NEW_TOKENS, STEPS = "Once upon a time", 40, 100
TOKENIZERS = ("char", "byte", "bpe:300")
Answer = tuple[list[int], list[int]]  # ids of the prompt, ids of what follows


def make_folder(folder: Path, preset: str, tokenizer: str) -> Path:
    """A small model that has learned `TEXT` by heart, so that rounding decides no token."""
    torch.manual_seed(0)
    made = build_tokenizer(tokenizer, [TEXT])
    model = GPT(GPTConfig.preset(preset, "1m", vocab_size=made.vocab_size, n_layer=2, n_embd=64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.tensor(made.encode(TEXT))
    for _ in range(STEPS):
        starts = torch.randint(len(ids) - 65, (16,))
        batch = torch.stack([ids[start : start + 65] for start in starts])
        _, loss = model(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return save_model(folder, model.eval(), made)


def ours(folder: Path) -> Answer:
    model, tokenizer = load_model(folder)
    ids = tokenizer.encode(PROMPT)
    return ids, generate_naive(model, ids, SamplingConfig(NEW_TOKENS, temperature=0.0))


def transformers(folder: Path) -> Answer:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(PROMPT).input_ids
    model = AutoModelForCausalLM.from_pretrained(folder)
    out = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False, max_new_tokens=NEW_TOKENS
    )
    return ids, out[0, len(ids) :].tolist()


def ctranslate2(folder: Path) -> Answer:
    import ctranslate2
    from transformers import AutoTokenizer

    converted = folder / "ctranslate2"
    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(converted), force=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT).input_ids
    found = ctranslate2.Generator(str(converted), intra_threads=1).generate_batch(
        [tokenizer.convert_ids_to_tokens(ids)], max_length=NEW_TOKENS, sampling_topk=1, include_prompt_in_result=False
    )
    return ids, found[0].sequences_ids[0]


def llama_cpp(folder: Path) -> Answer:
    """Through the file of `nanogpt-hub gguf`, from the text and from our ids of it: both must go on alike."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(export_gguf(folder, folder / "model.gguf"))
    params.n_ctx, params.n_parallel, params.fit_params, params.verbosity = 256, 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # the model is tiny
    server = xllamacpp.Server(params)
    request = {"prompt": PROMPT, "n_predict": NEW_TOKENS, "temperature": 0, "n_probs": 1, "cache_prompt": False}
    ids = load_model(folder)[1].encode(PROMPT)
    written = [
        [
            token["id"]
            for token in server.handle_completions({**request, "prompt": prompt})["choices"][0]["logprobs"]["content"]
        ]
        for prompt in (PROMPT, ids)
    ]
    return (ids if written[0] == written[1] else []), written[0]


PROGRAMS: dict[str, tuple[str, Callable[[Path], Answer]]] = {  # title -> package, what to call
    "Transformers": ("transformers", transformers),
    "CTranslate2, by its own converter": ("ctranslate2", ctranslate2),
    "llama.cpp, by `nanogpt-hub gguf`": ("xllamacpp", llama_cpp),
}


def reason_against(program: Callable[[Path], Answer], folder: Path, expected: Answer) -> str:
    """Empty, or why this program does not write what we do."""
    try:
        found = program(folder)
    except Exception as error:  # whatever another program says is the finding
        return " ".join(str(error).split()).partition(" (")[0] or type(error).__name__
    return "" if found == expected else "it writes something else"


def table() -> Iterator[str]:
    """Lines of Markdown; reasons stand below as notes."""
    notes: dict[str, int] = {}
    yield "| Preset | " + " | ".join(PROGRAMS) + " |"
    yield "|---|" + "---|" * len(PROGRAMS)
    for preset in tqdm(PRESETS, unit="preset"):
        cells = [[] for _ in PROGRAMS]
        for tokenizer in TOKENIZERS:
            with tempfile.TemporaryDirectory() as name:
                folder = make_folder(Path(name), preset, tokenizer)
                expected = ours(folder)
                for cell, (_, program) in zip(cells, PROGRAMS.values(), strict=True):
                    reason = reason_against(program, folder, expected)
                    cell.append(f"no ({notes.setdefault(reason, len(notes) + 1)})" if reason else "yes")
        yield f"| {preset} | " + " | ".join(summary(cell) for cell in cells) + " |"
    yield ""
    yield from (f"{number}. {reason}" for reason, number in notes.items())


def summary(answers: list[str]) -> str:
    """One word where all tokenizers agree."""
    if len(set(answers)) == 1:
        return answers[0]
    return ", ".join(f"{tokenizer} {answer}" for tokenizer, answer in zip(TOKENIZERS, answers, strict=True))


def main() -> None:
    packages = ["torch", *(package for package, _ in PROGRAMS.values())]
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    text = PAGE.read_text(encoding="utf-8")
    head, _, _ = text.partition(MARK)
    lines = [*table(), "", f"Made by `python docs/programs.py` with {versions}."]
    PAGE.write_text(head + MARK + "\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
