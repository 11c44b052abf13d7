"""The balance sheet: lines, differences and what explains them."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssmd_dagster.day.ledger import BooksLedger, ChannelLedger, Explanation, Ledger, TradesLedger, WireLedger

counts = st.none() | st.integers(0, 1_000)


@st.composite
def ledgers(draw: st.DrawFn) -> Ledger:
    """Any sheet."""
    channels = draw(
        st.lists(
            st.builds(
                ChannelLedger,
                channel=st.sampled_from(["trade", "ticker"]),
                received=counts,
                spooled=counts,
                published=counts,
                archived=counts,
                normalised=counts,
                duplicates=counts,
                control=counts,
                rejected=st.none() | st.dictionaries(st.sampled_from(["bad_json", "no_time"]), st.integers(0, 9)),
                other_day=counts,
                opening_fold=counts,
            ),
            max_size=3,
            unique_by=lambda sheet: sheet.channel,
        )
    )
    return Ledger(
        channels=tuple(channels),
        wire=draw(st.builds(WireLedger, distinct=counts, holes=counts, duplicates=counts)),
        trades=draw(
            st.builds(TradesLedger, exchange=counts, captured=counts, repaired=counts, missing=counts, extra=counts)
        ),
        books=draw(st.builds(BooksLedger, points=counts, differing=counts, markets=counts)),
    )


def trade_ledger(**lines: int) -> Ledger:
    """A sheet of one channel that balances, with some lines replaced."""
    sheet = ChannelLedger(
        channel="trade",
        **{
            "received": 10,
            "spooled": 10,
            "published": 10,
            "archived": 10,
            "normalised": 7,
            "duplicates": 1,
            "control": 1,
            "other_day": 0,
            "opening_fold": 0,
            **lines,
        },
        rejected={"bad_json": 1},
    )
    return Ledger(
        channels=(sheet,),
        wire=WireLedger(distinct=9, holes=0, duplicates=1),
        trades=TradesLedger(exchange=7, captured=7, repaired=0, missing=0, extra=0),
        books=BooksLedger(points=4, differing=0, markets=2),
    )


def test_a_balanced_sheet_has_no_difference() -> None:
    """Every record is accounted for, every line is computed."""
    ledger = trade_ledger()
    assert ledger.differences() == []
    assert ledger.not_computed() == []
    assert dict(ledger.lines())["trade rejected"] == 1


@given(ledgers())
def test_a_difference_is_named_for_every_pair_that_is_computed_and_unequal(ledger: Ledger) -> None:
    """Whatever the numbers are, the sizes of differences are those of the sides, and absent lines make none."""
    found = {difference.name: difference.size for difference in ledger.differences()}
    assert 0 not in found.values()
    for sheet in ledger.channels:
        name = f"{sheet.channel}: spooled - published"
        if sheet.spooled is None or sheet.published is None:
            assert name not in found
        else:
            assert found.get(name, 0) == sheet.spooled - sheet.published
        parts = [sheet.normalised, sheet.duplicates, sheet.control, sheet.rejected_total, sheet.other_day]
        filed = [part for part in (*parts, sheet.opening_fold) if part is not None]
        if sheet.archived is not None and len(filed) == 6:
            assert found.get(f"{sheet.channel}: archived - filed", 0) == sheet.archived - sum(filed)
    assert len(ledger.not_computed()) == sum(line.size is None for line in ledger.lines())


@given(ledgers())
def test_a_sheet_survives_json(ledger: Ledger) -> None:
    """What events and manifests carry can be read back."""
    plain = msgspec.json.decode(msgspec.json.encode(ledger.to_json()))
    assert Ledger.from_json(plain | {"later": 1}) == ledger


@pytest.mark.parametrize(
    ("spooled", "sizes", "explained"),
    [
        (8, [], False),
        (8, [2], True),
        (8, [1], False),
        (8, [1, 1], True),
        (8, [None], True),
        (12, [None], False),
        (12, [-2], True),
    ],
)
def test_gaps_explain_a_difference_of_their_size(spooled: int, sizes: list[int | None], explained: bool) -> None:
    """Sizes must add up; a gap of unknown size explains any loss and no surplus."""
    name = "trade: received - spooled"
    ledger = msgspec.structs.replace(
        trade_ledger(spooled=spooled, published=spooled, archived=spooled, normalised=spooled - 3),
        explanations=tuple(
            Explanation(difference=name, gap_id=f"g{number}", size=size) for number, size in enumerate(sizes)
        ),
    )
    (difference,) = ledger.differences()
    assert (difference.name, difference.size) == (name, 10 - spooled)
    assert difference.explained is explained
    assert difference.explained_by == (tuple(f"g{number}" for number in range(len(sizes))) if explained else ())
    assert ledger.unexplained() == ([] if explained else [difference])


def test_the_wire_and_the_exchange_have_their_say() -> None:
    """Holes in the exchange's numbering, trades that we lack and books that differ are differences of their own."""
    ledger = msgspec.structs.replace(
        trade_ledger(),
        wire=WireLedger(distinct=9, holes=2, duplicates=0),
        trades=TradesLedger(exchange=9, captured=7, repaired=1, missing=1, extra=3),
        books=BooksLedger(points=9, differing=4, markets=2),
    )
    assert [(entry.name, entry.size) for entry in ledger.differences()] == [
        ("wire: holes", 2),
        ("trades: missing", 1),
        ("books: differing", 4),
    ]


def test_why_a_part_is_not_computed_stands_beside_its_name() -> None:
    """As a reader and the condition see it."""
    ledger = msgspec.structs.replace(trade_ledger(), trades=TradesLedger(), why_not={"trades": "no key"})
    assert ledger.not_computed_briefly() == ["trades (no key)"]
