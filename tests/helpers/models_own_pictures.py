"""Models of our own writing for the routing tests: diffusion and pictures.

Routing reads what is registered and never calls a model, so none of them has a forward. Widths are
small; what leaves a model is said in its docstring.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

D = 32

# fmt: off


class Parts(nn.Module):
    """A module with these children and parameters, in this order."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def raw(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def conv_block(a: int, b: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(),
        nn.Conv2d(b, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(),
    )


# -- diffusion ------------------------------------------------------------------------------------


class DiTBlock(Parts):
    def __init__(self) -> None:
        super().__init__(
            norm1=nn.LayerNorm(D, elementwise_affine=False),
            attn=Parts(qkv=nn.Linear(D, 3 * D), proj=nn.Linear(D, D)),
            mlp=Parts(fc1=nn.Linear(D, 4 * D), fc2=nn.Linear(4 * D, D)),
            adaLN_modulation=nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D)),
        )


class DiT(Parts):
    """Peebles and Xie 2023. final_layer.linear gives the noise; its modulation is hidden."""

    def __init__(self) -> None:
        super().__init__(
            x_embedder=Parts(proj=nn.Conv2d(4, D, 2, 2)),
            t_embedder=Parts(mlp=mlp(64, D, D)),
            y_embedder=Parts(embedding_table=nn.Embedding(11, D)),
            pos_embed=raw(1, 16, D),
            blocks=nn.ModuleList([DiTBlock() for _ in range(2)]),
            final_layer=Parts(
                linear=nn.Linear(D, 32),
                adaLN_modulation=nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D)),
            ),
        )


class MMDiT(Parts):
    """Two streams of one transformer (Esser et al. 2024); proj_out gives the velocity."""

    def __init__(self) -> None:
        def block() -> nn.Module:
            return Parts(
                norm1=Parts(linear=nn.Linear(D, 6 * D)),
                attn=Parts(
                    to_q=nn.Linear(D, D), to_k=nn.Linear(D, D), to_v=nn.Linear(D, D),
                    add_q_proj=nn.Linear(D, D), add_k_proj=nn.Linear(D, D),
                    add_v_proj=nn.Linear(D, D),
                    to_out=nn.ModuleList([nn.Linear(D, D), nn.Dropout()]),
                    to_add_out=nn.Linear(D, D),
                ),
                ff=Parts(net=nn.ModuleList(
                    [Parts(proj=nn.Linear(D, 4 * D)), nn.Dropout(), nn.Linear(4 * D, D)])),
            )

        super().__init__(
            x_embedder=nn.Linear(16, D),
            context_embedder=nn.Linear(24, D),
            time_text_embed=Parts(
                timestep_embedder=Parts(linear_1=nn.Linear(16, D), linear_2=nn.Linear(D, D))
            ),
            transformer_blocks=nn.ModuleList([block(), block()]),
            norm_out=Parts(linear=nn.Linear(D, 2 * D)),
            proj_out=nn.Linear(D, 16),
        )


class ResBlock(Parts):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(
            norm1=nn.GroupNorm(4, a), conv1=nn.Conv2d(a, b, 3, padding=1),
            time_emb_proj=nn.Linear(64, b),
            norm2=nn.GroupNorm(4, b), conv2=nn.Conv2d(b, b, 3, padding=1),
            conv_shortcut=nn.Conv2d(a, b, 1) if a != b else nn.Identity(),
        )


