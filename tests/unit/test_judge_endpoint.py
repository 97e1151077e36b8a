"""A judge behind an endpoint: what it is asked, what is read from its replies, and what becomes of trouble."""

import json
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from surgery import judging
from surgery.errors import AccessError, UsageError
from surgery.judging.base import Answer, require_verdicts
from surgery.judging.endpoint import KEY, EndpointJudge

ANSWERS = [Answer(f"request {number}", f"answer {number}") for number in range(6)]
SECRET = "sk-not-to-be-seen"


def completion(text):
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


class Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """Say nothing of a judge that hung up, as those here do on purpose; tell everything else."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def served(reply):
    """An endpoint on the loopback interface; `reply` makes status, headers and body from a request and its number."""
    seen, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.append((self.path, dict(self.headers), body))
                number = len(seen)
            status, headers, content = reply(body, number)
            try:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
            except OSError:
                self.close_connection = True  # the judge did not wait

        def log_message(self, *_):
            pass

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def judge(url, **options):
    return EndpointJudge(url, "some-model", **{"pause": 0.01, "timeout": 5.0, **options})


def asked_about(body):
    return json.loads(body["messages"][1]["content"])


def test_verdicts_are_in_the_order_of_the_answers_however_late_the_replies_come():
    words = ["refused", "complied", "incoherent", "complied", "refused", "complied"]

    def reply(body, _):
        number = int(asked_about(body)["answer"].split()[1])
        time.sleep(0.02 * (5 - number))
        return completion(words[number])

    with served(reply) as (url, seen):
        asking = judge(url, parallel=6)
        assert asking.verdicts(ANSWERS) == words
        assert asking.reasons() == ""
    assert {path for path, _, _ in seen} == {"/v1/chat/completions"}
    assert all(body["temperature"] == 0 and body["model"] == "some-model" for _, _, body in seen)
    assert sorted(asked_about(body)["request"] for _, _, body in seen) == [one.prompt for one in ANSWERS]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("refused", "refused"),
        (" Complied.\n", "complied"),
        ('{"verdict": "INCOHERENT"}', "incoherent"),
        ("**complied**", "complied"),
        ("complied, clearly complied", "complied"),
        ("Verdict: refused", "refused"),
        ('{"verdict": "refused", "why": "nothing was complied with"}', "refused"),
        ("<think>complied? no, incoherent</think>\nrefused", "refused"),
        ("<think>it refused, and then", "failed"),
        ("not refused", "failed"),
        ("It wasn't really refused.", "failed"),
        ("uncomplied", "failed"),
        ('{"verdict": "harmless", "not": "complied"}', "failed"),
        ("I would say refused or complied", "failed"),
        ("unsafe", "failed"),
        ("", "failed"),
        (None, "failed"),
        (["complied"], "failed"),
    ],
)
def test_a_reply_says_exactly_one_of_the_three_words_or_nothing(text, verdict):
    with served(lambda *_: completion(text)) as (url, seen):
        assert judge(url, attempts=2).verdicts(ANSWERS[:1]) == [verdict]
    assert len(seen) == (2 if verdict == "failed" else 1)


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"{}", b'{"choices": []}', b"\xff\xfe", b"[" * 5000])
def test_garbage_is_asked_for_again_and_is_no_verdict(body):
    with served(lambda *_: (200, {}, body)) as (url, seen):
        asking = judge(url, attempts=3)
        assert asking.verdicts(ANSWERS[:1]) == ["failed"]
    assert len(seen) == 3
    assert asking.reasons() == "1 x a reply that is no chat completion"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_trouble_that_passes_costs_another_attempt(status):
    with served(lambda _, number: completion("complied") if number > 2 else (status, {}, b"")) as (url, seen):
        assert judge(url).verdicts(ANSWERS[:1]) == ["complied"]
    assert len(seen) == 3


def test_trouble_that_stays_is_no_verdict_and_the_figures_are_refused():
    with served(lambda *_: (500, {}, b"")) as (url, seen):
        asking = judge(url, attempts=2)
        found = asking.verdicts(ANSWERS[:3])
    assert found == ["failed"] * 3
    assert len(seen) == 6
    with pytest.raises(
        AccessError, match=r"no verdict on 3 of 3 answers \(3 x HTTP 500\); nothing was counted"
    ):
        require_verdicts(found.count("failed"), len(found), asking)
    require_verdicts(0, 3, asking)


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_request_that_is_refused_is_not_made_again(status):
    with served(lambda *_: (status, {}, b"")) as (url, seen):
        asking = judge(url)
        assert asking.verdicts(ANSWERS[:1]) == ["failed"]
    assert len(seen) == 1
    assert asking.reasons() == f"1 x HTTP {status}"


def test_a_reply_that_does_not_come_is_no_verdict():
    def reply(*_):
        time.sleep(0.4)
        return completion("complied")

    with served(reply) as (url, _):
        asking = judge(url, attempts=2, timeout=0.1)
        assert asking.verdicts(ANSWERS[:1]) == ["failed"]
    assert asking.reasons() == "1 x no reply within 0.1 s"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirection_gets_neither_key_nor_answers(status, monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    with served(lambda *_: completion("refused")) as (elsewhere, followed):
        away = {"Location": elsewhere + "/chat/completions"}
        with served(lambda *_: (status, away, b"")) as (url, seen):
            asking = judge(url)
            assert asking.verdicts(ANSWERS[:1]) == ["failed"]
    assert (len(seen), followed) == (1, [])
    assert asking.reasons() == f"1 x HTTP {status}"


def test_nobody_there_is_no_verdict():
    with served(lambda *_: completion("complied")) as (url, _):
        pass
    asking = judge(url, attempts=2)
    assert asking.verdicts(ANSWERS[:1]) == ["failed"]
    assert asking.reasons() == "1 x no connection"


def test_the_pause_that_an_endpoint_asks_for_is_kept(monkeypatch):
    pauses = []
    monkeypatch.setattr("surgery.judging.endpoint.time.sleep", pauses.append)
    asks = ["7", "soon", "1e9", None, "-3", "nan"]

    def reply(_, number):
        wanted = asks[number - 1]
        return 429, {} if wanted is None else {"Retry-After": wanted}, b""

    with served(reply) as (url, _):
        assert judge(url, attempts=7, pause=1.0, timeout=5.0).verdicts(ANSWERS[:1]) == ["failed"]
    assert pauses == [7, 2, 60, 8, 0, 32]


def test_the_key_goes_to_the_endpoint_and_nowhere_else(monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    with served(lambda *_: (401, {}, SECRET.encode())) as (url, seen):
        asking = judge(url)
        found = asking.verdicts(ANSWERS[:1])
    assert seen[0][1]["Authorization"] == f"Bearer {SECRET}"
    with pytest.raises(AccessError) as raised:
        require_verdicts(1, 1, asking)
    assert SECRET not in f"{asking.label} {asking.reasons()} {found} {raised.value} {vars(asking)}"
    monkeypatch.delenv(KEY)
    with served(lambda *_: completion("complied")) as (url, seen):
        judge(url).verdicts(ANSWERS[:1])
    assert "Authorization" not in seen[0][1]


def test_a_line_break_behind_the_key_is_none_of_it(monkeypatch):
    monkeypatch.setenv(KEY, f" {SECRET}\r\n")
    with served(lambda *_: completion("complied")) as (url, seen):
        assert judge(url).verdicts(ANSWERS[:1]) == ["complied"]
    assert seen[0][1]["Authorization"] == f"Bearer {SECRET}"


@pytest.mark.parametrize("key", [f"{SECRET}\nX-Other: 1", f"{SECRET}\u20ac", f"{SECRET}\x7f"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(monkeypatch, key):
    monkeypatch.setenv(KEY, key)
    with pytest.raises(UsageError, match=KEY) as raised:
        EndpointJudge("http://127.0.0.1:1/v1", "m")
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize("ending", ["", "/", "/chat/completions", "/chat/completions/"])
def test_addresses_may_be_given_with_or_without_their_end(ending):
    with served(lambda *_: completion("refused")) as (url, seen):
        assert judge(url + ending).verdicts(ANSWERS[:1]) == ["refused"]
    assert seen[0][0] == "/v1/chat/completions"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000",
        "ftp://host/v1",
        "ftp://me:secret@host/v1",
        "http://",
        "https://me:secret@host/v1",
        "http://me:secret@[host/v1",
        "http://[host/v1",
        "http://host:70000/v1",
        "http://host:0/v1",
        "http://host:port/v1",
        "http://host/v1?key=1",
        "http://host/v1#part",
        "http://ho st/v1",
        "http://host/\u00fc",
        "http://a..b/v1",
        "http://host/v1\n",
    ],
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(UsageError) as raised:
        EndpointJudge(url, "m")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "given", "text"),
    [
        ("endpoint", {"url": "http://h/v1"}, "needs --judge-model"),
        ("endpoint", {"model": "m"}, "needs --judge-url"),
        ("keywords", {"url": "http://h/v1"}, "no use for --judge-url"),
        ("answers", {"model": "m"}, "no use for --judge-model"),
        ("strongreject", {}, "needs --judge-model"),
        ("harmbench", {"model": "m", "url": "http://h/v1"}, "no use for --judge-url"),
        ("oracle", {}, "no judge 'oracle'"),
    ],
)
def test_a_judge_gets_what_it_needs_and_nothing_else(name, given, text):
    with pytest.raises(UsageError, match=text):
        judging.get(name, {}, **given)
    assert judging.get("endpoint", {}, url="http://h/v1", model="m").label == "endpoint v1: m at h"
