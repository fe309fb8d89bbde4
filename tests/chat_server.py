"""An OpenAI-compatible endpoint on loopback that answers by a rule and keeps what it was sent."""

import json
import re
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-test-0123456789-secret"


def completion(content):
    return {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": content}}],
        "usage": {"prompt_tokens": 11, "completion_tokens": 7},
    }


class Server(ThreadingHTTPServer):
    """``rule(messages) -> content``; ``faults`` are (status, headers, body) answered first."""

    daemon_threads = True

    def __init__(self, rule):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.rule, self.faults = rule, []
        self.seen, self.headers_seen, self.lock = [], [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.seen.append((self.path, body))
            server.headers_seen.append(dict(self.headers))
            fault = server.faults.pop(0) if server.faults else None
            if callable(fault):
                fault = fault(body)
            if fault is None:
                answer = json.dumps(completion(server.rule(body["messages"]))).encode()
        status, headers, raw = fault or (200, {}, answer)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(raw))}.items():
            self.send_header(name, value)
        with suppress(ConnectionError):  # who asked may have given up
            self.end_headers()
            self.wfile.write(raw)
            self.wfile.flush()

    def log_message(self, *_args):
        pass


@contextmanager
def serving(rule):
    server = Server(rule)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


def texts(messages):
    """Texts of a scorer's question, in their order."""
    return re.split(r"(?:^|\n\n)Text \d+: ", messages[1]["content"])[1:]


def kind(messages):
    """What is asked for: explain, detect or fuzz."""
    system = messages[0]["content"]
    if "Explanation:" in system:
        return "explain"
    return "fuzz" if "marked" in system else "detect"
