"""The one loop: batches in, optimizer steps, evaluations, saves; the same for pre-training and fine-tuning.

The order of events in a step is all here, in `Trainer.fit` and `Trainer.train_step`. Two rules make a run repeatable:
a batch is a function of (seed, step), and so is the dropout, because the random state is set anew before each step.
The loss of a step is the sum over all targets of all micro-batches and processes, divided by their number, so that
how a batch is split changes nothing but rounding.
"""

import contextlib
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
from accelerate import Accelerator
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_
from tqdm import tqdm

from nanogpt_hub.checkpoint import save_model, write_atomic
from nanogpt_hub.core import running_core
from nanogpt_hub.evaluate import BATCH_TOKENS
from nanogpt_hub.generate import generate
from nanogpt_hub.hub.card import RunFacts, write_card
from nanogpt_hub.model import GPT
from nanogpt_hub.sampling import SamplingConfig
from nanogpt_hub.tokenizer import Tokenizer, UnknownCharacterError
from train.attention import use_short_attention
from train.config import TrainConfig
from train.data import Data
from train.facts import merged, progress_facts
from train.hardware import (
    flops_per_token,
    is_out_of_memory,
    keep_freed_memory,
    matmul_flops,
    memory_bytes,
    seed_dropout,
    training_bytes,
)
from train.lora import without_adapters
from train.loss import count_targets, recompute_blocks, summed_loss
from train.optim import build_optimizer, load_optimizer_tensors, lr_scale, optimizer_tensors, set_lr
from train.report import METRICS, MetricsFile, describe_loss, plot_loss
from train.sharing import Sharing
from train.state import load_tensors, save_state


class TrainingError(RuntimeError):
    """The run cannot go on; what it has saved is whole."""


