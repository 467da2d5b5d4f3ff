"""`trap2 sweep`: accuracy and loss of one release with its update at each scale, nothing merged."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from trap2.attacks.live import LiveModel
from trap2.auditing.arena import Member, Whole
from trap2.checkpoint import Checkpoint
from trap2.errors import UserError
from trap2.schema import ScalePoint
from trap2.tasks.evaluation import Evaluation
from trap2.tasks.model import base_folder, load_encoder
from trap2.taskspec import TaskSpec


def sweep(
    release: Path,
    base: str,
    task: TaskSpec,
    scales: Sequence[float],
    *,
    split: Whole = "test",
    rows: int = 500,
    seed: int = 0,
    say: Callable[[ScalePoint], None] = lambda point: None,
) -> list[ScalePoint]:
    """Evaluate a release at each scale.

    Args:
        release: The release folder.
        base: Folder or Hub id of its base.
        task: Its task.
        scales: Scales, in the order they are run; 0 is the base, 1 the release as released.
        split: Rows to evaluate on.
        rows: How many at most.
        seed: Which rows, when there are more.
        say: Told each point as it comes.

    Raises:
        UserError: An input is not acceptable.
    """
    if rows < 1:
        raise UserError(f"rows={rows} leaves nothing to evaluate on; give 1 or more")
    folder = base_folder(base)
    encoder = load_encoder(folder, task.is_language)
    live = LiveModel(encoder, Checkpoint(folder))
    member = Member(release, task, folder, encoder, {split: rows}, seed)
    points = []
    for s in scales:
        with live.merged((name, s * delta) for name, delta in member.vector.items()):
            points.append(scale_point(s, member.evaluators[split]()))
        say(points[-1])
    return points


def scale_point(s: float, result: Evaluation) -> ScalePoint:
    """One point of a scale curve.

    Raises:
        UserError: At this scale the model computes NaN or infinity.
    """
    loss = result.loss
    if not math.isfinite(loss):
        raise UserError(f"at scale {s} the loss is {loss}; use finite scales nearer to 1")
    return ScalePoint(s=s, accuracy=result.accuracy, loss=loss)
