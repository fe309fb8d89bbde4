import hashlib
import json
import random
import re
import threading

import pytest
from chat_server import KEY, kind, serving, texts
from latents_problem import make_source

from mpsae.cli.main import main
from mpsae.evaluation.autointerp import (
    Context,
    Endpoint,
    Journal,
    LatentContexts,
    LimitReachedError,
    LocalModel,
    QuestionConfig,
    Requests,
    balanced_accuracy,
    estimate,
    interpret,
    questions,
    within,
)
from mpsae.evaluation.autointerp.questions import split

pytestmark = pytest.mark.usefixtures("one_thread")


class Letters:
    """A tokenizer's text of tokens for the tests: token t is a word."""

    def __call__(self, tokens):
        return [f" w{token}" for token in tokens]


def latent(number=7, contexts=40):
    """Fires on the words below 10, whatever else is in the text."""
    draw = random.Random(number)

    def context(at, fires):
        rest = [draw.randrange(100, 9000) for _ in range(8)]
        values = [0.0] * 8
        for place in draw.sample(range(8), 2) if fires else ():
            rest[place], values[place] = draw.randrange(10), 1.0 + at / 10
        return Context(at, tuple(rest), tuple(values))

    active = [context(at, True) for at in reversed(range(contexts))]
    silent = [context(contexts + at, False) for at in range(contexts)]
    return LatentContexts(number, 0.1, contexts, active[:6], active, silent)


def ask(number=7, **settings):
    return questions(latent(number), Letters(), QuestionConfig(shown=6, tests=10, **settings))


def perfect(messages):
    """Knows that the latent fires on words below 10."""
    asked = kind(messages)
    if asked == "explain":
        return "It is plain.\nExplanation: numbers below ten"
    marked = r"<<(?: w\d)+>>" if asked == "fuzz" else r" w\d\b"
    return str([int(bool(re.search(marked, text))) for text in texts(messages)])


def guessing(messages):
    """A coin for each text, the same each time."""
    if kind(messages) == "explain":
        return "Explanation: who knows"
    return str([hashlib.sha256(text.encode()).digest()[0] % 2 for text in texts(messages)])


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def endpoint(server, requests=None, **settings):
    settings = {"first_wait": 0.01, "timeout": 5.0, "retries": 2, **settings}
    return Endpoint(server.url, "clever", requests=requests, **settings)


def run(server, asked, journal, limit=None, **settings):
    requests = Requests(limit)
    chat = endpoint(server, requests, **settings)
    complete = interpret(asked, chat, chat, requests, journal, concurrency=3)
    records = [journal[q.key("clever", "clever")] for q in asked if complete]
    return records, requests


@pytest.mark.parametrize("fuzz", ["silent", "active"])
def test_a_perfect_scorer_gets_one_and_a_guessing_one_a_half(fuzz, key, tmp_path):
    asked = [ask(number, fuzz=fuzz) for number in range(12)]
    with serving(perfect) as server:
        records, _ = run(server, asked, Journal(tmp_path / "perfect.jsonl"))
        assert {(r["detection"], r["fuzzing"], r["malformed"]) for r in records} == {(1, 1, 0)}
        assert {r["explanation"] for r in records} == {"numbers below ten"}
        assert {r["requests"] for r in records} == {9}
        assert {r["prompt_tokens"] for r in records} == {9 * 11}
        server.rule = guessing
        records, _ = run(server, asked, Journal(tmp_path / "guess.jsonl"))
    for measure in ("detection", "fuzzing"):
        mean = sum(record[measure] for record in records) / len(records)
        assert mean == pytest.approx(0.5, abs=0.1)  # 240 coins: three deviations


