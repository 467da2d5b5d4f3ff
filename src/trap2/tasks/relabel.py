"""Re-labelling: what an attacker with a few labelled rows reads from a model's outputs.

The attacker fits a map of the outputs on those rows: nothing, a permutation of the classes, a bias
per class, or a linear map, whichever does best in cross-validation on the same rows. Raw accuracy
flatters a protection that moves the answer instead of hiding it; this does not.

Symbols: Z logits (N, C), standardised with the fitted rows' mean and spread; y labels (N,).
"""

import warnings
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from trap2.errors import UserError
from trap2.tasks.evaluation import Classification, Evaluation

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Reader = Callable[[Floats], Ints]
FOLDS = 5


def relabelled_accuracy(fit: Evaluation, score: Evaluation, rows: int) -> float:
    """Accuracy on `score` read through a map fitted on the first `rows` rows of `fit`.

    Raises:
        UserError: `fit` has fewer rows.
    """
    return float(relabelled_correct(fit, score, rows).mean())


def relabelled_correct(fit: Evaluation, score: Evaluation, rows: int) -> Bools:
    """Which rows (N,) of `score` are right, read through a map fitted on `fit`.

    Args:
        fit: Labelled rows the attacker has (validation).
        score: Rows it is scored on (test).
        rows: How many of `fit` it may use.

    Raises:
        UserError: `fit` has fewer rows.
    """
    if rows > len(fit):
        raise UserError(
            f"re-labelling with {rows} rows needs as many validation rows, there are "
            f"{len(fit)}; raise validation_rows or lower relabel_rows"
        )
    Z, y = first_rows(fit, rows)
    kind = max(READERS, key=lambda name: _cross_validated(name, Z, y))
    test_Z, test_y = _arrays(score)
    right: Bools = READERS[kind](Z, y)(test_Z) == test_y
    return right


def cross_validated_accuracy(fit: Evaluation, rows: int) -> float:
    """What the best map reaches in cross-validation on the first `rows` rows: for tuning."""
    Z, y = first_rows(fit, rows)
    return max(_cross_validated(name, Z, y) for name in READERS)


def readable_accuracy(evaluation: Evaluation) -> float:
    """What the best map reads from the outputs, cross-validated on all rows.

    Where there are no class outputs there is nothing to map: the accuracy as it is.
    """
    if isinstance(evaluation, Classification):
        return cross_validated_accuracy(evaluation, len(evaluation))
    return evaluation.accuracy


def first_rows(fit: Evaluation, rows: int) -> tuple[Floats, Ints]:
    """Outputs (N, C) and labels (N,) of the first rows, without NaN or infinity.

    Raises:
        UserError: There are fewer than two, which nothing can be fitted on.
    """
    Z, y = _arrays(fit)
    Z, y = Z[:rows], y[:rows]
    if len(y) < 2:
        raise UserError(f"re-labelling needs 2 rows or more, there are {len(y)}; give more rows")
    return Z, y


def _arrays(evaluation: Evaluation) -> tuple[Floats, Ints]:
    if not isinstance(evaluation, Classification):
        raise UserError(
            "re-labelling reads class outputs, and this kind of task has none; set relabel_rows to "
            "an empty list"
        )
    logits = torch.nan_to_num(evaluation.logits, nan=0.0, posinf=1e4, neginf=-1e4)
    return logits.double().numpy(), evaluation.labels.numpy()


def _cross_validated(kind: str, Z: Floats, y: Ints) -> float:
    folds = np.arange(len(y)) % min(FOLDS, len(y))
    right = 0
    for fold in range(int(folds.max()) + 1):
        inside, outside = folds != fold, folds == fold
        right += int((READERS[kind](Z[inside], y[inside])(Z[outside]) == y[outside]).sum())
    return right / len(y)


def _as_is(Z: Floats, y: Ints) -> Reader:
    return lambda new: new.argmax(1)


def _permutation(Z: Floats, y: Ints) -> Reader:
    """The assignment of answers to labels that is right most often (Hungarian method)."""
    counts = np.zeros((Z.shape[1], Z.shape[1]))
    np.add.at(counts, (Z.argmax(1), y), 1)
    renamed = linear_sum_assignment(-counts)[1]
    return lambda new: renamed[new.argmax(1)]


def _bias(Z: Floats, y: Ints) -> Reader:
    """A bias per class that centres the logits and gives each class its share of the answers."""
    spread = Z.std() + 1e-12
    bias = -Z.mean(0) / spread
    shares = np.bincount(y, minlength=Z.shape[1]) / len(y)
    for _ in range(50):
        answers = np.bincount((Z / spread + bias).argmax(1), minlength=Z.shape[1]) / len(y)
        bias = bias + 0.2 * (shares - answers)
    return lambda new: (new / spread + bias).argmax(1)


def _linear(Z: Floats, y: Ints) -> Reader:
    """Multinomial logistic regression on standardised logits."""
    if len(np.unique(y)) < 2:
        only = y[0]
        return lambda new: np.full(len(new), only)
    centre, spread = Z.mean(0), Z.std(0) + 1e-12
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = LogisticRegression(C=10.0, max_iter=300).fit((Z - centre) / spread, y)
    return lambda new: fitted.predict((new - centre) / spread)


READERS: dict[str, Callable[[Floats, Ints], Reader]] = {
    "as is": _as_is,
    "permutation": _permutation,
    "bias": _bias,
    "linear": _linear,
}
