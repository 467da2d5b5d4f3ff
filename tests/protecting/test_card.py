import yaml

from trap2.protecting.card import LIMITS, model_card


def record(
    strength: float = 0.3, method: str = "lora", name: str = "topics", leak: float | None = 0.6
) -> dict:
    return {
        "recipe": {
            "task": {"name": name, "classes": ["low", "high"]},
            "method": method,
            "base": "org/some_base",
            "training": {"steps": 40},
        },
        "seed": 3,
        "trap2": {"strength": strength},
        "validation": {
            "rows": 96,
            "chosen": {"step": 30, "utility": 0.9375, "leak": leak, "base_leak": 0.625},
            "scale_curve": [
                {"s": 0.0, "accuracy": 0.5, "relabelled": 0.625},
                {"s": 0.5, "accuracy": 0.021, "relabelled": 0.55},
            ],
        },
    }


def front_matter(card: str) -> dict:
    _, front, _ = card.split("---\n", 2)
    return yaml.safe_load(front)


def test_the_card_states_numbers_method_and_limits() -> None:
    card = model_card(record())
    assert "# topics: protected with trap2\n" in card
    assert 'lora fine-tune of org/some\\_base for the task "topics" (2 classes), seed 3, ' in card
    assert "40 steps, checkpoint of step 30" in card
    assert "Validation accuracy as released: 93.8 % (96 rows)." in card
    assert "| 0 | 50.0 % | 62.5 % |\n| 0.5 | 2.1 % | 55.0 % |\n" in card
    assert LIMITS in card
    assert "arXiv 2601.21898" in card


def test_the_card_does_not_say_where_a_local_base_lies() -> None:
    local = record()
    local["recipe"]["base"] = "/home/me/models/some_base"
    card = model_card(local)
    assert "lora fine-tune of some\\_base for" in card
    assert "/home" not in card


def test_a_protected_card_does_not_claim_that_merges_fail() -> None:
    assert "**Whether merges fail is not claimed here**" in model_card(record())
    assert "stands at the end of this card, put there by `trap2 card`" in model_card(record())


def test_a_trap_that_did_not_close_is_said_before_the_numbers() -> None:
    assert "did not close" not in model_card(record())
    claimed = model_card(record(leak=0.9)).split("## What is claimed\n\n")[1]
    assert claimed.startswith("**The trap did not close: at scale 0.5 or 0.8 re-labelled outputs ")


def test_a_control_claims_nothing() -> None:
    card = model_card(record(strength=0.0, leak=None))
    assert "unprotected control, trained without a trap" in card
    assert "Nothing is claimed" in card
    assert "protected with trap2" not in card


def test_the_front_matter_is_yaml_and_names_peft_only_for_adapters() -> None:
    assert front_matter(model_card(record())) == {"library_name": "peft", "tags": ["trap2"]}
    assert front_matter(model_card(record(method="full"))) == {"tags": ["trap2"]}


def test_outside_text_cannot_break_out_of_its_line() -> None:
    card = model_card(record(name="x\n---\n# <script>[a](b) |" + "y" * 500))
    title = card.split("\n\n")[1]
    assert title.startswith("# x --- \\# \\<script\\>\\[a\\](b) \\|yyy")
    assert len(title) < 250
    assert "<script>" not in card
