"""The catalogue of blocks with what each costs on one map: what `nasattn blocks` prints."""

import re
from typing import Any

import torch

from nasattn.architecture import Placement
from nasattn.catalog import BLOCKS, Entry
from nasattn.cost.analytic import COUNTERS, count
from nasattn.errors import UserError
from nasattn.model import make_block

MapShape = tuple[int, int, int]
LARGEST = 4096  # a side; beyond it a map over all pairs of positions has no countable size


def parse_shape(text: str) -> MapShape:
    """`96,14,14` -> (96, 14, 14), the channels, height and width of a map."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 3 or not all(
        re.fullmatch("[0-9]{1,9}", part) and 1 <= int(part) <= LARGEST for part in parts
    ):
        raise UserError(
            f"--shape: got '{text}'; allowed: the channels, height and width of a map, "
            f"such as 96,14,14, each a whole number from 1 to {LARGEST}"
        )
    channels, height, width = map(int, parts)
    return channels, height, width


def block_rows(shape: MapShape) -> list[dict[str, Any]]:
    """One row a block, in the catalogue's order, as placement puts it: with its default options.

    `identity` says by what the block starts as the identity: its `paper`, or the option
    `identity_init`. `macs`, `params` and `map_elements`, the attention weights of one sample, are
    those on a map (C, H, W); where the block cannot stand they are None and `reason` says why.
    """
    return [_row(name, entry, shape) for name, entry in BLOCKS.items()]


def _row(name: str, entry: Entry, shape: MapShape) -> dict[str, Any]:
    figures: dict[str, Any] = dict.fromkeys((*COUNTERS, "map_elements", "reason"))
    try:
        figures |= _figures(name, shape)
    except UserError as error:
        figures["reason"] = str(error)
    return {
        "block": name,
        "title": entry.title,
        "year": entry.year,
        "url": entry.url,
        "options": {
            option: {"default": rule.default, "allowed": rule.allowed}
            for option, rule in entry.options.items()
        },
        "identity": "paper" if entry.starts_as_identity else "identity_init",
        "shape": list(shape),
        **figures,
    }


def _figures(name: str, shape: MapShape) -> dict[str, int | float]:
    with torch.device("meta"):
        block: Any = make_block(Placement(site="map", block=name), shape[0])
    return {**count(block, (1, *shape)), "map_elements": block.map_elements(*shape[1:])}
