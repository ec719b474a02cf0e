"""Fine-tuning: a small language model, pretrained on one text, and trained further on another.

    python benchmarks/finetune.py --jobs 2              # docs/finetuning/finetune.json
    python benchmarks/finetune.py --quick --json x.json
    python benchmarks/finetune.py --page-only           # the table of docs/finetuning.md

The model is a Llama of transformers (bytes, width 128, 4 layers of 4 heads, SwiGLU, head tied; 0.8
million parameters), pretrained for 1,000 steps of 16 x 128 bytes on the source of Python's standard
library: once with AdamW at its best learning rate of three, and once with MuonW likewise. Every way
of fine-tuning takes 200 steps on another text that every machine with torch has, the C++ headers
that come with it, from the same weights:

- `adamw`, `muonw`: all weights. MuonW has the scale "match_rms_adamw", so that one learning rate
  serves both of its parts and the grids are AdamW's own.
- `lora, adamw`; `lora, muon`: PEFT's LoRA of rank 8 on all linear layers, alpha 8, by AdamW, and by
  MuonW with the rule of docs/trainers.md.
- `lora, lora-muon`: the rule of arXiv 2606.12921 (lora_muon.py).

Constant learning rate after 20 steps of warm-up, no weight decay, betas (0.9, 0.95), gradients
clipped to 1. Swept alike, on seed 0: four rates, a factor of 3 apart, and further ones as long as
the best is at the edge; the best is then run on all seeds, which differ in the order of batches and
in LoRA's first factor. Quoted are the validation loss on the new text, and that on the old one
(what was forgotten; 0 steps: as it was before). Stopped, the same command goes on.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
import transformers
from curves import Runs
from lora_muon import LoRAMuon
from parts import Record, machine_line, replace_block, table
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from muonkit import MuonW, Rule
from muonkit.lab.data import TextData, stdlib_text
from muonkit.lab.results import Figure, figure, p_value, welch

DOCS = Path(__file__).resolve().parents[1] / "docs"
FILE = DOCS / "finetuning" / "finetune.json"
PAGE = DOCS / "finetuning.md"
CONTEXT, BATCH, WARM_UP, RANK = 128, 16, 20, 8
FACTORS = Rule("*.lora_[AB].*", "muon")
# The first rates of every sweep.
RATES = {
    "adamw": 3e-4,
    "muonw": 3e-4,
    "lora, adamw": 1e-3,
    "lora, muon": 1e-3,
    "lora, lora-muon": 1e-2,
}
METHODS = {"adamw": tuple(RATES), "muonw": ("adamw", "muonw")}  # by what pretrained the model
FACTOR, FEWEST = 3.0, 4


def headers(context: int) -> TextData:
    """The C++ headers of torch: one file in ten validates."""
    root = Path(torch.__file__).parent / "include" / "ATen"
    sides: list[list[bytes]] = [[], []]
    for number, path in enumerate(sorted(root.rglob("*.h"))):
        sides[number % 10 == 9].append(path.read_bytes())
    train, val = (
        torch.frombuffer(bytearray(b"\n".join(some)), dtype=torch.uint8) for some in sides
    )
    return TextData("torch's C++ headers", train, val, context)


def new_model() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def optimizer_of(method: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """With LoRA the model is one of PEFT's."""
    if method.endswith("adamw"):
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr, betas=(0.9, 0.95), weight_decay=0.0)
    if method == "lora, lora-muon":
        return LoRAMuon(pairs(model), lr)
    return MuonW(
        model,
        lr=lr,
        weight_decay=0.0,
        adjust_lr_fn="match_rms_adamw",
        adamw_betas=(0.9, 0.95),
        rules=[FACTORS] if method == "lora, muon" else [],
    )


def pairs(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """PEFT's `lora_B` and `lora_A` of every adapted layer."""
    named = dict(model.named_parameters())
    return [
        (p, named[name.replace("lora_B", "lora_A")])
        for name, p in named.items()
        if "lora_B" in name
    ]


def evaluate(model: nn.Module, data: TextData) -> float:
    losses = []
    with torch.no_grad():
        for x, y in data.validation():
            losses.append(loss_of(model, x, y).item())
    return sum(losses) / len(losses)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=x).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())


def train(
    model: nn.Module, data: TextData, method: str, lr: float, seed: int, steps: int
) -> list[float]:
    """Every step's training loss."""
    optimizer = optimizer_of(method, model, lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1.0, (k + 1) / WARM_UP))
    trained = [p for p in model.parameters() if p.requires_grad]
    losses = []
    for step in range(steps):
        x, y = data.batch(seed, step, BATCH)
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def pretrain(method: str, steps: int, folder: Path) -> Path:
    """The weights of the best of three rates, in a file."""
    torch.set_num_threads(1)
    path = folder / f"{method}-{steps}.pt"
    if path.exists():
        return path
    data, best = stdlib_text(CONTEXT), None
    for lr in (1e-3, 3e-3, 9e-3):
        torch.manual_seed(0)
        model = new_model()
        train(model, data, method, lr, 0, steps)
        loss = evaluate(model, data)
        if best is None or loss < best["loss"]:
            best = {"loss": loss, "lr": lr, "weights": model.state_dict()}
    part = path.with_name(f"{path.name}.part")
    torch.save(best, part)
    part.replace(path)
    return path