@dataclass
class Progress:
    """The counters that a resumed run takes up again."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # targets trained on
    seconds: float = 0.0  # training and evaluation since the first step, over all sittings
    best_loss: float = math.inf
    best_step: int = -1
    first_loss: float = math.nan  # validation loss before the first step
    last_loss: float = math.nan  # validation loss at the last evaluation
    evaluated_step: int = -1  # of the last evaluation
    stale: int = 0  # evaluations since the best one


class LossOnly(nn.Module):
    """The model as the loop sees it: ids and targets in, loss out, so that no wrapper copies the logits."""

    def __init__(self, gpt: GPT):
        super().__init__()
        self.gpt = gpt

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        return summed_loss(self.gpt, idx, targets)


class Interrupt:
    """Turns the first SIGINT or SIGTERM into a request to finish the step, save and end; a second one ends at once."""

    def __init__(self):
        self.asked = False

    def __enter__(self) -> "Interrupt":
        main = threading.current_thread() is threading.main_thread()  # only there may handlers be set
        self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM) if main}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


class Trainer:
    """One run over one model and its data; `fit` is the loop."""

    def __init__(
        self,
        config: TrainConfig,
        gpt: GPT,
        tokenizer: Tokenizer,
        data: Data,
        accelerator: Accelerator,
        facts: RunFacts,
        sharing: Sharing | None = None,
    ):
        self.config, self.gpt, self.tokenizer, self.data, self.accelerator = config, gpt, tokenizer, data, accelerator
        self.facts = facts  # what was known before the first step, for the model card
        self.sharing = sharing  # on the main process of a run that pushes to the Hub
        self.new_best: RunFacts | None = None  # of best/, until it is submitted
        self.out = Path(config.out_dir)
        self.progress, self.recent = Progress(), []  # recent: the steps since the last log line
        self.say = tqdm.write if accelerator.is_main_process else lambda line: None
        self.world, self.rank = accelerator.num_processes, accelerator.process_index
        self.device = accelerator.device
        self.micro = micro_batch_size(config, self.world)
        optimizer = build_optimizer(gpt.to(self.device), config.optim)
        self.trained = [p for p in gpt.parameters() if p.requires_grad]
        if config.activation_checkpointing:
            recompute_blocks(gpt)
        self.loss_of, prepared = accelerator.prepare(LossOnly(gpt), optimizer)
        # Accelerate's wrapper serves its loss scaler; without one each of its steps would search the disk for packages.
        self.optimizer = optimizer if accelerator.scaler is None else prepared
        self.precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
        self.bytes_needed = bytes_needed(config, gpt, self.micro, self.precision, self.device.type)
        if self.device.type == "cpu":
            use_short_attention(gpt)
            keep_freed_memory(min(self.bytes_needed, (memory_bytes("cpu") or 2**30) // (2 * self.world)))
        self._compile()
        self.peak_flops = matmul_flops(self.device.type, self.precision)
        self.flops = flops_per_token(gpt.config, gpt.num_params(embeddings=gpt.config.tie_word_embeddings))
        self.prompt, self.sample = usable_prompt(config.eval.prompt, tokenizer, data.val[0]), ""
        e = config.eval
        self.sampling = SamplingConfig(e.sample_tokens or 1, temperature=e.temperature, top_k=e.top_k, seed=config.seed)

    # ---- the loop -------------------------------------------------------------------------------------------------

    def fit(self) -> str:
        """Trains until max_steps and returns how it ended: "done", "early stop" or "interrupted".

        Raises TrainingError when the loss is not finite; the last good checkpoint stays as it was.
        """
        cfg, p = self.config, self.progress
        if self.accelerator.is_main_process:
            self.metrics = MetricsFile(self.out / METRICS, keep_until=p.step if p.step else -1)
        self.started, self.saved_at = time.perf_counter() - p.seconds, time.perf_counter()
        ended = "done"
        with Interrupt() as interrupt, self._bar() as bar:
            if p.step == 0:
                self._log(bar, {"val_loss": self.evaluate()})
                self._share()
            while p.step < cfg.max_steps and ended == "done":
                stop, save = self._agree(interrupt.asked, self._save_due())
                if stop:
                    ended = "interrupted"
                    break
                if save:
                    self.save()
                ended = self._one_step(bar)
            self.save()
        self.say(self._closing_line(ended))
        return ended

    def _one_step(self, bar: tqdm) -> str:
        """A training step with what follows it: log line, evaluation, patience."""
        cfg, p = self.config, self.progress
        self.recent.append(self.train_step())
        evaluate = p.step % cfg.eval.interval == 0 or p.step == cfg.max_steps
        evaluated = {"val_loss": self.evaluate()} if evaluate else {}
        if evaluate or p.step % cfg.log_interval == 0:
            self._log(bar, {**self._summary(), **evaluated})
        if evaluate:
            self._share()
        bar.update()
        return "early stop" if 0 < cfg.eval.patience <= p.stale else "done"

    def _summary(self) -> dict:
        """The steps since the last log line as one row: loss and speed are their means."""
        steps, self.recent = self.recent, []
        speed = sum(step["n_targets"] for step in steps) / sum(step["seconds"] for step in steps)
        return {
            "train_loss": sum(step["train_loss"] for step in steps) / len(steps),
            "learning_rate": steps[-1]["learning_rate"],
            "grad_norm": steps[-1]["grad_norm"],
            "tokens_per_second": speed,
            "mfu": speed / self.world * self.flops / self.peak_flops,
        }

    def train_step(self) -> dict:
        """One optimizer step; halves the micro-batch and tries again when memory runs out."""
        while True:
            start = time.perf_counter()
            try:
                row = self._train_step()
            except Exception as error:
                self._shrink_or_raise(error)
                continue
            return {**row, "seconds": time.perf_counter() - start}

    def _train_step(self) -> dict:
        cfg, p = self.config, self.progress
        if not self.gpt.training:
            self.gpt.train()
        scale = lr_scale(p.step, cfg.max_steps, cfg.optim)
        set_lr(self.optimizer, scale)
        seed = (cfg.seed * 1_000_003 + p.step) * 65_537 + self.rank
        seed_dropout(self.device.type, seed)  # dropout depends on nothing else
        micro_batches = list(self._micro_batches(p.step))
        n_targets = int(self._sum(sum(count_targets(targets) for _, targets in micro_batches)))
        loss = 0.0
        for i, (idx, targets) in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.loss_of):
                part = self.loss_of(idx.to(self.device), targets.to(self.device)) / n_targets
                self.accelerator.backward(part * self.world)  # times world: DDP takes the processes' mean
            loss += part.detach()
        loss = float(self._sum(loss))
        norm = self._clip(loss)
        self.optimizer.step()
        self._clear_gradients()
        p.step += 1
        p.tokens += n_targets
        rate = scale * cfg.optim.learning_rate
        return {"train_loss": loss, "learning_rate": rate, "grad_norm": norm, "n_targets": n_targets}

    def _micro_batches(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of the step's batch: micro-batches are dealt out in turn, any split gives the same."""
        size, B = self.micro, self.config.batch_size
        for first in range(self.rank * size, B, size * self.world):
            yield self.data.batches.batch(step, B, rows=slice(first, first + size))

    def _clip(self, loss: float) -> float:
        """Clips the gradient and returns its norm; refuses to go on from a loss or gradient that is not finite."""
        clip = self.config.optim.grad_clip or math.inf
        scaled = self.accelerator.scaler is not None
        if scaled:
            self.accelerator.unscale_gradients()
        norms = torch._foreach_norm([p.grad for p in self.trained if p.grad is not None])
        total = torch.linalg.vector_norm(torch.stack(norms))
        norm = float(total)
        if norm > clip:
            clip_grads_with_norm_(self.trained, clip, total)
        if not math.isfinite(loss) or not (math.isfinite(norm) or scaled):  # a scaler skips such a step by itself
            raise TrainingError(
                f"loss {loss}, gradient norm {norm} at step {self.progress.step}: stopped before the update. The last "
                f"good weights are in {self.out}; try a lower learning rate, more warm-up, or --precision fp32"
            )
        return norm

    def _clear_gradients(self) -> None:
        """As the optimizer's zero_grad, but for its marks for a profiler, which a small step would notice."""
        for parameter in self.trained:
            parameter.grad = None

    # ---- looking at it --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss in nats per token over the fixed validation windows; keeps the best weights and writes a sample."""
        self.gpt.eval()
        total = torch.zeros(2, dtype=torch.float64)
        size = max(1, BATCH_TOKENS // self.gpt.config.block_size)  # windows: the same, whatever fits a training step
        for first in range(self.rank * size, len(self.data.val[0]), size * self.world):
            idx, targets = (t[first : first + size].to(self.device) for t in self.data.val)
            with self.accelerator.autocast():
                loss = summed_loss(self.gpt, idx, targets)
            total += torch.tensor([float(loss), count_targets(targets)], dtype=torch.float64)
        loss_sum, count = self._sum(total).tolist()
        if self.accelerator.is_main_process and self.config.eval.sample_tokens:
            self._write_sample()
        self._judge(loss_sum / count)
        return loss_sum / count

    def _judge(self, val_loss: float) -> None:
        """Notes the loss; a new best is saved at once, the start too: a folder that cannot be written shows here."""
        p = self.progress
        p.last_loss, p.evaluated_step = val_loss, p.step
        if p.step == 0:
            p.first_loss = val_loss
        if val_loss < p.best_loss:
            p.best_loss, p.best_step, p.stale = val_loss, p.step, 0
            self.new_best = self._save_folder("best")
        else:
            p.stale += 1

    def _share(self) -> None:
        """Submits what an evaluation brought, once its row is in the log that goes along."""
        best, self.new_best = self.new_best, None
        if best is not None and self.sharing and self.progress.step:
            self.sharing.best(self.gpt, best)
        if self.config.hub.repo_id and self.config.hub.push_steps:
            facts = self.save()
            if self.sharing:
                self.sharing.step(self.progress.step, self.gpt, facts)

    def _write_sample(self) -> None:
        self.sample = generate(self.gpt, self.tokenizer, self.prompt, self.sampling).text
        folder = self.out / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step-{self.progress.step:06d}.txt"
        path.write_text(self.prompt + self.sample, encoding="utf-8", newline="")

    def _log(self, bar: tqdm, row: dict) -> None:
        p = self.progress
        p.seconds = time.perf_counter() - self.started
        row = {"step": p.step, "tokens": p.tokens, "seconds": round(p.seconds, 3), **row}
        row["epochs"] = self.data.batches.epochs(p.step, self.config.batch_size)
        if self.config.trackers:
            self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=p.step)
        if not self.accelerator.is_main_process:
            return
        self.metrics.write(row)
        if "train_loss" in row:
            bar.set_postfix_str(f"loss {row['train_loss']:.3f}, {row['tokens_per_second']:,.0f} tok/s")
        if "val_loss" in row:
            self.say(self._eval_line(row))
            plot_loss(self.out / METRICS, self.out / "loss.png", self.data.baselines)

    def _eval_line(self, row: dict) -> str:
        quality = describe_loss(row["val_loss"], self.data.bytes_per_token)
        line = f"step {row['step']:>6}  val loss {row['val_loss']:.4f} ({quality})"
        if "train_loss" in row:
            gap = row["val_loss"] - row["train_loss"]
            line += f"  train {row['train_loss']:.4f}, gap {gap:+.3f}  epoch {row['epochs']:.2f}"
            line += f"  {row['tokens_per_second']:,.0f} tok/s, {row['mfu']:.0%} of the matrix rate"
        if self.config.eval.sample_tokens:
            line += "\n    | " + (self.prompt + self.sample)[:240].replace("\n", "\n    | ")
        return line

    def _bar(self) -> tqdm:
        return tqdm(
            total=self.config.max_steps, initial=self.progress.step, unit="step", desc="training",
            disable=not (self.accelerator.is_main_process and sys.stderr.isatty()), dynamic_ncols=True, mininterval=0.5,
        )  # fmt: skip

    def _closing_line(self, ended: str) -> str:
        p = self.progress
        line = f"{ended} after {p.step} steps, {p.tokens:,} tokens, {p.seconds:.0f} s"
        if math.isfinite(p.best_loss):
            line += f"; best validation loss {p.best_loss:.4f} at step {p.best_step}"
        return line

    # ---- keeping it -----------------------------------------------------------------------------------------------

    def save(self) -> RunFacts:
        """Writes last/ and the training state; every process must call it, the main one writes. Returns the facts."""
        self.saved_at = time.perf_counter()
        self.progress.seconds = self.saved_at - self.started
        facts = self._save_folder("last")
        if self.accelerator.is_main_process:
            state = {**asdict(self.progress), "micro_batch_size": self.micro, "fixed": fixed_settings(self)}
            if self.accelerator.scaler is not None:
                state["scaler"] = self.accelerator.scaler.state_dict()
            weights = dict(self.gpt.named_parameters())  # a tied head is listed once
            save_state(self.out / "state", state, weights, optimizer_tensors(self.gpt, self.optimizer))
            if self.sharing:
                self.sharing.state()
        self.accelerator.wait_for_everyone()
        return facts

    def _save_folder(self, name: str) -> RunFacts:
        """Writes best/ or last/ with its card, and run.json, which holds what the card of best/ is made of."""
        facts = merged(self.facts, progress_facts(self))
        if not self.accelerator.is_main_process:
            return facts
        save_model(self.out / name, without_adapters(self.gpt), self.tokenizer)
        write_card(self.out / name, facts)
        if name == "best":
            write_atomic(self.out / "run.json", json.dumps(facts, indent=2))
        return facts

    def resume(self, facts: dict) -> None:
        """Takes up the state that `read_facts` described. Raises ValueError when it belongs to another kind of run."""
        mine = fixed_settings(self)
        differing = [key for key in {**mine, **facts["fixed"]} if facts["fixed"].get(key) != mine.get(key)]
        if differing:
            was, now = ({k: s.get(k) for k in differing} for s in (facts["fixed"], mine))
            raise ValueError(
                f"{self.out} holds a run with other settings ({was}, now {now}): use them again, choose another "
                "--out_dir, or start anew with --overwrite"
            )
        weights, moments = load_tensors(self.out / "state", facts)
        with torch.no_grad():
            for name, p in self.gpt.named_parameters():
                p.copy_(weights[name])
        load_optimizer_tensors(self.gpt, self.optimizer, moments)
        if self.accelerator.scaler is not None and "scaler" in facts:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        self.progress = Progress(**{key: facts[key] for key in asdict(self.progress)})
        self.micro = min(self.micro, facts["micro_batch_size"]) if self.config.micro_batch_size == 0 else self.micro

    def _save_due(self) -> bool:
        cfg, step = self.config.save, self.progress.step
        by_time = cfg.minutes and time.perf_counter() - self.saved_at > 60 * cfg.minutes
        return bool(by_time or (cfg.interval and step and step % cfg.interval == 0))

    # ---- processes, memory, compilation ---------------------------------------------------------------------------

    def _sum(self, value: Tensor | float) -> Tensor:
        """The sum over all processes."""
        value = torch.as_tensor(value)
        if self.world == 1:
            return value
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        return self.accelerator.reduce(value.to(self.device, dtype), "sum").cpu()

    def _agree(self, *flags: bool) -> list[bool]:
        """A decision is everyone's when it is anyone's: no process may leave a step that another one waits in."""
        return [bool(n) for n in self._sum(torch.tensor([float(flag) for flag in flags])).tolist()]

    def _shrink_or_raise(self, error: Exception) -> None:
        """Out of memory, alone, with something left to halve: do that. Anything else goes on as it is."""
        if not is_out_of_memory(error):
            raise error
        if self.world > 1 or self.micro == 1:
            raise TrainingError(
                f"out of memory at micro_batch_size {self.micro}: set a smaller --micro_batch_size, --model.block_size "
                "or --model.size"
            ) from error
        self.micro = next(m for m in range(self.micro // 2, 0, -1) if self.config.batch_size % m == 0)
        self._clear_gradients()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        steps = self.config.batch_size // self.micro
        self.say(f"out of memory: going on with micro_batch_size {self.micro}, {steps} times per step")

    def _compile(self) -> None:
        """Compiles in place, so that no wrapper shows in a saved name; where it fails the model runs as it is."""
        wanted = self.config.compile
        if wanted == "never" or (wanted == "auto" and self.device.type != "cuda"):
            return
        T = self.gpt.config.block_size
        probe = torch.zeros(self.micro, T, dtype=torch.long, device=self.device)
        self.say("compiling the model, which takes up to a minute ...")
        try:
            self.loss_of.compile(dynamic=False)
            self.loss_of(probe, probe).backward()
            self._clear_gradients()
        except Exception as error:
            if is_out_of_memory(error):
                return  # the first step will find a micro-batch that fits
            torch.compiler.set_stance("force_eager")
            self.say(f"torch.compile does not work here ({type(error).__name__}); going on without it")


def micro_batch_size(config: TrainConfig, world: int) -> int:
    """Sequences per forward pass. Raises ValueError when the batch does not divide evenly over the processes."""
    if config.batch_size % (world * max(1, config.micro_batch_size)):
        raise ValueError(
            f"batch_size {config.batch_size} is not a multiple of {world} processes times micro_batch_size "
            f"{max(1, config.micro_batch_size)}"
        )
    return config.micro_batch_size or config.batch_size // world


def bytes_needed(config: TrainConfig, gpt: GPT, micro_batch_size: int, precision: str, device: str) -> int:
    """An estimate of the memory of a step; weights that are not trained have neither gradients nor moments."""
    trained = sum(p.numel() for p in gpt.parameters() if p.requires_grad)
    kept = {"recompute": config.activation_checkpointing, "short_attention": device == "cpu"}
    return 4 * (gpt.num_params() - trained) + training_bytes(gpt.config, trained, micro_batch_size, precision, **kept)


def usable_prompt(prompt: str, tokenizer: Tokenizer, val_idx: Tensor) -> str:
    """The prompt, or where the tokenizer cannot write it, the first character of the validation text."""
    try:
        if tokenizer.encode(prompt):
            return prompt
    except UnknownCharacterError:
        pass
    return tokenizer.decode(val_idx[0].tolist())[:1]


def fixed_settings(trainer: Trainer) -> dict:
    """What must be the same when a run goes on: otherwise it would not be that run."""
    config = trainer.config
    settings = {
        "seed": config.seed,
        "batch_size": config.batch_size,
        "optimizer": config.optim.name,
        "data": trainer.data.facts["source"]["name"],
        "train_tokens": trainer.data.facts["train_tokens"],
        "tokenizer": trainer.tokenizer.hash[:16],
        "model": {k: v for k, v in asdict(trainer.gpt.config).items() if k not in ("dropout", "init")},
    }
    if config.data.format != "text":
        settings["format"] = config.data.format
    if config.lora.rank:
        settings["lora"] = asdict(config.lora)
    if core := running_core().changed:
        settings["model.py"] = f"edited ({', '.join(core)}), core {running_core().fingerprint}"
    if "base_model" in trainer.facts:
        settings["base_model"] = trainer.facts["base_model"]
    return settings
