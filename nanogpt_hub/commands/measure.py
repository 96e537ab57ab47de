"""Numbers: what `nanogpt-hub eval`, `audit` and `compare` print."""

import argparse
import json
import math

from nanogpt_hub.checkpoint import CheckpointError
from nanogpt_hub.commands.common import open_model, prepare_engine, say
from nanogpt_hub.compare import compare, plot, read_experiment, tables
from nanogpt_hub.corpus.audit import VERBATIM, audit, overlap
from nanogpt_hub.engine.select import engine_setting, open_engine
from nanogpt_hub.evaluate import evaluate
from nanogpt_hub.generate import generate as generate_texts
from nanogpt_hub.hub.resolve import resolve
from nanogpt_hub.sampling import SamplingConfig
from nanogpt_hub.sources import open_source

# ---- eval ----


def evaluate_model(args: argparse.Namespace) -> None:
    if args.max_windows < 0:
        raise ValueError(f"--max-windows is {args.max_windows}; it must be at least 0")
    args.engine = engine_setting(args.engine, default="plain")
    about = dict(text_column=args.text_column, config=args.config, split=args.split, revision=args.revision)
    source = open_source(args.data, **about)
    place = resolve(args.path)
    model, tokenizer = open_model(place, args)
    if tokenizer is None:
        raise ValueError(f"{place} has no tokenizer, and so cannot read a text")
    prepare_engine(args)
    engine = open_engine(args.engine, model.wte.weight.device)
    result = evaluate(model, tokenizer, source, args.max_windows, engine=engine)
    measured = {"loss": result.loss, "perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte}
    if args.json:
        numbers = {name: value if math.isfinite(value) else None for name, value in measured.items()}
        counts = {"tokens": result.tokens, "bytes": result.bytes, "max_windows": args.max_windows}
        about = {"model": str(place), "data": source.describe(), "engine": result.engine}
        print(json.dumps({**about, **numbers, **counts}, indent=2))
        return
    print(f"model          {place}")
    print(f"data           {source.name}")
    print(f"engine         {result.engine}")
    print(f"loss           {result.loss:.4f} nats per token")
    print(f"perplexity     {result.perplexity:.4g}")
    print(f"bits per byte  {result.bits_per_byte:.4f}")
    print(f"tokens         {result.tokens:,} predicted, {result.bytes:,} bytes")


# ---- audit ----


def audit_text(args: argparse.Namespace) -> None:
    source = open_source(args.data, text_column=args.text_column)
    report = audit(source)
    print(f"looked at  {source.name}: {report.documents:,} documents, {report.characters:,} characters")
    if report.cut_short:
        print("note       there is more, which was not looked at")
    for found in report.findings:
        print(f"{found.count:>9,}  {found.kind}; for example in document {found.document}: {found.example}")
    if not report.findings:
        print("nothing found")
    if args.model:
        model, tokenizer = open_model(resolve(args.model), args)
        if tokenizer is None:
            raise CheckpointError(f"{args.model} has no tokenizer.json, so it cannot write texts to compare with")
        sampling = SamplingConfig(max_new_tokens=200, temperature=1.0, seed=1)
        written = [result.text for result in generate_texts(model, tokenizer, [""] * 20, sampling)]
        again = overlap(written, source.documents())
        print(f"verbatim   {again.share:.0%} of 20 texts by the model, in matches of {VERBATIM} bytes or more")
        if again.longest:
            print(f"longest    {again.longest} bytes: {again.example}")


# ---- compare ----


def compare_runs(args: argparse.Namespace) -> None:
    comparison = compare([read_experiment(folder) for folder in args.runs])
    print("\n\n".join(tables(comparison)))
    if args.plot:
        plot(comparison, args.plot)
        say(f"drawn: {args.plot}")
