"""The GPT that people start from, on any text: RoPE, QK norm, ReLU², Muon for the matrices.

Run it from the checkout; without ``--text`` it trains on the source of Python's standard library::

    python examples/train_gpt.py
    python examples/train_gpt.py --text book.txt more.txt --steps 2000 --width 384 --layers 6
    python examples/train_gpt.py --optimizer adamw --log runs/adamw.jsonl
    torchrun --nproc-per-node 2 examples/train_gpt.py      # DDP with ZeRO-1: the same losses
    python examples/train_gpt.py --checkpoint runs/gpt     # stopped, go on with --resume

Bytes are the tokens, the last tenth of a text validates. It runs on the GPU in bfloat16 autocast
where there is one, else on the CPU. ``--log`` keeps every loss as a line of JSON. A resumed run has
the losses of one that was never stopped; so has one on several ranks, to rounding, and with
``--ns-dtype float32``.

The model is that of the speed-runs (github.com/KellerJordan/modded-nanogpt), without what only
seconds on a GPU ask for: norms without gains, rotated and normalized queries and keys, squared
ReLU, projections to the residual stream that begin at zero. So is the schedule: a short warm-up, a
constant rate, and a linear warm-down.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from muonkit import MuonW
from muonkit.lab.data import TextData, generator, stdlib_text

VOCABULARY = 256
BETAS = (0.9, 0.95)
#: Peak rates of the hidden matrices at the default size: those that `muonkit compare gpt --sweep`
#: chose for a model of the same size. MuonW's is in the unit of AdamW's, by "match_rms_adamw".
LR = {"muonw": 0.016, "adamw": 0.002}

# --- the model -------------------------------------------------------------------------------


def norm(x: Tensor) -> Tensor:
    """RMS norm over the last dim, without a gain."""
    return F.rms_norm(x, (x.shape[-1],))


class Rotary(nn.Module):
    """RoPE: each pair of a head's entries is turned by an angle that grows with the position."""

    def __init__(self, head_width: int, context: int, base: float = 10_000.0) -> None:
        super().__init__()
        rates = base ** (-torch.arange(0, head_width, 2) / head_width)
        angles = torch.outer(torch.arange(context), rates)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, time, head width) to the same."""
        time = x.shape[-2]
        cos, sin = self.cos[:time], self.sin[:time]
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


class Block(nn.Module):
    """Causal attention with QK norm, then an MLP with ReLU²; each added to the residual stream."""

    def __init__(self, width: int, heads: int, rotary: Rotary) -> None:
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        # At first a block adds nothing, whatever the depth.
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.rotary(norm(q)), self.rotary(norm(k))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(norm(x))).square())


class GPT(nn.Module):
    """int64 (batch, time) to logits (batch, time, vocabulary)."""

    def __init__(self, width: int, layers: int, heads: int, context: int, tied: bool) -> None:
        super().__init__()
        if width % (2 * heads):
            raise SystemExit(f"--width {width} is not {heads} heads (--heads) of an even width")
        self.tokens = nn.Embedding(VOCABULARY, width)
        rotary = Rotary(width // heads, context)
        self.blocks = nn.ModuleList(Block(width, heads, rotary) for _ in range(layers))
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        if tied:
            self.head.weight = self.tokens.weight
        else:
            nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(norm(x))
        return logits.float()


# --- data, optimizers, schedule --------------------------------------------------------------


def text_data(paths: Sequence[Path], context: int) -> TextData:
    """The bytes of the files, one after the other; of each the last tenth validates.

    Raises:
        SystemExit: a file cannot be read, or all are too short for a window.
    """
    sides: list[list[bytes]] = [[], []]
    for path in paths:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise SystemExit(f"--text {path}: {error.strerror}") from error
        cut = len(content) * 9 // 10
        sides[0].append(content[:cut])
        sides[1].append(content[cut:])
    train, val = (torch.frombuffer(bytearray(b"".join(s) or b"\0"), dtype=torch.uint8)
                  for s in sides)  # fmt: skip
    if len(val) <= context + 1:
        raise SystemExit(
            f"--text has {len(train) + len(val):,} bytes, and a tenth, which validates, is to be "
            f"longer than a window of {context} bytes: give more text, or a smaller --context"
        )
    return TextData(f"{len(paths)} files", train, val, context)


def make_optimizer(model: GPT, options: argparse.Namespace) -> torch.optim.Optimizer:
    """MuonW over the whole model; or AdamW, with a rate of its own for embedding and head too."""
    shared = {"lr": options.lr, "weight_decay": options.weight_decay}
    if options.optimizer == "muonw":
        group = dist.group.WORLD if dist.is_initialized() else None
        return MuonW(
            model,
            adamw_lr=options.embedding_lr,
            adamw_betas=BETAS,
            adjust_lr_fn="match_rms_adamw",
            ns_dtype=options.ns_dtype,
            process_group=group,
            zero=1,
            **shared,
        )
    # The model has no vectors: whatever is not in a block is the embedding or the head.
    tables = [p for name, p in model.named_parameters() if not name.startswith("blocks.")]
    groups = [
        {"params": list(model.blocks.parameters())},
        {"params": tables, "lr": options.embedding_lr},
    ]
    return torch.optim.AdamW(groups, betas=BETAS, fused=True, **shared)


def lr_factor(step: int, steps: int, warmup: float, warmdown: float) -> float:
    """The share of the peak rate at ``step`` (from 0): a warm-up, a plateau, a warm-down to 0.

    Args:
        step: steps done.
        steps: length of the run.
        warmup: share of the steps in which the rate rises.
        warmdown: share of the steps, the last ones, in which it falls.
    """
    rise, fall = max(1, round(warmup * steps)), max(1, round(warmdown * steps))
    return min((step + 1) / rise, (steps - step) / fall, 1.0)


# --- training --------------------------------------------------------------------------------


class Log:
    """Every loss as a line of JSON; on rank 0, and only if asked for.

    What a resumed run finds beyond its checkpoint is cut off, and trained again.
    """

    def __init__(self, path: Path | None, facts: dict[str, Any], done: int) -> None:
        self.path = path
        lines = [facts]
        if path and done:
            if not path.exists():
                raise SystemExit(f"--log {path} is gone, to which {done} steps were written")
            written = path.read_text("utf-8").splitlines()
            # The facts, and a line for each step; a kill may have left half a line at the end.
            lines = [json.loads(line) for line in written[: 1 + done]]
            known = json.loads(json.dumps(facts))
            other = [key for key in known if key not in MAY_CHANGE
                     and (not lines or lines[0].get(key) != known[key])]  # fmt: skip
            if other or lines[-1].get("step") != done:
                raise SystemExit(
                    f"--log {path} is not the log of this run's first {done} steps "
                    f"({', '.join(other) or 'a step is missing'}): name that one, or another file "
                    "without --resume"
                )
        self.seconds = max(line.get("seconds", 0.0) for line in lines)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = path.with_name(f"{path.name}.new")  # a kill in a write would lose all lines
            whole.write_text("".join(f"{json.dumps(line)}\n" for line in lines), "utf-8")
            whole.replace(path)

    def add(self, *lines: dict[str, Any]) -> None:
        if self.path:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(f"{json.dumps(line)}\n" for line in lines)


class Training:
    """One run: ``train`` goes on from wherever its progress is."""

    def __init__(self, options: argparse.Namespace, rank: int, count: int) -> None:
        self.options, self.rank, self.count = options, rank, count
        is_cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if is_cuda else "cpu"
        self.autocast = torch.autocast("cuda", torch.bfloat16, enabled=is_cuda)
        context = options.context
        self.data = text_data(options.text, context) if options.text else stdlib_text(context)
        torch.manual_seed(generator("weights", options.seed).initial_seed())
        sizes = (options.width, options.layers, options.heads, context)
        self.model = GPT(*sizes, tied=options.tied).to(self.device)
        self.optimizer = make_optimizer(self.model, options)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.replica = DistributedDataParallel(self.model) if count > 1 else self.model
        self.progress = common.Progress(self.model, self.optimizer)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with self.autocast:
            logits = model(x.to(self.device))
        return F.cross_entropy(logits.flatten(0, 1), y.to(self.device).flatten())

    @torch.no_grad()
    def validation_loss(self) -> float:
        losses = [self.loss(self.model, x, y) * y.numel() for x, y in self.data.validation()]
        return float(sum(losses)) / sum(y.numel() for _, y in self.data.validation())

    def one_step(self) -> Tensor:
        options, step = self.options, self.progress.step
        factor = lr_factor(step, options.steps, options.warmup, options.warmdown)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        batch = self.data.batch(options.seed, step, options.batch)
        loss = self.loss(self.replica, *common.part_of(batch, self.rank, self.count))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.step += 1
        return loss.detach()

    def train(self) -> None:
        options, progress = self.options, self.progress
        checkpoints = common.open_checkpoints(options, progress, self.rank)
        is_first = self.rank == 0
        facts = {key: value for key, value in vars(options).items() if key not in NOT_FACTS}
        facts = {**facts, "parameters": sum(p.numel() for p in self.model.parameters())}
        facts |= {"data": self.data.fingerprint, "ranks": self.count, "device": str(self.device)}
        log = Log(options.log if is_first else None, facts, progress.step)
        waiting: list[Tensor] = []  # losses that were not read yet, so that a GPU need not wait
        began = time.perf_counter() - log.seconds
        while progress.step < options.steps:
            waiting.append(self.one_step())
            step, last = progress.step, progress.step == options.steps
            saves = checkpoints is not None and (last or step % options.save_every == 0)
            if not (last or saves or step % options.every == 0):
                continue
            means = torch.stack(waiting)
            if self.count > 1:
                dist.all_reduce(means)
                means /= self.count
            found = [{"step": step - len(waiting) + 1 + i, "loss": loss}
                     for i, loss in enumerate(means.tolist())]  # fmt: skip
            seconds = found[-1]["seconds"] = time.perf_counter() - began
            waiting.clear()
            if is_first and (last or step % options.every == 0):
                print(f"step {step:5}  loss {found[-1]['loss']:.6f}", flush=True)
            if last or step % options.validate_every == 0:
                found[-1]["validation_loss"] = self.validation_loss()
                if is_first:
                    print(f"step {step:5}  validation loss {found[-1]['validation_loss']:.6f}  "
                          f"after {seconds:.0f} s of training", flush=True)  # fmt: skip
            log.add(*found)
            if checkpoints and saves:
                checkpoints.save(progress)
            began = time.perf_counter() - seconds  # validating and saving is not training


#: Options that change no loss.
NOT_FACTS = ("text", "log", "checkpoint", "resume", "save_every", "every", "timeout")
#: Facts that a resumed run may have otherwise than its beginning.
MAY_CHANGE = ("steps", "ranks", "device")


def arguments() -> argparse.Namespace:
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--text", type=Path, nargs="+", metavar="FILE", help="text to train on")
    add("--optimizer", choices=LR, default="muonw", help="(muonw)")
    add("--width", type=common.at_least_one, default=128, help="of the residual stream (128)")
    add("--layers", type=common.at_least_one, default=4, help="(4)")
    add("--heads", type=common.at_least_one, default=4, help="(4)")
    add("--context", type=common.at_least_one, default=128, help="bytes in a window (128)")
    add("--tied", action="store_true", help="one matrix for embedding and head")
    add("--embedding-lr", type=float, default=0.016, help="peak rate of embedding and head (0.016)")
    add("--weight-decay", type=float, default=0.1, help="(0.1)")
    add("--warmup", type=float, default=0.05, help="share of the steps (0.05)")
    add("--warmdown", type=float, default=0.5, help="share of the steps (0.5)")
    add(
        "--validate-every",
        type=common.at_least_one,
        default=50,
        help="steps between validations (50)",
    )
    add("--ns-dtype", default="auto", help="of MuonW's products (auto: the fastest here)")
    add("--log", type=Path, metavar="FILE", help="every loss, as lines of JSON")
    parser.set_defaults(lr=None, steps=400)
    options = parser.parse_args()
    options.lr = LR[options.optimizer] if options.lr is None else options.lr
    # A validation belongs to a step whose loss is read anyway.
    if options.validate_every % options.every:
        parser.error("--validate-every is a multiple of --every")
    return options


def main() -> None:
    options = arguments()
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.set_float32_matmul_precision("high")
        backend = "cpu:gloo,cuda:nccl"
    with common.ranks(options.timeout, backend) as (rank, count):
        Training(options, rank, count).train()


if __name__ == "__main__":
    main()
