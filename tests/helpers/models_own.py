"""Models of our own writing for the routing tests: kinds that no package's naming has tidied.

Routing reads what is registered and never calls a model, so none of them has a forward. Widths are
small; what leaves a model is said in its docstring.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from tests.helpers import models_own_pictures as zoo_own_pictures
from tests.helpers.models_own_pictures import Backbone, D, Parts, ResBlock, mlp, raw

if TYPE_CHECKING:
    from collections.abc import Callable

# fmt: off
# -- two models, several towers -------------------------------------------------------------------


class Generator(Parts):
    """DCGAN: the last transposed convolution gives the picture."""

    def __init__(self) -> None:
        super().__init__(
            main=nn.Sequential(
                nn.ConvTranspose2d(16, 32, 4, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
                nn.ConvTranspose2d(32, 16, 4, 2, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
                nn.ConvTranspose2d(16, 3, 4, 2), nn.Tanh(),
            )
        )


class Discriminator(Parts):
    """The last convolution gives one score."""

    def __init__(self) -> None:
        super().__init__(
            main=nn.Sequential(
                nn.Conv2d(3, 16, 4, 2), nn.LeakyReLU(),
                nn.Conv2d(16, 32, 4, 2, bias=False), nn.BatchNorm2d(32), nn.LeakyReLU(),
                nn.Conv2d(32, 1, 4), nn.Sigmoid(),
            )
        )


class VAE(Parts):
    """fc_mu and fc_logvar give the latent, decoder.4 the picture."""

    def __init__(self) -> None:
        super().__init__(
            encoder=mlp(784, 64, D), fc_mu=nn.Linear(D, 8), fc_logvar=nn.Linear(D, 8),
            decoder=mlp(8, 64, 784),
        )


class ConvVAE(Parts):
    def __init__(self) -> None:
        super().__init__(
            encoder=Parts(
                conv_in=nn.Conv2d(3, 16, 3), blocks=nn.ModuleList([ResBlock(16, 16), ResBlock(16,
                    32)]),
                conv_out=nn.Conv2d(32, 8, 3),
            ),
            quant_conv=nn.Conv2d(8, 8, 1),
            post_quant_conv=nn.Conv2d(4, 4, 1),
            decoder=Parts(
                conv_in=nn.Conv2d(4, 32, 3), blocks=nn.ModuleList([ResBlock(32, 32), ResBlock(32,
                    16)]),
                conv_out=nn.Conv2d(16, 3, 3),
            ),
        )


class VQVAE(Parts):
    def __init__(self) -> None:
        super().__init__(
            encoder=nn.Sequential(nn.Conv2d(3, 16, 4, 2), nn.ReLU(), nn.Conv2d(16, 8, 3)),
            quantizer=Parts(codebook=raw(64, 8)),
            decoder=nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 3, 4, 2)),
        )


class TwoTowers(Parts):
    """CLIP: the projections of both towers leave the model."""

    def __init__(self) -> None:
        super().__init__(
            visual=Parts(conv1=nn.Conv2d(3, D, 8, 8),
                transformer=nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 4, 64,
                    batch_first=True), 2),
                proj=raw(D, 16)),
            transformer=nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 4, 64,
                batch_first=True), 2),
            token_embedding=nn.Embedding(100, D),
            positional_embedding=raw(16, D),
            text_projection=raw(D, 16),
            logit_scale=raw(),
        )


class SimCLR(Parts):
    """The projector's last layer leaves the model while it is trained."""

    def __init__(self) -> None:
        super().__init__(backbone=Backbone(), projector=mlp(32, 64, 16), predictor=mlp(16, 8, 16))


class AutoEncoder(Parts):
    def __init__(self) -> None:
        super().__init__(encoder=mlp(784, 64, 16), decoder=mlp(16, 64, 784))


# -- reinforcement --------------------------------------------------------------------------------


class ActorCritic(Parts):
    """A shared trunk, then policy and value."""

    def __init__(self) -> None:
        super().__init__(trunk=mlp(8, D, D), policy=nn.Linear(D, 4), value=nn.Linear(D, 1))


