"""The measures that a report shows: where each is found, and which way is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Measure:
    """One number of an SAE."""

    name: str
    label: str
    """Head of its column."""
    group: str
    better: Literal["lower", "higher"] | None
    file: str
    """Of the folder `evaluation`; none where it takes more than a look."""
    keys: tuple[str, ...]
    """Where in the file."""
    form: str
    meaning: str
    words: str = ""
    """What it is called in a sentence, if other than its label."""

    @property
    def spoken(self) -> str:
        """What it is called in a sentence."""
        return self.words or self.label


MEASURES = (
    Measure("l0", "L0", "Reconstruction", None, "reconstruction", ("l0",), ".1f",
            "Mean number of latents other than zero on a token."),
    Measure("fvu", "FVU", "Reconstruction", "lower", "reconstruction", ("fvu",), ".4f",
            "Fraction of the activations' variance that the reconstruction leaves unexplained."),
    Measure("cosine", "cosine", "Reconstruction", "higher", "reconstruction", ("cosine",), ".4f",
            "Cosine of activation and reconstruction, mean over tokens."),
    Measure("ce_recovered", "CE recovered", "Reconstruction", "higher", "reconstruction",
            ("ce_recovered",), ".4f",
            "Share of the model's cross-entropy that is kept with the reconstruction in place of "
            "the activations: 1 as with the activations, 0 as with their mean."),
    Measure("later_fvu", "later FVU", "Reconstruction", "lower", "", (), ".4f",
            "FVU of a later layer's activations with the reconstruction in place, against the "
            "clean ones: of the model's last layer, or the last one that was asked for."),
    Measure("dead", "dead", "Latents", "lower", "reconstruction", ("dead_fraction",), ".3f",
            "Share of the latents that fired on no held-out token."),
    Measure("dense", "dense", "Latents", "lower", "reconstruction", ("dense_fraction",), ".3f",
            "Share of the latents that fired on more than 10 % of the tokens."),
    Measure("coherence", "coherence", "Latents", "lower", "reconstruction", ("coherence",), ".3f",
            "Largest absolute cosine of two atoms."),
    Measure("absorption", "absorption", "Interpretability", "lower", "probing",
            ("absorption", "fraction"), ".3f",
            "Share of a labelled feature that latents other than its own carry, in tokens that "
            "have the feature."),
    Measure("splitting", "splitting", "Interpretability", "lower", "probing",
            ("splitting", "latents"), ".2f",
            "Latents that one labelled feature is spread over."),
    Measure("probe_f1", "probe F1", "Interpretability", "higher", "probing",
            ("sparse_probing", "1", "f1"), ".3f",
            "F1 of the single latent that best tells a labelled feature, mean over features."),
    Measure("detection", "detection", "Interpretability", "higher", "autointerp",
            ("means", "detection"), ".3f",
            "How often a language model says from a latent's explanation in which contexts it "
            "fires, mean over latents."),
    Measure("fuzzing", "fuzzing", "Interpretability", "higher", "autointerp",
            ("means", "fuzzing"), ".3f",
            "The same of whether the marked tokens are those on which it fires."),
    Measure("embedding", "embedding", "Interpretability", "higher", "autointerp",
            ("means", "embedding"), ".3f",
            "How well embeddings of contexts tell those in which a latent fires, with no language "
            "model asked; mean over latents."),
    Measure("encode_us", "encode µs/token", "Runtime", "lower", "reconstruction",
            ("encode_us",), ".3g", "Median time to encode a token.", "time to encode a token"),
    Measure("train_us", "train µs/token", "Runtime", "lower", "", (), ".3g",
            "Time of a training step over its tokens, mean over the run; that of the language "
            "model is not in it.", "time to train on a token"),
)  # fmt: skip
MEASURE = {measure.name: measure for measure in MEASURES}


def _more(name: str, label: str, form: str, meaning: str) -> Measure:
    return Measure(name, label, "Reconstruction", None, "reconstruction", (name,), form, meaning)


MORE = (
    _more("l0_min", "least L0", ".0f", "L0 of the token that has the fewest latents."),
    _more("l0_max", "most L0", ".0f", "L0 of the token that has the most."),
    _more("ce_clean", "CE clean", ".4f", "Cross-entropy of the model, nats a token."),
    _more("ce_sae", "CE SAE", ".4f", "The same with the reconstruction in place."),
    _more("ce_mean", "CE mean", ".4f", "The same with the mean activation in place."),
    _more("reselection_rate", "chosen again", ".3f",
          "Share of a pursuit's steps that choose a latent which the token has already."),
    _more("rescored_rate", "rescored", ".3f",
          "Share of a pursuit's steps that the 16-bit Gram matrix left undecided, so that "
          "candidates were scored again."),
    _more("mean_coherence", "mean coherence", ".4f", "Mean absolute cosine of two atoms."),
)  # fmt: skip
"""What only the table of encoders has."""

_ALL = MEASURE | {measure.name: measure for measure in MORE}
IN_FULL = tuple(
    _ALL[name] for name in (
        "fvu", "l0", "l0_min", "l0_max", "cosine", "ce_recovered", "ce_clean", "ce_sae", "ce_mean",
        "later_fvu", "dead", "dense", "reselection_rate", "rescored_rate", "coherence",
        "mean_coherence", "encode_us",
    )
)  # fmt: skip
"""Columns of the table of encoders."""

ARROWS = {"lower": "↓", "higher": "↑", None: ""}
COMMANDS = {
    "reconstruction": "eval",
    "probing": "probe",
    "latents": "latents",
    "autointerp": "autointerp",
}
"""Which command of `mpsae` makes a file."""


def written(measure: Measure, value: float | None) -> str:
    """Write a number as its column does; a dash where there is none."""
    return "–" if value is None else format(value, measure.form)
