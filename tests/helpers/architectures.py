"""The models whose routing is written out in tests/routing/tables, built without weights.

`python -m tests.helpers.architectures` writes docs/routing-tables.md anew, and with `--expected`
the tables that the tests compare with: read what changed before you keep it.
"""

from __future__ import annotations

import itertools
import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from muonkit.routing.routes import route
from tests.helpers.paths import DOCS, TESTS

if TYPE_CHECKING:
    from collections.abc import Callable

TABLES = TESTS / "routing" / "tables"
PAGE = DOCS / "routing-tables.md"
SCALE = "match_rms_adamw"  # that of the tables: torch's name, whatever MuonW's default is


# -- own convnets ---------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """He et al. 2015, the block of ResNet-18 and -34."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNet(nn.Module):
    """A ResNet of BasicBlocks, two per stage."""

    def __init__(self, widths: tuple[int, ...] = (8, 16, 32, 64), classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        stages, inputs = [], widths[0]
        for i, width in enumerate(widths):
            first = BasicBlock(inputs, width, stride=1 if i == 0 else 2)
            stages.append(nn.Sequential(first, BasicBlock(width, width)))
            inputs = width
        self.layers = nn.Sequential(*stages)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(torch.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


class ConvNeXtBlock(nn.Module):
    """Liu et al. 2022: depthwise 7 × 7, then two pointwise linear layers, scaled per channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim, 1, 1), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).movedim(1, -1))
        y = self.pwconv2(nn.functional.gelu(self.pwconv1(y)))
        return x + self.gamma * y.movedim(-1, 1)


class ConvNeXt(nn.Module):
    """Two stages of two blocks."""

    def __init__(self, dims: tuple[int, ...] = (8, 16), classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, dims[0], 4, 4), nn.GroupNorm(1, dims[0]))
        stages: list[nn.Module] = [nn.Sequential(*(ConvNeXtBlock(dims[0]) for _ in range(2)))]
        for narrow, wide in itertools.pairwise(dims):
            stages += [
                nn.Sequential(nn.GroupNorm(1, narrow), nn.Conv2d(narrow, wide, 2, 2)),
                nn.Sequential(*(ConvNeXtBlock(wide) for _ in range(2))),
            ]
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stages(self.stem(x)).mean((2, 3))))


# -- Hugging Face, PEFT and torch -----------------------------------------------------------------

_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_TEXT = _SMALL | {"vocab_size": 100}


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=100)
    return GPT2LMHeadModel(config)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_TEXT, num_key_value_heads=2))


def qwen3_moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **_TEXT, num_key_value_heads=2, head_dim=8, num_experts=4, moe_intermediate_size=24
    )
    return Qwen3MoeForCausalLM(config)


def bert_classifier() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**_TEXT, num_labels=3))


def bert_masked_lm() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**_TEXT))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(**_SMALL, image_size=32, patch_size=8, num_labels=10)
    return ViTForImageClassification(config)


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=100)
    return T5ForConditionalGeneration(config)


def torch_transformer() -> nn.Module:
    return nn.Transformer(32, 4, 2, 2, 64, batch_first=True)


def lora_gpt2() -> nn.Module:
    """LoRA on GPT-2's fused attention, its stored-transposed layers named as PEFT wants them."""
    return _lora(gpt2(), ["c_attn"], fan_in_fan_out=True)


def dora_llama() -> nn.Module:
    """DoRA on Llama's attention, with the output head trained in full beside it."""
    return _lora(llama(), ["q_proj", "v_proj"], use_dora=True, modules_to_save=["lm_head"])


def _lora(model: nn.Module, targets: list[str], **options: object) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, **options))


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "gpt2": gpt2,
    "llama": llama,
    "qwen3_moe": qwen3_moe,
    "bert_classifier": bert_classifier,
    "bert_masked_lm": bert_masked_lm,
    "vit": vit,
    "t5": t5,
    "resnet": ResNet,
    "convnext": ConvNeXt,
    "torch_transformer": torch_transformer,
    "lora_gpt2": lora_gpt2,
    "dora_llama": dora_llama,
}


def main() -> None:
    """Write the tables where the command line says."""
    sections = {name: str(route(build(), scale=SCALE)) for name, build in ARCHITECTURES.items()}
    if "--expected" in sys.argv[1:]:
        TABLES.mkdir(exist_ok=True)
        for name, table in sections.items():
            (TABLES / f"{name}.txt").write_text(f"{table}\n", encoding="utf-8")
        return
    text = "# Routing tables\n\n"
    text += "Written by `python -m tests.helpers.architectures`; small configurations.\n"
    text += f"The scale is that of `{SCALE}`; MuonW's default, `unit_rms`, is five times that.\n"
    text += "The index of a layer is written `*`, and rows that are equal but for it are counted.\n"
    for name, table in sections.items():
        text += f"\n## {name}\n\n```text\n{table}\n```\n"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
