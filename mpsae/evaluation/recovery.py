"""Whether the latents of an SAE are the features that the data were made of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mpsae.evaluation.matching import cosines, match, uniqueness
from mpsae.evaluation.splitting import composition, splitting
from mpsae.evaluation.synthetic import Hierarchy
from mpsae.evaluation.trees import absorption, depths, level_errors, selection_order
from mpsae.metrics import RunningFVU
from mpsae.sae import SparseAutoencoder
from mpsae.sparse import Pursuit, SparseCode, dense_code

_NAN = float("nan")


@dataclass(frozen=True)
class Recovery:
    """Measures of latents as features, see :func:`recovery`; NaN where nothing is measured."""

    mcc: float
    """Mean cosine of the pairs, see `mean_max_cosine`."""
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
    explained_variance: float = _NAN
    """1 - FVU."""
    shrinkage: float = _NAN
    """Mean over rows of the norm of the reconstruction over that of the row; 1 is none."""
    dead_fraction: float = _NAN
    """Latents that fire in none of the rows."""
    uniqueness: float = _NAN
    """Features that are the nearest to some latent, over latents."""
    splitting: float = _NAN
    """Of the features with latents of their own, the share that has two or more."""
    composition: float = _NAN
    """Share of the latents that fire which are the sum of two features."""
    parent_recall: float = _NAN
    """Recall of pairs whose feature has children."""
    child_recall: float = _NAN
    """Recall of pairs whose feature has a parent."""
    parent_cosine: float = _NAN
    """Mean cosine of a child's latent and its parent's feature."""
    flat_mse: float = _NAN
    """Error of the cosines among latents of one level."""
    hierarchical_mse: float = _NAN
    """Error of the cosines among latents of different levels."""
    parent_first: float = _NAN
    """For a pursuit, how often a parent is selected before its child, if both are."""
    step_by_depth: tuple[float, ...] = ()
    """For a pursuit, the mean step, from 1 on, at which features of each depth are selected."""


def detection(on: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Judge latents as detectors of features, pair by pair.

    With L and F the rows in which latent and feature of a pair fire:

        precision  |L & F| / |L|               0 where the latent never fires
        recall     |L & F| / |F|
        f1         2 |L & F| / (|L| + |F|)     NaN, like recall, where the feature never fires

    A latent that fires independently of its feature has the rate of the feature as its precision
    and its own rate as its recall.

    Args:
        on: ``[B, m]`` bool, where latents fire.
        truth: ``[B, m]`` bool, where their features do.

    Returns:
        Precision, recall and f1, each ``[m]`` fp64.

    Example:
        >>> on, truth = torch.tensor([[True], [True], [False]]), torch.tensor([[1], [0], [1]]) > 0
        >>> [measure.item() for measure in detection(on, truth)]
        [0.5, 0.5, 0.5]
    """
    both, mine, theirs = (t.sum(0).double() for t in (on & truth, on, truth))
    f1 = torch.where(theirs > 0, 2 * both / (mine + theirs), _NAN)
    return both / mine.clamp_min(1), both / theirs, f1


def recovery(
    dictionary: Tensor,
    code: SparseCode | Pursuit,
    features: Tensor,
    magnitudes: Tensor,
    parent: Tensor,
) -> Recovery:
    r"""Hold latents against the features that made the data.

    Latents and features are paired one to one by the largest sum of cosines. Measures over these
    pairs leave out features for which there is no latent; precision, recall and f1, which are means
    of :func:`detection` over pairs, also those that never fire. With m pairs:

        mcc               1/m sum_p cos(atom_p, feature_p)
        parent_cosine     mean over pairs with a parent, of cos(atom_p, parent of feature_p)
        absorption        see `trees.absorption`, over pairs of which both parent and child are one
        parent_first, step_by_depth   see `trees.selection_order`; NaN and () for other codes
        flat_mse, hierarchical_mse    see `trees.level_errors`

    Not over pairs: uniqueness over all latents (`matching.uniqueness`), splitting and composition
    over those that fire (`splitting.splitting`, `splitting.composition`), l0 and dead_fraction.

    Args:
        dictionary: ``[n, d]``.
        code: of B rows; a latent fires where its values add up to other than 0.
        features: ``[F, d]``.
        magnitudes: ``[B, F]``, other than 0 where a feature fires.
        parent: ``[F]`` int64, -1 for none; a feature fires only where its parent does.

    Returns:
        Recovery without explained variance and shrinkage.

    Raises:
        ValueError: shapes disagree.

    References:
        Chanin & Garriga-Alonso, 2026, arXiv 2602.14687 (mcc, uniqueness, precision, recall, f1:
        theirs take absolute cosines, and judge each latent, dead ones too, by its nearest feature
        rather than by one of its own). Costa et al., 2025, arXiv 2506.03093 (parent_cosine, which
        they call absorption, and the errors of levels).
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
    alive = fires.any(0)
    on, truth = fires[:, latents], (magnitudes != 0)[:, matched]
    place = torch.full((count + 1,), -1)  # the last one is the parent of roots
    place[matched] = torch.arange(len(matched))
    above, depth = place[parent[matched]], depths(parent)[matched]
    precision, recall, f1 = detection(on, truth)
    seen = truth.any(0)
    has_child = torch.isin(matched, parent)
    has_parent = parent[matched] >= 0
    to_parents = cosines(dictionary[latents[has_parent]], features)
    flat, hierarchical = level_errors(dictionary[latents], features[matched], depth)
    first, steps = _NAN, tuple[float, ...]()
    if isinstance(code, Pursuit):
        first, steps = selection_order(code, latents, truth, above, depth)
    return Recovery(
        mcc=cosine.mean().item(),
        f1=f1[seen].mean().item(),
        precision=precision[seen].mean().item(),
        recall=recall[seen].mean().item(),
        absorption=absorption(on, truth, above),
        l0=fires.sum(1).double().mean().item(),
        dead_fraction=1 - alive.double().mean().item(),
        uniqueness=uniqueness(dictionary, features),
        splitting=splitting(dictionary[alive], features),
        composition=composition(dictionary[alive], features),
        parent_recall=recall[seen & has_child].mean().item(),
        child_recall=recall[seen & has_parent].mean().item(),
        parent_cosine=to_parents.gather(1, parent[matched[has_parent], None]).mean().item(),
        flat_mse=flat,
        hierarchical_mse=hierarchical,
        parent_first=first,
        step_by_depth=steps,
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
        Recovery. Rows in which no feature fires are left out of shrinkage.
    """
    x, magnitudes = data.sample(rows, seed)
    code = sae.eval().encode(x, **options)
    residual = code.residual if isinstance(code, Pursuit) else x - sae.decode(code)
    total = RunningFVU(sae.config.d_in)
    total.update(x, residual)
    norm = x.norm(dim=1)
    ratio = ((x - residual).norm(dim=1) / norm)[norm > 1e-6]
    found = recovery(sae.dictionary, code, data.features, magnitudes, data.parent)
    return replace(
        found,
        explained_variance=1 - total.value(),
        shrinkage=ratio.double().mean().item(),
    )
