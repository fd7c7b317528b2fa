"""What the report says of calibration: the numbers of its findings, and nothing without it."""

from __future__ import annotations

import math
from dataclasses import replace

from quantize.report import CalibrationReport, ExpertStats
from tests.quantize.test_report import NASTY, TIMES, Node, changed, layer, parse, run

NAN = math.nan
SETTINGS = CalibrationReport("texts.jsonl", 128, 2048, "descent", False, 32)
GIVEN = ExpertStats(
    tokens=[1000, 2000, 31, 0, 500, 4000, 32, 1500],
    rules=["descent", "descent", "mse", "mse", "descent", "descent", "descent", "descent"],
    before=[[0.08, 0.1], [0.08, 0.1], [0.08, 0.1], [NAN, NAN], *[[0.08, 0.1]] * 4],
    after=[[0.04, 0.06], [0.04, 0.06], [0.08, 0.1], [NAN, NAN], *[[0.05, 0.09]] * 3, [0.09, 0.05]],
)


def page(given: ExpertStats = GIVEN, **more: object) -> Node:
    settings = replace(SETTINGS, **more)  # type: ignore[arg-type]
    return parse(run(layer(0, calibration=given), layer(1), calibration=settings))


def section(root: Node) -> Node:
    return root.one("section", class_="calibration")


def words(node: Node) -> str:
    return " ".join(node.text.split())


def test_a_run_without_calibration_says_nothing_of_it() -> None:
    root = parse(run(layer(0), layer(1)))
    assert root.all("section", class_="calibration") == []
    assert "alibrat" not in words(root.one("body"))


def test_the_settings_and_what_it_is_compared_with() -> None:
    root = page()
    said = words(section(root))
    assert f"descent, 128 {TIMES} 2,048 tokens of texts.jsonl" in said
    assert "each expert given those routed to it" in said
    assert "under the rule max without calibration" in said
    assert "An expert with fewer than 32 is rounded to nearest instead" in said
    assert "all of them" in words(section(page(every_expert=True)))


def test_tokens_errors_and_rules_of_a_layer() -> None:
    details = section(page()).one("details")
    assert details.attributes["id"] == "calibration-0"  # the layer without findings has none
    said = words(details.one("summary"))
    assert "0 750 4,000" in said  # least, median of 500 and 1,000, most
    assert "2 below 32" in said
    # Means over the seven experts with a number: after (2 * .04 + .08 + 3 * .05 + .09) / 7.
    assert "gate, up 0.08000 → 0.05714 (" in said
    assert "down 0.1000 → 0.07714 (" in said
    assert "6 descent" in said
    assert "2 mse" in said


def test_which_experts_fell_back_and_which_are_worse() -> None:
    lists = section(page()).one("dl")
    names = [words(node) for node in lists.all("dt")]
    found = dict(zip(names, lists.all("dd"), strict=True))
    numbers = {name: [link.text for link in node.all("a")] for name, node in found.items()}
    assert numbers["mse"] == ["2", "3"]
    assert numbers["below 32"] == ["2", "3"]
    assert numbers["no output"] == ["3"]
    assert numbers["worse after"] == ["7"]  # of its first product
    assert words(found["descent"]) == "6 experts"


def test_links_lead_to_the_experts_rows() -> None:
    root = page()
    targets = {node.attributes.get("id") for node in root.all("tr")}
    links = {link.attributes["href"].removeprefix("#") for link in section(root).all("a")}
    assert links
    assert links <= targets
    row = next(node for node in root.all("tr") if node.attributes.get("id") in links)
    assert [words(cell) for cell in row.all("td")][-2:] in (["31", "mse"], ["0", "mse"],
                                                              ["1,500", "descent"])  # fmt: skip


def test_names_from_outside_are_text() -> None:
    root = parse(
        run(layer(0, calibration=GIVEN, prefix=NASTY), calibration=replace(SETTINGS, text=NASTY))
    )
    assert NASTY in section(root).text
    assert len(root.all("script")) == len(parse(run(layer(0))).all("script"))


def test_experts_that_got_nothing_at_all() -> None:
    none = ExpertStats([0] * 8, ["mse"] * 8, [[NAN, NAN]] * 8, [[NAN, NAN]] * 8)
    said = words(section(page(none)))
    assert "8 below 32" in said
    assert "nan" not in said.lower().replace("nanoseconds", "")


def test_experts_that_got_too_little_text_are_named_first() -> None:
    verdict = page().one(class_="verdict")
    assert "warn" in verdict.attributes["class"]
    assert verdict.one("h2").text == "Errors are as usual, but 2 experts got too little text"
    (line,) = verdict.all("li")
    assert "little text model.layers.0.mlp.experts expert 2 31 tokens; expert 3 0 tokens" in (
        words(line).replace("textmodel", "text model")
    )
    assert "Fewer than 32: rounded to nearest" in words(line)
    assert [a.attributes["href"] for a in line.all("a")] == ["#e0-2", "#e0-3"]
    # With all tokens for all experts, those that the router sends few are calibrated too.
    every = replace(GIVEN, rules=["descent"] * 8)
    assert (
        page(every, every_expert=True).one(class_="verdict").one("h2").text == "Nothing stands out"
    )


def test_what_became_of_the_outputs_is_said_of_a_weight_that_is_far() -> None:
    bad = changed(layer(0, calibration=GIVEN), 0, (0.0951, 0.0949, 0.3127))
    verdict = parse(run(bad, layer(1), calibration=SETTINGS)).one(class_="verdict")
    before, after = math.hypot(0.08, 0.1), math.hypot(0.04, 0.06)
    assert verdict.all(class_="why")[0].text == (
        "Expert 0 was rounded for its outputs on 1,000 tokens; their error went from "
        f"{before:.3g} to {after:.3g}."
    )
