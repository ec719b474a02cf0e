"""Six small training scripts of the kinds that people have, each with its optimizer left open.

Written anew from what such scripts are known to do: their sizes are cut to some seconds on one
core, their optimizers' settings are the usual ones of their kind. `first_try.py` runs them.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from muonkit.lab import data

__all__ = ["SCRIPTS", "Script"]

Optimizer = torch.optim.Optimizer
Make = Callable[[nn.Module], Optimizer]


@dataclass(frozen=True)
class Script:
    """A training, from a seed to one figure.

    Attributes:
        summary: the model and its data.
        settings: what the script has in the place of its optimizer.
        lr, weight_decay: the same for MuonW; a decay of None is what the script does not say.
        theirs: makes the script's optimizer.
        figure: what `run` returns.
        higher: whether more of it is better.
        steps: of the optimizer.
        run: from the optimizer's maker and a number of steps; torch's seed was set.
    """

    summary: str
    settings: str
    lr: float
    weight_decay: float | None
    theirs: Make
    figure: str
    steps: int
    run: Callable[[Make, int], float]
    higher: bool = False


def _finite(loss: Tensor) -> Tensor:
    """Raises FloatingPointError: the loss is not finite, and the run is over."""
    if not math.isfinite(loss.item()):
        raise FloatingPointError
    return loss


# --- a character language model ---------------------------------------------------------------


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.fc, self.fc_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        qkv = self.c_attn(self.ln_1(x)).split(width, dim=2)
        q, k, v = (t.view(batch, time, self.heads, -1).transpose(1, 2) for t in qkv)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(mixed.transpose(1, 2).reshape(batch, time, width))
        added: Tensor = self.fc_proj(F.gelu(self.fc(self.ln_2(x))))
        return x + added


class _CharacterModel(nn.Module):
    def __init__(self, context: int, width: int = 48, layers: int = 2) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(256, width), nn.Embedding(context, width)
        self.h = nn.Sequential(*(_Block(width, 4) for _ in range(layers)))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, 256, bias=False)
        self.lm_head.weight = self.wte.weight
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        logits: Tensor = self.lm_head(self.ln_f(self.h(x)))
        return logits


@cache
def _text() -> data.TextData:
    return data.stdlib_text(32)


def language_model(make: Make, steps: int) -> float:
    """A loop that writes one rate into every group, as many have it: warm-up, then a cosine."""
    text, seed = _text(), torch.initial_seed()
    model = _CharacterModel(text.context)
    optimizer = make(model)
    peak = max(group["lr"] for group in optimizer.param_groups)
    warmup = steps // 20
    for step in range(steps):
        done = (step - warmup) / max(1, steps - warmup)
        share = (step + 1) / warmup if step < warmup else 0.55 + 0.45 * math.cos(math.pi * done)
        for group in optimizer.param_groups:
            group["lr"] = peak * share
        x, y = text.batch(seed, step, 8)
        optimizer.zero_grad()
        _finite(F.cross_entropy(model(x).flatten(0, 1), y.flatten())).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        return statistics.fmean(
            F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item()
            for x, y in text.validation()
        )


# --- a variational autoencoder ----------------------------------------------------------------


class _Autoencoder(nn.Module):
    def __init__(self, width: int = 128, latent: int = 20) -> None:
        super().__init__()
        self.fc1, self.fc21 = nn.Linear(784, width), nn.Linear(width, latent)
        self.fc22 = nn.Linear(width, latent)
        self.fc3, self.fc4 = nn.Linear(latent, width), nn.Linear(width, 784)

    def forward(self, x: Tensor) -> Tensor:
        """The negative evidence bound of every image, in nats."""
        hidden = self.fc1(x).relu()
        mean, log_variance = self.fc21(hidden), self.fc22(hidden)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        logits = self.fc4(self.fc3(z).relu())
        misfit = F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1)
        distance: Tensor = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        return misfit + distance


@cache
def _digits() -> tuple[Tensor, Tensor]:
    """MNIST's images as (examples, 784) in [0, 1]: to train on, and 2,000 to validate."""
    images = data.mnist()
    return tuple(  # type: ignore[return-value]
        x.flatten(1).float() / 255 for x in (images.train_x, images.val_x[:2000])
    )