def test_questions_are_balanced_of_text_not_shown_and_repeat(key):
    asked, again = ask(), ask()
    assert asked == again
    assert asked.key("a", "b") == again.key("a", "b")
    others = {asked.key("a", "c"), asked.key("b", "b"), ask(8).key("a", "b"),
              ask(per_prompt=4).key("a", "b")}  # fmt: skip
    assert len(others | {asked.key("a", "b")}) == 5
    assert asked.requests == 1 + 4 + 4
    for _, batches in asked.scorings():
        items = [item for batch in batches for item in batch]
        assert sum(item.truth for item in items) == 10 == len(items) / 2
        assert [item.truth for item in items] != sorted((i.truth for i in items), reverse=True)
    shown = asked.explain[1]["content"]
    for item in [item for batch in asked.detection for item in batch]:
        assert item.text not in shown.replace("<<", "").replace(">>", "")
    trial = split(latent(), QuestionConfig(shown=6, tests=10))
    peaks = [context.peak for context in trial.active]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] - peaks[-1] > 2  # over all of the activations


def test_random_highlights_are_as_many_as_right_ones():
    for fuzz in ("silent", "active"):
        items = [item for batch in ask(fuzz=fuzz).fuzzing for item in batch]
        for item in items:
            marked = "".join(re.findall(r"<<(.*?)>>", item.text)).split()
            assert len(marked) == 2
            right = [len(word) == 2 for word in marked]
            assert all(right) if item.truth else not any(right)


def test_a_latent_that_hardly_fires_is_asked_nothing():
    empty = LatentContexts(3, 0.0, 0, [], [], latent().silent)
    asked = questions(empty, Letters(), QuestionConfig())
    assert (asked.detection, asked.fuzzing) == ([], [])


def test_balanced_accuracy_leaves_out_what_was_not_judged():
    truth = [True, True, True, False]
    assert balanced_accuracy(truth, [True, True, False, False]) == pytest.approx(5 / 6)
    assert balanced_accuracy(truth, [None, None, False, True]) == 0
    assert balanced_accuracy(truth, [None, None, None, True]) is None
    assert balanced_accuracy([], []) is None


def test_busy_and_failing_endpoints_are_tried_again(key):
    with serving(lambda _: "fine") as server:
        broken = (200, {}, b"<html>not json</html>")
        for fault in [(429, {"Retry-After": "0"}, b"busy"), (503, {}, b""), broken]:
            server.faults = [fault]
            before = len(server.seen)
            requests = Requests()
            assert endpoint(server, requests).ask([], 5) == ("fine", 11, 7)
            assert len(server.seen) - before == requests.made == 2
        path, body = server.seen[-1]
        assert path == "/v1/chat/completions"
        assert body == {"model": "clever", "messages": [], "max_tokens": 5, "temperature": 0}
        for url in (f"{server.url}/", f"{server.url}/v1", f"{server.url}/v1/"):
            assert Endpoint(url, "clever").ask([], 5).text == "fine"
        assert {path for path, _ in server.seen} == {"/v1/chat/completions"}
        assert {h["Authorization"] for h in server.headers_seen} == {f"Bearer {KEY}"}


def test_slow_endpoints_are_given_up(key):
    waiting = threading.Event()

    def slow(_body):
        waiting.wait(2)

    with serving(lambda _: "late") as server:
        server.faults = [slow, slow]
        with pytest.raises(OSError, match=r"timed out, 2 times"):
            endpoint(server, timeout=0.1, retries=1).ask([], 5)
        waiting.set()
    with pytest.raises(OSError, match=r"clever: \[Errno \d+\] Connection refused, 3 times"):
        endpoint(server).ask([], 5)


@pytest.mark.parametrize(
    ("fault", "message", "made"),
    [
        ((401, {}, json.dumps({"error": {"message": f"no such key {KEY}"}}).encode()),
         r"status 401 \(no such key \*\*\*\)$", 1),
        ((404, {}, b"nowhere"), r"failed for clever: status 404 \(nowhere\)$", 1),
        ((302, {"Location": "http://127.0.0.1:9/"}, b""), r"status 302$", 1),
        ((500, {}, KEY.encode() * 50), r"status 500 \(\*+\), 3 times$", 3),
        ((200, {}, b'{"choices": []}' + KEY.encode()), r"no chat completion but", 3),
        ((200, {}, b"[1"), r"no chat completion but '\[1', 3 times$", 3),
    ],
)  # fmt: skip
def test_errors_are_clear_and_without_the_key(fault, message, made, key):
    with serving(lambda _: "") as server:
        server.faults = [fault] * 9
        requests = Requests()
        chat = endpoint(server, requests)
        with pytest.raises(OSError, match=message) as caught:
            chat.ask([], 5)
        assert requests.made == len(server.seen) == made
    assert KEY not in str(caught.value) + repr(chat) + repr(caught.value.__cause__)


