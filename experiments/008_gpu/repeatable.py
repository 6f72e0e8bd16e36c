"""Are trainings on a GPU the same to the bit, and what does that cost?

    python repeatable.py [--device cuda]

First every block: the gradients of six equal steps, by torch's default kernels and by its
deterministic ones, which nasattn trains with. Then whole training steps by both kinds in turns.
"""

import argparse
import os
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasattn.architecture import Placement
from nasattn.blocks import BLOCKS
from nasattn.config import Experiment, TrainerFile
from nasattn.evaluate.device import repeatable
from nasattn.model import build
from nasattn.space import SearchSpace
from nasattn.space_file import SpaceFile

os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # before the first product, by either kind

SHAPES = [(16, 32, 56, 56), (4, 32, 28, 28)]
STEPS, ROUNDS, BATCH = 10, 8, 64
CUED = "../../search_spaces/cued_digits.yaml"
PHOTOS = {"backbone": {"name": "mobilenet_v2"}, "input": [3, 224, 224], "classes": 10}
PHOTOS |= {"sites": ["stage*.*"], "blocks": {"se": {}}}
NETWORKS: list[tuple[str, object, tuple[str, str], list[str]]] = [
    ("cued digits", CUED, ("stage2.0", "stage4.0"), ["self_attention", "lightnl", "ccnet"]),
    (
        "224 x 224",
        PHOTOS,
        ("stage3.0", "stage5.0"),
        ["self_attention", "non_local", "lightnl", "ccnet", "isanet", "emanet"],
    ),
]


def kernels(device: str, deterministic: bool) -> AbstractContextManager[None]:
    """Those that a training on the device uses, or torch's default ones."""
    accelerator = "gpu" if device == "cuda" and deterministic else "cpu"
    return repeatable(TrainerFile(accelerator=accelerator))


def spread(block: nn.Module, shape: tuple[int, ...], device: str) -> float:
    """The largest difference between the gradients of six equal steps."""
    torch.manual_seed(1)
    x = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
    x, upper = x.requires_grad_(), torch.randn(shape, device=device)
    first: list[Tensor] = []
    worst = 0.0
    for _ in range(6):
        x.grad = None
        block.zero_grad()
        block(x).backward(upper)
        grads = [g.clone() for t in (x, *block.parameters()) if (g := t.grad) is not None]
        first = first or grads
        worst = max(worst, *(float((a - b).abs().max()) for a, b in zip(first, grads, strict=True)))
    return worst


def awake(name: str, device: str) -> nn.Module:
    """A block none of whose parameters are zero, without dropout, which is random."""
    torch.manual_seed(0)
    block = BLOCKS[name](32).to(device).train()
    for parameter in block.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, 0.0, 0.1)
    for module in block.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0
    return block


def milliseconds(network: nn.Module, shape: tuple[int, ...], device: str) -> np.ndarray:
    """(rounds, 2) of a training step: by the default kernels, by the deterministic ones."""
    network = network.to(device).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    x = torch.randn(BATCH, *shape, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (BATCH,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()

    def wait() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    times = []
    for _ in range(ROUNDS):
        for deterministic in (False, True):
            with kernels(device, deterministic):
                for _ in range(3):
                    step()
                begun = wait()
                for _ in range(STEPS):
                    step()
                times.append(1e3 * (wait() - begun) / STEPS)
    return np.array(times).reshape(-1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    device = parser.parse_args().device
    kinds = list(product(SHAPES, (False, True)))
    print("block |", *("x".join(map(str, s)) + " deterministic" * d + " |" for s, d in kinds))
    for name in BLOCKS:
        shown = []
        for shape, deterministic in kinds:
            try:
                with kernels(device, deterministic):
                    shown.append(f"{spread(awake(name, device), shape, device):.1e}")
            except RuntimeError as error:
                shown.append(str(error).split(" does not have")[0])
        print(f"{name:15}", *shown, flush=True)
    print("network | blocks | ms a step, quartiles | the same, deterministic | ratio, quartiles")
    for title, space, sites, specs in NETWORKS:
        fields = {"study": "gpu", "space": space, "data": {"name": "cued_digits"}}
        if isinstance(space, str):
            fields["space"] = SpaceFile.load(space)
        plain = SearchSpace.of(Experiment.from_dict(fields).space).baseline()
        for spec in ["", *specs]:
            placed = tuple(Placement.parse(site, spec) for site in sites if spec)
            network = build(replace(plain, placements=placed))
            times = milliseconds(network, plain.input, device)
            ratio = times[:, 1] / times[:, 0]
            quartiles = [np.percentile(v, (25, 50, 75)) for v in (*times.T, ratio)]
            cells = ["{1:.2f} ({0:.2f} to {2:.2f})".format(*q) for q in quartiles]
            print(title, spec or "plain", *cells, sep=" | ", flush=True)


if __name__ == "__main__":
    main()
