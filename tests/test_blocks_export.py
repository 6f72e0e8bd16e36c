"""Every block compiled whole, exported, and run by ONNX Runtime, against the block itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nasattn.blocks import BLOCKS

Options = dict[str, Any]

# Every block, and every option that leads through other operators.
CASES: list[tuple[str, Options]] = [
    *((name, {}) for name in BLOCKS),
    ("self_attention", {"value_ratio": 0.5, "pool": 2}),
    ("non_local", {"mode": "gaussian", "subsample": "before"}),
    ("non_local", {"mode": "dot_product", "norm": False}),
    ("non_local", {"mode": "concatenation", "subsample": "after"}),
    ("danet", {"branches": "channel", "channel": "paper"}),
    ("gcnet", {"fusion": "mul_add", "pooling": "avg", "identity_init": True}),
    ("emanet", {"gradients": True}),
    ("isanet", {"padding": "masked", "size": 4}),
    ("lightnl", {"stride": 2}),
    ("dmsanet", {"mode": "gate", "scales": "depthwise"}),
]
every_case = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=lambda v: v if isinstance(v, str) else ",".join(v) or "defaults"
)
BATCH = ({0: torch.export.Dim("batch")},)


def make(name: str, options: Options) -> nn.Module:
    """With its zero-initialised parameters at random values, so that the block does something."""
    torch.manual_seed(0)
    block = BLOCKS[name](32, **options).eval()
    for parameter in block.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.5)
    return block


def maps(batch: int, height: int = 13, width: int = 11) -> Tensor:
    """More positions than four times the channels: attention by the kernels, not by its map."""
    return torch.randn(batch, 32, height, width, generator=torch.Generator().manual_seed(batch))


@pytest.mark.slow
@every_case
def test_compiles_without_a_graph_break(name: str, options: Options) -> None:
    torch.compiler.reset()
    block, twin = make(name, options).train(), make(name, options).train()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    inputs = [maps(2).requires_grad_() for _ in range(2)]
    for _ in range(2):  # the second pass sees the buffers that the first has left
        outputs = []
        for module, x in zip((block, compiled), inputs, strict=True):
            torch.manual_seed(1)
            outputs.append(module(x))
            outputs[-1].square().sum().backward()
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    assert inputs[0].grad is not None and inputs[1].grad is not None
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-3, atol=1e-3)
    for ours, theirs in zip(block.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@every_case
def test_exports_for_any_batch(name: str, options: Options) -> None:
    block = make(name, options)
    exported = torch.export.export(block, (maps(2),), dynamic_shapes=BATCH).module()
    for batch in (2, 5):
        torch.testing.assert_close(exported(maps(batch)), block(maps(batch)))


class Together(nn.Module):
    """All cases on one input: the exporter takes seconds for each program, whatever its size."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(make(name, options) for name, options in CASES)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [block(x) for block in self.blocks]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the exporter's own
def test_onnx_runtime_gives_the_same(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    blocks = Together().eval()
    program = torch.onnx.export(
        blocks, (maps(2),), dynamo=True, dynamic_shapes=BATCH, verbose=False
    )
    assert program is not None
    program.save(tmp_path / "blocks.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "blocks.onnx")
    for batch in (2, 5):
        outputs = session.run(None, {session.get_inputs()[0].name: maps(batch).numpy()})
        for case, y, wanted in zip(CASES, outputs, blocks(maps(batch)), strict=True):
            torch.testing.assert_close(
                torch.from_numpy(y), wanted, rtol=1e-3, atol=1e-4, msg=lambda m, c=case: f"{c}: {m}"
            )