def test_what_cannot_be_an_endpoint_is_refused(monkeypatch, key):
    for url in ("localhost:8000", "file:///etc/passwd", "http://"):
        with pytest.raises(ValueError, match="endpoint must be an http or https URL"):
            Endpoint(url, "m")
    with pytest.raises(ValueError, match="user or password") as caught:
        Endpoint(f"http://me:{KEY}@127.0.0.1", "m")
    assert KEY not in str(caught.value)
    monkeypatch.setenv("OTHER", f"{KEY}\r\nX: 1")
    with pytest.raises(ValueError, match="the key in OTHER holds") as caught:
        Endpoint("http://127.0.0.1", "m", key_variable="OTHER")
    assert KEY not in str(caught.value)
    with pytest.raises(ValueError, match="timeout=0"):
        Endpoint("http://127.0.0.1", "m", timeout=0)
    with pytest.raises(ValueError, match="max_requests must be at least 0, not -1"):
        Requests(-1)


def test_malformed_answers_are_counted_and_not_wrong(key, tmp_path):
    def rule(messages):
        answer = perfect(messages)
        odd = kind(messages) == "detect" and len(server.seen) % 2
        return "yes and no" if odd else f"<think>[0]</think> ```json\n{answer}\n```"

    asked = [ask(number) for number in range(3)]
    with serving(rule) as server:
        records, _ = run(server, asked, Journal(tmp_path / "a.jsonl"))
        malformed = sum(record["malformed"] for record in records)
        assert 0 < malformed < 3 * 8
        assert all(record["detection"] in (1, None) for record in records)
        assert {record["fuzzing"] for record in records} == {1}
        # no explanation: nothing to score, and it says so
        server.rule = lambda messages: "  \n"
        (record,), requests = run(server, asked[:1], Journal(tmp_path / "b.jsonl"))
    assert requests.made == 1
    assert record["malformed"] == 1
    assert (record["explanation"], record["detection"], record["fuzzing"]) == (None,) * 3


def test_what_is_done_is_not_asked_again(key, tmp_path):
    path = tmp_path / "new" / "journal.jsonl"
    asked = [ask(number) for number in range(6)]
    with serving(perfect) as server:
        # fails for ever from the 30th request on: three latents of nine requests each are done
        server.faults = [None] * 29 + [(500, {}, b"down")] * 100
        with pytest.raises(OSError, match="down"):
            run(server, asked, Journal(path))
        done = [q for q in asked if q.key("clever", "clever") in Journal(path)]
        assert 1 <= len(done) <= 3
        whole = path.read_text()
        path.write_text(whole + whole[:40])  # as if killed while writing
        server.faults.clear()
        server.seen.clear()
        records, requests = run(server, asked, Journal(path))
        assert requests.made == len(server.seen) == 9 * (6 - len(done))
        assert [record["id"] for record in records] == list(range(6))
        server.seen.clear()
        again, requests = run(server, asked, Journal(path))
        assert (again, requests.made, server.seen) == (records, 0, [])
    assert sum(line.startswith('{"id"') for line in path.read_text().splitlines()) >= 6
    assert KEY not in path.read_text()


def test_never_more_requests_than_allowed(key, tmp_path):
    asked = [ask(number) for number in range(4)]
    assert [q.id for q in within(asked, 20)] == [0, 1]
    assert len(within(asked, None)) == 4
    journal = Journal(tmp_path / "j.jsonl")
    with serving(perfect) as server:
        _, requests = run(server, asked, journal, limit=20)
        assert requests.made == len(server.seen) == 20
        with pytest.raises(LimitReachedError):
            requests.take()


