"""Registration, the checks of `merge`, and task vectors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trap2.attacks import attack as module
from trap2.attacks.attack import (
    COEFFICIENTS,
    DATA_TIER,
    ROUTING,
    TIERS,
    Attack,
    attack,
    load_attacks,
    merge,
)
from trap2.attacks.vectors import TaskVector, Tensors, by_tensor
from trap2.errors import Trap2Error, UserError
from trap2.registry import Registry

QUICK = settings(deadline=None, max_examples=30)

A = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
B = {"b": torch.tensor([5.0]), "v": torch.tensor([[7.0]])}


@pytest.fixture
def registry(monkeypatch):
    """An empty registry in the place of the real one, so that tests register freely."""
    load_attacks()
    fresh = Registry("attack")
    monkeypatch.setattr(module, "ATTACKS", fresh)
    return fresh


def registered(registry, function, **options):
    attack("mine", paper="-", **options)(function)
    return registry.get("mine")


def test_built_in_attacks_are_listed_and_say_what_they_are():
    attacks = load_attacks()
    assert {"task_arithmetic", "ties", "dare_ties", "slerp", "tsv", "iso_c"} <= set(attacks)
    for name in attacks:
        entry = attacks.get(name)
        assert entry.name == name
        assert entry.paper.startswith("https://")
        assert entry.function.__doc__
        assert set(entry.tiers) <= set(TIERS) or entry.tiers in ((DATA_TIER,), (ROUTING,))
        assert entry.needs_data == (entry.tiers == (DATA_TIER,))
        assert 0.0 in entry.coefficients or entry.tiers == (ROUTING,)
        assert all(keys.keys() == entry.grid.keys() for keys in entry.settings())
    assert attacks.get("slerp").needs_base
    assert not attacks.get("ties").needs_base
    assert max(COEFFICIENTS) > 1


def test_settings_are_all_combinations(registry):
    def mine(updates, coefficients, *, p, q):
        return iter(())

    entry = registered(registry, mine, grid={"p": (1, 2), "q": (0.5,)})
    assert list(entry.settings()) == [{"p": 1, "q": 0.5}, {"p": 2, "q": 0.5}]


def test_an_attack_that_takes_data_is_in_the_tier_of_data_alone(registry):
    def mine(updates, coefficients, *, data, p):
        return iter(())

    entry = registered(registry, mine, grid={"p": (1,)})
    assert (entry.needs_data, entry.tiers, list(entry.grid)) == (True, ("T4",), ["p"])


def test_an_attack_on_data_is_worked_out_at_once(registry):
    ran = []

    def mine(updates, coefficients, *, data):
        for update in updates:
            ran.extend(data)
            yield from update.items()

    entry = registered(registry, mine)
    merged = merge(entry, [A], 1.0, data=["rows"])
    assert ran == ["rows"]
    assert dict(merged).keys() == A.keys()


def test_an_attack_without_parameters_has_one_setting():
    assert list(load_attacks().get("task_arithmetic").settings()) == [{}]


def test_decorator_returns_the_function(registry):
    def mine(updates, coefficients):
        return iter(())

    assert attack("mine", paper="-")(mine) is mine


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "attack 'mine' takes 'density', but its grid has no values for it; add 'density'"),
        ({"grid": {"density": ()}}, "takes 'density', but its grid has no values"),
        (
            {"grid": {"density": (1.0,), "drop": (0.5,)}},
            "has 'drop' in its grid, but its function takes no keyword-only parameter of that "
            "name; it takes: density",
        ),
        ({"grid": {"density": (1.0,)}, "tiers": ("T9",)}, "has tier 'T9'; use T1, T2, T3"),
    ],
)
def test_grid_must_match_the_signature(registry, options, message):
    def mine(updates, coefficients, *, density):
        return iter(())

    with pytest.raises(UserError, match=message):
        attack("mine", paper="-", **options)(mine)
    assert "mine" not in registry


def test_a_name_is_taken_once(registry):
    def mine(updates, coefficients):
        return iter(())

    registered(registry, mine)
    with pytest.raises(UserError, match="attack 'mine' is registered already"):
        registered(registry, mine)


def test_by_tensor_is_the_union_in_order_of_first_appearance_with_zeros():
    walked = list(by_tensor([TaskVector.of(A), TaskVector.of(B)]))
    assert [name for name, _ in walked] == ["w", "b", "v"]
    (_, (w1, w2)), (_, (b1, b2)), (_, (v1, v2)) = walked
    assert torch.equal(w1, A["w"])
    assert torch.equal(w2, torch.zeros(2))
    assert (b1, b2) == (3.0, 5.0)
    assert torch.equal(v1, torch.zeros(1, 1))
    assert torch.equal(v2, B["v"])


def test_by_tensor_refuses_two_shapes_of_one_tensor():
    other = {"w": torch.zeros(3)}
    with pytest.raises(UserError, match=r"'w' has shape \(2,\) in one update and \(3,\) in anoth"):
        list(by_tensor([TaskVector.of(A), TaskVector.of(other)]))


def test_task_vector_reads_float32_and_only_what_it_has():
    vector = TaskVector.of({"w": torch.ones(2, dtype=torch.bfloat16)})
    assert vector["w"].dtype == torch.float32
    assert "v" not in vector
    assert vector.get("v") is None
    assert len(vector) == 1
    assert TaskVector.of(vector) is vector


def test_tensors_read_only_when_asked():
    read = []
    tensors = Tensors(["a", "b"], lambda name: read.append(name) or torch.zeros(1))
    assert list(tensors) == ["a", "b"]
    assert read == []
    assert torch.equal(tensors["b"], torch.zeros(1))
    assert read == ["b"]


@QUICK
@given(
    st.lists(st.integers(-9, 9), min_size=1, max_size=30),
    st.integers(1, 100),
    st.integers(1, 5),
)
def test_magnitude_is_the_kth_largest_of_the_whole_update(values, percent, cut):
    share = percent / 100
    whole = torch.tensor(values, dtype=torch.float32)
    parts = {"a": whole[:cut], "b": whole[cut:]}
    kept = max(1, round(share * len(values)))
    expected = sorted((abs(v) for v in values), reverse=True)[kept - 1]
    vector = TaskVector.of(parts)
    assert vector.magnitude(share) == expected
    assert vector.magnitude(share) == expected


def test_what_was_worked_out_is_remembered_by_its_key():
    vector, done = TaskVector.of(A), []
    for key in ("one", "two", "one"):
        assert vector.remember((key,), lambda key=key: done.append(key) or len(done)) in (1, 2)
    assert done == ["one", "two"]
    assert vector.serial != TaskVector.of(A).serial


def test_only_the_latest_version_of_a_result_is_kept():
    vector, done = TaskVector.of(A), []
    for version in (1, 1, 2, 1):
        vector.remember(("one",), lambda version=version: done.append(version), (version,))
    assert done == [1, 2, 1]


def test_magnitude_is_exact_past_the_limit_of_quantile():
    count = 2**24 + 2
    entries = torch.zeros(count)
    entries[7], entries[-1] = 3.0, -2.0
    vector = TaskVector.of({"w": entries})
    assert vector.magnitude(2 / count) == 2.0
    with pytest.raises(RuntimeError):
        torch.quantile(entries, 0.5)


@pytest.mark.parametrize(
    ("name", "updates", "coefficients", "params", "message"),
    [
        ("tise", [A], 1.0, {}, "no attack is called 'tise'; did you mean 'ties'"),
        ("ties", [], 1.0, {"density": 1.0}, "'ties' merges 1 or more models, but got 0; give"),
        ("slerp", [A], 1.0, {}, "'slerp' merges 2 models, but got 1; give that many"),
        (
            "task_arithmetic",
            [A, B],
            [1.0, 1.0, 1.0],
            {},
            "got 3 coefficients for 2 models; give one shared coefficient or one per model",
        ),
        ("task_arithmetic", [A], float("nan"), {}, "got the coefficient nan, .* give finite"),
        ("ties", [A], 1.0, {"densty": 1.0}, "no parameter 'densty'; did you mean 'density'"),
        ("ties", [A], 1.0, {}, "needs 'density', which has no default; give one, such as density="),
        ("task_arithmetic", [A], 1.0, {"k": 1}, "has no parameter 'k'; it has: none"),
        ("slerp", [A, B], 0.5, {}, "the updates given name no base; give base="),
    ],
)
def test_merge_refuses_wrong_input_at_once(name, updates, coefficients, params, message):
    with pytest.raises(UserError, match=message):
        merge(name, updates, coefficients, **params)


def test_merge_wants_a_base_with_every_tensor():
    with pytest.raises(
        UserError, match="an update changes 'v', which the base does not have; give"
    ):
        merge("slerp", [A, B], 0.5, base=A)


def test_merge_finds_parameters_in_the_defaults():
    assert next(merge("dare_ties", [A], 1.0, drop=0.0))[0] == "w"


def yielding(*pairs):
    def mine(updates, coefficients):
        return iter(pairs)

    return Attack("mine", "-", ("T1",), mine, {}, (1, None), False, (0.0,))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("w", A["w"])], "left out 1 of 2 tensors, such as 'b'; a merge must yield every tensor"),
        ([("w", A["w"]), ("w", A["w"])], "yielded 'w' twice; correct"),
        ([("x", A["w"])], "yielded 'x' though no update has it; correct"),
        ([("w", A["w"] / 0)], r"with coefficients \(1.0,\) and no parameters gave NaN or infinity"),
    ],
)
def test_merge_checks_what_an_attack_yields(pairs, message):
    with pytest.raises(Trap2Error, match=message):
        list(merge(yielding(*pairs), [A], 1.0))


def test_merge_is_lazy_tensor_by_tensor():
    read = []

    def reader(name):
        read.append(name)
        return A[name]

    stream = merge("task_arithmetic", [TaskVector(A, reader)], 1.0)
    assert read == []
    next(stream)
    assert read == ["w"]
