"""`mpsae autointerp`: explain latents by a language model, and score the explanations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpsae.cli.sources import SourceConfig, sources
from mpsae.cli.table import number, short, table
from mpsae.evaluation import files
from mpsae.evaluation.autointerp import (
    Chat,
    Collected,
    Endpoint,
    Journal,
    LocalModel,
    Pieces,
    QuestionConfig,
    Questions,
    Requests,
    Source,
    collect,
    embedding_scores,
    estimate,
    interpret,
    questions,
    scored,
    within,
)
from mpsae.training import pick_device


@dataclass(kw_only=True)
class AutointerpConfig(SourceConfig, QuestionConfig):
    """Explain latents by a language model and score the explanations; embedding scores without."""

    endpoint: str | None = None
    """URL of an OpenAI-compatible endpoint, such as http://localhost:8000/v1."""
    explainer: str | None = None
    """Its model that explains."""
    scorer: str | None = None
    """Its model that scores; the explainer by default."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key."""
    local: str | None = None
    """Causal model of transformers on this machine, in place of an endpoint."""
    concurrency: int = 4
    """Requests at a time."""
    timeout: float = 60.0
    """Seconds that a request may take."""
    retries: int = 5
    """Tries after the first, where an endpoint is busy or fails."""
    max_requests: int | None = None
    """Requests at most, repetitions counted; run again to go on."""
    price_in: float | None = None
    """Price of a million tokens of prompts."""
    price_out: float | None = None
    """Price of a million tokens of answers."""
    embedding_hookpoint: str | None = None
    """Hookpoint whose hidden states embed contexts; the one that the SAE reads by default."""
    dry_run: bool = False
    """Print what would be asked and its price, and stop."""

    def __post_init__(self) -> None:
        SourceConfig.__post_init__(self)
        QuestionConfig.__post_init__(self)
        if self.endpoint is not None and self.local is not None:
            raise ValueError("--endpoint and --local say both who answers")
        if self.endpoint is not None and self.explainer is None:
            raise ValueError("--endpoint needs --explainer, the name of a model there")
        if self.endpoint is None and (self.explainer or self.scorer):
            raise ValueError("--explainer and --scorer are models of an --endpoint")
        if self.concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, not {self.concurrency}")


@dataclass
class _Job:
    """An SAE whose latents are to be explained."""

    folder: Path
    source: Source
    collected: Collected
    asked: list[Questions]
    journal: Journal


def run(config: AutointerpConfig) -> None:
    """Print the estimate, ask, write `evaluation/autointerp.json` of each SAE, print the means."""
    requests = Requests(config.max_requests)
    names = _names(config)
    # comes first: a wrong URL or name should not be found after a pass over the text
    chats = None if names is None or config.dry_run else _chats(config, requests)
    jobs = [_job(config, *found) for found in sources(config)]
    if names is not None:
        _print_estimate(config, [latent for job in jobs for latent in _open(job, names)])
    if config.dry_run:
        return
    results: dict[Path, dict[str, Any]] = {}
    complete = True
    for job in jobs:
        embedding = embedding_scores(job.source, job.collected, config, config.embedding_hookpoint)
        try:
            if chats is not None:
                complete &= _ask(config, job, chats, requests)
        finally:  # what is finished is worth keeping
            results[job.folder] = _write(job, names, embedding)
    rows = [
        [name, *(number(result["means"][measure]) for measure in _MEASURES),
         str(max(result["scored"].values()))]
        for name, result in zip(short(list(results)), results.values(), strict=True)
    ]  # fmt: skip
    print(table(["SAE", *_MEASURES, "latents"], rows))
    if chats is not None:
        wrong = sum(result["malformed"] for result in results.values())
        answers = sum(result["requests"] for result in results.values())
        print(f"\n{answers:,} answers, {wrong:,} of them malformed; {requests.made:,} requests now")
    if not complete:
        print(f"stopped at --max_requests {config.max_requests}; run again to go on")


_MEASURES = ("detection", "fuzzing", "embedding")


def _names(config: AutointerpConfig) -> tuple[str, str] | None:
    """Names of explainer and scorer, None where no language model is asked."""
    explainer = config.local or config.explainer
    return None if explainer is None else (explainer, config.scorer or explainer)


def _chats(config: AutointerpConfig, requests: Requests) -> tuple[Chat, Chat]:
    if config.local is not None:
        model = LocalModel(config.local, device=pick_device(config.device), requests=requests)
        return model, model
    explainer, scorer = (
        Endpoint(
            str(config.endpoint),
            name,
            key_variable=config.key_variable,
            requests=requests,
            timeout=config.timeout,
            retries=config.retries,
        )
        for name in _names(config) or ()
    )
    return explainer, scorer


def _job(config: AutointerpConfig, folder: Path, source: Source, ids: list[int]) -> _Job:
    collected = collect(
        source,
        ids,
        top=config.shown,
        sample=config.shown + 10 * config.tests,
        silent=2 * config.tests,
        pool=max(1000, 10 * config.tests),
        seed=config.seed,
    )
    pieces = Pieces(source.tokenizer)
    asked = [questions(latent, pieces, config) for latent in collected.latents]
    return _Job(
        folder,
        source,
        collected,
        # nothing to test an explanation on, so none is asked for
        [latent for latent in asked if latent.detection],
        Journal(folder / files.FOLDER / "autointerp.jsonl"),
    )


def _open(job: _Job, names: tuple[str, str]) -> list[Questions]:
    return [latent for latent in job.asked if latent.key(*names) not in job.journal]


def _print_estimate(config: AutointerpConfig, asked: list[Questions]) -> None:
    total = estimate(asked)
    price = total.price(config.price_in, config.price_out)
    print(
        f"{total.latents:,} latents to ask about: {total.requests:,} requests, about "
        f"{total.prompt_tokens:,} tokens of prompts and {total.completion_tokens:,} of answers"
        + ("" if price is None else f", price about {price:,.2f}")
    )
    if config.max_requests is not None and total.requests > config.max_requests:
        few = len(within(asked, config.max_requests))
        print(f"--max_requests {config.max_requests} is enough for {few:,} of the latents")


def _ask(config: AutointerpConfig, job: _Job, chats: tuple[Chat, Chat], requests: Requests) -> bool:
    explainer, scorer = chats
    names = (explainer.name, scorer.name)
    wanted = _open(job, names)
    left = None if requests.limit is None else requests.limit - requests.made
    now = within(wanted, left)
    done = interpret(
        now,
        explainer,
        scorer,
        requests,
        job.journal,
        concurrency=1 if config.local else config.concurrency,
        progress=True,
    )
    return done and len(now) == len(wanted)


def _write(
    job: _Job, names: tuple[str, str] | None, embedding: dict[int, float | None]
) -> dict[str, Any]:
    explainer, scorer = names or (None, None)
    records = {}
    if names is not None:
        keys = {latent.id: latent.key(*names) for latent in job.asked}
        records = {number: job.journal[key] for number, key in keys.items() if key in job.journal}
    result = scored(job.source, job.collected, embedding, records, explainer, scorer)
    files.write(job.folder, "autointerp", result)
    return result
