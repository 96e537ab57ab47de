"""The table of docs/scale.md, made anew: `python docs/plans.py`. All of it is computed by train/cost.py."""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from nanogpt_hub.system.readable import duration
from train.config import make_parser, parse
from train.cost import DEVICES, TOKENS_PER_PARAMETER, Cost, cost_of
from train.plan import ROOM

PAGE = Path(__file__).with_name("scale.md")
MARK = "<!-- made by docs/plans.py -->\n"
BATCH = 1024  # sequences a step
COMMON = ["--precision=bf16", "--activation_checkpointing=true", f"--batch_size={BATCH}", "--data.tokenizer=gpt2"]
LLAMA = ["--model.preset=llama", "--model.block_size=4096", "--model.n_kv_head=8"]
MODELS = {
    "124M": ["--model.preset=gpt2", "--model.size=124m"],
    "350M": ["--model.preset=gpt2", "--model.size=350m"],
    "1.5B": ["--model.preset=gpt2", "--model.size=1558m"],
    "7B": [*LLAMA, "--model.n_layer=32", "--model.n_head=32", "--model.n_embd=4096", "--model.n_inner=11008"],
    "70B": [*LLAMA, "--model.n_layer=80", "--model.n_head=64", "--model.n_embd=8192", "--model.n_inner=28672"],
}
COUNTS = (1, 8, 64, 1024)  # H100


def memory(flags: list[str], devices: int) -> str:
    """Of each device, with one sequence at a time and the model cut over all of them; bold where it fits."""
    cut = ["--parallel.shard=true", "--micro_batch_size=1", "--max_steps=1"]
    config, _ = parse(make_parser("plans", ""), [*COMMON, *flags, *cut])
    needed = cost_of(config, devices, "H100").needed
    text = f"{needed / 1e9:,.0f} GB" if needed >= 10e9 else f"{needed / 1e9:.1f} GB"
    return f"**{text}**" if needed <= ROOM * DEVICES["H100"].memory else text


def compute_optimal(flags: list[str], devices: int) -> Cost:
    """A run of 20 tokens for each parameter."""
    config, _ = parse(make_parser("plans", ""), [*COMMON, *flags, "--max_steps=1"])
    step = cost_of(config, devices, "H100")
    steps = TOKENS_PER_PARAMETER * step.n_params // step.tokens
    return step._replace(tokens=step.tokens * steps, flops=step.flops * steps, seconds=step.seconds * steps)


def table() -> Iterator[str]:
    counts = [f"{n:,}" for n in COUNTS]
    yield "| model | tokens | memory: " + " | ".join(counts) + " | time: " + " | ".join(counts) + " |"
    yield "|---|---:|" + "---:|" * (2 * len(COUNTS))
    for name, flags in MODELS.items():
        costs = [compute_optimal(flags, n) for n in COUNTS]
        cells = [*(memory(flags, n) for n in COUNTS), *(duration(cost.seconds) for cost in costs)]
        yield f"| {name} | {costs[0].tokens / 1e9:,.1f} B | " + " | ".join(cells) + " |"


def main() -> None:
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(MARK)
    _, _, tail = rest.partition("\n\n")
    lines = "\n".join(table())
    PAGE.write_text(f"{head}{MARK}{lines}\n\n{tail}", encoding="utf-8")
    print(lines)


if __name__ == "__main__":
    main()