def autoencoder(make: Make, steps: int) -> float:
    train, held_out = _digits()
    model = _Autoencoder()
    optimizer = make(model)
    for _ in range(steps):
        x = train[torch.randint(len(train), (64,))]
        optimizer.zero_grad()
        _finite(model(x).sum()).backward()
        optimizer.step()
    with torch.no_grad():
        return float(model(held_out).mean())


# --- a diffusion model ------------------------------------------------------------------------


class _Denoiser(nn.Module):
    def __init__(self, width: int = 96, layers: int = 3, embedding: int = 32) -> None:
        super().__init__()
        self.register_buffer("frequencies", 25 * 1e4 ** (-torch.linspace(0, 1, embedding // 2)))
        self.stem = nn.Linear(3 * embedding, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        inputs = torch.stack([x[:, 0], x[:, 1], t / 2], 1)
        angles = (inputs.unsqueeze(-1) * self.frequencies).flatten(1)
        hidden = F.gelu(self.stem(torch.cat([angles.sin(), angles.cos()], 1)))
        for layer in self.layers:
            hidden = hidden + F.gelu(layer(hidden))
        noise: Tensor = self.out(hidden)
        return noise


def _spiral(count: int) -> Tensor:
    """Points (count, 2) on a spiral of three half turns, with a little noise, of unit size."""
    angle = (0.5 + 2.5 * torch.rand(count).sqrt()) * math.pi
    points = angle.unsqueeze(1) * torch.stack([angle.cos(), angle.sin()], 1) / 5
    return points + 0.02 * torch.randn(count, 2)


def _noise_loss(model: nn.Module, x: Tensor, share: Tensor) -> Tensor:
    """Mean squared error of the predicted noise at the cosine schedule's times in [0, 1]."""
    noise = torch.randn_like(x)
    kept = (share * math.pi / 2).cos().unsqueeze(1)
    noisy = kept * x + (1 - kept.square()).clamp(min=0).sqrt() * noise
    return F.mse_loss(model(noisy, share), noise)


def diffusion(make: Make, steps: int) -> float:
    model = _Denoiser()
    optimizer = make(model)
    for _ in range(steps):
        optimizer.zero_grad()
        _finite(_noise_loss(model, _spiral(64), torch.rand(64))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    torch.manual_seed(1000)  # the same points, times and noise for all
    with torch.no_grad():
        return float(_noise_loss(model, _spiral(20_000), torch.rand(20_000)))


# --- a graph network --------------------------------------------------------------------------


class _GraphNetwork(nn.Module):
    def __init__(self, features: int, width: int, classes: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Linear(features, width), nn.Linear(width, width)
        self.conv3 = nn.Linear(width, classes)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        for conv in (self.conv1, self.conv2):
            x = F.dropout((adjacency @ conv(x)).relu(), 0.5, self.training)
        logits: Tensor = adjacency @ self.conv3(x)
        return logits


def _graph(nodes: int = 700, classes: int = 7, features: int = 100) -> tuple[Tensor, ...]:
    """Features, normalized adjacency and labels of a stochastic block model: nodes of one class are
    linked ten times as often, and have words of their class a little more often."""
    labels = torch.arange(nodes) % classes
    same = labels.unsqueeze(0) == labels.unsqueeze(1)
    links = (torch.rand(nodes, nodes) < torch.where(same, 0.02, 0.002)).float().triu(1)
    links = links + links.T + torch.eye(nodes)
    root = links.sum(1).rsqrt()
    topics = torch.rand(classes, features) < 0.2
    words = torch.rand(nodes, features) < torch.where(topics[labels], 0.06, 0.02)
    x = words.float() / words.sum(1, keepdim=True).clamp(min=1)
    return x, root.unsqueeze(1) * links * root, labels


def graph_network(make: Make, steps: int) -> float:
    """20 nodes of each class have labels, as citation graphs are split; the rest is held out."""
    x, adjacency, labels = _graph()
    known, held_out = slice(0, 140), slice(140, None)
    model = _GraphNetwork(x.shape[1], 32, 7)
    optimizer = make(model)
    for _ in range(steps):
        optimizer.zero_grad()
        _finite(F.cross_entropy(model(x, adjacency)[known], labels[known])).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        right = model(x, adjacency)[held_out].argmax(1) == labels[held_out]
    return 100 * right.float().mean().item()


# --- policy gradients -------------------------------------------------------------------------


class _Poles:
    """Carts with poles to balance, some at once: Barto, Sutton and Anderson 1983, by Euler's steps.

    A cart that has run for `limit` steps, left the track or dropped its pole begins anew. Plain
    floats: for so few carts they are faster than tensors.
    """

    def __init__(self, count: int, limit: int, seed: int) -> None:
        self.limit, self.random = limit, random.Random(seed)
        self.carts = [self._new() for _ in range(count)]
        self.ages = [0] * count

    def _new(self) -> list[float]:
        return [self.random.uniform(-0.05, 0.05) for _ in range(4)]

    def states(self) -> Tensor:
        """Position, speed, angle and spin of every cart, float32 (count, 4)."""
        return torch.tensor(self.carts)

    def step(self, right: Sequence[float]) -> list[int]:
        """Push each cart to the right (1) or left (0); the ages of those that ended, else 0."""
        ended = [0] * len(self.carts)
        for i, (x, v, angle, spin) in enumerate(self.carts):
            sine, cosine = math.sin(angle), math.cos(angle)
            push = ((10 if right[i] else -10) + 0.05 * spin * spin * sine) / 1.1
            turn = (9.8 * sine - cosine * push) / (0.5 * (4 / 3 - 0.1 * cosine * cosine / 1.1))
            pull = push - 0.05 * turn * cosine / 1.1
            cart = [x + 0.02 * v, v + 0.02 * pull, angle + 0.02 * spin, spin + 0.02 * turn]
            self.carts[i], self.ages[i] = cart, self.ages[i] + 1
            fell = abs(cart[0]) > 2.4 or abs(cart[2]) > math.radians(12)
            if fell or self.ages[i] >= self.limit:
                ended[i], self.ages[i], self.carts[i] = self.ages[i], 0, self._new()
        return ended


def _log_p(logits: Tensor, action: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, action.unsqueeze(-1)).squeeze(-1)


def reinforce(make: Make, steps: int) -> float:
    """One step for each batch of eight episodes of at most 200; their mean length at the end."""
    policy, lengths, seed = _tower(2, 1.0, (4, 128), nn.ReLU), [], torch.initial_seed()
    optimizer = make(policy)
    for step in range(steps):
        poles, alive = _Poles(8, 200, 1000 * seed + step), [1.0] * 8
        states, actions, lived = [], [], []
        while any(alive):
            states.append(poles.states())
            with torch.no_grad():
                actions.append(policy(states[-1]).softmax(-1).multinomial(1).squeeze(-1))
            lived.append(alive)
            ended = poles.step(actions[-1].tolist())
            alive = [a * (not e) for a, e in zip(alive, ended, strict=True)]
        rewards, future, returns = torch.tensor(lived), torch.zeros(8), []
        for reward in rewards.flip(0):
            future = reward + 0.99 * future
            returns.append(future)
        gain = torch.stack(returns).flip(0)
        mean, deviation = gain[rewards > 0].mean(), gain[rewards > 0].std()
        gain = rewards * (gain - mean) / (deviation + 1e-8)
        optimizer.zero_grad()
        log_p = _log_p(policy(torch.stack(states)), torch.stack(actions))
        _finite(-(log_p * gain).sum() / 8).backward()
        optimizer.step()
        lengths.append(rewards.sum().item() / 8)
    return statistics.fmean(lengths[-max(1, steps // 10) :])


def _tower(
    outputs: int, gain: float, widths: Sequence[int], act: Callable[[], nn.Module]
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, width in pairwise(widths):
        layers += [nn.Linear(inputs, width), act()]
    head = nn.Linear(widths[-1], outputs)
    with torch.no_grad():
        head.weight *= gain
    return nn.Sequential(*layers, head)


class _ActorCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.critic = _tower(1, 1.0, (4, 64, 64), nn.Tanh)
        self.actor = _tower(2, 0.01, (4, 64, 64), nn.Tanh)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.actor(state), self.critic(state).squeeze(-1)


def _rollout(model: _ActorCritic, poles: _Poles, length: int) -> tuple[list[Tensor], list[int]]:
    """States, actions, log-probabilities, advantages and returns, flat; and the ages of those that
    ended."""
    seen, ages = [], []
    with torch.no_grad():
        for _ in range(length):
            state = poles.states()
            logits, value = model(state)
            action = logits.softmax(-1).multinomial(1).squeeze(-1)
            ended = poles.step(action.tolist())
            ages += [age for age in ended if age]
            going = torch.tensor([0.0 if age else 1.0 for age in ended])
            seen.append((state, action, _log_p(logits, action), value, going))
        after, running, advantages = model(poles.states())[1], torch.zeros(len(ended)), []
        for _, _, _, value, going in reversed(seen):
            running = 1 + going * (0.99 * after + 0.9405 * running) - value
            after = value
            advantages.append(running)
    columns = [torch.stack(column).flatten(0, 1) for column in zip(*seen, strict=True)]
    advantage = torch.stack(advantages[::-1]).flatten()
    return [*columns[:3], advantage, advantage + columns[3]], ages


def proximal(make: Make, steps: int) -> float:
    """Clipped policy gradients, 16 steps for each rollout of 8 × 128, the rate falling to zero;
    the mean length of the episodes that ended in the last quarter (at most 500)."""
    model, poles, ages = _ActorCritic(), _Poles(8, 500, torch.initial_seed()), []
    optimizer = make(model)
    rollouts = max(1, steps // 16)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 - n / rollouts)
    for rollout in range(rollouts):
        (state, action, old, advantage, target), ended = _rollout(model, poles, 128)
        ages += ended * (rollout >= rollouts * 3 // 4)
        for chosen in (c for _ in range(4) for c in torch.randperm(len(state)).split(256)):
            logits, value = model(state[chosen])
            ratio = (_log_p(logits, action[chosen]) - old[chosen]).exp()
            gain = advantage[chosen]
            gain = (gain - gain.mean()) / (gain.std() + 1e-8)
            surrogate = torch.min(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()
            misfit = 0.5 * (value - target[chosen]).square().mean()
            entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
            optimizer.zero_grad()
            _finite(-surrogate + 0.5 * misfit - 0.01 * entropy).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        decay.step()
    return statistics.fmean(ages) if ages else 500.0


def _adam(**options: float | tuple[float, float]) -> Make:
    return lambda model: torch.optim.Adam(model.parameters(), **options)  # type: ignore[arg-type]


def _adamw(**options: float | tuple[float, float]) -> Make:
    return lambda model: torch.optim.AdamW(model.parameters(), **options)  # type: ignore[arg-type]


SCRIPTS: dict[str, Script] = {
    "language model": Script(
        "transformer, 2 layers of width 48, bytes of Python's source",
        "AdamW(lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)",
        *(1e-3, 0.1, _adamw(lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)),
        *("validation loss, nats per byte", 300, language_model),
    ),
    "autoencoder": Script(
        "variational, 784-128-20-128-784, MNIST",
        "Adam(lr=1e-3)",
        *(1e-3, None, _adam(lr=1e-3)),
        *("validation loss, nats per image", 400, autoencoder),
    ),
    "diffusion": Script(
        "denoising MLP, 3 residual layers of width 96, points on a spiral",
        "AdamW(lr=1e-3)",
        *(1e-3, 0.01, _adamw(lr=1e-3)),
        *("mean squared error of the noise", 600, diffusion),
    ),
    "graph": Script(
        "three graph convolutions of width 32, 700 nodes of a block model",
        "Adam(lr=0.01, weight_decay=5e-4)",
        *(0.01, None, _adam(lr=0.01, weight_decay=5e-4)),
        *("accuracy on held-out nodes, %", 200, graph_network, True),
    ),
    "policy gradient": Script(
        "REINFORCE, MLP 4-128-2, a cart and its pole",
        "Adam(lr=0.01)",
        *(0.01, None, _adam(lr=0.01)),
        *("mean length of the last episodes, of 200", 100, reinforce, True),
    ),
    "proximal policy": Script(
        "PPO, two MLPs 4-64-64, a cart and its pole",
        "Adam(lr=1e-3, eps=1e-5)",
        *(1e-3, None, _adam(lr=1e-3, eps=1e-5)),
        *("mean length of the last episodes, of 500", 400, proximal, True),
    ),
}
