"""preconditions: If-Match and If-None-Match of RFC 9110 section 13, as a table."""

import pytest

from pullthrough.core.preconditions import Precondition, evaluate

HOLDS, FAILED, NOT_MODIFIED = Precondition.HOLDS, Precondition.FAILED, Precondition.NOT_MODIFIED


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        pytest.param(None, HOLDS, id="absent"),
        pytest.param('"x"', HOLDS, id="same"),
        pytest.param(' "y" , "x" ', HOLDS, id="in a list"),
        pytest.param("*", HOLDS, id="any"),
        pytest.param('W/"x"', FAILED, id="weak tag never matches strongly"),
        pytest.param('"y"', FAILED, id="other"),
        pytest.param("x", FAILED, id="unquoted"),
        pytest.param('"x" "y"', FAILED, id="no comma"),
        pytest.param('"x', FAILED, id="open quote"),
        pytest.param("", FAILED, id="empty"),
    ],
)
def test_if_match(field: str | None, expected: Precondition) -> None:
    """Strong comparison; what cannot be read matches nothing."""
    assert evaluate(field, None, '"x"') is expected


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        pytest.param(None, HOLDS, id="absent"),
        pytest.param('"x"', NOT_MODIFIED, id="same"),
        pytest.param('W/"x"', NOT_MODIFIED, id="weakly the same"),
        pytest.param('"y","x"', NOT_MODIFIED, id="in a list"),
        pytest.param(', "y", , "x",', NOT_MODIFIED, id="empty elements"),
        pytest.param('"a,b", "x"', NOT_MODIFIED, id="comma in a tag"),
        pytest.param(" * ", NOT_MODIFIED, id="any"),
        pytest.param('"y"', HOLDS, id="other"),
        pytest.param('"xx"', HOLDS, id="longer"),
        pytest.param('w/"x"', HOLDS, id="the weakness mark has a case"),
        pytest.param('"x", *', HOLDS, id="star in a list"),
        pytest.param("x", HOLDS, id="unquoted"),
        pytest.param("", HOLDS, id="empty"),
    ],
)
def test_if_none_match(field: str | None, expected: Precondition) -> None:
    """Weak comparison; what cannot be read matches nothing."""
    assert evaluate(None, field, '"x"') is expected


def test_if_match_comes_first() -> None:
    """The order of RFC 9110 section 13.2.2."""
    assert evaluate('"y"', '"x"', '"x"') is FAILED
    assert evaluate('"x"', '"x"', '"x"') is NOT_MODIFIED


def test_a_long_field_costs_little() -> None:
    """No field makes the grammar try the same thing again and again."""
    assert evaluate(None, '"y", ' * 50_000 + "!", '"x"') is HOLDS
    assert evaluate(None, " ," * 50_000 + "!", '"x"') is HOLDS
