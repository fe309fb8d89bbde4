"""Probe activations for labelled features, and one SAE's latents for the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpsae.evaluation.files import describe
from mpsae.evaluation.probing.absorption import absorption
from mpsae.evaluation.probing.codes import Codes, encode, mean_differences
from mpsae.evaluation.probing.logistic import Score, fit_wide, score
from mpsae.evaluation.probing.rows import Labels
from mpsae.evaluation.probing.sparse import (
    Splitting,
    largest,
    main_latents,
    sparse_score,
    splitting,
)
from mpsae.evaluation.probing.tasks import FIRST_LETTER, Task
from mpsae.sae import SparseAutoencoder, Transcoder

KS = (1, 2, 5, 10, 20)
MIN_TRAIN, MIN_TEST = 20, 10  # rows of a class, and of the others
MIN_F1 = 0.6  # of the probe of activations, for splitting and absorption


class Target(NamedTuple):
    """One class against the others of its task."""

    number: int
    train: Tensor
    """``[R]`` int64: 1 in the class, 0 not, -1 for rows without label or of the test side."""
    test: Tensor
    """The same of test rows."""
    score: Score
    """Of the probe of activations."""
    direction: Tensor
    """Of that probe, ``[d]``."""
    seen: Tensor
    """Test rows of the class in which that probe sees it, ``[P]`` int64."""


@dataclass
class Probed:
    """Activations of labelled rows, and what probes of them find."""

    x: Tensor
    """``[R, d]``."""
    labels: Labels
    tasks: list[Task]
    targets: dict[str, list[Target]]
    """For each task its classes that occur often enough; empty where none does."""


def probe_activations(x: Tensor, labels: Labels, tasks: Sequence[Task]) -> Probed:
    """Fit and test probes of activations, one for each class with enough rows.

    Args:
        x: ``[R, d]`` fp32.
        labels: of the same rows.
        tasks: that gave the labels.
    """
    targets = {task.name: _targets(x, labels.of[task.name], labels.test, task) for task in tasks}
    return Probed(x, labels, list(tasks), targets)


def _targets(x: Tensor, label: Tensor, test: Tensor, task: Task) -> list[Target]:
    train_rows, test_rows = (((label >= 0) & side).nonzero()[:, 0] for side in (~test, test))
    kept = [
        number
        for number in task.probed
        if _enough(label[train_rows] == number, MIN_TRAIN)
        and _enough(label[test_rows] == number, MIN_TEST)
    ]
    if not kept:
        return []
    wanted = torch.tensor(kept)
    probe = fit_wide(x[train_rows], (label[train_rows, None] == wanted).to(x.dtype))
    logits = x[test_rows] @ probe.weight.T + probe.bias
    targets = []
    for place, number in enumerate(kept):
        inside = (label == number).long()
        is_class = inside[test_rows]
        targets.append(
            Target(
                number,
                train=torch.where((label >= 0) & ~test, inside, -1),
                test=torch.where((label >= 0) & test, inside, -1),
                score=score(logits[:, place], is_class),
                direction=probe.weight[place],
                seen=test_rows[(is_class > 0) & (logits[:, place] > 0)],
            )
        )
    return targets


def _enough(inside: Tensor, least: int) -> bool:
    return least <= int(inside.sum()) <= len(inside) - least


@torch.no_grad()
def probe_sae(sae: SparseAutoencoder, probed: Probed, *, ks: Sequence[int] = KS) -> dict[str, Any]:
    """Probe an SAE's latents for the features that its activations were probed for.

    Args:
        sae: of any architecture; put into evaluation mode.
        probed: activations that it encodes.
        ks: latents of sparse probes.

    Returns:
        What `probing.json` has of the SAE: means over tasks, then every task and class. Absorption
        and splitting are over classes that the probe of activations finds with an F1 above 0.6.

    Raises:
        ValueError: a k below 1.
    """
    for k in ks:
        if k < 1:
            raise ValueError(f"ks={list(ks)}: a sparse probe has at least 1 latent")
    codes = encode(sae, probed.x)
    tasks: dict[str, Any] = {
        task.name: _task(sae, codes, probed, task, ks)
        if probed.targets[task.name]
        else {"unavailable": _reason(task, probed.labels)}
        for task in probed.tasks
    }
    found = [result for result in tasks.values() if "unavailable" not in result]
    chosen = tasks.get(FIRST_LETTER, {})
    return {
        "sae": describe(sae),
        "tokens": len(probed.x),
        "test_tokens": int(probed.labels.test.sum()),
        "split_by": probed.labels.split_by,
        "activations": _mean([task["activations"] for task in found]),
        "sparse_probing": {
            str(k): _mean([task["sparse_probing"][str(k)] for task in found]) for k in ks
        },
        "splitting": chosen.get("splitting"),
        "absorption": chosen.get("absorption"),
        "absorption_unavailable": _no_direction(sae),
        "tasks": tasks,
    }


def _reason(task: Task, labels: Labels) -> str:
    if task.name in labels.missing:
        return labels.missing[task.name]
    if task.needs and not (labels.of[task.name] >= 0).any():
        return f"the text is not {task.needs}"
    return (
        f"no class has {MIN_TRAIN} rows and as many others to train on, and {MIN_TEST} of both "
        "to test on"
    )


def _no_direction(sae: SparseAutoencoder) -> str | None:
    """Say why a latent has no one direction among the activations, if it has none."""
    if isinstance(sae, Transcoder):
        return "atoms of a transcoder are directions of the output, probes are of the input"
    if len(sae.dictionary) != sae.config.d_sae:
        return "each step of the pursuit has atoms of its own"
    return None


def _task(
    sae: SparseAutoencoder, codes: Codes, probed: Probed, task: Task, ks: Sequence[int]
) -> dict[str, Any]:
    label = torch.where(probed.labels.test, -1, probed.labels.of[task.name])
    differences = mean_differences(codes, label, len(task.classes))
    targets = probed.targets[task.name]
    classes: dict[str, Any] = {}
    for target in targets:
        order = largest(differences[target.number], max(ks, default=1))
        classes[task.classes[target.number]] = {
            "train_rows": int((target.train == 1).sum()),
            "test_rows": int((target.test == 1).sum()),
            "activations": target.score._asdict(),
            "sparse_probing": {
                str(k): sparse_score(codes, order[:k], target.train, target.test)._asdict()
                for k in ks
            },
            "latents": order.tolist(),
        }
    found = [target for target in targets if target.score.f1 > MIN_F1]
    absorbed: list[dict[str, Any]] = []
    split: list[Splitting] = []
    if found:
        numbers = torch.tensor([target.number for target in found])
        orders = main_latents(codes, differences[numbers], [target.train for target in found])
        for target, order in zip(found, orders, strict=True):
            result = classes[task.classes[target.number]]
            split.append(splitting(codes, order, target.train, target.test))
            result["splitting"] = split[-1]._asdict()
            if len(target.seen) and _no_direction(sae) is None:
                absorbed.append(_absorption(sae, codes, probed, target, split[-1].latents))
                result["absorption"] = absorbed[-1]
    results = list(classes.values())
    return {
        "rows": int((probed.labels.of[task.name] >= 0).sum()),
        "activations": _mean([r["activations"] for r in results]),
        "sparse_probing": {
            str(k): _mean([r["sparse_probing"][str(k)] for r in results]) for k in ks
        },
        "splitting": {
            "classes": len(split),
            "latents": fmean(len(s.latents) for s in split),
        }
        if split
        else None,
        "absorption": {
            "classes": len(absorbed),
            **_mean([{k: a[k] for k in ("fraction", "full")} for a in absorbed]),
        }
        if absorbed
        else None,
        "classes": classes,
    }


def _absorption(
    sae: SparseAutoencoder, codes: Codes, probed: Probed, target: Target, main: list[int]
) -> dict[str, Any]:
    result = absorption(
        *codes.where(target.seen),
        probed.x[target.seen],
        target.direction,
        sae.dictionary.cpu(),
        torch.tensor(main),
    )
    return {
        "rows": len(target.seen),
        "fraction": result.fraction.mean().item(),
        "full": result.full.double().mean().item(),
    }


def _mean(results: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each number; empty where there is nothing."""
    return {name: fmean(r[name] for r in results) for name in results[0]} if results else {}
