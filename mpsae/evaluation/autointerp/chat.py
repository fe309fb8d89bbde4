"""Language models that answer: an OpenAI-compatible endpoint, or one of transformers."""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch

from mpsae.activations import is_causal, load_language_model
from mpsae.evaluation.autointerp.budget import Requests

_LONGEST_WAIT = 60.0  # seconds, whatever an endpoint asks for
_LARGEST = 2**22  # bytes of an answer
_SHOWN = 200  # characters of an endpoint's error


class Answer(NamedTuple):
    """Text of an answer and the tokens it cost."""

    text: str
    prompt_tokens: int
    completion_tokens: int


class Chat(Protocol):
    """A language model that answers messages."""

    name: str

    def ask(self, messages: Sequence[dict[str, str]], max_tokens: int) -> Answer:
        """Answer messages of `role` and `content`, in `max_tokens` tokens at most."""
        ...


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key goes to the endpoint that was named, and nowhere else."""

    def redirect_request(self, *_args: Any) -> None:
        return None


class Endpoint:
    """A model behind `POST URL/v1/chat/completions`.

    Status 429 and 5xx, a connection that fails and one that takes too long are tried again after
    1, 2, 4, ... seconds (or what `Retry-After` says), each times a random number from 0.5 to 1.

    Args:
        url: with or without `/v1`; http or https.
        model: its name there.
        key_variable: environment variable that holds the key; where it is unset none is sent. The
            key is in no message, file or repr.
        requests: counts each try.
        timeout: seconds that one try may take to answer.
        retries: tries after the first.
        first_wait: seconds before the first of them.

    Raises:
        ValueError: another kind of URL, or one with a password; a key that no header can hold.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_variable: str = "OPENAI_API_KEY",
        requests: Requests | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        first_wait: float = 1.0,
    ):
        parts = urllib.parse.urlsplit(url)
        if "@" in parts.netloc:
            raise ValueError("endpoint holds a user or password; name a variable with the key")
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"endpoint must be an http or https URL, not {url!r}")
        if timeout <= 0 or retries < 0 or first_wait < 0:
            raise ValueError(
                f"timeout={timeout} must be above 0, retries={retries} and first_wait={first_wait} "
                "at least 0"
            )
        self.url = f"{url.rstrip('/').removesuffix('/v1')}/v1/chat/completions"
        self.name, self.requests = model, requests or Requests()
        self.timeout, self.retries, self.first_wait = timeout, retries, first_wait
        self._key = os.environ.get(key_variable, "").strip()
        if not (self._key.isascii() and (self._key.isprintable() or not self._key)):
            raise ValueError(f"the key in {key_variable} holds characters that no header can hold")
        self._opener = urllib.request.build_opener(_NoRedirect)

    def ask(self, messages: Sequence[dict[str, str]], max_tokens: int) -> Answer:
        """Answer messages.

        Raises:
            OSError: it cannot be reached, refuses, or fails every time; what it answers is no
                chat completion.
            LimitReachedError: no further request may be made.
        """
        body = {
            "model": self.name,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        for attempt in range(self.retries + 1):
            self.requests.take()
            wait = self.first_wait * 2**attempt
            try:
                return self._read(self._post(json.dumps(body).encode()))
            except urllib.error.HTTPError as error:
                with error:
                    problem = f"status {error.code}{self._said(error)}"
                if error.code != 429 and error.code < 500:
                    raise self._failure(problem) from None
                wait = _retry_after(error.headers.get("Retry-After"), wait)
            except (OSError, http.client.HTTPException) as error:  # refused, cut off, too slow
                reason = getattr(error, "reason", error)
                problem = self._clean(str(reason) or type(reason).__name__)
            if attempt < self.retries:
                self.requests.wait(min(wait, _LONGEST_WAIT) * random.uniform(0.5, 1))
        raise self._failure(f"{problem}, {self.retries + 1} times")

    def _post(self, body: bytes) -> bytes:
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        if self._key:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        end = time.monotonic() + self.timeout
        raw = b""
        with self._opener.open(request, timeout=self.timeout) as response:
            while part := response.read1(2**16):  # time-outs of sockets are for one part only
                raw += part
                if time.monotonic() > end or len(raw) > _LARGEST:
                    raise TimeoutError(f"no whole answer in {self.timeout} s or {_LARGEST} bytes")
        return raw

    def _read(self, raw: bytes) -> Answer:
        try:
            answer = json.loads(raw)
            text = answer["choices"][0]["message"]["content"]
            usage = answer.get("usage") or {}
            counts = [int(usage.get(f"{kind}_tokens") or 0) for kind in ("prompt", "completion")]
        except (ValueError, TypeError, LookupError, AttributeError):
            shown = self._clean(raw.decode(errors="replace"))[:_SHOWN]
            raise OSError(f"no chat completion but {shown!r}") from None
        return Answer(text if isinstance(text, str) else "", *counts)

    def _said(self, error: urllib.error.HTTPError) -> str:
        """Message of an error's body, if it has one."""
        try:
            raw = error.read(4096).decode(errors="replace")
        except (OSError, http.client.HTTPException):
            return ""
        try:
            message = json.loads(raw)["error"]["message"]
        except (ValueError, TypeError, LookupError):
            message = raw
        return f" ({self._clean(str(message))[:_SHOWN]})" if message else ""

    def _failure(self, problem: str) -> OSError:
        return OSError(f"{self.url} failed for {self.name}: {problem}")

    def _clean(self, text: str) -> str:
        """Take the key out of what an endpoint sent back."""
        return text.replace(self._key, "***") if self._key else text


class LocalModel:
    """A causal language model of transformers, on this machine; the likeliest token each time.

    Args:
        name: hub id or local folder. Without a chat template the messages are joined as text.
        device: where it runs.
        requests: counts each answer.

    Raises:
        OSError: it cannot be reached or read.
        ValueError: it is no causal model.
    """

    def __init__(self, name: str, *, device: str = "cpu", requests: Requests | None = None):
        self.model, self.tokenizer = load_language_model(name, device=device)
        if not is_causal(self.model):
            raise ValueError(f"{name} is no causal language model, so it answers nothing")
        self.name, self.requests = name, requests or Requests()
        self._one_at_a_time = threading.Lock()

    @torch.no_grad()
    def ask(self, messages: Sequence[dict[str, str]], max_tokens: int) -> Answer:
        """Answer messages.

        Raises:
            ValueError: prompt and answer are longer than the model's positions reach.
            LimitReachedError: no further request may be made.
        """
        self.requests.take()
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
            ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        else:
            text = "\n\n".join(m["content"] for m in messages) + "\n\nAnswer:"
            ids = self.tokenizer(text, return_tensors="pt", verbose=False).input_ids
        reach = getattr(self.model.config, "max_position_embeddings", None)
        if reach is not None and ids.shape[1] + max_tokens > reach:
            raise ValueError(
                f"a prompt of {ids.shape[1]} tokens and an answer of {max_tokens} exceed the "
                f"{reach} positions of {self.name}; show fewer or shorter contexts"
            )
        ids = ids.to(self.model.device)
        with self._one_at_a_time:
            made = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens,
                do_sample=False, temperature=None, top_p=None, top_k=None,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0,
            )[0, ids.shape[1] :]  # fmt: skip
        text = self.tokenizer.decode(made, skip_special_tokens=True)
        return Answer(text, ids.shape[1], len(made))


def _retry_after(header: str | None, wait: float) -> float:
    """Seconds that an endpoint asks to wait; dates are left to the own schedule."""
    try:
        asked = float(header or "")
    except ValueError:
        return wait
    return max(asked, wait) if asked >= 0 else wait
