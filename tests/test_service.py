"""`negfast serve` over HTTP: what it answers, what it refuses, and what is left after a kill."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

import negfast
from negfast.serve.restart import sockets_of
from tests.tiny import run_cli

NOW = int(time.time())


@contextmanager
def served(run: Path, *options: str, **environment: str) -> Iterator[tuple[httpx.Client, subprocess.Popen]]:
    """A client of `negfast serve` in a process of its own."""
    command = [sys.executable, "-m", "negfast", "serve", str(run), "--port", "0", *options]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
    )
    assert process.stderr is not None
    said = []
    try:
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"running on http://127.0.0.1:(\d+)", line):
                break
        assert found, "".join(said)
        threading.Thread(target=process.stderr.read, daemon=True).start()  # so that the process can go on talking
        headers = {"Authorization": f"Bearer {environment['NEGFAST_TOKEN']}"} if "NEGFAST_TOKEN" in environment else {}
        with httpx.Client(base_url=f"http://127.0.0.1:{found[1]}", headers=headers, timeout=30) as client:
            yield client, process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def service(tiny_run):
    with served(tiny_run) as (client, _):
        yield client


def told(user: str, item: str, feedback: str = "dislike", **more: Any) -> dict[str, Any]:
    return {"user": user, "item": item, "feedback": feedback, **more}


def score(client: httpx.Client, user: str, items: list[str]) -> list[float | None]:
    reply = client.post("/score", json={"user": user, "items": items})
    assert reply.status_code == 200, reply.text
    return reply.json()["scores"]


def test_score_is_that_of_the_run(service, tiny_run):
    items = [f"i{n}" for n in range(0, 90, 7)]
    live = negfast.load(tiny_run).live()
    expected = live.score("u5", [*items, "nothing"]).probability.tolist()
    found = score(service, "u5", [*items, "nothing"])
    assert found[-1] is None and found[:-1] == pytest.approx(expected[:-1], abs=1e-3)  # a moment later
    assert score(service, "nobody", items) == [None] * len(items)


def test_predict_is_that_of_the_run(service, tiny_run):
    expected = negfast.load(tiny_run).predict(["u5"], top=7)
    found = service.post("/predict", json={"user": "u5", "top": 7}).json()["items"]
    assert [row["item"] for row in found] == expected["item"].to_pylist()
    assert [row["score"] for row in found] == pytest.approx(expected["score"].to_pylist(), rel=1e-5)
    assert service.post("/predict", json={"user": "nobody"}).json() == {"items": []}


def test_events_count_at_once_and_metrics_tell(service):
    items = [f"i{n}" for n in range(90)]
    assert score(service, "newcomer", items) == [None] * 90
    events = [told("newcomer", "i1", time=NOW - 86_400), told("newcomer", "i2", "like", time=NOW - 86_400, value=5)]
    reply = service.post("/events", json={"events": [*events, told("newcomer", "unheard")]}).json()
    assert reply["accepted"] == 2 and [no["index"] for no in reply["refused"]] == [2]
    assert "is new, expected its text" in reply["refused"][0]["reason"]
    assert None not in score(service, "newcomer", items)
    lines = service.get("/metrics").text.splitlines()
    assert "negfast_events_total 2.0" in lines and "negfast_events_refused_total 1.0" in lines
    assert any(line.startswith('negfast_request_seconds_count{path="/score"}') for line in lines)
    assert service.get("/health").json()["status"] == "ok"


BAD = [
    ("/score", {"user": "u1"}, 422),
    ("/score", {"user": "u1", "items": []}, 422),
    ("/score", {"user": "u1", "items": ["i1"], "itmes": 1}, 422),
    ("/score", {"user": 3, "items": ["i1"]}, 422),
    ("/score", {"user": "u1", "items": ["i1"] * 10_001}, 422),
    ("/events", {"events": [told("u1", "i1", "hate")]}, 422),
    ("/events", {"events": [told("u1", "i1", time=-1)]}, 422),
    ("/predict", {"user": "u1", "top": 0}, 422),
    ("/nothing", {}, 404),
]


@pytest.mark.parametrize(("path", "body", "status"), BAD)
def test_bad_requests_are_refused_in_a_line(service, path, body, status):
    reply = service.post(path, json=body)
    assert reply.status_code == status
    assert "\n" not in reply.json()["detail"]


@pytest.mark.parametrize(
    "body", ['{"user": NaN, "items": [NaN]}', '{"user": "u1", "items": [1e999]}', "{", "[]", '"\\ud800"']
)
def test_what_is_no_request_is_refused(service, body):
    reply = service.post("/score", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 422 and reply.json()["detail"]


def test_a_request_of_a_million_items_is_refused(service):
    body = json.dumps({"user": "u1", "items": ["i1"] * 10**6})
    reply = service.post("/score", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 413
    parts = (body[start : start + 1000].encode() for start in range(0, len(body), 1000))  # without a length
    reply = service.post("/score", content=parts, headers={"content-type": "application/json"})
    assert reply.status_code == 413
    assert None not in score(service, "u1", ["i1"])


def test_a_token_is_asked_for(tiny_run):
    with served(tiny_run, NEGFAST_TOKEN="secret") as (client, _):
        assert score(client, "u1", ["i1"])
        for headers in ({"Authorization": "Bearer other"}, {"Authorization": ""}):
            assert client.post("/score", json={"user": "u1", "items": ["i1"]}, headers=headers).status_code == 401
        assert client.get("/health", headers={"Authorization": ""}).status_code == 200


def test_an_address_of_others_needs_a_token(tiny_run, monkeypatch):
    monkeypatch.delenv("NEGFAST_TOKEN", raising=False)
    assert "NEGFAST_TOKEN is not set" in run_cli("serve", str(tiny_run), "--host", "0.0.0.0", code=2)


def test_acknowledged_events_survive_a_kill(tiny_run, tmp_path):
    """Killed while events stream in: what was acknowledged counts after the restart, and nothing twice."""
    file, acknowledged = tmp_path / "events.jsonl", 0
    with served(tiny_run, "--events", str(file)) as (client, process):
        killer = threading.Timer(1.5, process.send_signal, [signal.SIGKILL])
        killer.start()
        try:
            while True:
                event = told(f"visitor{acknowledged}", f"i{acknowledged % 90}", time=NOW - 86_400)
                acknowledged += client.post("/events", json={"events": [event]}).json()["accepted"]
        except httpx.TransportError:
            pass
    assert acknowledged > 10
    kept = [json.loads(line) for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    assert [event["user"] for event in kept][:acknowledged] == [f"visitor{n}" for n in range(acknowledged)]
    assert len(kept) - acknowledged in (0, 1)
    with served(tiny_run, "--events", str(file)) as (client, _):
        for n in (0, acknowledged - 1):
            assert score(client, f"visitor{n}", ["i3"]) != [None]
        assert score(client, f"visitor{acknowledged + 1}", ["i3"]) == [None]
        second = run_cli("serve", str(tiny_run), "--events", str(file), code=2)
        assert "is being written by process" in second


def connected(client: httpx.Client) -> http.client.HTTPConnection:
    """A connection that is not made again once it is lost."""
    assert client.base_url.port is not None
    connection = http.client.HTTPConnection("127.0.0.1", client.base_url.port, timeout=60)
    connection.connect()
    connection.auto_open = 0
    return connection


def post(connection: http.client.HTTPConnection, path: str, body: dict[str, Any]) -> dict[str, Any]:
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    reply = connection.getresponse()
    text = reply.read()
    assert reply.status == 200, text
    return json.loads(text)


def loaded(client: httpx.Client) -> str:
    """When the process loaded its run."""
    lines = client.get("/metrics").text.splitlines()
    return next(line for line in lines if line.startswith("negfast_run_loaded_timestamp_seconds "))


class Half:
    """A request of which the client has sent one half."""

    def __init__(self, client: httpx.Client) -> None:
        body = json.dumps({"user": "u1", "items": ["i1"]}).encode()
        head = b"POST /score HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        whole = head % len(body) + body
        self.connection, self.rest = connected(client), whole[-10:]
        self.connection.sock.sendall(whole[:-10])

    def answer(self) -> http.client.HTTPResponse:
        """That of the whole request."""
        self.connection.sock.sendall(self.rest)
        reply = http.client.HTTPResponse(self.connection.sock, method="POST")
        reply.begin()
        return reply


def test_a_restart_loses_no_request_and_no_connection(tiny_run, tmp_path):
    file, counts, failed, stop = tmp_path / "events.jsonl", [0] * 6, [], threading.Event()
    with served(tiny_run, "--events", str(file)) as (client, process):
        idle, half, begun = connected(client), Half(client), loaded(client)

        def ask(number: int) -> None:
            connection = connected(client)
            try:
                while not stop.is_set():
                    if number % 2:
                        reply = post(connection, "/score", {"user": "u5", "items": ["i1", "i2"]})
                        assert None not in reply["scores"]
                    else:
                        event = told(f"v{number}-{counts[number]}", "i1", key=f"{number}-{counts[number]}")
                        reply = post(connection, "/events", {"events": [event]})
                        assert (reply["accepted"], reply["known"]) == (1, 0)
                    counts[number] += 1
            except Exception as error:
                failed.append(error)

        asking = [threading.Thread(target=ask, args=[number]) for number in range(len(counts))]
        for thread in asking:
            thread.start()
        process.send_signal(signal.SIGUSR2)
        assert half.answer().status == 200
        deadline = time.time() + 60
        while loaded(client) == begun and time.time() < deadline:
            time.sleep(0.05)
        assert loaded(client) != begun
        seen = list(counts)
        while not failed and min(now - before for now, before in zip(counts, seen, strict=True)) < 3:
            time.sleep(0.01)  # each has asked the new process
        stop.set()
        for thread in asking:
            thread.join()
        assert not failed
        assert post(idle, "/score", {"user": "u5", "items": ["i1"]})["scores"] != [None]
    users = [json.loads(line)["user"] for line in file.read_text().splitlines()]
    assert sorted(users) == sorted(f"v{number}-{n}" for number in (0, 2, 4) for n in range(counts[number]))


def test_a_stop_answers_what_has_arrived(tiny_run):
    with served(tiny_run) as (client, process):
        half = Half(client)
        process.send_signal(signal.SIGTERM)
        while True:
            try:
                connected(client).close()
            except OSError:  # nobody listens any more
                break
        reply = half.answer()
        assert reply.status == 200 and reply.headers["connection"] == "close"
        assert json.loads(reply.read())["scores"] != [None]
        assert process.wait(timeout=60) == -signal.SIGTERM


def test_a_socket_that_listens_is_taken(tiny_run):
    """As systemd passes it; what arrived before the start is answered."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        passing = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ |= dict(LISTEN_PID=str(os.getpid()), "
        passing += "LISTEN_FDS='1'); os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
        command = [sys.executable, "-c", passing, str(listener.fileno()), "-m", "negfast", "serve", str(tiny_run)]
        process = subprocess.Popen(command, pass_fds=[listener.fileno()], stderr=subprocess.DEVNULL)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60) as client:
                assert score(client, "u1", ["i1"]) != [None]
        finally:
            process.kill()
            process.wait()


