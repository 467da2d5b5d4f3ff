"""The model card of a release: what it is, what is claimed, and what is not."""

from pathlib import Path
from typing import Any

from trap2.protecting.selection import open_trap

LIMITS = """\
- **It works alone.** Used as released (scale 1) it does its task; that is what a publisher ships.
- **A merge can keep it at scale 1.** With its own coefficient at 1 and the partners shrunk, the
  protected skill stays; what suffers then are the partners. No weight-space protection can change
  what a release does when it is used as released.
- **Routing is not merging.** Switching adapters, routing between whole experts or averaging
  outputs leaves the release at scale 1 and is not hindered.
- **Distillation is not merging.** Whoever can run a release can train another model on its answers.
- **Raw accuracy is not protection.** A merge can answer wrongly and still carry the information;
  read the re-labelled numbers.
- **Legitimate merges break too**, the author's own included."""


def model_card(record: dict[str, Any]) -> str:
    """Write the card from `trap2.json`.

    Args:
        record: The content of `trap2.json`.

    Returns:
        Markdown with the YAML front matter model hubs read.
    """
    recipe, chosen = record["recipe"], record["validation"]["chosen"]
    protected = record["trap2"]["strength"] > 0
    what = "protected with trap2" if protected else "unprotected control, trained without a trap"
    claim = (
        "On validation rows the skill is there at scale 1 and the table shows what is left "
        "elsewhere. **Whether merges fail is not claimed here**: that takes an audit "
        "(`trap2 audit`). If these weights were audited, what was found stands at the end of this "
        "card, put there by `trap2 card`, with `report.json` beside it."
        if protected
        else "Nothing is claimed: this release exists to compare the protected one with."
    )
    if doubt := open_trap(chosen):
        claim = f"**{doubt[0].upper()}{doubt[1:]}.** {claim}"
    name = _plain(recipe["task"]["name"])
    front = ["---", "library_name: peft" if recipe["method"] == "lora" else None, "tags:"]
    front += ["- trap2", "---"]
    return (
        "\n".join(line for line in front if line is not None)
        + f"""

# {name}: {what}

A {recipe["method"]} fine-tune of {_plain(_base_name(recipe["base"]))} for the task "{name}" \
({_what(recipe["task"])}), seed {record["seed"]}, \
{recipe["training"]["steps"]} steps, checkpoint of step {chosen["step"]}.
Validation accuracy as released: {100 * chosen["utility"]:.1f} % \
({record["validation"]["rows"]} rows).

## What is claimed

{claim}

{_curve(record["validation"]["scale_curve"])}

## What is not claimed

{LIMITS}

## How it was made

`trap2.json` holds the recipe, all settings, versions, seed and SHA-256 digests of base and weights.
Method: Trap^2, arXiv 2601.21898.
"""
    )


def _what(task: dict[str, Any]) -> str:
    classes = len(task["classes"])
    return f"{classes} classes" if classes else f"kind {task['kind']}"


def _curve(points: list[dict[str, Any]]) -> str:
    """What is left at each scale; without class outputs the loss stands where a map would read."""
    said = "Accuracy on validation rows with the update applied at scale s"
    if points[0]["relabelled"] is None:
        said += ", and loss. Scale 0 is the base model.\n\n| s | accuracy | loss |"
        last = [f"{p['loss']:.3f}" for p in points]
    else:
        said += (
            "; *re-labelled* is what a linear map\nof the outputs, cross-validated on the same "
            "rows, makes of it. Scale 0 is the base model.\n\n| s | as it answers | re-labelled |"
        )
        last = [f"{100 * p['relabelled']:.1f} %" for p in points]
    rows = [
        f"| {p['s']:g} | {100 * p['accuracy']:.1f} % | {cell} |"
        for p, cell in zip(points, last, strict=True)
    ]
    return "\n".join([said, "|---|---|---|", *rows])


def _base_name(base: str) -> str:
    """The Hub id, or of a local folder its name: where it lies is nobody else's business."""
    return Path(base).name if Path(base).is_absolute() else base


def _plain(text: str, longest: int = 120) -> str:
    """Outside text as one harmless line of Markdown."""
    text = " ".join(str(text).split())[:longest]
    return "".join("\\" + c if c in "\\`*_{}[]<>#|!$~" else c for c in text)
