"""Trouble while weights are read from the Hub by range: what is tried again, and what is refused."""

import threading
from concurrent.futures import ThreadPoolExecutor

import hub_server
import pytest
import remote_models
import torch
from remote_models import Fault, failure, read_one, shard_of, stored, tensors

from surgery.errors import AccessError, InputError
from surgery.hub import ranges
from surgery.hub.remote_reader import RemoteReader

made = remote_models.made
aligned = remote_models.aligned


# Trouble on the way


@pytest.mark.parametrize("keep", [0, 1, 30_000])
def test_a_connection_that_drops_is_taken_up_where_it_broke(keep, hub, aligned):
    hub.faults.append(Fault(stored(aligned), keep=keep, times=2))
    before = len(hub.seen)
    assert torch.equal(read_one(aligned), tensors(1)["embed.weight"])
    tries = [seen for seen in hub.seen[before:] if seen.origin == "storage"]
    info = aligned.tensors["embed.weight"]
    assert [seen.headers["range"] for seen in tries] == [
        f"bytes={info.start + number * keep}-{info.start + info.nbytes - 1}" for number in range(3)
    ]
    assert sum(seen.sent for seen in tries) == info.nbytes


def test_a_connection_that_keeps_dropping_is_an_error_after_a_few_tries(hub, aligned):
    hub.faults.append(Fault(stored(aligned), keep=10))
    text = failure(AccessError, lambda: read_one(aligned))
    assert "5 times in a row" in text
    assert shard_of(aligned, "embed.weight").name in text
    assert 1_000_000 - hub.faults[0].times == 5
    hub.faults.clear()
    assert torch.equal(read_one(aligned), tensors(1)["embed.weight"])


def test_tries_are_counted_anew_once_much_has_come(hub, aligned, monkeypatch):
    monkeypatch.setattr(ranges, "_PROGRESS", 1000)
    hub.faults.append(Fault(stored(aligned), keep=1000, times=9))
    assert torch.equal(read_one(aligned), tensors(1)["embed.weight"])
    monkeypatch.setattr(ranges, "_PROGRESS", 1001)
    hub.faults.append(Fault(stored(aligned), keep=1000, times=9))
    failure(AccessError, lambda: read_one(aligned))


