"""Depth of tensors by their names."""

from trap2.attacks.depth import depths


def test_depth_is_the_number_of_the_layer_as_a_share_of_the_last():
    names = ["embeddings.word.weight", "layer.0.a", "layer.1.a", "layer.2.b.3.c", "pooler.weight"]
    assert list(depths(names).values()) == [None, 0.0, 0.5, 1.0, None]


def test_without_layers_or_with_one_there_is_no_division_by_zero():
    assert depths(["a", "b"]) == {"a": None, "b": None}
    assert depths(["layer.0.a"]) == {"layer.0.a": 0.0}
    assert depths([]) == {}
