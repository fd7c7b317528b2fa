"""``nvfp4_moe_report.html``: one safe file whose marks and numbers are those of the run."""

import math
import re
import statistics
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

from quantize.nvfp4.kernels import for_device
from quantize.nvfp4.kernels.kernel import quantize_weights
from quantize.report import LayerReport, RunReport, render
from quantize.report.heatmap import LEVELS
from quantize.report.histogram import value

VOID = {"meta", "link", "img", "br", "hr", "input", "area", "base", "source"}
NAN = math.nan
TIMES, MINUS = "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}"
NASTY = "model.<script>alert('1')</script>\"&.3.experts"


@dataclass
class Node:
    tag: str
    attributes: dict[str, str]
    children: list["Node | str"] = field(default_factory=list)

    def all(self, tag: str = "", **attributes: str) -> list["Node"]:
        """Descendants; ``class_`` wants one of the element's classes."""
        kind = attributes.pop("class_", None)
        found = []
        for child in self.children:
            if isinstance(child, Node):
                matches = (
                    child.tag == (tag or child.tag)
                    and (kind is None or kind in child.attributes.get("class", "").split())
                    and attributes.items() <= child.attributes.items()
                )
                found += [child] * matches + child.all(tag, **attributes, **_class(kind))
        return found

    def one(self, tag: str = "", **attributes: str) -> "Node":
        (found,) = self.all(tag, **attributes)
        return found

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)


def _class(kind: str | None) -> dict[str, str]:
    return {} if kind is None else {"class_": kind}


class Tree(HTMLParser):
    """A strict parser: every element is closed, in order."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("", {})
        self.open = [self.root]
        self.feed(page)
        self.close()
        assert self.open == [self.root], "unclosed elements"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), "an attribute twice"
        node = Node(tag, {name: text or "" for name, text in attrs})
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def layer(number: int, experts: int = 8, **more: Any) -> LayerReport:
    """A layer like any other: errors within 2 % of 0.095, scales up to 448."""
    errors = [
        tuple(0.095 + 0.0001 * ((7 * e + 3 * p + number) % 11) for p in range(3))
        for e in range(experts)
    ]
    counts = [0] * 127
    for bits in range(100, 127):
        counts[bits] = 10 + bits
    default = LayerReport(
        f"model.layers.{number}.mlp.experts",
        "swiglu_oai(alpha=1.702, beta=1, limit=7)",
        ("gate", "up", "down"),
        errors,
        counts,
        4_000_000,
        1_000_000,
    )
    return replace(default, **more)


def run(*layers: LayerReport, **more: Any) -> RunReport:
    default = RunReport(
        "org/source",
        "/out/target",
        "nvfp4-moe quantize org/source /out/target",
        "modelopt",
        "max",
        {"vllm-nvfp4-moe": "9.8.7", "torch": "2.11.0"},
        20_000_000,
        8_000_000,
        list(layers),
    )
    return replace(default, **more)


def changed(original: LayerReport, expert: int, errors: tuple[float, ...]) -> LayerReport:
    return replace(
        original,
        errors=[errors if i == expert else row for i, row in enumerate(original.errors)],
    )


def parse(report: RunReport) -> Node:
    return Tree(render(report)).root


def cells(map_: Node) -> list[list[str]]:
    """The class of each cell of a heat map: its colour, ``c0`` to ``c63``, or what is remarkable;
    empty where there is no cell."""
    found: dict[tuple[int, int], str] = {}
    for path in map_.all("path"):
        kind, drawn = path.attributes["class"], path.attributes["d"]
        if kind == "grid":
            continue
        runs = re.findall(r"M(\d+) (\d+)h(\d+)v1H(\d+)z", drawn)
        assert "".join(f"M{x} {y}h{n}v1H{back}z" for x, y, n, back in runs) == drawn
        for x, y, n, back in runs:
            assert x == back
            for column in range(int(x), int(x) + int(n)):
                assert (int(y), column) not in found
                found[int(y), column] = kind
    rows, columns = (1 + max(place[axis] for place in found) for axis in (0, 1))
    return [[found.get((row, column), "") for column in range(columns)] for row in range(rows)]


def level(kind: str) -> int:
    """Of a cell's colour, out of ``LEVELS``."""
    assert kind[0] == "c"
    return int(kind[1:])


