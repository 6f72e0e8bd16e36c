"""`nasattn blocks`, and the page that lists the same blocks."""

import json
import re
import sys
from typing import Any

import pytest
import torch
from conftest import ROOT

from nasattn import catalog, cli
from nasattn.architecture import Placement
from nasattn.blocks import BLOCKS
from nasattn.cost.blocks import block_rows, parse_shape
from nasattn.errors import UserError
from nasattn.model import make_block

PAGE = ROOT / "nasattn/blocks/README.md"
COLUMNS = ("params", "macs", "map_elements")

# Parameters, MACs in units of 1e9 and attention weights of the papers' forms, from closed forms
# that were worked out and evaluated apart from this code.
KNOWN = {
    (512, 97, 97): {
        "self_attention": (328_321, 54.076, 88_529_281),
        "non_local": (526_592, 50.260, 88_529_281),
        "danet": (328_322, 59.009, 88_791_425),
        "a2net": (525_568, 6.166, 4_817_408),
        "ccnet": (328_321, 8.269, 1_825_346),
        "gcnet": (33_889, 0.010, 9_409),
        "emanet": (525_824, 7.091, 602_176),
        "isanet": (2_366_464, 26.716, 2_520_128),
        "annnet": (920_576, 9.163, 1_034_990),
        "lightnl": (5_632, 1.277, 65_536),
    },
    (1024, 14, 14): {
        "self_attention": (1_312_001, 0.301, 38_416),
        "non_local": (2_101_760, 0.450, 38_416),
        "danet": (1_312_002, 0.712, 1_086_992),
        "a2net": (2_099_712, 0.514, 200_704),
        "ccnet": (1_312_001, 0.526, 5_488),
        "gcnet": (133_313, 0.001, 196),
        "emanet": (2_100_224, 0.501, 12_544),
        "isanet": (9_451_520, 2.317, 17_408),
        "annnet": (3_676_160, 0.741, 21_560),
        "lightnl": (11_264, 0.051, 38_416),
    },
    (64, 56, 56): {
        "self_attention": (5_201, 0.724, 9_834_496),
        "non_local": (8_480, 0.655, 9_834_496),
        "danet": (5_202, 0.750, 9_838_592),
        "a2net": (8_352, 0.032, 200_704),
        "ccnet": (5_201, 0.083, 351_232),
        "gcnet": (653, 0.000, 3_136),
        "emanet": (8_384, 0.116, 200_704),
        "isanet": (37_760, 0.150, 354_368),
        "annnet": (14_720, 0.067, 344_960),
        "lightnl": (704, 0.008, 1_024),
    },
}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of `nasattn blocks` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["nasattn", "blocks", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


@pytest.mark.parametrize("shape", KNOWN, ids=str)
def test_figures_are_the_closed_forms(shape: tuple[int, int, int]) -> None:
    rows = {row["block"]: row for row in block_rows(shape)}
    channels, height, width = shape
    # The closed form projects ANNNet's values everywhere, the block only the 110 pooled ones.
    saved = {"annnet": (height * width - 110) * channels * channels // 2}
    for name, (params, giga_macs, elements) in KNOWN[shape].items():
        row = rows[name]
        # Placement adds the scale of `identity_init`, one parameter, where the paper has no zero.
        extra = row["identity"] == "identity_init"
        assert row["params"] == params + extra
        assert round((row["macs"] + saved.get(name, 0)) / 1e9, 3) == giga_macs
        assert row["map_elements"] == elements
        assert row["reason"] is None


def test_rows_are_the_whole_catalogue() -> None:
    rows = block_rows((96, 14, 14))
    assert [row["block"] for row in rows] == list(catalog.BLOCKS) == list(BLOCKS)
    for row in rows:
        entry = catalog.BLOCKS[row["block"]]
        assert (row["title"], row["year"], row["url"]) == (entry.title, entry.year, entry.url)
        assert list(row["options"]) == list(entry.options)
        for option, rule in entry.options.items():
            assert row["options"][option]["default"] == rule.default
            assert row["options"][option]["allowed"] == rule.allowed
        assert row["params"] > 0 or row["block"] == "simam"
        assert row["map_elements"] > 0


@pytest.mark.parametrize("name", BLOCKS)
def test_what_is_said_of_the_identity_is_so(name: str) -> None:
    """A real block, as placement makes it, is the identity; only the papers' own without help."""
    (row,) = (row for row in block_rows((64, 7, 9)) if row["block"] == name)
    torch.manual_seed(0)
    x = torch.rand(2, 64, 7, 9)  # not negative, as EMANet's skip would have it
    block = make_block(Placement(site="map", block=name), 64).train()
    assert torch.equal(block(x), x)
    assert sum(p.numel() for p in block.parameters()) == row["params"]
    bare = BLOCKS[name](64).train()
    assert torch.equal(bare(x), x) == (row["identity"] == "paper")
    assert "identity_init" in row["options"] or row["identity"] == "paper"


def test_a_block_that_cannot_stand_says_why() -> None:
    rows = {row["block"]: row for row in block_rows((24, 56, 56))}
    refused = {name for name, row in rows.items() if row["reason"]}
    assert refused == {"gcnet", "dmsanet"}
    for name in refused:
        assert {rows[name][m] for m in COLUMNS} == {None}
        assert "24 channels" in rows[name]["reason"]
    assert rows["lightnl"]["params"] == 11 * 24


def test_shapes() -> None:
    assert parse_shape("96,14,14") == (96, 14, 14)
    assert parse_shape(" 1, 4096 ,07") == (1, 4096, 7)
    for row in block_rows((4096, 4096, 4096)):
        assert row["macs"] >= 0 and row["reason"] is None


@pytest.mark.parametrize(
    "text",
    [
        *("", "96", "96,14", "96,14,14,1", "96x14x14", "96,,14", "96,14,14,", "a,b,c"),
        *("96,14,0", "96,-14,14", "9.5,14,14", "96,14,4097", "99999999999,1,1", "\u0663,14,14"),
    ],
)
def test_bad_shapes(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="channels, height and width"):
        parse_shape(text)
    assert run(monkeypatch, f"--shape={text}") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"--shape: got '{text}'" in printed.err
    assert "such as 96,14,14" in printed.err


def test_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--shape", "24,56,56", "--json") == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert rows == block_rows((24, 56, 56))


def test_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--shape=24,56,56") == 0
    text = capsys.readouterr().out
    for row in block_rows((24, 56, 56)):
        assert row["title"] in text and str(row["year"]) in text
        for option, rule in row["options"].items():
            default = re.escape(json.dumps(rule["default"]).strip('"'))
            assert re.search(rf"{row['block']}\.{option} +{default} ", text)
        figures = ["-"] * 3 if row["reason"] else [f"{row[m]:,}" for m in COLUMNS]
        assert re.search(rf"{row['block']} +{row['identity']} +" + " +".join(figures), text)
        assert (row["reason"] or "") in text


def test_the_page_lists_every_block() -> None:
    """The table of the page against the catalogue: names, papers, years, identity and options."""
    table = dict(re.findall(r"^\| `(\w+)` \|(.*)\|$", PAGE.read_text(encoding="utf-8"), re.M))
    assert list(table) == list(BLOCKS)
    for name, entry in catalog.BLOCKS.items():
        cells = [cell.strip() for cell in table[name].split("|")]
        assert cells[0] == f"[{entry.title}]({entry.url})"
        assert cells[1] == str(entry.year)
        assert cells[-2] == ("yes" if entry.starts_as_identity else "`identity_init`")
        assert re.findall(r"`(\w+)`", cells[-1]) == list(entry.options)


def test_the_examples_of_the_page_run() -> None:
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert len(examples) == 2
    for example in examples:
        exec(example, {})


def test_the_links_of_the_page_lead_somewhere() -> None:
    links = re.findall(r"\]\((\.[^)]*)\)", PAGE.read_text(encoding="utf-8"))
    assert len(links) >= 3
    for link in links:
        assert (PAGE.parent / link).is_file(), link
