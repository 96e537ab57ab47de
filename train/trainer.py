"""The one loop: batches in, optimizer steps, evaluations, saves; the same for pre-training and fine-tuning.

The order of events in a step is all here, in `Trainer.fit` and `Trainer.train_step`. Two rules make a run repeatable:
a batch is a function of (seed, step), and so is the dropout, because the random state is set anew before each step.
The loss of a step is the sum over all targets of all micro-batches and processes, divided by their number, so that
how a batch is split changes nothing but rounding.
"""

import contextlib
import json
import math
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.nn as nn
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from nanogpt_hub.checkpoint import clean_state, load_model, save_model
from nanogpt_hub.corpus.audit import KnownText
from nanogpt_hub.edits.core import running_core, watch_routers
from nanogpt_hub.evaluate import BATCH_TOKENS
from nanogpt_hub.hub.card import RunFacts, write_card
from nanogpt_hub.model import GPT, IGNORE_INDEX, GPTConfig
from nanogpt_hub.runs import METRICS
from nanogpt_hub.system.files import write_atomic
from nanogpt_hub.tokenizer import Tokenizer

from .attention import use_short_attention
from .config import TrainConfig
from .data import TOKENS, Data, text_bytes
from .experts import ExpertUse, describe_use, training_loss
from .facts import changes_between, merged_facts, progress_facts, settings_now
from .folder import TrainingError, check_best, disk_errors
from .hardware import (
    DTYPES,
    flops_per_token,
    is_out_of_memory,
    keep_freed_memory,
    matmul_flops,
    memory_bytes,
    seed_dropout,
)
from .lora import without_adapters
from .loss import count_targets, recompute_blocks, summed_loss
from .optim import build_optimizer, load_optimizer_tensors, lr_scale, optimizer_tensors, set_lr
from .parallel import compile_layers, cut_as, is_sharded, local, reshard, shard, whole_model, whole_tensors
from .plan import bytes_needed, divisors, micro_batch_size, save_bytes
from .processes import GRACE, Watchdog, check_same, from_main, least, on_main, safe_so_far, say_lost
from .report import FLOOR, MetricsFile, check_metrics, describe_loss, plot_loss
from .sample import Sample
from .sharing import Sharing
from .state import COUNTERS, StateError, load_tensors, save_state
from .tokenizing import wait_for


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
        return training_loss(self.gpt, idx, targets)


