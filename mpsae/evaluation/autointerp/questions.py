"""What is asked about each latent: the explanation, then detection and fuzzing."""

# no postponed annotations: a command whose config inherits from the one here reads its types

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from mpsae import checks
from mpsae.evaluation.autointerp import prompts
from mpsae.evaluation.autointerp.contexts import Context, LatentContexts, distinct
from mpsae.evaluation.autointerp.firings import spread
from mpsae.evaluation.autointerp.pieces import Pieces, fires_at, highlight

Fuzz = Literal["silent", "active"]


@dataclass(kw_only=True)
class QuestionConfig:
    """What is shown and asked."""

    shown: int = 20
    """Strongest contexts that the explainer sees."""
    tests: int = 20
    """Other contexts in which a latent fires, drawn evenly over its activations, that the scorer
    judges; and as many in which it does not."""
    per_prompt: int = 5
    """Contexts in one question to the scorer."""
    threshold: float = 0.3
    """Tokens are highlighted from this share of a context's largest activation on."""
    fuzz: Fuzz = "silent"
    """silent or active: whether tokens highlighted at random are in contexts in which the latent is
    silent, or in those in which it fires (harder)."""
    seed: int = 0
    """Of the draws and the order of questions."""

    def __post_init__(self) -> None:
        for name in ("shown", "tests", "per_prompt"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1, not {self.threshold}")
        checks.choice("fuzz", self.fuzz, get_args(Fuzz))


class Trial(NamedTuple):
    """Contexts of a latent: what the explainer sees shares no text with what is tested."""

    shown: list[Context]
    active: list[Context]
    silent: list[Context]


def split(latent: LatentContexts, config: QuestionConfig) -> Trial:
    """Part a latent's contexts; ``active`` and ``silent`` are of equal number."""
    shown = latent.top[: config.shown]
    others = distinct(latent.sample, besides=shown)
    silent = distinct(latent.silent, besides=[*shown, *others])
    count = min(config.tests, len(others), len(silent))
    places = spread(len(others), count, f"{config.seed}-{latent.id}") if count else ()
    return Trial(shown, [others[place] for place in places], silent[:count])


class Item(NamedTuple):
    """A text and whether the right answer is yes."""

    text: str
    truth: bool


Batches = list[list[Item]]
Asking = Callable[[str, Sequence[str]], prompts.Messages]


class Questions(NamedTuple):
    """All that is asked about a latent."""

    id: int
    explain: prompts.Messages
    detection: Batches
    fuzzing: Batches

    @property
    def requests(self) -> int:
        """Requests without repetitions."""
        return 1 + len(self.detection) + len(self.fuzzing)

    def key(self, explainer: str, scorer: str) -> str:
        """Digest of all that an answer depends on: texts, wording and models."""
        asked = [
            explainer,
            scorer,
            self.explain,
            *(
                [ask("", [item.text for item in batch]), [item.truth for item in batch]]
                for ask, batches in self.scorings()
                for batch in batches
            ),
        ]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    def scorings(self) -> tuple[tuple[Asking, Batches], tuple[Asking, Batches]]:
        """Pair detection and fuzzing with how each is put."""
        return (prompts.detect, self.detection), (prompts.fuzz, self.fuzzing)


def questions(latent: LatentContexts, pieces: Pieces, config: QuestionConfig) -> Questions:
    """Write the questions about a latent; which these are depends on nothing but the arguments."""
    trial = split(latent, config)
    draw = random.Random(f"{config.seed}-{latent.id}")

    def marked(context: Context) -> tuple[str, list[tuple[str, int]]]:
        texts, places = pieces(context.tokens), fires_at(context, config.threshold)
        peak = latent.top[0].peak
        strengths = [
            (texts[place], max(1, round(10 * abs(context.activations[place]) / peak)))
            for place in sorted(places)
        ]
        return highlight(texts, places), strengths

    def batches(items: list[Item]) -> Batches:
        draw.shuffle(items)
        return [
            items[first : first + config.per_prompt]
            for first in range(0, len(items), config.per_prompt)
        ]

    def plain(context: Context) -> str:
        return "".join(pieces(context.tokens))

    detection = [Item(plain(context), True) for context in trial.active]
    detection += [Item(plain(context), False) for context in trial.silent]
    right = [Item(marked(context)[0], True) for context in trial.active]
    wrong = []
    bases = trial.silent if config.fuzz == "silent" else trial.active
    for base, model in zip(bases, trial.active, strict=True):
        # as many as in a right one: their number must not give the answer away
        count = len(fires_at(model, config.threshold))
        rest = [place for place, value in enumerate(base.activations) if value == 0]
        if len(rest) >= count:
            places = set(draw.sample(rest, count))
            wrong.append(Item(highlight(pieces(base.tokens), places), False))
    return Questions(
        latent.id,
        prompts.explain([marked(context) for context in trial.shown]),
        batches(detection),
        batches(right + wrong),
    )