class ConvAttention(Parts):
    def __init__(self, width: int) -> None:
        super().__init__(
            mem_kv=raw(2, 4, width // 4, 4),
            to_qkv=nn.Conv2d(width, 3 * width, 1, bias=False),
            to_out=nn.Conv2d(width, width, 1),
        )
        self.heads = 4


class DiffusionUNet(Parts):
    """conv_out gives the noise."""

    def __init__(self) -> None:
        super().__init__(
            conv_in=nn.Conv2d(3, 16, 3, padding=1),
            time_embedding=Parts(linear_1=nn.Linear(16, 64), linear_2=nn.Linear(64, 64)),
            down_blocks=nn.ModuleList(
                [
                    Parts(res=ResBlock(16, 16), attn=ConvAttention(16), down=nn.Conv2d(16, 16, 3,
                        2, 1)),
                    Parts(res=ResBlock(16, 32), attn=ConvAttention(32), down=nn.Conv2d(32, 32, 3,
                        2, 1)),
                ]
            ),
            mid=Parts(res1=ResBlock(32, 32), attn=ConvAttention(32), res2=ResBlock(32, 32)),
            up_blocks=nn.ModuleList(
                [
                    Parts(res=ResBlock(64, 32), attn=ConvAttention(32), up=nn.ConvTranspose2d(32,
                        32, 4, 2, 1)),
                    Parts(res=ResBlock(48, 16), attn=ConvAttention(16), up=nn.ConvTranspose2d(16,
                        16, 4, 2, 1)),
                ]
            ),
            norm_out=nn.GroupNorm(4, 16),
            conv_out=nn.Conv2d(16, 3, 3, padding=1),
        )


class SequentialUNet(Parts):
    """Ho's UNet as written by Dhariwal and Nichol: `out.2` gives the noise."""

    def __init__(self) -> None:
        super().__init__(
            time_embed=mlp(16, 64, 64),
            label_emb=nn.Embedding(10, 64),
            input_blocks=nn.ModuleList(
                [nn.Sequential(nn.Conv2d(3, 16, 3, padding=1)), nn.Sequential(ResBlock(16, 16))]
            ),
            middle_block=nn.Sequential(ResBlock(16, 16), ResBlock(16, 16)),
            output_blocks=nn.ModuleList([nn.Sequential(ResBlock(32, 16)),
                nn.Sequential(ResBlock(32, 16))]),
            out=nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 3, 3, padding=1)),
        )


# -- pictures -------------------------------------------------------------------------------------


class Backbone(Parts):
    def __init__(self) -> None:
        super().__init__(
            stem=conv_block(3, 8), stage1=conv_block(8, 16), stage2=conv_block(16, 32)
        )


class Retina(Parts):
    """One head for all levels: class scores and boxes by convolutions."""

    def __init__(self) -> None:
        super().__init__(
            backbone=Backbone(),
            fpn=Parts(
                inner_blocks=nn.ModuleList([nn.Conv2d(16, 16, 1), nn.Conv2d(32, 16, 1)]),
                layer_blocks=nn.ModuleList([nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)]),
            ),
            head=Parts(
                classification_head=Parts(conv=conv_block(16, 16), cls_logits=nn.Conv2d(16, 27, 3)),
                regression_head=Parts(conv=conv_block(16, 16), bbox_reg=nn.Conv2d(16, 12, 3)),
            ),
        )


class LevelHeads(Parts):
    """A detector with a class and a box head of its own on every level, as in YOLO."""

    def __init__(self) -> None:
        def tower(out: int) -> nn.Module:
            return nn.Sequential(conv_block(16, 16), nn.Conv2d(16, out, 1))

        super().__init__(
            backbone=Backbone(),
            neck=nn.ModuleList([nn.Conv2d(16, 16, 1), nn.Conv2d(32, 16, 1)]),
            cls_preds=nn.ModuleList([tower(9), tower(9)]),
            box_preds=nn.ModuleList([tower(4), tower(4)]),
        )


class BoxPredictor(Parts):
    """The two heads of a Faster R-CNN, behind its region proposals."""

    def __init__(self) -> None:
        super().__init__(
            backbone=Backbone(),
            rpn=Parts(
                head=Parts(
                    conv=nn.Sequential(nn.Conv2d(32, 32, 3)),
                    cls_logits=nn.Conv2d(32, 3, 1),
                    bbox_pred=nn.Conv2d(32, 12, 1),
                )
            ),
            roi_heads=Parts(
                box_head=Parts(fc6=nn.Linear(32 * 49, 64), fc7=nn.Linear(64, 64)),
                box_predictor=Parts(cls_score=nn.Linear(64, 9), bbox_pred=nn.Linear(64, 36)),
            ),
        )


class UNet(Parts):
    """Ronneberger et al. 2015: outc gives one score per class and pixel."""

    def __init__(self) -> None:
        super().__init__(
            inc=conv_block(3, 8), down1=conv_block(8, 16), down2=conv_block(16, 32),
            up1=Parts(up=nn.ConvTranspose2d(32, 16, 2, 2), conv=conv_block(32, 16)),
            up2=Parts(up=nn.ConvTranspose2d(16, 8, 2, 2), conv=conv_block(16, 8)),
            outc=Parts(conv=nn.Conv2d(8, 5, 1)),
        )