def test_an_event_that_is_sent_again_counts_once(tiny_run, tmp_path):
    file = tmp_path / "events.jsonl"
    events = [told("newcomer", f"i{n}", time=NOW - 86_400, key=f"key {n}") for n in range(3)]
    for start in range(2):
        with served(tiny_run, "--events", str(file)) as (client, process):
            reply = client.post("/events", json={"events": events[:2]}).json()
            assert (reply["accepted"], reply["known"]) == (2, 2 * start)
            reply = client.post("/events", json={"events": [events[2], *events]}).json()
            assert (reply["accepted"], reply["known"]) == (4, 3 + start)
            process.kill()
    assert [json.loads(line)["item"] for line in file.read_text().splitlines()] == ["i0", "i1", "i2"]


def test_an_address_that_is_taken_is_refused(tiny_run):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        said = run_cli("serve", str(tiny_run), "--port", str(listener.getsockname()[1]), code=2)
    assert "cannot listen there: Address already in use" in said


def test_a_damaged_event_file_is_refused(tiny_run, tmp_path):
    file = tmp_path / "events.jsonl"
    with served(tiny_run, "--events", str(file)) as (client, _):
        for n in range(3):
            client.post("/events", json={"events": [told("u1", f"i{n}")]})
    damaged = bytearray(file.read_bytes())
    damaged[20] ^= 1
    file.write_bytes(damaged)
    assert "events.jsonl: line 1: damaged" in run_cli("serve", str(tiny_run), "--events", str(file), code=2)
    assert file.read_bytes() == damaged


