"""The numbers that modules state about themselves: widths, heads, experts, kernel sizes.

Each is read by the names under which public code keeps it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "CLASSES",
    "CONFIGS",
    "ENSEMBLES",
    "EXPERT_COUNTS",
    "HEADS",
    "HEAD_DIM",
    "INPUTS",
    "KERNEL_SIZES",
    "KV_HEADS",
    "OUTPUTS",
    "WIDTHS",
    "first_number",
    "number",
    "stated",
    "widths_of",
]

# Where a module keeps the configuration of its model.
CONFIGS = ("config", "cfg", "args")

HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "nheads", "heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads")
HEAD_DIM = ("head_dim", "head_size", "attention_head_size", "dim_head", "d_head")
WIDTHS = ("hidden_size", "embed_dim", "n_embd", "d_model", "dim")
KERNEL_SIZES = ("kernel_size", "conv_kernel_size", "conv_kernel", "d_conv", "filter_size")
EXPERT_COUNTS = (
    "num_experts",
    "num_local_experts",
    "n_experts",
    "moe_num_experts",
    "n_routed_experts",
)
CLASSES = (
    "num_classes",
    "num_class",
    "n_classes",
    "n_class",
    "nb_classes",
    "number_classes",
    "class_num",
    "classnum",
    "cls_num",
    "num_speakers",
)
ENSEMBLES = ("ensemble_size", "num_ensemble", "num_ensembles", "n_ensemble", "num_nets")

# The attributes with a layer's inputs and outputs: torch's and Hugging Face's, convolutions',
# graph libraries' (PyG, DGL), Megatron's, and those of small public packages.
_WIDTHS = (
    ("in_features", "out_features"),
    ("nx", "nf"),
    ("in_channels", "out_channels"),
    ("in_channel", "out_channel"),
    ("_in_feats", "_out_feats"),
    ("_in_src_feats", "_out_feats"),
    ("in_feats", "out_feats"),
    ("in_feat", "out_feat"),
    ("in_size", "out_size"),
    ("input_size_per_partition", "output_size_per_partition"),
    ("input_size", "output_size"),
    ("input_dim", "output_dim"),
    ("inputdim", "outdim"),
    ("in_dim", "out_dim"),
    ("dim_in", "dim_out"),
)
INPUTS = ("in_features", "nx", "in_channels")
OUTPUTS = ("out_features", "nf", "out_channels")


def stated(source: object, name: str) -> Any:
    """The attribute of this name, or None.

    None also where the attribute is a property that raises, as some do until a module is set up.
    """
    try:
        return getattr(source, name, None)
    except Exception:
        return None


def number(source: object, name: str) -> int | None:
    """The positive whole number that an object keeps under a name, if it keeps one."""
    value = stated(source, name) if name else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def first_number(sources: Iterable[object], names: Sequence[str]) -> int | None:
    """The first such number of the first of the objects that has one."""
    return next((v for s in sources for n in names if (v := number(s, n)) is not None), None)


def widths_of(module: object) -> tuple[int, int] | None:
    """(outputs, inputs) of a layer by its own word; None where it states no two of a kind."""
    for takes, gives in _WIDTHS:
        inputs, outputs = number(module, takes), number(module, gives)
        if inputs is not None and outputs is not None:
            return outputs, inputs
    return None
