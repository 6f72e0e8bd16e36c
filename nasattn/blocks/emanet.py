"""Expectation-maximisation attention (Li et al., EMANet, ICCV 2019)."""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nasattn.blocks.identity import IdentityInit
from nasattn.blocks.tokens import image, no_autocast, project, tokens, widen

EPSILON = 1e-6


class ExpectationMaximization(nn.Module):
    """relu(x + BN(W relu(mu z^T))): the map rebuilt from a few bases mu and who belongs to them, z.

    https://arxiv.org/abs/1907.13426, section 3.2. x: (B, C, H, W) -> same; the skip is meant for
    what is not negative, such as the output of a ReLU. On f = W_1 x, `stages` rounds of z = softmax
    over the bases of f^T mu, then mu = the means of f weighted by z, brought to length 1, start
    from the buffer `bases`. As in the authors' code no gradient flows through the rounds, so W_1
    stays as it is at first and is frozen; with `gradients` it does.
    In training, bases <- momentum * bases + (1 - momentum) * the mean of mu over the batch (of all
    ranks), not brought to length 1 again: see `follow`.
    Departs from the paper: with `identity_init`, x + s (f(x) - x), s = 0 at first.
    """

    bases: Tensor
    start: Tensor
    total: Tensor
    count: Tensor
    seen: Tensor

    def __init__(
        self,
        channels: int,
        *,
        bases: int = 64,
        stages: int = 3,
        momentum: float = 0.9,
        gradients: bool = False,
        identity_init: bool = False,
    ) -> None:
        super().__init__()
        self.stages = stages
        self.momentum = momentum
        self.gradients = gradients
        self.before = project(channels, channels).requires_grad_(gradients)
        self.after = project(channels, channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.identity = IdentityInit(identity_init)
        for conv in (self.before, self.after):
            nn.init.normal_(conv.weight, std=math.sqrt(2 / channels))
        start = unit(torch.randn(1, channels, bases) * math.sqrt(2 / bases))
        self.register_buffer("bases", start)
        self.register_buffer("start", start.clone(), persistent=False)
        self.register_buffer("total", torch.zeros_like(start), persistent=False)
        self.register_buffer("count", torch.zeros(1), persistent=False)
        self.register_buffer("seen", torch.full_like(self.trained(), torch.nan), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        features = tokens(self.before(x))
        if not self.gradients:
            features = features.detach()
        # float32: EPSILON and the sums over positions are out of float16's range.
        with no_autocast(x):
            mu, z = self.rounds(widen(features), widen(self.origin()))
            rebuilt = torch.bmm(z, mu.mT).to(features.dtype)  # (B, T, C)
        if self.training:
            self.follow(mu.detach())
        out = self.norm(self.after(F.relu(image(rebuilt, like=x))))
        return self.identity(x, F.relu(x + out.to(x.dtype)))

    def rounds(self, features: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, C) and (1, C, K) -> mu (B, C, K) and the z (B, T, K) that it was made from."""
        mu = mu.expand(features.shape[0], -1, -1)
        for _ in range(self.stages):
            z = torch.bmm(features, mu).softmax(2)
            mu = unit(torch.bmm(features.mT, z) / (EPSILON + z.sum(1, keepdim=True)))
        return mu, z

    @torch.no_grad()
    def origin(self) -> Tensor:
        """The bases that the rounds start from: in training, those before this optimiser step."""
        if not self.training:
            return self.bases
        trained = self.trained()
        stepped = (trained != self.seen).any()
        self.seen.copy_(trained)
        self.start.copy_(torch.where(stepped, self.bases, self.start))
        self.total.copy_(torch.where(stepped, 0, self.total))
        self.count.copy_(torch.where(stepped, 0, self.count))
        return self.start.clone()

    @torch.no_grad()
    def follow(self, mu: Tensor) -> None:
        """Moves the bases towards the mean of mu over all samples of this optimiser step.

        One move a step, from `start`, made anew with every forward pass. So passes that accumulate
        gradients, or see the two halves of a batch, are one batch; and a pass that checkpointing
        repeats starts from the same bases, finds the same mu and leaves the same mean. That a step
        was taken shows in the parameters, compared as tensors: no hook, nothing for the compiler to
        stumble on.
        """
        total, count = mu.sum(0, keepdim=True), mu.new_full((1,), mu.shape[0])
        if dist.is_available() and dist.is_initialized():
            # Reduced now and not when used: DDP hands rank 0's buffers to all before each pass.
            both = torch.cat((total.flatten(), count))
            dist.all_reduce(both)
            total, count = both[:-1].view_as(total), both[-1:]
        self.total.add_(total)
        self.count.add_(count)
        self.bases.copy_(torch.lerp(self.total / self.count, self.start, self.momentum))

    def trained(self) -> Tensor:
        """Parameters few enough to compare, of which every step moves some."""
        few = [p.detach().flatten() for p in (*self.norm.parameters(), *self.identity.parameters())]
        return torch.cat(few)

    def map_elements(self, height: int, width: int) -> int:
        return height * width * self.bases.shape[2]


def unit(mu: Tensor) -> Tensor:
    """Length 1 over the channels."""
    length: Tensor = torch.linalg.vector_norm(mu, dim=1, keepdim=True)
    return mu / (length + EPSILON)
