"""Put the questions to language models and score what they answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from mpsae.evaluation.autointerp import prompts
from mpsae.evaluation.autointerp.budget import LimitReachedError, Requests
from mpsae.evaluation.autointerp.chat import Chat
from mpsae.evaluation.autointerp.journal import Journal
from mpsae.evaluation.autointerp.questions import Asking, Batches, Questions

_BYTES_A_TOKEN = 4
_EXPLANATION = "x" * 160  # of usual length, where the true one is not known yet
_EXPLANATION_TOKENS, _VERDICT_TOKENS = 60, 3  # of usual answers, the latter a text


@dataclass
class Estimate:
    """What is to be asked: requests without repetitions, tokens at 4 bytes each."""

    latents: int
    requests: int
    prompt_tokens: int
    completion_tokens: int

    def price(self, per_million_in: float | None, per_million_out: float | None) -> float | None:
        """Price in the unit of the two; None where either is unknown."""
        if per_million_in is None or per_million_out is None:
            return None
        return (
            self.prompt_tokens * per_million_in + self.completion_tokens * per_million_out
        ) / 1e6


def estimate(asked: Iterable[Questions]) -> Estimate:
    """Estimate what the questions cost."""
    total = Estimate(0, 0, 0, 0)
    for latent in asked:
        total.latents += 1
        total.requests += latent.requests
        total.prompt_tokens += _tokens(latent.explain)
        total.completion_tokens += _EXPLANATION_TOKENS
        for ask, batches in latent.scorings():
            for batch in batches:
                total.prompt_tokens += _tokens(ask(_EXPLANATION, [item.text for item in batch]))
                total.completion_tokens += _VERDICT_TOKENS * len(batch)
    return total


def _tokens(messages: prompts.Messages) -> int:
    return sum(len(message["content"].encode()) for message in messages) // _BYTES_A_TOKEN


def within(asked: Sequence[Questions], limit: int | None) -> list[Questions]:
    """Those that can be asked in full with so many requests, in their order."""
    kept, sum_ = [], 0
    for latent in asked:
        sum_ += latent.requests
        if limit is not None and sum_ > limit:
            break
        kept.append(latent)
    return kept


def balanced_accuracy(truth: Sequence[bool], verdict: Sequence[bool | None]) -> float | None:
    """Mean of the shares of true and of false items judged right; unjudged ones are left out.

    None where no true item or no false one was judged.

    Example:
        >>> balanced_accuracy([True, True, False, False], [True, None, True, False])
        0.75
    """
    shares = []
    for side in (True, False):
        pairs = zip(truth, verdict, strict=True)
        judged = [said == side for true, said in pairs if true == side and said is not None]
        if not judged:
            return None
        shares.append(sum(judged) / len(judged))
    return sum(shares) / 2


def interpret(
    asked: Sequence[Questions],
    explainer: Chat,
    scorer: Chat,
    requests: Requests,
    journal: Journal,
    *,
    concurrency: int = 4,
    progress: bool = False,
) -> bool:
    """Ask all questions that the journal has no answer to, and write what comes of them into it.

    Args:
        asked: of each latent, see :func:`mpsae.evaluation.autointerp.questions`.
        explainer: writes explanations from the strongest contexts.
        scorer: judges texts by an explanation.
        requests: what both count in; ended where something fails.
        journal: finished latents; those in it are not asked again.
        concurrency: latents at a time, so requests at a time.
        progress: show a bar.

    Returns:
        Whether all is in the journal: false where the limit of requests was reached.

    Raises:
        OSError, ValueError: a model cannot be asked. What was finished is in the journal.

    Notes:
        A record holds `explanation`, `detection` and `fuzzing` (balanced accuracy over texts with
        a verdict, None without), `malformed` (answers that were none), `requests` (answers),
        `prompt_tokens` and `completion_tokens`.
    """
    open_ = [latent for latent in asked if latent.key(explainer.name, scorer.name) not in journal]
    failure: BaseException | None = None
    limited = False
    with ThreadPoolExecutor(concurrency) as pool:
        waiting = [pool.submit(_one, latent, explainer, scorer, journal) for latent in open_]
        try:
            for done in tqdm(
                as_completed(waiting), total=len(waiting), desc="latents",
                disable=None if progress else True, leave=False,
            ):  # fmt: skip
                error = None if done.cancelled() else done.exception()
                if isinstance(error, LimitReachedError):
                    limited = True
                elif error is not None:
                    failure = failure or error
                if error is not None:
                    _stop(requests, waiting)
        except BaseException:  # interrupted: the threads end with their present request
            _stop(requests, waiting)
            raise
    if failure is not None:
        raise failure
    return not limited


def _stop(requests: Requests, waiting: Iterable[Any]) -> None:
    requests.end()
    for future in waiting:
        future.cancel()


def _one(latent: Questions, explainer: Chat, scorer: Chat, journal: Journal) -> None:
    answer = explainer.ask(latent.explain, prompts.EXPLANATION_TOKENS)
    explanation = prompts.read_explanation(answer.text)
    record: dict[str, Any] = {
        "id": latent.id,
        "key": latent.key(explainer.name, scorer.name),
        "explanation": explanation,
        "detection": None,
        "fuzzing": None,
        "malformed": int(explanation is None),
        "requests": 1,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
    }
    if explanation is not None:
        for name, (ask, batches) in zip(("detection", "fuzzing"), latent.scorings(), strict=True):
            record[name] = _score(explanation, ask, batches, scorer, record)
    journal.add(record)


def _score(
    explanation: str, ask: Asking, batches: Batches, scorer: Chat, record: dict[str, Any]
) -> float | None:
    truth: list[bool] = []
    verdicts: list[bool | None] = []
    for batch in batches:
        messages = ask(explanation, [item.text for item in batch])
        answer = scorer.ask(messages, prompts.verdict_tokens(len(batch)))
        read = prompts.read_verdicts(answer.text, len(batch))
        record["malformed"] += read is None
        record["requests"] += 1
        record["prompt_tokens"] += answer.prompt_tokens
        record["completion_tokens"] += answer.completion_tokens
        truth += [item.truth for item in batch]
        verdicts += read or [None] * len(batch)
    return balanced_accuracy(truth, verdicts)