def test_estimate_is_what_is_then_made(key, tmp_path):
    asked = [ask(number) for number in range(2)]
    total = estimate(asked)
    assert (total.latents, total.requests) == (2, 18)
    with serving(perfect) as server:
        _, requests = run(server, asked, Journal(tmp_path / "j.jsonl"))
        sent = sum(
            len(message["content"].encode())
            for _, body in server.seen
            for message in body["messages"]
        )
    assert requests.made == total.requests
    assert total.prompt_tokens == pytest.approx(sent / 4, rel=0.25)  # the explanation is short
    assert total.completion_tokens == 2 * (60 + 3 * 40)
    assert total.price(2.0, None) is None
    price = (total.prompt_tokens * 2 + total.completion_tokens * 10) / 1e6
    assert total.price(2.0, 10.0) == pytest.approx(price)


def test_local_model_answers_deterministically_and_within_its_positions(tiny_models):
    requests = Requests(3)
    model = LocalModel(str(tiny_models["llama"][0]), requests=requests)
    messages = [{"role": "user", "content": "what is this?"}]
    first = model.ask(messages, 5)
    assert first == model.ask(messages, 5)
    assert 1 <= first.completion_tokens <= 5
    assert first.prompt_tokens > 3
    short = LocalModel(str(tiny_models["gpt2"][0]))
    with pytest.raises(ValueError, match=r"answer of 60 exceed the 64 positions"):
        short.ask(messages, 60)
    model.tokenizer.chat_template = "{% for m in messages %}({{ m['content'] }}){% endfor %}!"
    assert model.ask(messages, 5).prompt_tokens > 3
    with pytest.raises(LimitReachedError):
        model.ask(messages, 5)
    with pytest.raises(ValueError, match="no causal language model"):
        LocalModel(str(tiny_models["bert"][0]))


@pytest.fixture(scope="module")
def trained(tiny_models, text_file, tmp_path_factory):
    """A saved SAE of the tiny Llama."""
    source = make_source(tiny_models, text_file)
    source.sae.metadata = {
        "model_name": str(tiny_models["llama"][0]),
        "hook_name": "layers.1",
        "text": {"dataset": str(text_file), "context": 24},
    }
    folder = tmp_path_factory.mktemp("runs") / "run" / "matching_pursuit" / "layers.1"
    source.sae.save_pretrained(folder)
    return folder


SAMPLE = ["--number", "4", "--min_contexts", "12", "--window", "8"]
ARGUMENTS = [*SAMPLE, "--shown", "4", "--tests", "5", "--max_tokens", "4000"]


def test_autointerp_command(trained, key, capsys, read_json, tmp_path):
    run_folder = trained.parent.parent
    results = trained / "evaluation" / "autointerp.json"
    with serving(guessing) as server:
        argv = ["autointerp", str(run_folder), *ARGUMENTS, "--endpoint", server.url]
        argv += ["--explainer", "one", "--scorer", "two", "--price_in", "1", "--price_out", "2"]
        assert main([*argv, "--dry_run"]) == 0
        shown = capsys.readouterr().out
        assert re.match(r"4 latents to ask about: 20 requests, about [\d,]+ .* price about", shown)
        assert server.seen == []
        assert not results.exists()
        assert main([*argv, "--max_requests", "11"]) == 0
        shown = capsys.readouterr()
        assert "--max_requests 11 is enough for 2 of the latents" in shown.out
        assert "stopped at --max_requests 11; run again to go on" in shown.out
        assert len(server.seen) == 10
        assert read_json(results)["scored"]["detection"] == 2
        assert main(argv) == 0
        assert len(server.seen) == 20
        models = [body["model"] for _, body in server.seen]
        assert (models.count("one"), models.count("two")) == (4, 16)
        assert main(argv) == 0
        assert len(server.seen) == 20
        output = capsys.readouterr()
        written = read_json(results)
        server.faults = [(500, {}, KEY.encode())] * 50
        assert main([*argv, "--seed", "1", "--retries", "0"]) == 2
        output_of_failure = capsys.readouterr()
        assert re.search(r"error: .* failed for one: status 500 \(\*\*\*\)", output_of_failure.err)
    assert (written["explainer"], written["scorer"]) == ("one", "two")
    assert written["requests"] == 20
    assert written["malformed"] == 0
    assert list(written["means"]) == ["detection", "fuzzing", "embedding"]
    for record in written["latents"].values():
        assert record["explanation"] == "who knows"
        assert all(0 <= record[name] <= 1 for name in written["means"])
    means = [record["detection"] for record in written["latents"].values()]
    assert written["means"]["detection"] == pytest.approx(sum(means) / 4)
    files = [path for path in run_folder.rglob("*") if path.is_file()]
    assert len(files) > 3
    for path in files:
        assert KEY.encode() not in path.read_bytes()
    for said in (output.out, output.err, output_of_failure.out, output_of_failure.err):
        assert KEY not in said