class Interrupt:
    """Turns the first SIGINT, SIGTERM or SIGHUP (the terminal was closed) into a request to finish the step, save and
    end; a second one ends at once. A SIGHUP that `nohup` has set to be ignored stays so."""

    SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP

    def __init__(self):
        self.asked, self.before = False, {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            numbers = [getattr(signal, name) for name in self.SIGNALS if hasattr(signal, name)]
            asked = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
            self.before = {number: signal.signal(number, self._ask) for number in asked}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if signal.Signals(number).name == "SIGHUP":
            leave_terminal()


def leave_terminal() -> None:
    """What is said from here on goes nowhere, if it went to a terminal: one that is gone gives an error instead."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            if stat.S_ISCHR(os.fstat(stream.fileno()).st_mode):  # a lost terminal no longer says that it is one
                os.dup2(nowhere.fileno(), stream.fileno())


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
        known: KnownText | None = None,
    ):
        self.config, self.gpt, self.tokenizer, self.data, self.accelerator = config, gpt, tokenizer, data, accelerator
        self.facts = facts  # what was known before the first step, for the model card
        self.known = known  # the training text, in which samples are looked for
        self.sharing = sharing  # on the main process of a run that pushes to the Hub
        self.out = Path(config.out_dir)
        self.progress = Progress()
        self.recent: list[dict] = []  # the steps since the last log line
        self.changes: list[dict] = []  # settings that were others before some step, see changes_between
        self.saved: RunFacts | None = None  # facts of the last save, if no step was made since
        self.new_best: RunFacts | None = None  # facts of a best model that is not pushed yet
        self.say = tqdm.write if accelerator.is_main_process else lambda line: None
        self.world, self.rank = accelerator.num_processes, accelerator.process_index
        self.device = accelerator.device
        # Where nothing has to be told to other processes, a GPU works while the next steps are prepared.
        self.runs_ahead = self.device.type == "cuda" and self.world == 1 and accelerator.scaler is None
        self.precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
        self.watchdog = Watchdog(60 * config.parallel.timeout_minutes + GRACE, lambda: say_lost(config))
        self.micro = least(micro_batch_size(config, gpt, self.world, self.precision, self.device.type))
        check_same({**fixed_settings(self), "bytes": text_bytes(data.facts["source"])}, "settings or data")
        self.loss_of, self.optimizer, optimizer = self._prepare()
        self.trained = [p for p in gpt.parameters() if p.requires_grad]
        self.bytes_needed = bytes_needed(config, gpt, self.micro, self.precision, self.device.type)
        self.save_bytes = save_bytes(gpt, optimizer)
        if self.device.type == "cpu" and config.fast_cpu:
            use_short_attention(gpt)
            keep_freed_memory(min(self.bytes_needed, (memory_bytes("cpu") or 2**30) // (2 * self.world)))
        self._compile()
        self.peak_flops = matmul_flops(self.device.type, self.precision)
        self.flops = flops_per_token(gpt.config, gpt.num_params(embeddings=gpt.config.tie_word_embeddings))
        self.expert_use = ExpertUse(gpt.config)  # at the last evaluation
        self.sampler, self.sample = Sample(config.eval, gpt, tokenizer, data, config.seed), ""

    def _prepare(self) -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.Optimizer]:
        """The model as the processes train it, its optimizer as the loop calls it, and that without a wrapper."""
        gpt, config, accelerator = self.gpt, self.config, self.accelerator
        self.sharded = is_sharded(config)
        self.whole_now: GPT | None = None  # a sharded model as a whole, where no step was made since
        loss_of = LossOnly(gpt)
        if self.sharded:
            self.empty = shard(loss_of, gpt, self.device, DTYPES[self.precision])
        optimizer = build_optimizer(gpt if self.sharded else gpt.to(self.device), config.optim)
        if config.activation_checkpointing:
            recompute_blocks(gpt)
        if self.sharded:
            return loss_of, optimizer, optimizer
        loss_of, prepared = accelerator.prepare(loss_of, optimizer)
        # Accelerate's wrapper serves its loss scaler; without one each of its steps would search the disk for packages.
        return loss_of, optimizer if accelerator.scaler is None else prepared, optimizer

    def whole(self) -> GPT:
        """The model with all of its weights. Of a sharded one every process must call it: the main one gets a copy on
        the CPU, the others one without weights."""
        if not self.sharded:
            return self.gpt
        if self.whole_now is None:
            self.whole_now = whole_model(self.gpt, self.empty)
        return self.whole_now

    # ---- the loop -------------------------------------------------------------------------------------------------

    def fit(self) -> str:
        """Trains until max_steps and returns how it ended: "done", "early stop" or "interrupted".

        Raises TrainingError when the loss is not finite, the text cannot be read any further, or what was learned
        cannot be written; what was saved before stays as it was.
        """
        try:
            with disk_errors(self.out, self.save_bytes):
                ended = self._fit()
        except ValueError as error:
            raise TrainingError(f"{error}. {safe_so_far(self.out)}") from error
        self.say(self._closing_line(ended))
        return ended

    def _fit(self) -> str:
        cfg, p = self.config, self.progress
        if self.accelerator.is_main_process:
            self.metrics = MetricsFile(self.out / METRICS, keep_until=p.step if p.step else -1)
            if p.step and not (self.out / "loss.png").exists():  # a card that is written shows it
                plot_loss(self.out / METRICS, self.out / "loss.png", self.data.baselines)
        self.started, self.saved_at = time.perf_counter() - p.seconds, time.perf_counter()
        ended = "done"
        with (
            Interrupt() as interrupt,
            self._bar() as bar,
            self.watchdog if self.world > 1 else contextlib.nullcontext(),
        ):
            if p.step == 0:
                self._log(bar, {"val_loss": self.evaluate()})
                self._share_step()
            while p.step < cfg.max_steps and ended == "done":
                stop, save = self._agree(interrupt.asked, self._save_due())
                if stop:
                    ended = "interrupted"
                    break
                if save:
                    self.save()
                ended = self._one_step(bar) if self._wait_for_data(interrupt) else "interrupted"
            self.save()
        return ended

    @property
    def finished(self) -> str:
        """What there is to raise so that the run goes on; empty where it is not at its end."""
        patience = self.config.eval.patience
        if self.progress.step >= self.config.max_steps:
            return "--max_steps"
        return "--eval.patience" if 0 < patience <= self.progress.stale else ""

    def _wait_for_data(self, interrupt: Interrupt) -> bool:
        """Waits, where the next step needs tokens that are not ready yet; False when the run shall end instead."""
        batches, step, B = self.data.batches, self.progress.step, self.config.batch_size
        for one in self.data.tokenizing:
            one.revive()
        if not batches.needs_more(step, B):
            return True

        def ready() -> bool:
            self.watchdog.beat()  # all processes answered when they last told each other what they see
            return batches.ready(step, B)

        try:
            return wait_for(ready, self.data.tokenizing, lambda: interrupt.asked)
        except ValueError:  # the text cannot be read any further: what was learned from it so far is kept
            self.save()
            raise

    def _one_step(self, bar: tqdm) -> str:
        """A training step with what follows it: log line, evaluation, patience."""
        cfg, p = self.config, self.progress
        self.recent.append(self.train_step())
        evaluate = p.step % cfg.eval.interval == 0 or p.step == cfg.max_steps
        summary = self._summary() if evaluate or p.step % cfg.log_interval == 0 else {}
        evaluated = {"val_loss": self.evaluate()} if evaluate else {}
        if summary:
            self._log(bar, {**summary, **evaluated})
        if evaluate:
            self._share_step()
        bar.update()
        return "early stop" if 0 < cfg.eval.patience <= p.stale else "done"

    def _summary(self) -> dict:
        """The steps since the last log line as one row: loss and speed are their means."""
        self._read_recent()
        steps, self.recent = self.recent, []
        speed = sum(step["n_targets"] for step in steps) / sum(step["seconds"] for step in steps)
        return {
            "train_loss": sum(step["train_loss"] for step in steps) / len(steps),
            "learning_rate": steps[-1]["learning_rate"],
            "grad_norm": steps[-1]["grad_norm"],
            "tokens_per_second": speed,
            "mfu": speed / self.world * self.flops / self.peak_flops,
        }

    def _read_recent(self) -> None:
        """Waits for the steps since the last log line, and checks them, where the GPU ran behind."""
        if not self.runs_ahead or not self.recent:
            return
        start, first = time.perf_counter(), self.progress.step - len(self.recent)
        for number, row in enumerate(self.recent):
            self._check(row, first + number)
        self.recent[-1]["seconds"] += time.perf_counter() - start

    def train_step(self) -> dict:
        """One optimizer step; halves the micro-batch and tries again when memory runs out.

        Where the trainer `runs_ahead` the loss and the norm are tensors that are not computed yet.
        """
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
        self.saved = None
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
            with self._micro_step(last):
                part = self.loss_of(self._put(idx), self._put(targets)) / n_targets
                self.accelerator.backward(part * self.world)  # times world: gradients are the processes' mean
            loss += part.detach()
        rate = scale * cfg.optim.learning_rate
        row = {"train_loss": self._sum(loss), "learning_rate": rate, "grad_norm": self._clip(), "n_targets": n_targets}
        if not self.runs_ahead:
            self._check(row, p.step)
        self.optimizer.step()
        self._clear_gradients()
        self.whole_now = None
        p.step += 1
        p.tokens += n_targets
        return row

    def _micro_step(self, last: bool) -> contextlib.AbstractContextManager:
        """Around a micro-batch. Gradients of a whole model are exchanged after the last one; those of a sharded model
        at once, because until then each process would hold all of them."""
        if self.sharded:
            return self.accelerator.autocast()  # which `prepare` puts around a whole model
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.loss_of)

    def _micro_batches(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of the step's batch: micro-batches are dealt out in turn, any split gives the same."""
        size, B = self.micro, self.config.batch_size
        for first in range(self.rank * size, B, size * self.world):
            yield self.data.batches.batch(step, B, rows=slice(first, first + size))

    def _clip(self) -> Tensor:
        """Clips the gradient and returns the norm that it had."""
        clip = self.config.optim.grad_clip or math.inf
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients()
        grads = [local(p.grad) for p in self.trained if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        if self.sharded:  # each process has the norm of its rows
            norm = self._sum(norm.square()).sqrt().to(self.device, norm.dtype)
        if clip < math.inf and (self.runs_ahead or norm > clip):
            torch._foreach_mul_(grads, (clip / (norm + 1e-6)).clamp(max=1))
        return norm

    def _check(self, row: dict, step: int) -> None:
        """Reads the loss and the norm of a step; refuses to go on where they are not finite."""
        row["train_loss"], row["grad_norm"] = loss, norm = float(row["train_loss"]), float(row["grad_norm"])
        skipped = self.accelerator.scaler is not None  # a scaler skips such a step by itself
        if not math.isfinite(loss) or not (math.isfinite(norm) or skipped):
            raise TrainingError(
                f"loss {loss}, gradient norm {norm} at step {step}: stopped; try a "
                f"lower learning rate, more warm-up, or --precision fp32. {safe_so_far(self.out)}"
            )

    def _clear_gradients(self) -> None:
        """As the optimizer's zero_grad, but for its marks for a profiler, which a small step would notice."""
        for parameter in self.trained:
            parameter.grad = None

    # ---- looking at it --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss in nats per token over the fixed validation windows; keeps the best weights and writes a sample."""
        self.gpt.eval()
        total, self.expert_use = torch.zeros(2, dtype=torch.float64), ExpertUse(self.gpt.config)
        for idx, targets in self._val_batches():
            n_targets = count_targets(targets)
            with watch_routers(self.gpt) as routed:
                loss = self.val_loss(idx, targets)
            if self.gpt.config.n_expert and n_targets:
                self.expert_use.add(routed)
            total += torch.tensor([loss, n_targets], dtype=torch.float64)
        if self.sharded:
            reshard(self.loss_of)
        loss_sum, count = self._sum(total).tolist()
        if self.gpt.config.n_expert:
            self.expert_use.counts = self._sum(self.expert_use.counts)
        if self.config.eval.sample_tokens:
            whole = self.whole()
            if self.accelerator.is_main_process:
                self.sample = self.sampler.write(self.out / "samples", self.progress.step, whole)
        self._judge(loss_sum / count)
        return loss_sum / count

    def _val_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's validation windows. A layer of a sharded model is gathered by all processes together: so each
        gets as many batches, of which the last may have no target."""
        idx, targets = self.data.val
        size = max(1, BATCH_TOKENS // self.gpt.config.block_size)  # windows: the same, whatever fits a training step
        n, at_once = len(idx), size * self.world
        end = -(-n // at_once) * at_once if self.sharded else n
        for first in range(self.rank * size, end, at_once):
            if first < n:
                yield idx[first : first + size], targets[first : first + size]
            else:
                yield idx[:size], torch.full_like(targets[:size], IGNORE_INDEX)

    def val_loss(self, idx: Tensor, targets: Tensor) -> float:
        """The summed loss of windows (B, T), without gradients."""
        idx, targets = self._put(idx), self._put(targets)
        with self.accelerator.autocast():
            return float(self.loss_of(idx, targets) if self.sharded else summed_loss(self.gpt, idx, targets))

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

    def _share_step(self) -> None:
        """Pushes what an evaluation has found, now that its row is in the log: a new best model, and the step, where
        each is kept on the Hub."""
        facts, self.new_best = self.new_best, None
        if not self.config.hub.repo_id:
            return
        whole = self.whole()
        if self.sharing and facts is not None and self.progress.step:
            self.sharing.best(whole, facts)
        if self.config.hub.push_steps:
            facts = self.save()
            if self.sharing:
                self.sharing.step(self.progress.step, whole, facts)

    def _log(self, bar: tqdm, row: dict) -> None:
        p = self.progress
        p.seconds = time.perf_counter() - self.started
        row = {"step": p.step, "tokens": p.tokens, "seconds": round(p.seconds, 3), **row}
        row |= self.expert_use.row() if "val_loss" in row else {}
        epochs = self.data.batches.epochs(p.step, self.config.batch_size)
        row |= {} if epochs is None else {"epochs": epochs}
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
        if FLOOR in self.data.baselines:
            line += f"  {row['val_loss'] - self.data.baselines[FLOOR]:.4f} above the entropy of the text"
        if "train_loss" in row:
            gap = row["val_loss"] - row["train_loss"]
            line += f"  train {row['train_loss']:.4f}, gap {gap:+.3f}"
            line += f"  epoch {row['epochs']:.2f}" if "epochs" in row else ""
            line += f"  {row['tokens_per_second']:,.0f} tok/s, {row['mfu']:.0%} of the matrix rate"
        line += describe_use(row, self.gpt.config)
        if self.config.eval.sample_tokens:
            line += "\n    | " + (self.sampler.prompt + self.sample)[:240].replace("\n", "\n    | ")
        return line

    def _bar(self) -> tqdm:
        return tqdm(
            total=self.config.max_steps, initial=self.progress.step, unit="step", desc="training",
            disable=not (self.accelerator.is_main_process and sys.stderr.isatty()), dynamic_ncols=True, mininterval=0.5,
        )  # fmt: skip

    def _closing_line(self, ended: str) -> str:
        p = self.progress
        line = f"{ended} after {p.step} steps, {p.tokens:,} tokens, {p.seconds:.0f} s"
        if math.isfinite(p.best_loss) and p.best_step > 0:
            line += f"; best validation loss {p.best_loss:.4f} at step {p.best_step}"
        return line

    # ---- keeping it -----------------------------------------------------------------------------------------------

    def save(self) -> RunFacts:
        """Writes the training state, then last/; every process must call it, the main one writes. Returns the facts.

        In this order a kill leaves no last/ that the run could not go on from.
        """
        self.saved_at = time.perf_counter()
        if self.saved is not None:
            return self.saved
        self._read_recent()
        self.progress.seconds = self.saved_at - self.started
        self._save_state()
        self.saved = self._save_folder("last")
        if self.sharing:
            self.sharing.state()
        self.accelerator.wait_for_everyone()
        return self.saved

    def _save_state(self) -> None:
        weights = dict(self.whole().named_parameters())  # a tied head is listed once
        moments = optimizer_tensors(self.gpt, self.optimizer)
        if self.sharded:
            moments = whole_tensors(moments)
        if not self.accelerator.is_main_process:
            return
        state = {**asdict(self.progress), "micro_batch_size": self.micro, "fixed": fixed_settings(self)}
        state |= {"recent": self.recent, "settings": settings_now(self), "changes": self.changes}
        state["log"] = self.metrics.mark()
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        save_state(self.out / "state", state, weights, moments)

    def repair_last(self) -> None:
        """Writes last/ of a finished run again, where a kill came before it."""
        whole = self.whole()
        if self.accelerator.is_main_process and not self._last_is_there(whole):
            with disk_errors(self.out, self.save_bytes):
                self._write_folder("last", whole, merged_facts(self.facts, progress_facts(self)))

    def _last_is_there(self, whole: GPT) -> bool:
        """Whether last/ holds these weights, and a card that was written after them."""
        last = self.out / "last"
        try:
            kept, _ = load_model(last)
            if (last / "README.md").stat().st_mtime_ns < (last / "model.safetensors").stat().st_mtime_ns:
                return False
        except (ValueError, OSError):
            return False
        weights = clean_state(without_adapters(whole))
        return all(torch.equal(tensor, weights[name].cpu()) for name, tensor in clean_state(kept).items())

    def _save_folder(self, name: str) -> RunFacts:
        """Writes best/ or last/ with its card, and run.json, which holds what the card of best/ is made of."""
        facts, whole = merged_facts(self.facts, progress_facts(self)), self.whole()
        if self.accelerator.is_main_process:
            self._write_folder(name, whole, facts)
        return facts

    def _write_folder(self, name: str, whole: GPT, facts: RunFacts) -> None:
        save_model(self.out / name, without_adapters(whole), self.tokenizer)
        write_card(self.out / name, facts)
        if name == "best":
            write_atomic(self.out / "run.json", json.dumps(facts, indent=2))

    def resume(self, facts: dict) -> None:
        """Takes up the state that `read_facts` described. Raises ValueError when it belongs to another kind of run, or
        when a file that the run goes on writing to is damaged; nothing is changed then."""
        missing = [name for name in (*COUNTERS, "fixed", "micro_batch_size") if name not in facts]
        if missing:
            raise StateError(f"{self.out / 'state' / 'state.json'} is damaged: it does not tell {missing[0]}")
        mine, fixed = fixed_settings(self), facts["fixed"]
        fixed = fixed if TOKENS in fixed else {**self.data.identity, **fixed}  # an earlier version does not tell all
        differing = [key for key in {**mine, **fixed} if fixed.get(key) != mine.get(key)]
        if differing:
            was, now = ({k: s.get(k) for k in differing} for s in (fixed, mine))
            raise ValueError(
                f"{self.out} holds a run with other settings ({was}, now {now}): use them again, choose another "
                "--out_dir, or start anew with --overwrite"
            )
        best_is_there = on_main(lambda: self._check_outputs(facts))
        self._load(facts)
        if self.accelerator.scaler is not None and "scaler" in facts:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        self.progress, self.recent = Progress(**{key: facts[key] for key in COUNTERS}), facts.get("recent", [])
        self.changes = [*facts.get("changes", []), *changes_between(facts, settings_now(self))]
        self.sample = self.sampler.read(self.out / "samples", self.progress.evaluated_step)
        if self.config.micro_batch_size == 0:  # what fitted before, and as many micro-batches in every process
            part = self.config.batch_size // self.world
            self.micro = next(divisors(part, min(self.micro, facts["micro_batch_size"])))
        if not best_is_there:
            self.progress.best_loss, self.progress.best_step = math.inf, -1  # the next evaluation writes one
        if self.sharing and self.progress.best_step > 0:
            self.sharing.go_on()
        if self.progress.step == 0:  # nothing learned: the evaluation before the first step comes again
            self.progress = Progress()

    def _check_outputs(self, facts: dict) -> bool:
        """Looks at the files that the run goes on writing to; returns whether there is a best/."""
        if "log" in facts and (self.out / METRICS).is_file():
            check_metrics(self.out / METRICS, facts["log"])
        if there := (self.out / "best").exists():
            check_best(self.out / "best")
        return there

    @torch.no_grad()
    def _load(self, facts: dict) -> None:
        """Weights and moments of a state, read by the main process. Raises StateError for those of another model."""
        named = dict(self.gpt.named_parameters())
        found: list[dict[str, Tensor]] = [{}, {}]

        def read() -> None:
            found[:] = load_tensors(self.out / "state", facts)
            shapes = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (found[0], named))
            if next(shapes) != next(shapes):
                raise StateError(f"{self.out / 'state' / facts['files']['model']} is of another model than this run's")

        on_main(read)
        weights, moments = found
        for name, tensor in from_main(weights, self.device):
            named[name].copy_(cut_as(tensor, named[name]))
        load_optimizer_tensors(self.gpt, self.optimizer, from_main(moments, self.device))
        self.whole_now = None

    def _save_due(self) -> bool:
        cfg, step = self.config.save, self.progress.step
        by_time = cfg.minutes and time.perf_counter() - self.saved_at > 60 * cfg.minutes
        return bool(by_time or (cfg.interval and step and step % cfg.interval == 0))

    # ---- processes, memory, compilation ---------------------------------------------------------------------------

    def _put(self, tensor: Tensor) -> Tensor:
        """The tensor on the device; nothing waits for the copy to a GPU."""
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _sum(self, value: Tensor | float) -> Tensor:
        """The sum over all processes."""
        value = torch.as_tensor(value)
        if self.world == 1:
            return value
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        total = self.accelerator.reduce(value.to(self.device, dtype), "sum").cpu()
        self.watchdog.beat()
        return total

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
        self.micro = next(divisors(self.config.batch_size, self.micro // 2))
        self._clear_gradients()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        steps = self.config.batch_size // self.micro
        self.say(f"out of memory: going on with micro_batch_size {self.micro}, {steps} times per step")

    def _compile(self) -> None:
        """Compiles in place, so that no wrapper shows in a saved name; where it fails the model runs as it is."""
        wanted = self.config.compile
        dense = not self.gpt.config.n_expert  # an expert gets another number of tokens each time: no shape to compile
        if wanted == "never" or (wanted == "auto" and not (self.device.type == "cuda" and dense)):
            return
        T = self.gpt.config.block_size
        probe = torch.zeros(self.micro, T, dtype=torch.long, device=self.device)
        self.say("compiling the model, which takes up to a minute ...")
        try:
            compile_layers(self.gpt) if self.sharded else self.loss_of.compile(dynamic=False)
            with self._micro_step(last=True):
                self.loss_of(probe, probe).backward()
            self._clear_gradients()
        except Exception as error:
            if is_out_of_memory(error):
                return  # the first step will find a micro-batch that fits
            torch.compiler.set_stance("force_eager")
            self.say(f"torch.compile does not work here ({type(error).__name__}); going on without it")


def free_fields(config: GPTConfig) -> tuple[str, ...]:
    """The fields of the model that may be others when a run goes on, or mean nothing."""
    dense = () if config.n_expert else ("n_expert", "n_expert_per_tok")
    return ("dropout", "init", "router_aux_loss_coef", *dense)


def fixed_settings(trainer: Trainer) -> dict:
    """What must be the same when a run goes on: otherwise it would not be that run."""
    config = trainer.config
    settings = {
        "seed": config.seed,
        "batch_size": config.batch_size,
        "optimizer": config.optim.name,
        **trainer.data.identity,
        "tokenizer": trainer.tokenizer.hash[:16],
        "model": {k: v for k, v in asdict(trainer.gpt.config).items() if k not in free_fields(trainer.gpt.config)},
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
