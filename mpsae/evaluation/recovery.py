"""Whether the latents of an SAE are the features that the data were made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mpsae.evaluation.synthetic import Hierarchy
from mpsae.metrics import RunningFVU
from mpsae.sae import SparseAutoencoder
from mpsae.sparse import Pursuit, SparseCode, dense_code


@dataclass(frozen=True)
class Recovery:
    """Measures over the pairs of one latent and one feature that are matched, see `recovery`."""

    mcc: float
    """Mean cosine of the pairs."""
    f1: float
    """Of a latent as a detector of its feature, mean over pairs."""
    precision: float
    """Share of a latent's firings in which its feature fires, mean over pairs."""
    recall: float
    """Share of a feature's firings in which its latent fires, mean over pairs."""
    absorption: float
    """Share of a child's firings in which its latent fires and its parent's is silent."""
    l0: float
    """Mean number of latents that fire in a row."""
    explained_variance: float = float("nan")
    """1 - FVU."""


def match(dictionary: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pair latents and features one to one so that the sum of their cosines is the largest.

    The cosine has its sign: a latent that fires with positive values cannot stand for a feature
    that points the other way. It does not depend on the norms of atoms.

    Args:
        dictionary: ``[n, d]``.
        features: ``[F, d]``.

    Returns:
        Latents, features (both ``[m]`` int64, m = min(n, F), latents rising) and cosines ``[m]``.

    Example:
        >>> match(torch.eye(2), torch.tensor([[0.0, 3.0], [1.0, 0.0]]))[1].tolist()
        [1, 0]
    """
    cosine = F.normalize(dictionary.double(), dim=1) @ F.normalize(features.double(), dim=1).T
    cosine = cosine.cpu()
    turned = cosine.shape[0] > cosine.shape[1]
    columns = torch.from_numpy(assignment(-(cosine.T if turned else cosine).numpy()))
    rows = torch.arange(len(columns))
    if turned:
        columns, order = columns.sort()
        rows, columns = columns, order
    return rows, columns, cosine[rows, columns]


def assignment(cost: np.ndarray) -> np.ndarray:
    """Give each row a column of its own so that the sum of costs is the smallest.

    Shortest augmenting paths with potentials: rows join one by one, each along the path of least
    reduced cost to a free column.

    Args:
        cost: ``[m, n]``, finite, m <= n.

    Returns:
        Column of each row, ``[m]`` int64.

    Notes:
        O(m^2 n); m n steps of NumPy at worst.

    References:
        Kuhn, 1955. Jonker & Volgenant, 1987.

    Example:
        >>> assignment(np.array([[1.0, 2.0], [1.0, 4.0]])).tolist()
        [1, 0]
    """
    m, n = cost.shape
    of_row, of_column = np.zeros(m), np.zeros(n)
    owner = np.full(n, -1)  # row of each column
    for new in range(m):
        distance = np.full(n, np.inf)
        before = np.full(n, -1)  # column before on the path, -1 at its start
        done = np.zeros(n, dtype=bool)
        row, column, reached = new, -1, 0.0
        while True:
            ahead = reached + cost[row] - of_row[row] - of_column
            closer = ~done & (ahead < distance)
            distance[closer], before[closer] = ahead[closer], column
            column = int(np.where(done, np.inf, distance).argmin())
            reached, done[column] = distance[column], True
            if owner[column] < 0:
                break
            row = owner[column]
        gain = reached - distance[done]
        of_column[done] -= gain
        taken = owner[done]
        of_row[taken[taken >= 0]] += gain[taken >= 0]
        of_row[new] += reached
        while column >= 0:
            earlier = before[column]
            owner[column] = new if earlier < 0 else owner[earlier]
            column = earlier
    columns = np.empty(m, dtype=np.int64)
    taken = owner >= 0
    columns[owner[taken]] = taken.nonzero()[0]
    return columns


def recovery(
    dictionary: Tensor,
    code: SparseCode | Pursuit,
    features: Tensor,
    magnitudes: Tensor,
    parent: Tensor,
) -> Recovery:
    r"""Hold latents against the features that made the data.

    Latents and features are paired by :func:`match`; measures are over these pairs only, so that
    features for which there is no latent count nowhere. With L_p and F_p the rows in which latent
    and feature of pair p fire:

        mcc         mean_p cos(atom, feature)
        precision   mean_p |L_p & F_p| / |L_p|               0 where the latent never fires
        recall      mean_p |L_p & F_p| / |F_p|
        f1          mean_p 2 |L_p & F_p| / (|L_p| + |F_p|)
        absorption  sum_{(p, c)} |F_c & L_c - L_p| / sum_{(p, c)} |F_c|

    The last runs over a parent p and a child c of it that are both paired: in a row where both
    features fire, the parent's latent is silent and the child's fires. Pairs whose feature never
    fires are left out of precision, recall and f1.

    Args:
        dictionary: ``[n, d]``.
        code: of B rows; a latent fires where its values add up to other than 0.
        features: ``[F, d]``.
        magnitudes: ``[B, F]``, other than 0 where a feature fires.
        parent: ``[F]`` int64, -1 for none; a feature fires only where its parent does.

    Returns:
        Recovery without explained variance; NaN where nothing is measured.

    Raises:
        ValueError: shapes disagree.
    """
    n, count = len(dictionary), len(features)
    if magnitudes.shape != (len(code.indices), count) or parent.shape != (count,):
        raise ValueError(
            f"{count} features and {len(code.indices)} rows of code need magnitudes "
            f"{[len(code.indices), count]} and parent {[count]}, not {list(magnitudes.shape)} and "
            f"{list(parent.shape)}"
        )
    latents, matched, cosine = match(dictionary, features)
    fires = dense_code(code.indices, code.values, n) != 0
    on, truth = fires[:, latents].double(), (magnitudes != 0)[:, matched].double()
    both, mine, theirs = (t.sum(0) for t in (on * truth, on, truth))
    seen = theirs > 0
    place = torch.full((count + 1,), -1)  # the last one is the parent of roots
    place[matched] = torch.arange(len(matched))
    above = place[parent[matched]]
    child = (above >= 0).nonzero()[:, 0]
    absorbed = truth[:, child] * on[:, child] * (1 - on[:, above[child]])
    return Recovery(
        mcc=cosine.mean().item(),
        f1=(2 * both / (mine + theirs))[seen].mean().item(),
        precision=(both / mine.clamp_min(1))[seen].mean().item(),
        recall=(both / theirs)[seen].mean().item(),
        absorption=(absorbed.sum() / truth[:, child].sum()).item(),
        l0=fires.sum(1).double().mean().item(),
    )


@torch.no_grad()
def evaluate_recovery(
    sae: SparseAutoencoder, data: Hierarchy, *, rows: int = 20_000, seed: int, **options: Any
) -> Recovery:
    """Measure an SAE on rows of synthetic data.

    Args:
        sae: of any architecture; put into evaluation mode.
        data: what it was trained on.
        rows: drawn and encoded at once.
        seed: of the rows; another one than in training.
        options: of the SAE's ``encode``, for instance ``refit=True``.

    Returns:
        Recovery.
    """
    x, magnitudes = data.sample(rows, seed)
    code = sae.eval().encode(x, **options)
    residual = code.residual if isinstance(code, Pursuit) else x - sae.decode(code)
    total = RunningFVU(sae.config.d_in)
    total.update(x, residual)
    found = recovery(sae.dictionary, code, data.features, magnitudes, data.parent)
    return Recovery(**{**vars(found), "explained_variance": 1 - total.value()})
