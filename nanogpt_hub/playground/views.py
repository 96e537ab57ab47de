"""Records as plain JSON for the views that the page draws; page/static/views.js says what each must hold."""

import base64
import math
import re
from collections.abc import Sequence

from torch import Tensor

from nanogpt_hub.lens import Divergence, Inside, LogitLens, NextTokens, Part, Piece, Surprise
from nanogpt_hub.runs import CURVES, Run

STAGES = {
    "model": "the model's probability",
    "repetition_penalty": "after repetition penalty",
    "temperature": "after temperature",
    "top_k": "after top-k",
    "top_p": "after top-p",
    "min_p": "after min-p",
}
PICTURE = re.compile(r"!\[([^\]\n]*)\]\([^)\n]*\)")
CODE = re.compile(r"(```.*?```|~~~.*?~~~|`[^`\n]*`)", re.DOTALL)


def percent(p: float) -> str:
    return f"{100 * p:.1f} %" if p >= 0.001 or p == 0 else f"{100 * p:.3f} %" if p >= 1e-5 else "< 0.001 %"


def probability_cell(p: float) -> dict:
    return {"v": round(p, 5), "text": percent(p)}


def next_tokens_view(result: NextTokens) -> dict:
    """Bars: a row for each token, a column for each sampler."""
    rows = []
    for token in result.tokens:
        cells = [probability_cell(p) for p in token.probs]
        if token.cut_by:
            first = result.stages.index(token.cut_by)
            cells = [{"cut": True} if n >= first else cell for n, cell in enumerate(cells)]
        rows.append({"name": token.text, "cells": cells})
    rows.append({"name": "all others", "plain": True, "cells": [probability_cell(p) for p in result.rest]})
    columns = [STAGES[stage] for stage in result.stages]
    kept = [f"{n:,} tokens, {bits:.2f} bits undecided" for n, bits in zip(result.kept, result.entropy, strict=True)]
    columns = [f"{name} ({left})" for name, left in zip(columns, kept, strict=True)]
    return {"columns": ["next token", *columns], "rows": rows}


def attention_view(inside: Inside) -> dict:
    """All maps, a byte for each weight."""
    L, H = inside.attention.shape[:2]
    maps = [[as_bytes(inside.attention[layer, head]) for head in range(H)] for layer in range(L)]
    return {"tokens": list(inside.tokens), "layers": L, "heads": H, "maps": maps}


def as_bytes(weights: Tensor) -> str:
    return base64.b64encode((weights * 255).round().byte().numpy().tobytes()).decode()


def lens_view(result: LogitLens, inside: Inside) -> dict:
    """A table: a row for each depth, a column for each position."""
    names = ["embeddings", *(f"after layer {n}" for n in range(1, len(result.top_tokens)))]
    columns = (result.top_probs, result.entropy, result.answer_ranks)
    rows = []
    for name, texts, *numbers in zip(names, result.top_tokens, *(c.tolist() for c in columns), strict=True):
        cells = [[text, round(p, 4), round(bits, 2), rank] for text, p, bits, rank in zip(texts, *numbers, strict=True)]
        rows.append({"name": name, "cells": cells})
    return {"tokens": list(inside.tokens), "rows": rows}


def surprise_view(result: Surprise) -> dict:
    """Tokens coloured by surprise."""
    tokens, group = [], -1
    for token in result.tokens:
        piece = token.piece
        text = piece.text if piece.start is None else result.text[piece.start : piece.end]
        view = {"t": text if piece.group != group else "", "name": piece.text, "bits": token.bits, "rank": token.rank}
        if token.bits is not None:
            view |= {"bits": round(token.bits, 3), "p": 2.0**-token.bits}
            view["best"] = [token.best_text, token.best_prob]
        tokens.append(view)
        group = piece.group
    return {"run": str(hash((result.text, result.total_bits))), "tokens": tokens}


def surprise_says(result: Surprise) -> str:
    """The figures in a sentence, and where the model was caught out."""
    worst = sorted(result.tokens[1:], key=lambda token: -token.bits)[:3]
    where = ", ".join(f"`{escape(token.piece.text)}` ({token.bits:.1f} bits)" for token in worst)
    return (
        f"**{result.bits_per_character:.2f} bits per character**, {result.bits_per_token:.2f} bits per token "
        f"(perplexity {result.perplexity:.4g}), {result.bits_per_byte:.2f} bits per byte; "
        f"8 would be knowing nothing. Caught out most at {where}."
    )


def escape(text: str) -> str:
    """A token for a code span of Markdown."""
    return text.replace("\n", "⏎").replace("`", "'").replace(" ", "␣")


def pieces_view(pieces: Sequence[Piece]) -> dict:
    """The tokens of a text, side by side."""
    return {
        "pieces": [{"id": p.id, "text": p.text, "bytes": p.data.hex(" "), "group": p.group} for p in pieces],
    }


def divergence_view(result: Divergence, names: tuple[str, str]) -> dict:
    """Bars: the next token for one model and for the other."""
    rows = [{"name": text, "cells": [probability_cell(a), probability_cell(b)]} for _, text, a, b in result.tokens]
    return {"columns": ["next token", *names], "rows": rows}


def divergence_says(result: Divergence) -> str:
    return (
        f"After the prompt the two are **{result.js:.3f} bits** apart (Jensen-Shannon: 0 if they expect the same, 1 if "
        f"they have nothing in common). Who expects B and reads what A writes wastes {result.kl_ab:.3f} bits a token, "
        f"the other way round {result.kl_ba:.3f}."
    )


def parts_view(parts: Sequence[Part]) -> dict:
    """Bars: parameters by part."""
    total = sum(part.parameters for part in parts)
    rows = [
        {
            "name": part.name,
            "plain": True,
            "cells": [{"v": part.parameters / total, "text": f"{part.parameters:,}"}],
            "note": part.note,
        }
        for part in parts
    ]
    return {"columns": ["part", "parameters", ""], "rows": rows, "notes": True}


def spacing(steps: Sequence[int]) -> int:
    """The largest distance that meets all kept steps, for a slider."""
    return max(1, math.gcd(*(step - steps[0] for step in steps))) if len(steps) > 1 else 1


def step_says(run: Run, step: int, known: bool) -> str:
    """What was measured at a kept step, in a line; `known` says whether its weights can be loaded."""
    row = run.at(step)
    parts = [f"**Step {step:,}**" + (f" of {run.max_steps:,}" if run.max_steps else "")]
    for key, label in CURVES.items():
        parts += [f"{label} loss {row[key]:.3f}"] if key in row else []
    parts += [f"{int(row['tokens']):,} tokens seen"] if "tokens" in row else []
    parts += ["training goes on"] if run.going_on() else []
    parts += [] if known else ["its weights were not kept; a run that pushes to the Hub can keep each step"]
    return " · ".join(parts)


def safe_markdown(text: str) -> str:
    """A card from anywhere, as text: without its front matter, without HTML, and pictures as their captions.

    So nothing is fetched from elsewhere when the card is shown. Code stays as it is.
    """
    text = re.sub(r"\A\s*---\r?\n.*?\n---[ \t]*(\r?\n|\Z)", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    parts = CODE.split(text)
    parts[::2] = [PICTURE.sub(r"*\1*", part).replace("![", "[").replace("<", "&lt;") for part in parts[::2]]
    return "".join(parts)
