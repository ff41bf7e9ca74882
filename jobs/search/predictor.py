"""What an assignment will cost in quality: a sum over groups, corrected by what was seen together.

Takes the divergence that each choice causes alone, and losses of whole assignments as they come;
gives predicted rises of the loss. Pure.

Alone, choices add up only roughly: errors of one block meet those of the next. So every kind of
choice (a format in a part) has a factor, 1 to begin with, and ridge regression towards 1 (Hoerl and
Kennard 1970) moves it by joint results.

S groups, C choices, K kinds, N assignments
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jobs.search.space import Assignment, Space

_RIDGE = 0.05  # Weight of the prior, over the mean square of the rises seen.


@dataclass(frozen=True)
class Predictor:
    """Rises of the loss that each choice of each group adds, in nats per token."""

    rises_SC: NDArray[np.float64]  # noqa: N815

    def rise(self, assignment: Assignment) -> float:
        """Return the predicted rise of the mean loss, in nats per token."""
        if not assignment:
            return 0.0
        return float(self.rises_SC[np.arange(len(assignment)), list(assignment)].sum())

    def refitted(
        self, space: Space, assignments: Sequence[Assignment], rises: Sequence[float]
    ) -> "Predictor":
        """Return a predictor that also explains these joint results; not finite ones are left out.

        `self` must hold what choices add alone, as they were measured.
        """
        seen = [(a, r) for a, r in zip(assignments, rises, strict=True) if a and np.isfinite(r)]
        if not seen:
            return self
        kinds_SC, num_kinds = _kinds(space)
        features_NK = np.zeros((len(seen), num_kinds))
        for row, (assignment, _) in enumerate(seen):
            for group, choice in enumerate(assignment):
                features_NK[row, kinds_SC[group, choice]] += self.rises_SC[group, choice]
        wanted_N = np.array([rise for _, rise in seen])
        # Large rises would drown the small ones that matter: every row counts by its own size.
        weight_N = 1.0 / (np.abs(wanted_N) + np.median(np.abs(wanted_N)) + 1e-9)
        rows_NK, missing_N = features_NK * weight_N[:, None], wanted_N * weight_N
        missing_N = missing_N - rows_NK.sum(axis=1)
        ridge = _RIDGE * len(seen) * max(float(np.mean(rows_NK**2)), 1e-12)
        gram_KK = rows_NK.T @ rows_NK + ridge * np.eye(num_kinds)
        factor_K = 1.0 + np.linalg.solve(gram_KK, rows_NK.T @ missing_N)
        return Predictor(self.rises_SC * np.clip(factor_K, 0.1, 10.0)[kinds_SC])


def _kinds(space: Space) -> tuple[NDArray[np.int64], int]:
    """Return the kind of every choice of every group, [S, C], and how many kinds there are."""
    parts = sorted({group.part for group in space.groups})
    kinds_SC = np.array(
        [
            [parts.index(group.part) * len(space.choices) + c for c in range(len(space.choices))]
            for group in space.groups
        ]
    )
    return kinds_SC, len(parts) * len(space.choices)
