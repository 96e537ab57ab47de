"""Where the heads of a model look, and what it writes with and without attention.

python lessons/05_attention/run.py [out/first_gpt/best] [out/one_token/best] [--seed 1]
"""

import argparse
from itertools import islice

import torch

from nanogpt_hub import generate, load_model
from nanogpt_hub.corpus.stories import first_error, stories
from nanogpt_hub.lens import look_inside


def looks_at_the_animal(model, tokenizer) -> torch.Tensor:
    """How much of its attention each head gives the animal where the sound comes next, (layers, heads), on average.

    Ada the bee says "Buzz!": what follows the quotation mark depends on the token two places before it.
    """
    scores = []
    for text in islice(stories(2, seed=99), 50):
        begins = text[: text.index('"') + 1]
        scores.append(look_inside(model, tokenizer, begins).attention[:, :, -1, -3])
    return torch.stack(scores).mean(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="out/first_gpt/best")
    parser.add_argument("without", nargs="?", default="out/one_token/best")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    for name, folder in (("with attention", args.model), ("without", args.without)):
        model, tokenizer = load_model(folder)
        if model.config.block_size > 1:
            scores = looks_at_the_animal(model, tokenizer)
            layer, head = divmod(int(scores.argmax()), scores.size(1))
            print(f"most attention of a head to the animal: {scores.max():.3f}")
            print(f"the mean of all heads: {scores.mean():.3f}")
            print(f"look at layer {layer + 1}, head {head + 1} in the page")
        written = generate(model, tokenizer, [""] * 100, max_new_tokens=60, temperature=1.0, seed=1000 * args.seed)
        flawless = sum(first_error(result.text, 2) is None for result in written)
        print(f"{name}, flawless of 100: {flawless}")


if __name__ == "__main__":
    main()
