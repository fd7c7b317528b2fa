"""Which kernels of two checkouts are compared with which, and what counts as different."""

from __future__ import annotations

from benchmarks.same_sass import compare


def test_equal_code_is_the_same_under_any_name() -> None:
    before = {"route": "a", "some_gated": "b", "some_plain": "c"}
    after = {"gemm64_plain": "c", "gemm64_gated": "b", "route": "a"}
    assert compare(before, after) == [
        ("route", "route", True),
        ("some_gated", "gemm64_gated", True),
        ("some_plain", "gemm64_plain", True),
    ]


def test_what_differs_or_has_no_partner_is_found() -> None:
    same_name = compare({"route": "a", "gather": "b"}, {"route": "a", "gather": "B"})
    assert same_name == [("route", "route", True), ("gather", "gather", False)]
    # Two kernels that have changed places keep their names, and do not pass for each other.
    swapped = compare({"gated": "a", "plain": "b"}, {"gated": "b", "plain": "a"})
    assert [same for *_, same in swapped] == [False, False]
    assert compare({"old": "a"}, {"new": "b"}) == [("old", "", False), ("", "new", False)]
    # One kernel is the partner of one.
    assert compare({"one": "a", "two": "a"}, {"three": "a"}) == [
        ("one", "three", True),
        ("two", "", False),
    ]