class FCN(Parts):
    """A backbone with a main and an auxiliary segmentation head."""

    def __init__(self) -> None:
        def head(a: int) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(a, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 1)
            )

        super().__init__(backbone=Backbone(), classifier=head(32), aux_classifier=head(16))


class MobileNet(Parts):
    """conv_head is hidden: `classifier` follows it."""

    def __init__(self) -> None:
        super().__init__(
            conv_stem=nn.Conv2d(3, 8, 3, bias=False), bn1=nn.BatchNorm2d(8),
            blocks=nn.Sequential(
                nn.Sequential(nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16,
                    8, 1)),
                nn.Sequential(nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16,
                    8, 1)),
            ),
            conv_head=nn.Conv2d(8, 64, 1, bias=False), bn2=nn.BatchNorm2d(64),
            classifier=nn.Linear(64, 10),
        )


class SqueezeExcite(Parts):
    def __init__(self, width: int) -> None:
        super().__init__(fc1=nn.Conv2d(width, 8, 1), act=nn.ReLU(), fc2=nn.Conv2d(8, width, 1))


class FastNet(Parts):
    """final_conv is hidden, and its squeeze-and-excite, registered last, gives nothing."""

    def __init__(self) -> None:
        super().__init__(
            backbone=Backbone(),
            final_conv=Parts(conv=nn.Conv2d(32, 64, 3), se=SqueezeExcite(64), act=nn.GELU()),
            head=Parts(global_pool=nn.AdaptiveAvgPool2d(1), fc=nn.Linear(64, 10)),
        )


class WideClassifier(Parts):
    """DLA: a classifier of more classes than channels, as a convolution."""

    def __init__(self) -> None:
        super().__init__(backbone=Backbone(), global_pool=nn.AdaptiveAvgPool2d(1),
            fc=nn.Conv2d(32, 100, 1))


class CondConv(nn.Module):
    """Yang et al. 2019: experts' kernels, each flattened to a row, mixed by a router."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.num_experts, self.in_channels, self.out_channels = 4, inputs, outputs
        self.weight = raw(4, outputs * inputs * 9)


class CondConvNet(Parts):
    def __init__(self) -> None:
        super().__init__(
            backbone=Backbone(),
            blocks=nn.ModuleList(
                Parts(routing_fn=nn.Linear(32, 4), conv=CondConv(32, 32)) for _ in range(2)),
            classifier=nn.Linear(32, 10),
        )


class FlexibleViT(Parts):
    """Patches arrive cut out: embeds.proj is linear and meets the picture."""

    def __init__(self) -> None:
        super().__init__(
            embeds=Parts(cls_token=raw(1, 1, D), pos_embed=raw(1, 4, 4, D), proj=nn.Linear(48, D)),
            blocks=nn.Sequential(DiTBlock(), DiTBlock()),
            norm=nn.LayerNorm(D), head=nn.Linear(D, 10),
        )


class SuperResolution(Parts):
    """EDSR: the last convolution gives the picture."""

    def __init__(self) -> None:
        super().__init__(
            head=nn.Sequential(nn.Conv2d(3, 16, 3)),
            body=nn.Sequential(*(Parts(conv1=nn.Conv2d(16, 16, 3), conv2=nn.Conv2d(16, 16, 3)) for
                _ in range(2))),
            tail=nn.Sequential(nn.Conv2d(16, 64, 3), nn.PixelShuffle(2), nn.Conv2d(16, 3, 3)),
        )


class LinearPatches(Parts):
    """A ViT whose patches are embedded by a Linear, whose decoder gives pixels (SimMIM, MAE)."""

    def __init__(self) -> None:
        super().__init__(
            patch_embed=nn.Linear(48, D),
            cls_token=raw(1, 1, D),
            pos_embedding=raw(1, 17, D),
            layers=nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 4, 64, batch_first=True), 2),
            mask_token=raw(D),
            to_pixels=nn.Linear(D, 48),
        )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "dit": DiT,
    "mmdit": MMDiT,
    "diffusion_unet": DiffusionUNet,
    "sequential_unet": SequentialUNet,
    "retina": Retina,
    "level_heads": LevelHeads,
    "box_predictor": BoxPredictor,
    "unet": UNet,
    "fcn": FCN,
    "mobilenet": MobileNet,
    "fast_net": FastNet,
    "wide_classifier": WideClassifier,
    "cond_conv_net": CondConvNet,
    "flexible_vit": FlexibleViT,
    "super_resolution": SuperResolution,
    "linear_patches": LinearPatches,
}
# fmt: on
