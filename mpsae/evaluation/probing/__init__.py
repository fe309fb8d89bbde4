"""Labelled features of text, and how an SAE's latents stand for them."""

from mpsae.evaluation.probing.absorption import Absorption, absorption
from mpsae.evaluation.probing.aligned import AlignedText, read_aligned
from mpsae.evaluation.probing.codes import Codes, collect, encode, mean_differences
from mpsae.evaluation.probing.document import Document
from mpsae.evaluation.probing.logistic import Probe, Score, fit_narrow, fit_wide, score
from mpsae.evaluation.probing.measure import Probed, probe_activations, probe_sae
from mpsae.evaluation.probing.rows import Labels, activations, join, label_rows
from mpsae.evaluation.probing.sparse import (
    Splitting,
    largest,
    main_latents,
    sparse_score,
    splitting,
)
from mpsae.evaluation.probing.spelling import (
    Prompts,
    spelled,
    spelling_prompts,
    vocabulary_words,
)
from mpsae.evaluation.probing.tasks import FIRST_LETTER, TASKS, Task

__all__ = [
    "FIRST_LETTER",
    "TASKS",
    "Absorption",
    "AlignedText",
    "Codes",
    "Document",
    "Labels",
    "Probe",
    "Probed",
    "Prompts",
    "Score",
    "Splitting",
    "Task",
    "absorption",
    "activations",
    "collect",
    "encode",
    "fit_narrow",
    "fit_wide",
    "join",
    "label_rows",
    "largest",
    "main_latents",
    "mean_differences",
    "probe_activations",
    "probe_sae",
    "read_aligned",
    "score",
    "sparse_score",
    "spelled",
    "spelling_prompts",
    "splitting",
    "vocabulary_words",
]
