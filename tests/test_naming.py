"""Which tensor is which: one leading module name is kept, stripped or added, one rule for all."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trap2.naming import align, is_head

PARTS = st.sampled_from(["layer", "0", "1", "dense", "weight", "bias", "bert"])
NAMES = st.lists(
    st.lists(PARTS, min_size=1, max_size=4).map(".".join), unique=True, min_size=1, max_size=8
)


@pytest.mark.parametrize(
    "name",
    [
        "classifier.weight",
        "classifier.out_proj.bias",
        "score.weight",
        "pre_classifier.weight",
        "head.dense.weight",
        "bert.classifier.weight",
    ],
)
def test_heads_are_known_by_name(name: str) -> None:
    assert is_head(name)


@pytest.mark.parametrize(
    "name",
    [
        "encoder.layer.0.attention.self.query.weight",
        "bert.encoder.layer.0.classifier.weight",
        "pooler.dense.weight",
        "headless.weight",
        "embeddings.scored.weight",
    ],
)
def test_encoder_tensors_are_no_heads(name: str) -> None:
    assert not is_head(name)


@given(names=NAMES)
def test_equal_names_stay(names: list[str]) -> None:
    assert align(names, names) == {name: name for name in names}


@given(names=NAMES)
def test_a_prefix_is_stripped_or_added(names: list[str]) -> None:
    longer = [f"model.{name}" for name in names]
    assert align(longer, names) == dict(zip(longer, names, strict=True))
    assert align(names, longer) == dict(zip(names, longer, strict=True))


@given(names=NAMES, known=NAMES)
def test_it_maps_onto_known_names_and_never_two_onto_one(
    names: list[str], known: list[str]
) -> None:
    mapped = align(names, known)
    assert set(mapped) <= set(names)
    assert set(mapped.values()) <= set(known)
    assert len(set(mapped.values())) == len(mapped)
    assert list(mapped) == [name for name in names if name in mapped]


def test_one_rule_is_used_for_all() -> None:
    names = ["bert.a.weight", "bert.b.weight", "a.weight", "classifier.weight"]
    assert align(names, ["a.weight", "b.weight"]) == {
        "bert.a.weight": "a.weight",
        "bert.b.weight": "b.weight",
    }


def test_strangers_do_not_map() -> None:
    assert align(["x.y"], ["a.b"]) == {}
    assert align([], ["a.b"]) == {}
    assert align(["x.y"], []) == {}
