"""The Hub in trouble, the cache, and a disk that is full: the real client against a Hub on loopback."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import hub_models
import pytest
from hub_models import INDEX, SHARDS, WANTED, Fault, failure, files, longest

from surgery.errors import AccessError, ResourceError
from surgery.hub import repository, resolve

model = hub_models.model


# Trouble on the way


def test_a_hub_that_cannot_be_reached_is_an_error_at_once(hub, model, slept):
    hub.close()
    text = failure("org/model")
    assert "could not be reached" in text
    assert "no folder org/model" in text
    assert longest(slept) == 0


def test_a_hub_that_never_answers_is_not_waited_for_long(hub, model, monkeypatch):
    monkeypatch.setattr(repository, "_TIMEOUT", 0.3)
    hub.faults.append(Fault("/api/models/", silent=True))
    assert "could not be reached" in failure("org/model")


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize(
    "path", ["/api/models/org/model$", "/tree/", "/resolve/.*README", "/resolve/.*safetensors$"]
)
def test_passing_trouble_is_waited_out(status, path, hub, model, slept):
    hub.faults.append(Fault(path, status=status, headers={"Retry-After": "3"}, times=1))
    assert files(resolve("org/model")) == WANTED
    assert hub.faults[0].times == 0
    assert longest(slept) < 30


@pytest.mark.parametrize("status", [403, 429, 500, 504])
@pytest.mark.parametrize("path", ["/api/models/org/model$", "/tree/", "/resolve/.*README", "/[0-9a-f]{64}$"])
def test_lasting_trouble_ends_in_an_error(status, path, hub, model, slept):
    hub.faults.append(Fault(path, status=status, body=b"<html>trouble</html>"))
    text = failure("org/model")
    assert "org/model" in text
    assert "html" not in text
    assert longest(slept) < 60
    hub.faults.clear()
    assert files(resolve("org/model")) == WANTED


def test_a_long_wait_asked_for_is_an_error_instead(hub, model, slept):
    hub.faults.append(Fault("/api/models/", status=429, headers={"Retry-After": "3600"}))
    assert "no more requests" in failure("org/model")
    assert longest(slept) == 0


@pytest.mark.parametrize(
    "body", [b"<html>log in</html>", b"[1]", b"{}", b'{"id": "org/model"}', b'"x"', b"\xff"]
)
def test_something_that_is_no_hub_is_said_to_be_none(body, hub, model):
    hub.faults.append(Fault("/api/models/", status=200, headers={"Content-Type": "text/html"}, body=body))
    assert "does not answer as a Hub" in failure("org/model")


@pytest.mark.parametrize("keep", [0, 7])
def test_a_download_that_breaks_off_is_an_error_and_a_rerun_goes_on(keep, hub, model, slept):
    hub.faults.append(Fault(f"/{sha(model, SHARDS[0])}$", method="GET", keep=keep))
    assert "broke off" in failure("org/model")
    tries = [seen for seen in hub.seen if seen.origin == "storage" and sha(model, SHARDS[0]) in seen.path]
    assert 1 < len(tries) < 10
    assert longest(slept) < 60
    hub.faults.clear()
    before = len(hub.seen)
    assert files(resolve("org/model")) == WANTED
    again = {seen.path for seen in hub.seen[before:] if seen.origin == "storage"}
    assert f"/org/model/{sha(model, SHARDS[0])}" in again
    assert not list((Path("cache")).rglob("*.incomplete"))


def test_a_download_that_breaks_off_once_goes_through(hub, model):
    hub.faults.append(Fault(f"/{sha(model, SHARDS[0])}$", method="GET", keep=7, times=1))
    assert (resolve("org/model").folder / SHARDS[0]).read_bytes() == b"first" * 100
    assert hub.faults[0].times == 0


def test_a_download_that_came_out_short_is_an_error(hub, model):
    hub.faults.append(Fault(f"/{sha(model, SHARDS[0])}$", method="GET", status=200, body=b"first"))
    assert "broke off" in failure("org/model")


def sha(model, name):
    return model.trees[model.refs["main"]][name].sha256


# The cache


def test_a_filled_cache_is_enough_without_a_network(hub, model, offline):
    first = model.refs["main"]
    model.commit({"x.txt": b"x"}, branch="wip/fast")
    online = {name: resolve(name) for name in ("org/model", "org/model@wip/fast", f"org/model@{first}")}
    hub.close()
    offline()
    assert {name: resolve(name) for name in online} == online


def test_without_a_network_what_is_not_cached_is_an_error(hub, model, offline):
    commit = resolve("org/model").commit
    offline()
    assert "HF_HUB_OFFLINE" in failure("org/other")
    assert "HF_HUB_OFFLINE" in failure("org/model@v1")
    assert resolve(f"org/model@{commit}").commit == commit


@pytest.mark.parametrize("name", [SHARDS[0], "tokenizer.json", INDEX])
def test_without_a_network_a_copy_that_is_not_whole_is_an_error(name, hub, model, offline):
    source = resolve("org/model")
    (source.folder / name).unlink()
    asked = len(hub.seen)
    offline()
    text = failure("org/model")
    assert "HF_HUB_OFFLINE" in text
    assert len(hub.seen) == asked


def test_a_moved_branch_is_followed_online_and_its_last_known_commit_is_used_offline(hub, model, offline):
    old = resolve("org/model").commit
    new = model.commit({"x.txt": b"x"})
    assert resolve("org/model").commit == new != old
    offline()
    assert resolve("org/model").commit == new
    assert resolve(f"org/model@{old}").commit == old


def test_a_disk_that_cannot_hold_the_files_is_found_before_they_are_fetched(hub, model, monkeypatch):
    resolve("org/model")
    model.commit({SHARDS[0]: b"x" * 5000})
    monkeypatch.setattr(repository.resources, "disk_free", lambda path: 4999)
    before = len(hub.seen)
    assert "HF_HOME" in failure("org/model", ResourceError)
    assert not [seen for seen in hub.seen[before:] if seen.origin == "storage"]
    monkeypatch.setattr(repository.resources, "disk_free", lambda path: 50_000)
    assert (resolve("org/model").folder / SHARDS[0]).read_bytes() == b"x" * 5000


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, ResourceError), (errno.EACCES, AccessError), (errno.EROFS, AccessError)],
)
def test_a_cache_that_cannot_be_written_is_named(number, kind, hub, model, monkeypatch):
    from huggingface_hub import constants, file_download

    def fail(*values, **named):
        raise OSError(number, os.strerror(number), "x")

    monkeypatch.setattr(file_download, "_download_to_tmp_and_move", fail)
    assert constants.HF_HUB_CACHE in failure("org/model", kind)


def test_a_file_in_the_place_of_the_cache_is_an_access_error(hub, model):
    Path("cache").write_text("x")
    failure("org/model")


def test_two_at_once_get_the_same(hub, model):
    found = []
    threads = [threading.Thread(target=lambda: found.append(resolve("org/model"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert found[0] == found[1] == found[2]
    assert files(found[0]) == WANTED


def test_nothing_heavy_is_imported_until_the_hub_is_needed():
    code = (
        "import sys; from surgery.hub import resolve; resolve('/');"
        "assert not {'torch', 'huggingface_hub', 'httpx', 'httpx2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
