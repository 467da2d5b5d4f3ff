"""The registry: a fixed order, refusal of duplicates, and a suggestion on a miss."""

import pytest

from trap2.errors import UserError
from trap2.registry import Registry, did_you_mean


def fruits() -> Registry[int]:
    registry: Registry[int] = Registry("fruit")
    for number, name in enumerate(("pear", "apple", "fig")):
        assert registry.add(name, number) == number
    return registry


def test_its_order_is_the_alphabet_whatever_was_imported_first() -> None:
    registry = fruits()
    assert list(registry) == ["apple", "fig", "pear"]
    assert len(registry) == 3
    assert "apple" in registry
    assert "plum" not in registry
    assert registry.get("fig") == 2


def test_a_name_is_given_once() -> None:
    registry = fruits()
    with pytest.raises(UserError) as caught:
        registry.add("fig", 9)
    assert str(caught.value) == "fruit 'fig' is registered already; choose another name"
    assert registry.get("fig") == 2


def test_a_near_miss_gets_a_suggestion_and_the_list() -> None:
    with pytest.raises(UserError) as caught:
        fruits().get("aple")
    assert str(caught.value) == (
        "no fruit is called 'aple'; did you mean 'apple'? known: apple, fig, pear"
    )


def test_nothing_near_gets_no_suggestion() -> None:
    with pytest.raises(UserError) as caught:
        fruits().get("zzz")
    assert str(caught.value) == "no fruit is called 'zzz'; known: apple, fig, pear"
    assert did_you_mean("zzz", ["pear"]) == ""