def test_a_hub_that_goes_away_or_never_answers_is_an_error(hub, aligned, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    hub.faults.append(Fault("/resolve/", silent=True))
    assert "broke off" in failure(AccessError, lambda: read_one(aligned))
    hub.close()
    assert "broke off" in failure(AccessError, lambda: read_one(aligned))


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_passing_trouble_is_waited_out(status, hub, aligned, slept):
    hub.faults.append(Fault("/resolve/", status=status, headers={"Retry-After": "3"}, times=2))
    file = shard_of(aligned, "embed.weight").remote
    info = aligned.tensors["embed.weight"]
    found = ranges.read_bytes(file, info.start, info.nbytes)
    assert found == bytes(tensors(1)["embed.weight"].numpy().data.cast("B"))
    assert sum(slept[threading.get_ident()]) == 6


@pytest.mark.parametrize(
    ("status", "headers", "part", "tries"),
    [
        (401, {}, "log in", 1),
        (403, {}, "does not let", 1),
        (404, {}, "no model", 1),
        (403, {"X-Error-Code": "GatedRepo"}, "is gated", 1),
        (404, {"X-Error-Code": "EntryNotFound"}, "any more", 1),
        (404, {"X-Error-Code": "RevisionNotFound"}, "no revision", 1),
        (429, {"Retry-After": "3600"}, "no more requests", 1),
        (429, {}, "no more requests", 5),
        (500, {}, "answered 500", 5),
        (503, {}, "answered 503", 5),
    ],
)
def test_lasting_trouble_ends_in_its_own_message(status, headers, part, tries, hub, aligned):
    hub.faults.append(Fault("/resolve/", status=status, headers=headers, body=b"<html>trouble</html>"))
    text = failure(AccessError, lambda: read_one(aligned))
    assert part in text
    assert "org/aligned" in text
    assert "html" not in text
    assert 1_000_000 - hub.faults[0].times == tries


def test_a_limit_of_requests_is_waited_out_as_the_hub_says(hub, aligned, slept):
    file = shard_of(aligned, "ids").remote
    headers = {
        "RateLimit": '"resolvers";r=0;t=200',
        "RateLimit-Policy": '"fixed window";"resolvers";q=3000;w=300',
    }
    hub.faults.append(Fault("/resolve/", status=429, headers=headers, times=1))
    assert len(ranges.read_bytes(file, 0, 8)) == 8
    assert slept[threading.get_ident()] == [200]
    hub.faults.append(Fault("/resolve/", status=429, headers={"RateLimit": '"resolvers";r=0;t=400'}))
    assert "no more requests" in failure(AccessError, lambda: ranges.read_bytes(file, 0, 8))
    assert slept[threading.get_ident()] == [200]


def test_the_hub_is_asked_once_for_each_file_until_storage_refuses(hub, aligned):
    begin = len(hub.seen)
    with RemoteReader(aligned) as reader:
        for name, tensor in tensors(1).items():
            assert torch.equal(reader.read(name), tensor)
        seen = hub.seen[begin:]
        assert len([one for one in seen if one.origin == "hub"]) == len(aligned.shards)
        assert len([one for one in seen if one.origin == "storage"]) == len(tensors()) - 1, "one has no bytes"
        begin = len(hub.seen)
        hub.faults.append(Fault(stored(aligned), status=403, body=b"<Error>expired</Error>", times=1))
        assert torch.equal(reader.read("embed.weight"), tensors(1)["embed.weight"])
        assert [one.origin for one in hub.seen[begin:]] == ["storage", "hub", "storage"]
        begin = len(hub.seen)
        hub.faults.append(Fault(stored(aligned), keep=5, times=1))
        assert torch.equal(reader.read("embed.weight"), tensors(1)["embed.weight"])
        assert [one.origin for one in hub.seen[begin:]] == ["storage", "hub", "storage"], "a broken one, too"
        hub.faults.append(Fault(stored(aligned), status=403, body=b"<Error>no</Error>"))
        assert "does not let" in failure(AccessError, lambda: reader.read("embed.weight"))


def test_rights_that_end_on_the_way_are_told(hub, aligned):
    hub.repositories["org/aligned"].gated = True
    assert f"{hub.url}/org/aligned" in failure(AccessError, lambda: read_one(aligned))
    hub.repositories["org/aligned"].gated = False
    hub.repositories["org/aligned"].private = True
    assert "log in" in failure(AccessError, lambda: read_one(aligned))


SPAN = "bytes {start}-{end}/{size}"


@pytest.mark.parametrize(
    ("status", "span", "headers", "kind", "part"),
    [
        (416, "bytes */5", {}, InputError, "shorter"),
        (206, "bytes {start}-{end}/5", {}, InputError, "5 bytes"),
        (206, "bytes 0-{end}/{size}", {}, AccessError, "wrong part"),
        (206, "bytes {start}-{size}/{size}", {}, AccessError, "wrong part"),
        (206, "", {}, AccessError, "wrong part"),
        (200, "", {}, AccessError, "without --stream"),
        (204, "", {}, AccessError, "without --stream"),
        (206, SPAN, {"Content-Encoding": "gzip"}, AccessError, "without --stream"),
        (206, SPAN, {"X-Repo-Commit": "f" * 40}, InputError, "commit ffff"),
        (206, SPAN, {"X-Linked-Etag": '"other"'}, InputError, "ETag"),
        (206, SPAN, {"X-Repo-Commit": "{commit}", "ETag": 'W/"other"'}, InputError, "ETag"),
    ],
)
def test_an_answer_that_is_not_the_planned_part_is_refused(status, span, headers, kind, part, hub, aligned):
    info = aligned.tensors["embed.weight"]
    shard = shard_of(aligned, info.name)
    values = {
        "start": info.start,
        "end": info.start + info.nbytes - 1,
        "size": shard.header.size,
        "commit": shard.remote.commit,
    }
    sent = {name: value.format(**values) for name, value in {"Content-Range": span, **headers}.items()}
    hub.faults.append(Fault(stored(aligned), status=status, headers=sent, body=b"\0" * info.nbytes))
    assert part in failure(kind, lambda: read_one(aligned))
    assert 1_000_000 - hub.faults[0].times == 1
    hub.faults[0] = Fault(
        stored(aligned),
        status=206,
        headers={"Content-Range": SPAN.format(**values), "X-Repo-Commit": shard.remote.commit,
                 "ETag": f'W/"{shard.remote.etag}"', "X-Linked-Etag": shard.remote.etag},
        body=b"\0" * info.nbytes,
    )  # fmt: skip
    assert not read_one(aligned).any(), "the control: the right headers are believed"


def test_an_answer_with_less_than_it_says_is_asked_for_the_rest(hub, aligned):
    info = aligned.tensors["embed.weight"]
    span = f"bytes {info.start}-{info.start + 9}/{shard_of(aligned, info.name).header.size}"
    content = tensors(1)["embed.weight"].numpy().tobytes()
    hub.faults.append(
        Fault(stored(aligned), status=206, headers={"Content-Range": span}, body=content[:10], times=1)
    )
    assert torch.equal(read_one(aligned), tensors(1)["embed.weight"])
    hub.faults.append(Fault(stored(aligned), status=206, headers={"Content-Range": span}, body=content))
    assert "wrong part" in failure(AccessError, lambda: read_one(aligned))


def test_more_than_was_asked_for_is_not_taken(aligned):
    file = shard_of(aligned, "ids").remote
    ranges._check_piece(b"12", file, 2, None)
    assert "more of" in failure(AccessError, lambda: ranges._check_piece(b"123", file, 2, None))


def test_a_file_that_was_replaced_on_the_hub_is_found(hub, aligned):
    shard = shard_of(aligned, "embed.weight")
    tree = hub.repositories["org/aligned"].trees[shard.remote.commit]
    tree[shard.name] = hub_server.Blob(b"\0" * shard.header.size, large=True)
    assert "changed on the Hub" in failure(InputError, lambda: read_one(aligned))
    assert read_one(aligned, "ids").equal(torch.arange(13)), "the control: other files are as they were"


def test_reading_ends_when_the_reader_is_closed(hub, aligned, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.faults.append(Fault(stored(aligned), silent=True))
    with ThreadPoolExecutor(1) as pool:
        with RemoteReader(aligned) as reader:
            future = pool.submit(reader.read, "embed.weight")
            while hub.faults[0].times == 1_000_000:
                threading.Event().wait(0.005)
        assert "stopped" in failure(AccessError, future.result)