@pytest.fixture(scope="module")
def eventful() -> Node:
    """Layer 1's expert 5 has a bad down; of layer 2, expert 0 is all zero and 6 is exact."""
    second = changed(changed(layer(2), 0, (NAN, NAN, NAN)), 6, (0.0, 0.0, 0.0))
    return parse(run(layer(0), changed(layer(1), 5, (0.0951, 0.0949, 0.3127)), second))


def test_the_page_is_one_file(eventful: Node) -> None:
    for element in eventful.all():
        for name, text in element.attributes.items():
            if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
                assert text.startswith("#"), text
            assert not name.startswith("on")
            assert "url(" not in text
    assert not eventful.all("link")
    style = eventful.one("style").text
    assert "@import" not in style
    assert "url(" not in style
    policy = eventful.one("meta", **{"http-equiv": "Content-Security-Policy"})
    assert "default-src 'none'" in policy.attributes["content"]


def test_links_lead_somewhere_and_ids_are_unique(eventful: Node) -> None:
    ids = [e.attributes["id"] for e in eventful.all() if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    links = [a.attributes["href"] for a in eventful.all("a")]
    assert links
    assert {link.removeprefix("#") for link in links} <= set(ids)


def test_pictures_have_words(eventful: Node) -> None:
    pictures = [svg for svg in eventful.all("svg") if svg.attributes.get("aria-hidden") != "true"]
    assert len(pictures) == 4 + 3
    assert all(svg.attributes["role"] == "img" for svg in pictures)
    assert "1 far above, 1 all zero, 1 exact" in pictures[0].attributes["aria-label"]
    assert eventful.one("head").one("title").text == "target: NVFP4 MoE report"
    assert eventful.one("h1").text == "target"


def test_what_the_run_was(eventful: Node) -> None:
    page = eventful.one("main").text
    for fact in (
        "org/source",
        "nvfp4-moe quantize org/source /out/target",
        "swiglu_oai(alpha=1.702, beta=1, limit=7)",
        "modelopt",
        "vllm-nvfp4-moe 9.8.7, torch 2.11.0",
    ):
        assert fact in page
    sizes = eventful.one(class_="sizes").text
    assert "20.0 MB" in sizes
    assert "experts 12.0 MB → 3.0 MB" in sizes
    assert "all else 8.0 MB → 5.0 MB" in sizes
    tiles = [tile.text for tile in eventful.all(class_="big")]
    assert tiles[:2] == [f"2.50{TIMES} smaller", f"4.00{TIMES} smaller"]
    assert tiles[3] == "24 in 3 layers"


def test_the_worst_is_named_first(eventful: Node) -> None:
    verdict = eventful.one(class_="verdict")
    assert "bad" in verdict.attributes["class"]
    assert verdict.one("h2").text == "1 weight is far above the usual error"
    lines = verdict.all("li")
    assert [line.one(class_="chip").text for line in lines] == ["far above", "all zero", "exact"]
    # Zero and exact ones do not count; that the bad one does moves a median little.
    usual = [row[2] for n in range(3) for e, row in enumerate(layer(n).errors) if n < 2 or e % 6]
    times = f"{0.3127 / statistics.median(usual):.2f} {TIMES} its median"
    assert f"model.layers.1.mlp.experts expert 5 down 0.3127 ({times})" in lines[0].text
    assert "model.layers.2.mlp.experts expert 0 gate, up, down" in lines[1].text

    first = eventful.one("table", class_="worst").one("tbody").all("tr")[0]
    assert [cell.text for cell in first.all("td")][:4] == [
        "model.layers.1.mlp.experts",
        "5",
        "down",
        "0.3127",
    ]
    row = eventful.one(id=first.all("a")[1].attributes["href"].removeprefix("#"))
    combined = math.sqrt((0.0951**2 + 0.0949**2 + 0.3127**2) / 3)
    numbers = [cell.text for cell in row.all("td")]
    assert numbers == [f"{combined:.4f}", "0.09510", "0.09490", "0.3127"]


def test_findings_come_first_and_say_why(eventful: Node) -> None:
    """Before all figures: what is off, gravest first, each with a reason."""
    sections = eventful.one("main").all("section")
    assert "verdict" in sections[0].attributes["class"]
    whole = eventful.one("main").text
    assert whole.index("far above the usual error") < whole.index("smaller") < whole.index("Layers")
    reasons = [line.one(class_="why").text for line in sections[0].all("li")]
    assert ["verify SRC DST" in reasons[0], "zeros" in reasons[1], "NVFP4 has" in reasons[2]] == (
        [True] * 3
    )


def test_few_scales_left_is_a_reason() -> None:
    """Block scales of 1 to 7 are subnormal: here a tenth of all."""
    bad = changed(layer(1), 5, (0.0951, 0.0949, 0.3127))
    counts = [0] * 127
    counts[3], counts[100] = 100, 900
    verdict = parse(run(layer(0), replace(bad, scale_counts=counts))).one(class_="verdict")
    assert verdict.one(class_="why").text.startswith(
        "10% of the layer's block scales are subnormal"
    )


def test_an_expert_that_a_huge_value_has_wiped_out() -> None:
    """Its relative error is small, since the value makes up its norm: that must not look well."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) / 50
    weight[3, 5] = 1e6
    (found,) = quantize_weights([weight], "mse", for_device(torch.device("cpu")))
    left = found.weight.dequantize()
    left[3, 5] = 0
    assert not left.any()  # what else was there is lost
    error = math.sqrt(found.noise / found.signal)
    assert error < 0.04
    root = parse(run(layer(0), changed(layer(1), 5, (0.0951, 0.0949, error))))
    verdict = root.one(class_="verdict")
    assert "warn" in verdict.attributes["class"]
    assert verdict.one("h2").text == "1 weight is far below the usual error"
    assert "expert 5 down" in verdict.one("li").text
    assert "a few huge values" in verdict.one(class_="why").text.lower()
    assert root.all("svg", class_="map")[0].all("path", class_="low")


def test_nothing_is_wider_than_a_phone(eventful: Node) -> None:
    """What has a width of its own lies in something that scrolls, or shrinks with the page."""
    (viewport,) = [m for m in eventful.all("meta") if m.attributes.get("name") == "viewport"]
    assert viewport.attributes["content"].startswith("width=device-width")
    style = eventful.one("style").text
    for scrolls in (
        r"\.wide\{[^}]*overflow-x:auto",
        r"\.scroll\{[^}]*overflow:auto",
        r"\.histogram\{[^}]*max-width:100%",
        r"pre\{[^}]*white-space:pre-wrap",
    ):
        assert re.search(scrolls, style)
    assert len(eventful.all("table")) == sum(
        len(s.all("table")) for s in eventful.all(class_="scroll")
    )
    maps = eventful.all("svg", class_="map")
    assert len(maps) == sum(
        len(wide.all("svg", class_="map")) for wide in eventful.all(class_="wide")
    )
    for picture in eventful.all("svg"):
        kinds = picture.attributes.get("class", "").split()
        assert {"map", "histogram"} & {*kinds} or int(picture.attributes["width"]) <= 150
    for rule in re.findall(r"[;{](?:min-)?width:(\d+)px", style):
        assert int(rule) <= 150 or f"width:{rule}px;max-width:100%" in style


def test_maps_mark_what_is_remarkable(eventful: Node) -> None:
    combined, gate, _, down = eventful.all("svg", class_="map")
    for map_, row, column, kind in (
        (combined, 1, 5, "far"),
        (down, 1, 5, "far"),
        (combined, 2, 0, "zero"),
        (gate, 2, 0, "zero"),
        (combined, 2, 6, "exact"),
    ):
        marked = [
            (r, c) for r, line in enumerate(cells(map_)) for c, k in enumerate(line) if k == kind
        ]
        assert marked == [(row, column)]
        x, y, w, h = (map_.attributes[f"data-{name}"] for name in "xywh")
        assert map_.one("g").attributes["transform"] == f"translate({x} {y}) scale({w} {h})"
    assert not gate.all("path", class_="far")
    assert gate.all("text")[0].text == "0"
    coloured = [kind for row in cells(combined) for kind in row if kind.startswith("c")]
    assert len(coloured) == 3 * 8 - 3


def test_colours_follow_errors() -> None:
    errors = [(0.090 + 0.001 * i,) * 3 for i in range(11)]
    map_ = parse(run(layer(0, errors=errors))).all("svg", class_="map")[0]
    (row,) = cells(map_)
    levels = [level(kind) for kind in row]
    assert levels == sorted(set(levels))
    assert abs(levels[5] - (LEVELS - 1) / 2) < 1  # the median gets the middle
    assert map_.attributes["data-w"] == "40"


def test_each_level_has_its_colour(eventful: Node) -> None:
    colours = re.findall(r"\.c(\d+)\{fill:(#[0-9a-f]{6})\}", eventful.one("style").text)
    assert [int(number) for number, _ in colours] == list(range(LEVELS))
    assert len({colour for _, colour in colours}) == LEVELS


def test_noise_does_not_look_like_news() -> None:
    errors = [(0.095 + 1e-5 * i,) * 3 for i in range(8)]
    root = parse(run(layer(0, errors=errors)))
    (row,) = cells(root.all("svg", class_="map")[0])
    levels = [level(kind) for kind in row]
    assert (max(levels) - min(levels)) / LEVELS < 4 / 128
    assert root.one(class_="verdict").one("h2").text == "Nothing stands out"
    assert f"{MINUS}5%median+5%" in root.one(class_="ramp").text


def test_zero_weights_alone_are_a_warning() -> None:
    root = parse(run(layer(0), changed(layer(1), 2, (0.095, NAN, 0.095))))
    verdict = root.one(class_="verdict")
    assert "warn" in verdict.attributes["class"]
    assert "expert 2 up" in verdict.one("li").text
    numbers = [cell.text for cell in root.one(id="e1-2").all("td")]
    assert numbers == ["all zero", "0.09500", "all zero", "0.09500"]


def test_a_whole_bad_layer_is_one_line() -> None:
    root = parse(run(*map(layer, range(6)), layer(6, errors=[(0.4, 0.4, 0.4)] * 8)))
    verdict = root.one(class_="verdict")
    assert verdict.one("h2").text == "24 weights are far above the usual error"
    assert "; and 2 more" in verdict.one("li").text


def test_a_wholly_bad_run_is_not_its_own_yardstick() -> None:
    root = parse(run(layer(0, errors=[(0.8, 0.8, 0.8)] * 8)))
    assert "24 weights are far above" in root.one(class_="verdict").text


def test_histogram() -> None:
    counts = [0] * 127
    counts[63], counts[64], counts[120] = 300, 100, 1
    root = parse(run(layer(0, scale_counts=counts)))
    figure = root.one("svg", class_="histogram")
    bars = figure.all("rect", class_="bar")
    assert [bar.one("title").text.split(":")[0] for bar in bars] == ["1.875", "2", "256"]
    assert bars[0].one("title").text == "1.875: 300 (74.81%)"
    tall = [float(bar.attributes["height"]) for bar in bars]
    assert max(tall) == tall[0]
    # Areas are shares: 300 to 100.
    area = [t * float(bar.attributes["width"]) for t, bar in zip(tall, bars, strict=True)]
    assert area[0] / area[1] == pytest.approx(3, rel=0.05)
    assert "401 block scales; largest 256, 0 subnormal, 0 zero" in figure.attributes["aria-label"]


def test_values_of_bit_patterns() -> None:
    bits = torch.arange(127, dtype=torch.uint8)
    assert [value(b) for b in range(127)] == bits.view(torch.float8_e4m3fn).float().tolist()


def test_scales_of_zero_are_damage() -> None:
    root = parse(run(layer(0, scale_counts=[3] + [1] * 126)))
    verdict = root.one(class_="verdict")
    assert "bad" in verdict.attributes["class"]
    assert "3 block scales of zero" in verdict.one("li").text


def test_names_from_the_checkpoint_stay_text() -> None:
    bad = layer(0, errors=[(0.4, 0.095, 0.095)] * 9, prefix=NASTY, gate=NASTY)
    names = tuple(f"{NASTY}.{i}" for i in range(3))
    dense = layer(0, prefix=NASTY, projections=("weight",), errors=[(0.1,)] * 3, names=names)
    root = parse(
        run(
            *(layer(9), bad),
            source=NASTY,
            target=NASTY,
            command=NASTY,
            layout=NASTY,
            scales=NASTY,
            versions={NASTY: NASTY},
            dense=dense,
        )
    )
    assert len(root.all("script")) == 1
    assert root.one("main").text.count(NASTY) > 15
    assert not any("alert" in name for e in root.all() for name in e.attributes)


def test_names_that_are_no_unicode_can_be_written() -> None:
    assert render(run(layer(0, prefix="a\ud800b"))).encode()


def test_the_same_run_gives_the_same_page() -> None:
    assert render(run(layer(0), layer(1))) == render(run(layer(0), layer(1)))


def test_dense_linears_by_kind_and_layer() -> None:
    names = tuple(
        f"model.layers.{n}.self_attn.{k}_proj" for n in (0, 10**9) for k in ("q", "k", "v")
    )
    errors = [(0.095,), (0.095,), (0.095,), (0.095,), (0.2,), (NAN,)]
    dense = layer(0, prefix="dense", projections=("weight",), errors=errors, names=names)
    root = parse(run(layer(0), dense=dense))
    map_ = root.all("svg", class_="map")[-1]
    labels = [label.text for label in map_.all("text")]
    assert labels[:3] == [f"model.layers.N.self_attn.{k}_proj" for k in ("q", "k", "v")]
    coloured = [[kind.startswith("c") for kind in row] for row in cells(map_)]
    assert coloured == [[True, True], [True, False], [True, False]]
    lines = [line.text for line in root.one(class_="verdict").all("li")]
    assert f"{names[4]} weight 0.2000 (2.11 {TIMES} its median)" in lines[0]
    assert root.one(id="d1-1").one("th").text == names[4]
    assert "dense linears 4.0 MB → 1.0 MB" in root.one(class_="sizes").text


@pytest.mark.parametrize(
    "report",
    [
        run(),
        run(layer(0, errors=[(NAN,) * 3] * 4, scale_counts=[0] * 127)),
        run(layer(0, errors=[(math.inf,) * 3] * 4)),
        run(layer(0, errors=[(0.0,) * 3] * 4)),
        run(layer(0, experts=1)),
        run(layer(0), layer(1, experts=3)),
        run(layer(0, projections=("up", "down"), errors=[(0.1, 0.1)] * 4), layer(1)),
        run(layer(0), bytes_before=0, bytes_after=0),
        run(layer(0, prefix="experts"), layer(0, prefix="experts")),
        run(dense=layer(0, projections=("weight",), errors=[(0.1,)] * 4)),
        run(layer(0), dense=layer(0, projections=("weight",), errors=[])),
    ],
)
def test_odd_runs_have_a_page_too(report: RunReport) -> None:
    root = parse(report)
    assert root.one("h1")
    assert "nan" not in root.one("main").text
    ids = [e.attributes["id"] for e in root.all() if "id" in e.attributes]
    assert len(ids) == len(set(ids))


def test_gates_that_differ_are_counted() -> None:
    root = parse(run(layer(0), layer(1), layer(2, gate="silu")))
    said = root.one(class_="setup").text
    assert "swiglu_oai(alpha=1.702, beta=1, limit=7) in 2 layers, silu in 1 layer" in said


def test_a_minimax_m3_stays_small() -> None:
    page = render(run(*(layer(n, experts=128) for n in range(3, 60))))
    assert len(page.encode()) < 2_000_000
    root = Tree(page).root
    combined, *others = root.all("svg", class_="map")
    assert len(others) == 3
    assert [len(row) for row in cells(combined)] == [128] * 57
    assert all(kind for row in cells(combined) for kind in row)
    assert int(combined.attributes["width"]) <= 1070
    assert root.one(id="e56-127").one("th").text == "127"
