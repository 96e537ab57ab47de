"""Records as plain JSON for the views that the page draws; page/static/views.js says what each must hold."""

import base64
import math
import re
from collections.abc import Collection, Sequence

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.renderer import RendererHTML

from nanogpt_hub.lens import Divergence, Inside, LogitLens, NextTokens, Part, Piece, Surprise
from nanogpt_hub.runs import CURVES, Run, attention_json
from nanogpt_hub.sampling import SAMPLERS

STAGES = {"model": "the model's probability"} | {e.name: f"after {e.label.lower()}" for e in SAMPLERS.values()}


def percent(p: float) -> str:
    return f"{100 * p:.1f} %" if p >= 0.001 or p == 0 else f"{100 * p:.3f} %" if p >= 1e-5 else "< 0.001 %"


def probability_cell(p: float) -> dict:
    return {"v": round(p, 5), "text": percent(p)}


def next_tokens_view(result: NextTokens) -> dict:
    """Bars: a row for each token, a column for each sampler."""
    rows: list[dict] = []
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
    return attention_json(inside.tokens, inside.attention)


def lens_view(result: LogitLens, inside: Inside) -> dict:
    """A table: a row for each depth, a column for each position."""
    names = ["embeddings", *(f"after layer {n}" for n in range(1, len(result.top_tokens)))]
    columns = (result.top_probs, result.entropy, result.answer_ranks)
    rows = []
    for name, texts, *numbers in zip(names, result.top_tokens, *(c.tolist() for c in columns), strict=True):
        cells = [[text, round(p, 4), round(bits, 2), rank] for text, p, bits, rank in zip(texts, *numbers, strict=True)]
        rows.append({"name": name, "cells": cells})
    return {"tokens": list(inside.tokens), "rows": rows}


def experts_view(inside: Inside) -> dict | None:
    """A table: a row for each layer, a column for each token, in a cell the experts that it took, most first, with how
    much it took of each. None for a dense model."""
    if inside.experts is None:
        return None

    def taken(shares: list[float]) -> list[list[float]]:
        return sorted(([e, round(p, 3)] for e, p in enumerate(shares, start=1) if p), key=lambda each: -each[1])

    layers = enumerate(inside.experts.tolist(), start=1)
    rows = [{"name": f"layer {n}", "cells": [taken(shares) for shares in tokens]} for n, tokens in layers]
    return {"tokens": list(inside.tokens), "experts": inside.experts.size(-1), "rows": rows}


def surprise_note(result: Surprise) -> str:
    """The figures in a sentence, and where the model was caught out."""
    worst = sorted(result.tokens[1:], key=lambda token: -(token.bits or 0.0))[:3]
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


def divergence_note(result: Divergence) -> str:
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


MOST_STEPS = 150  # kept steps that the page plays through
SAMPLE_CHARACTERS = 1200  # of each


def kept_steps(run: Run) -> list[int]:
    """The steps of a run that have a sample, thinned evenly to `MOST_STEPS`; both ends stay."""
    steps = [*run.samples]
    every = max(1, math.ceil(len(steps) / MOST_STEPS))
    return steps[::every] + (steps[-1:] if steps and (len(steps) - 1) % every else [])


def training_view(runs: Sequence[Run], steps: Sequence[int], usable: Collection[int]) -> dict:
    """Curves of runs over each other, and the first run's kept steps, each with its sample and what was measured.

    usable: the steps whose weights can be loaded.
    """
    run = runs[0]
    kept = [
        {"step": n, "note": step_note(run, n), "text": run.sample(n, SAMPLE_CHARACTERS), "usable": n in usable}
        for n in steps
    ]
    measures = (*CURVES, "learning_rate", "tokens_per_second", "expert_evenness")
    drawn = [
        {"name": each.name, "curves": {key: each.curve(key) for key in measures}, "floor": drawn_floor(each)}
        for each in runs
    ]
    return {"runs": drawn, "steps": kept, "live": run.going_on(), "last": run.last_step, "max": run.max_steps}


def drawn_floor(run: Run) -> float | None:
    """The entropy of a run's text, where it is known and lies below the run's highest loss: else it is not its own."""
    highest = max((row[key] for row in run.rows for key in CURVES if key in row), default=0.0)
    return run.floor if run.floor is not None and run.floor < highest else None


def head_view(run: Run, steps: Sequence[int], chosen: tuple[int, int] | None = None) -> dict | None:
    """Where one head looked at each kept step: (layer, head) `chosen`, else the one that changed most.

    None where the run did not keep it. Maps of another text or shape than the first are passed over.
    """
    found = [(step, maps) for step in steps if (maps := run.attention(step))]
    if not found:
        return None
    first = found[0][1]
    shape = [first[key] for key in ("tokens", "layers", "heads")]
    kept = [(step, maps) for step, maps in found if [maps[key] for key in ("tokens", "layers", "heads")] == shape]
    _, L, H = shape
    last = kept[-1][1]["maps"]
    changes = [change(first["maps"][n // H][n % H], last[n // H][n % H]) for n in range(L * H)]
    most = changes.index(max(changes))
    layer, head = chosen if chosen and chosen[0] in range(L) and chosen[1] in range(H) else (most // H, most % H)
    scaled = [each / max(*changes, 1e-9) for each in changes]
    chosen_maps = [[step, maps["maps"][layer][head]] for step, maps in kept]
    about = {"run": run.name, "tokens": shape[0], "heads": [L, H], "layer": layer, "head": head}
    return {**about, "changes": [round(each, 3) for each in scaled], "steps": chosen_maps}


def change(one: str, other: str) -> float:
    """How far apart two maps are, as `attention_json` spells them: the mean difference of a weight."""
    a, b = base64.b64decode(one), base64.b64decode(other)
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / max(1, len(a))


def step_note(run: Run, step: int) -> str:
    """What was measured at a kept step, in a line."""
    row = run.at(step)
    parts = [f"step {step:,}" + (f" of {run.max_steps:,}" if run.max_steps else "")]
    for key, label in CURVES.items():
        parts += [f"{label} loss {row[key]:.3f}"] if key in row else []
    parts += [f"{int(row['tokens']):,} tokens seen"] if "tokens" in row else []
    return " · ".join(parts)


class CardRenderer(RendererHTML):
    """Writes a card as HTML in which the card's own HTML is text, its comments are gone and a picture is its caption.

    So nothing is fetched from elsewhere, and nothing runs, when the card is shown. No empty line is outside of <pre>:
    gradio takes the whole for Markdown once more, in which one would end the HTML.
    """

    def html_inline(self, tokens, idx, options, env) -> str:
        text = tokens[idx].content
        return "" if text.startswith("<!--") else escapeHtml(text)

    def html_block(self, tokens, idx, options, env) -> str:
        return f"<pre><code>{text}</code></pre>\n" if (text := self.html_inline(tokens, idx, options, env)) else ""

    def image(self, tokens, idx, options, env) -> str:
        return f"<em>{escapeHtml(tokens[idx].content)}</em>"


def card_html(text: str) -> str:
    """A card from anywhere, without its front matter, as HTML of a few harmless kinds."""
    body = re.sub(r"\A\s*---\r?\n.*?\n---[ \t]*(\r?\n|\Z)", "", text, flags=re.DOTALL)
    return MarkdownIt("commonmark", renderer_cls=CardRenderer).enable("table").render(body)