def test_a_new_run_takes_over_and_no_request_is_lost(tiny_run, tmp_path):
    first, second, link = tmp_path / "first", tmp_path / "second", tmp_path / "current"
    for run in (first, second):
        shutil.copytree(tiny_run, run)
        description = json.loads((run / "run.json").read_text())
        description["data"] = os.path.relpath(tiny_run / description["data"], run)
        (run / "run.json").write_text(json.dumps(description))
    link.symlink_to(first)
    with served(link, "--events", str(tmp_path / "events.jsonl")) as (client, process):
        assert client.post("/events", json={"events": [told("newcomer", "i1", time=NOW - 86_400)]}).status_code == 200
        before = score(client, "newcomer", ["i1", "i2"])
        failed, stop = [], threading.Event()

        def ask() -> None:
            with httpx.Client(base_url=client.base_url, timeout=30) as other:
                while not stop.is_set():
                    reply = other.post("/score", json={"user": "newcomer", "items": ["i1", "i2"]})
                    if reply.status_code != 200 or None in reply.json()["scores"]:
                        failed.append(reply.text)

        asking = threading.Thread(target=ask)
        asking.start()
        link.unlink()
        link.symlink_to(second)
        process.send_signal(signal.SIGHUP)
        deadline = time.time() + 60
        while client.get("/health").json()["run"] != str(second) and time.time() < deadline:
            time.sleep(0.05)
        assert client.get("/health").json()["run"] == str(second)
        assert score(client, "newcomer", ["i1", "i2"]) == pytest.approx(before, abs=1e-6)
        stop.set()
        asking.join()
        assert not failed
        shutil.rmtree(second)
        process.send_signal(signal.SIGHUP)  # which is refused, and the run of before goes on
        time.sleep(0.5)
        assert score(client, "newcomer", ["i1", "i2"]) == pytest.approx(before, abs=1e-6)


def test_a_full_disk_is_said_and_nothing_is_half_kept(tiny_run, tmp_path):
    file = tmp_path / "events.jsonl"
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400)); "
    limit += "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "from negfast.cli import main; sys.argv[0] = 'negfast'; main()"
    command = [sys.executable, "-c", limit, "serve", str(tiny_run), "--port", "0", "--events", str(file)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            found = next(filter(None, (re.search(r"running on (http://\S+)", line) for line in process.stderr)))
            with httpx.Client(base_url=found[1], timeout=30) as client:
                statuses = [client.post("/events", json={"events": [told("u1", "i1")]}).status_code for _ in range(6)]
                assert statuses[0] == 200 and statuses[-1] == 507
                assert None not in score(client, "u1", ["i1"])
        finally:
            process.kill()
    kept = file.read_text().splitlines()
    assert len(kept) == statuses.count(200) and all(json.loads(line)["user"] == "u1" for line in kept)


def test_an_answer_does_not_wait_for_the_clients_acknowledgement():
    listener = sockets_of("127.0.0.1", 0)[0]
    with listener, socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