class Towers(Parts):
    """Separate towers, as CleanRL writes them."""

    def __init__(self) -> None:
        super().__init__(critic=mlp(8, D, D, 1), actor_mean=mlp(8, D, D, 3), actor_logstd=raw(1, 3))


class StableBaselines(Parts):
    """Stable-Baselines3: the extractor's nets are hidden, action_net and value_net are heads."""

    def __init__(self) -> None:
        def body() -> nn.Module:
            return nn.Sequential(nn.Linear(8, D), nn.Tanh(), nn.Linear(D, D), nn.Tanh())

        super().__init__(
            mlp_extractor=Parts(policy_net=body(), value_net=body()),
            action_net=nn.Linear(D, 4),
            value_net=nn.Linear(D, 1),
        )


class SAC(Parts):
    """An actor that gives mean and deviation, two critics."""

    def __init__(self) -> None:
        def critic() -> nn.Module:
            return Parts(fc1=nn.Linear(11, D), fc2=nn.Linear(D, D), fc3=nn.Linear(D, 1))

        super().__init__(
            actor=Parts(fc1=nn.Linear(8, D), fc2=nn.Linear(D, D), fc_mean=nn.Linear(D, 3),
                fc_logstd=nn.Linear(D, 3)),
            qf1=critic(), qf2=critic(),
        )


class DuelingDQN(Parts):
    def __init__(self) -> None:
        super().__init__(
            features=nn.Sequential(nn.Conv2d(4, 16, 8, 4), nn.ReLU(), nn.Conv2d(16, 32, 4, 2),
                nn.ReLU()),
            advantage=mlp(128, D, 6),
            value=mlp(128, D, 1),
        )


# -- sound, text, graphs, tables ------------------------------------------------------------------


class Vocoder(Parts):
    """HiFi-GAN's generator: conv_post gives the wave, one channel."""

    def __init__(self) -> None:
        norm = nn.utils.parametrizations.weight_norm
        super().__init__(
            conv_pre=norm(nn.Conv1d(16, 32, 7, padding=3)),
            ups=nn.ModuleList([norm(nn.ConvTranspose1d(32, 16, 4, 2)), norm(nn.ConvTranspose1d(16,
                8, 4, 2))]),
            resblocks=nn.ModuleList(
                Parts(convs1=nn.ModuleList([norm(nn.Conv1d(c, c, 3))]),
                    convs2=nn.ModuleList([norm(nn.Conv1d(c, c, 3))]))
                for c in (16, 8)
            ),
            conv_post=norm(nn.Conv1d(8, 1, 7, padding=3)),
        )


class MultiScaleDiscriminator(Parts):
    """HiFi-GAN's: every discriminator of the list ends in a convolution of one channel."""

    def __init__(self) -> None:
        def one() -> nn.Module:
            return Parts(
                convs=nn.ModuleList([nn.Conv1d(1, 16, 15), nn.Conv1d(16, 32, 41, 4, groups=4),
                    nn.Conv1d(32, 32, 5)]),
                conv_post=nn.Conv1d(32, 1, 3),
            )

        super().__init__(discriminators=nn.ModuleList([one(), one()]))


class Vocos(Parts):
    """A vocoder that gives magnitudes and phases by one Linear, `head.out`."""

    def __init__(self) -> None:
        def block() -> nn.Module:
            return Parts(
                dwconv=nn.Conv1d(D, D, 7, groups=D), norm=nn.LayerNorm(D),
                pwconv1=nn.Linear(D, 64), pwconv2=nn.Linear(64, D), gamma=raw(D),
            )

        super().__init__(
            backbone=Parts(embed=nn.Conv1d(16, D, 7), convnext=nn.ModuleList([block(), block()]),
                final_layer_norm=nn.LayerNorm(D)),
            head=Parts(out=nn.Linear(D, 34)),
        )