def finetune(base: Path, method: str, lr: float, seed: int, steps: int) -> Record:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = new_model()
    model.load_state_dict(torch.load(base)["weights"])
    if method.startswith("lora"):
        lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
        model = get_peft_model(model, lora)  # type: ignore[arg-type]
    old, new = stdlib_text(CONTEXT), headers(CONTEXT)
    losses = train(model, new, method, lr, seed, steps)
    return {
        "losses": losses,
        "new": evaluate(model, new),
        "old": evaluate(model, old),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def tune(seeds: int, loss_of: Callable[[float, int], float], first: float) -> None:
    """The runs of one method: the sweep on seed 0, then its best rate on all seeds."""

    def loss(lr: float, seed: int) -> float:
        found = loss_of(float(f"{lr:.3g}"), seed)
        return found if found == found else float("inf")

    rates = [first * FACTOR**k for k in range(FEWEST)]
    while True:
        losses = [loss(lr, 0) for lr in rates]
        at = losses.index(min(losses))
        if 0 < at < len(rates) - 1 or len(rates) >= 2 * FEWEST:
            break
        rates = [rates[0] / FACTOR, *rates] if at == 0 else [*rates, rates[-1] * FACTOR]
    for seed in range(1, seeds):
        loss(rates[at], seed)


def measure(path: Path, options: argparse.Namespace) -> None:
    setting = {"pretrain": options.pretrain, "steps": options.steps, "seeds": options.seeds}
    # The texts come with them.
    setting |= {"torch": torch.__version__, "python": platform.python_version()}
    runs = Runs(path, "finetune", setting, ("base", "method", "lr", "seed"))
    torch.set_num_threads(1)  # as every run's; the file says so
    options.folder.mkdir(parents=True, exist_ok=True)
    made = functools.partial(pretrain, steps=options.pretrain, folder=options.folder)
    with ProcessPoolExecutor(options.jobs) as pool, ThreadPoolExecutor(options.jobs) as threads:
        files = dict(zip(METHODS, pool.map(made, METHODS), strict=True))
        bases = {}
        for base, file in files.items():
            best = torch.load(file)
            model = new_model()
            model.load_state_dict(best["weights"])
            new = evaluate(model, headers(CONTEXT))
            bases[base] = {"lr": best["lr"], "old": best["loss"], "new": new}
        runs.keep(bases=bases)

        def tuned(base: str, method: str) -> str:
            def loss_of(lr: float, seed: int) -> float:
                asked = (finetune, files[base], method, lr, seed, options.steps)
                found = runs.get((base, method, lr, seed), lambda: pool.submit(*asked).result())
                return float(found["new"])

            tune(options.seeds, loss_of, RATES[method])
            return f"{base}: {method}"

        ways = [(base, method) for base, methods in METHODS.items() for method in methods]
        for future in as_completed([threads.submit(tuned, *way) for way in ways]):
            print(future.result(), flush=True)


def runs_of(record: Record, base: str, method: str) -> list[Record]:
    return [run for run in record["runs"] if (run["base"], run["method"]) == (base, method)]


def chosen(runs: list[Record]) -> list[Record]:
    """The runs at the rate that was best on seed 0."""
    first = [run for run in runs if run["seed"] == 0 and run["new"] == run["new"]]
    best = min(first, key=lambda run: float(run["new"]))["lr"]
    return [run for run in runs if run["lr"] == best]


def block(record: Record) -> str:
    parts = [machine_line(record)]
    for base, methods in METHODS.items():
        before = record["bases"][base]
        of_adamw = chosen(runs_of(record, base, "adamw"))
        rows: list[tuple[float, list[object]]] = []
        for method in methods:
            runs = chosen(runs_of(record, base, method))
            new, old = (figure([run[key] for run in runs]) for key in ("new", "old"))
            assert isinstance(new, Figure)
            assert isinstance(old, Figure)
            p = welch([run["new"] for run in runs], [run["new"] for run in of_adamw])
            cells = [
                method,
                f"{runs[0]['trained']:,}",
                f"{runs[0]['lr']:g}",
                new.text(4),
                "" if method == "adamw" else p_value(p),
                old.text(3),
            ]
            rows.append((new.mean, cells))
        rows.sort(key=lambda row: row[0])
        head = ["way", "weights trained", "lr", "new text", "p", "old text"]
        zero = ["before", "", "", f"{before['new']:.4f}", "", f"{before['old']:.3f}"]
        parts.append(f"Pretrained with `{base}` (lr {before['lr']:g}):")
        parts.append(table(head, [*(cells for _, cells in rows), zero]))
    return "\n\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrain", type=int, default=1000, help="steps")
    parser.add_argument("--steps", type=int, default=200, help="of fine-tuning")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--json", type=Path, default=FILE)
    parser.add_argument("--folder", type=Path, default=DOCS.parent / "runs" / "finetune")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it works")
    parser.add_argument("--page-only", action="store_true", help="train nothing")
    options = parser.parse_args()
    if options.quick:
        options.pretrain, options.steps, options.seeds = 3, 3, 2
        options.folder = Path(tempfile.mkdtemp())
    if not options.page_only:
        measure(options.json, options)
    written = block(json.loads(options.json.read_text()))
    if options.json == FILE:
        PAGE.write_text(replace_block(PAGE.read_text(), "finetune", written))
    else:
        print(written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
