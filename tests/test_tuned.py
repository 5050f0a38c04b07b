"""The report of the tuning benchmark."""

from __future__ import annotations

from benchmarks.tuned import LONG, gap_closed


def cell(loss: float) -> dict:
    return {"valid": loss, "test": loss, "curve": [[1.0, loss]]}


def test_the_share_of_a_gap_is_told_only_where_the_gap_exceeds_its_spread():
    search = [cell(2.0)] * (LONG - 1) + [cell(0.9)]
    results = {
        "untuned low 0": cell(1.0), "untuned low 1": cell(2.0), "default low 0": cell(0.5),
        "untuned high 0": cell(2.9), "untuned high 1": cell(3.0), "default high 0": cell(1.0), "random any 0": search,
    }  # fmt: skip
    assert "low no gap beyond the spread (1.0000, 0.5000, 0.9000)" in gap_closed(results)
    assert "high 95 % (2.9000, 1.0000, 0.9000)" in gap_closed(results)
    several = results | {"random any 1": [cell(1.89)] * LONG, "default low 1": cell(1.5)}  # gaps of 0.1 and 0.11
    assert "low 476 % (1.5000, 1.0000, 1.3950)" in gap_closed(several)
    assert gap_closed(results | {"random any 0": search[:-1]}) == "No long search was run"