def test_autointerp_without_a_language_model_has_embedding_scores(trained, capsys, read_json):
    assert main(["autointerp", str(trained), *ARGUMENTS]) == 0
    written = read_json(trained / "evaluation" / "autointerp.json")
    assert (written["explainer"], written["requests"]) == (None, 0)
    assert written["means"]["detection"] is None
    assert 0 <= written["means"]["embedding"] <= 1
    assert written["scored"] == {"detection": 0, "fuzzing": 0, "embedding": 4}
    assert "requests" not in capsys.readouterr().out


def test_autointerp_with_a_local_model(trained, tiny_models, capsys, read_json):
    name = str(tiny_models["llama"][0])
    argv = ["autointerp", str(trained), *ARGUMENTS, "--latents", "3", "--local", name]
    assert main([*argv, "--shown", "1", "--tests", "1", "--window", "4"]) == 0
    written = read_json(trained / "evaluation" / "autointerp.json")
    assert (written["explainer"], written["scorer"]) == (name, name)
    assert list(written["latents"]) == ["3"]
    assert written["requests"] >= 1
    assert "answers" in capsys.readouterr().out


def test_latents_command(trained, capsys, read_json):
    argv = ["latents", str(trained.parent.parent), *SAMPLE, "--delphi", "--top", "2"]
    assert main(argv) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown == [f"written: {trained / 'evaluation' / part}" for part in
                     ("latents.json", "delphi/latents")]  # fmt: skip
    written = read_json(trained / "evaluation" / "latents.json")
    assert len(written["latents"]) == 4
    assert all(len(latent["top"]) == 2 for latent in written["latents"])
    assert (trained / "evaluation" / "delphi" / "latents" / "layers.1" / "config.json").exists()
    # an SAE is still one SAE with these beside it
    assert main([*argv[:2], *SAMPLE, "--latents", "3", "5"]) == 0
    written = read_json(trained / "evaluation" / "latents.json")
    assert [latent["id"] for latent in written["latents"]] == [3, 5]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--endpoint", "http://127.0.0.1:9"], "--endpoint needs --explainer"),
        (["--explainer", "m"], "are models of an --endpoint"),
        (["--endpoint", "http://127.0.0.1:9", "--explainer", "m", "--local", "l"], "who answers"),
        (["--latents", "1", "--all", "True"], "which latents are meant"),
        (["--latents", "40", "--window", "8"], "ids must be different numbers from 0 to 39"),
        (["--tests", "0"], "tests must be at least 1, not 0"),
        (["--fuzz", "hard"], "fuzz"),
        (["--concurrency", "0"], "concurrency must be at least 1, not 0"),
    ],
)
def test_wrong_settings_are_one_line(more, message, trained, capsys):
    try:
        status = main(["autointerp", str(trained), *more])
    except SystemExit as stopped:  # argparse knows the choices
        status = stopped.code
    assert status == 2
    assert message in capsys.readouterr().err