class Tacotron(Parts):
    """prenet's layers are hidden; mel and gate projections leave the model."""

    def __init__(self) -> None:
        super().__init__(
            embedding=nn.Embedding(50, D),
            encoder=Parts(convolutions=nn.ModuleList([nn.Conv1d(D, D, 5), nn.Conv1d(D, D, 5)]),
                lstm=nn.LSTM(D, 16, bidirectional=True)),
            decoder=Parts(
                prenet=Parts(layers=nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])),
                attention_rnn=nn.LSTMCell(48, D),
                attention_layer=Parts(query_layer=nn.Linear(D, 16), memory_layer=nn.Linear(D, 16),
                    v=nn.Linear(16, 1)),
                decoder_rnn=nn.LSTMCell(64, D),
                linear_projection=nn.Linear(64, 16),
                gate_layer=nn.Linear(64, 1),
            ),
            postnet=Parts(convolutions=nn.ModuleList([nn.Conv1d(16, D, 5), nn.Conv1d(D, 16, 5)])),
        )


class Seq2Seq(Parts):
    """Recurrent translation: decoder.fc_out gives the words."""

    def __init__(self) -> None:
        super().__init__(
            encoder=Parts(embedding=nn.Embedding(100, D), rnn=nn.GRU(D, D), fc=nn.Linear(D, D)),
            decoder=Parts(
                attention=Parts(attn=nn.Linear(64, D), v=nn.Linear(D, 1, bias=False)),
                embedding=nn.Embedding(90, D), rnn=nn.GRU(64, D), fc_out=nn.Linear(96, 90),
            ),
        )


class Translator(Parts):
    """torch's transformer with embeddings and a generator."""

    def __init__(self) -> None:
        super().__init__(
            src_embed=nn.Embedding(100, D), tgt_embed=nn.Embedding(90, D),
            transformer=nn.Transformer(D, 4, 1, 2, 64, batch_first=True),
            generator=nn.Linear(D, 90),
        )


class Recommender(Parts):
    """Neural collaborative filtering: two embeddings, an MLP that ends in one score."""

    def __init__(self) -> None:
        super().__init__(
            user_embedding=nn.Embedding(50, 16), item_embedding=nn.Embedding(60, 16), mlp=mlp(D,
                64, 16, 1)
        )


class DLRM(Parts):
    def __init__(self) -> None:
        super().__init__(
            emb_l=nn.ModuleList([nn.EmbeddingBag(50, 16), nn.EmbeddingBag(60, 16)]),
            bot_l=mlp(13, D, 16),
            top_l=mlp(19, D, 1),
        )


class GraphConv(nn.Module):
    """Kipf and Welling's layer with a raw weight, stored in × out."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.weight, self.bias = raw(inputs, outputs), raw(outputs)


class GCN(Parts):
    """gc3 gives the classes; gc1 is fed with the nodes' features."""

    def __init__(self) -> None:
        super().__init__(gc1=GraphConv(24, D), gc2=GraphConv(D, 48), gc3=GraphConv(48, 7))


class GATConv(Parts):
    """Veličković et al. 2018 as graph libraries write it: duck-typed Linear, attention vectors."""

    def __init__(self, inputs: int, outputs: int, heads: int) -> None:
        super().__init__(lin=Parts(weight=raw(heads * outputs, inputs)))
        self.lin.in_channels, self.lin.out_channels = inputs, heads * outputs
        self.att_src, self.att_dst = raw(1, heads, outputs), raw(1, heads, outputs)
        self.bias = raw(heads * outputs)


class GAT(Parts):
    def __init__(self) -> None:
        super().__init__(
            convs=nn.ModuleList([GATConv(24, 8, 4), GATConv(D, 8, 4)]), lin_out=nn.Linear(D, 7)
        )


class GraphTransformer(Parts):
    """Atoms and bonds are looked up, `pooler_out` gives one energy."""

    def __init__(self) -> None:
        def layer() -> nn.Module:
            return Parts(
                lin_key=nn.Linear(D, D), lin_query=nn.Linear(D, D), lin_value=nn.Linear(D, D),
                lin_edge=nn.Linear(D, D, bias=False), lin_skip=nn.Linear(D, D),
            )

        super().__init__(
            atom_encoder=nn.Embedding(20, D), bond_encoder=nn.Embedding(4, D),
            layers=nn.ModuleList([layer(), layer()]), readout=mlp(D, 16, 1),
        )


