"""The same text in four tokenizers: how many tokens, how surprising each, and what stays the same.

python lessons/02_tokens/run.py [--seed 1]
"""

import argparse
import math

from nanogpt_hub.corpus.stories import entropy
from nanogpt_hub.sources import open_source
from nanogpt_hub.tokenizer import build_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    texts = [*open_source(f"stories:level=4,seed={args.seed},size=200000").documents()]
    known, n_bytes = entropy(4), sum(len(text.encode()) for text in texts)
    for spec in ("char", "byte", "bpe:300", "bpe:1024"):
        tokenizer = build_tokenizer(spec, texts)
        count = sum(len(ids) + 1 for ids in tokenizer.encode_batch(texts)) / len(texts)  # and the end of each story
        loss = known.nats_per_token(count)
        print(f"{spec} tokens per story: {count:.1f}")
        print(f"{spec} lowest loss: {loss:.4f}")
        print(f"{spec} bits per byte: {loss / math.log(2) * count * len(texts) / n_bytes:.4f}")


if __name__ == "__main__":
    main()
