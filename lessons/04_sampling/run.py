"""What temperature and top-k do: 100 texts for each setting, and how many of them are stories of the grammar.

    python lessons/04_sampling/run.py [out/first_gpt/best] [--seed 1]

A text is flawless if the grammar gives it a probability above zero. Different counts how many of the flawless ones
differ from each other.
"""

import argparse

from nanogpt_hub import generate, load_model
from nanogpt_hub.corpus.stories import first_error

SETTINGS = {
    "temperature 0.3": dict(temperature=0.3),
    "temperature 1": dict(temperature=1.0),
    "temperature 2": dict(temperature=2.0),
    "temperature 2, top-k 4": dict(temperature=2.0, top_k=4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="out/first_gpt/best")
    parser.add_argument("--level", type=int, default=2, help="of the stories that the model was trained on")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    for name, setting in SETTINGS.items():
        written = generate(model, tokenizer, [""] * 100, max_new_tokens=60, seed=1000 * args.seed, **setting)
        flawless = [result.text for result in written if first_error(result.text, args.level) is None]
        print(f"{name}, flawless of 100: {len(flawless)}")
        print(f"{name}, different: {len(set(flawless))}")


if __name__ == "__main__":
    main()