class TabTransformer(Parts):
    def __init__(self) -> None:
        super().__init__(
            category_embed=nn.Embedding(30, D), cls_token=raw(1, 1, D),
            numerical_embedder=Parts(weights=raw(5, D), biases=raw(5, D)),
            transformer=nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 4, 64,
                batch_first=True), 2),
            to_logits=nn.Sequential(nn.LayerNorm(D), nn.ReLU(), nn.Linear(D, 3)),
        )


class NeRF(Parts):
    """Colours and density leave the model; feature_linear is hidden."""

    def __init__(self) -> None:
        super().__init__(
            pts_linears=nn.ModuleList([nn.Linear(63, D), nn.Linear(D, D), nn.Linear(D + 63, D),
                nn.Linear(D, D)]),
            views_linears=nn.ModuleList([nn.Linear(D + 27, 16)]),
            feature_linear=nn.Linear(D, D), alpha_linear=nn.Linear(D, 1), rgb_linear=nn.Linear(16,
                3),
        )


class MixtureDensity(Parts):
    def __init__(self) -> None:
        super().__init__(
            hidden=mlp(4, D, D), pi=nn.Linear(D, 5), mu=nn.Linear(D, 5), sigma=nn.Linear(D, 5)
        )


class Forecaster(Parts):
    """DLinear-like: one Linear per part, both leave the model; and an LSTM before one."""

    def __init__(self) -> None:
        super().__init__(lstm=nn.LSTM(7, D, 2, batch_first=True), linear=nn.Linear(D, 24))


class CharRNN(Parts):
    def __init__(self) -> None:
        super().__init__(encoder=nn.Embedding(60, D), rnn=nn.LSTM(D, D, 2), decoder=nn.Linear(D,
            60))


class MultiTask(Parts):
    """One trunk, one head per task, kept in a dict."""

    def __init__(self) -> None:
        super().__init__(
            trunk=mlp(16, D, D), heads=nn.ModuleDict({"age": nn.Linear(D, 1), "kind": mlp(D, 16,
                5)})
        )


class Memory(Parts):
    """nanoGPT-like blocks with memory tokens and a fused key and value."""

    def __init__(self) -> None:
        def block() -> nn.Module:
            return Parts(
                attn=Parts(to_q=nn.Linear(D, 64, bias=False), to_kv=nn.Linear(D, 128, bias=False),
                    to_out=nn.Linear(64, D), null_kv=raw(2, 4, 16)),
                ff=nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 64), nn.GELU(), nn.Linear(64, D)),
            )

        super().__init__(
            token_emb=nn.Embedding(100, D), memory_tokens=raw(4, D),
            layers=nn.ModuleList([block(), block()]), norm=nn.LayerNorm(D), to_logits=nn.Linear(D,
                100),
        )


def gan() -> nn.Module:
    return nn.ModuleDict({"G": Generator(), "D": Discriminator()})


MODELS: dict[str, Callable[[], nn.Module]] = {
    **zoo_own_pictures.MODELS,
    "gan": gan,
    "vae": VAE,
    "conv_vae": ConvVAE,
    "vq_vae": VQVAE,
    "two_towers": TwoTowers,
    "simclr": SimCLR,
    "autoencoder": AutoEncoder,
    "actor_critic": ActorCritic,
    "actor_critic_towers": Towers,
    "stable_baselines": StableBaselines,
    "sac": SAC,
    "dueling_dqn": DuelingDQN,
    "vocoder": Vocoder,
    "wave_discriminators": MultiScaleDiscriminator,
    "vocos": Vocos,
    "tacotron": Tacotron,
    "seq2seq": Seq2Seq,
    "translator": Translator,
    "recommender": Recommender,
    "dlrm": DLRM,
    "gcn": GCN,
    "gat": GAT,
    "graph_transformer": GraphTransformer,
    "tab_transformer": TabTransformer,
    "nerf": NeRF,
    "mixture_density": MixtureDensity,
    "forecaster": Forecaster,
    "char_rnn": CharRNN,
    "multi_task": MultiTask,
    "memory": Memory,
}
# fmt: on


def build(name: str) -> nn.Module:
    """The model of that name, without weights."""
    with torch.device("meta"):
        return MODELS[name]()
