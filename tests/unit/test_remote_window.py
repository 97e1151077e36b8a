"""A window of shards on disk: what is downloaded when, taken up, checked and deleted; a Hub on loopback."""

import contextlib
import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import hub_server
import pytest
import torch

from surgery.checkpoint.layout import open_checkpoint
from surgery.checkpoint.reader import file_sha256
from surgery.errors import AccessError, InputError, ResourceError, SurgeryError
from surgery.hub import download, ranges, resolve, window
from surgery.hub.remote import open_source
from surgery.hub.remote_reader import RemoteReader
from surgery.hub.window import ShardWindow
from surgery.testing import write_checkpoint

Fault = hub_server.Fault
SHARDS = 5


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layers.{number}.weight": torch.randn((53, 101 + number), generator=generator)
        for number in range(10)
    }


@pytest.fixture
def made(hub, tmp_path, monkeypatch):
    """The folder from which `org/aligned` was made, in five shards."""
    monkeypatch.setattr(ranges, "_WAITS", (0.0, 0.0))
    folder = write_checkpoint(tmp_path / "made", tensors(), {}, shards=SHARDS)
    hub.create("org/aligned").commit_folder(folder)
    return folder


@pytest.fixture
def aligned(made):
    """The checkpoint, its weights on the Hub."""
    return open_source(resolve("org/aligned", weights="stream"))


@pytest.fixture
def folder(tmp_path):
    """Where the windows are."""
    return tmp_path / "out.partial" / "shards"


def on_disk(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def open_files():
    """What the descriptors of this process lead to; other threads open and close some meanwhile."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            yield os.readlink(f"/proc/self/fd/{name}")


def ranges_of(hub, shard, begin=0):
    """The ranges that storage was asked for of a shard."""
    return [
        seen.headers.get("range")
        for seen in hub.seen[begin:]
        if seen.origin == "storage" and shard.remote.sha256 in seen.path
    ]


def failure(kind, act):
    with pytest.raises(SurgeryError) as caught:
        act()
    assert type(caught.value) is kind, caught.value
    assert "\n" not in str(caught.value)
    return str(caught.value)


def take_all(checkpoint, folder, **options):
    """Names of tensors that came out as they should, over a whole pass."""
    found = []
    with ShardWindow(checkpoint, folder, **options) as shards:
        for shard in options.get("shards", checkpoint.shards):
            shards.take(shard)
            for info in shard.header.tensors:
                assert torch.equal(shards.reader.read(info.name), tensors()[info.name])
                found.append(info.name)
            shards.done(shard)
    return found


def test_every_shard_is_there_when_it_is_taken_and_gone_when_it_is_done(aligned, folder, made):
    with ShardWindow(aligned, folder) as shards:
        for shard in aligned.shards:
            path = shards.take(shard)
            assert path.read_bytes() == (made / shard.name).read_bytes()
            assert shards.sha256(shard) == shard.remote.sha256
            for info in shard.header.tensors:
                assert torch.equal(shards.reader.read(info.name), tensors()[info.name])
            shards.done(shard)
            assert not path.exists()
            assert str(path) not in "".join(open_files()), "its disk is free again"
    assert not folder.exists()


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_never_more_shards_are_on_disk_than_the_window_is_wide(ahead, aligned, folder, monkeypatch):
    most = []
    real = window.download

    def counted(file, path, *, stop):
        most.append(len(on_disk(folder)) + 1)
        found = real(file, path, stop=stop)
        assert len(on_disk(folder)) <= most[-1]
        return found

    monkeypatch.setattr(window, "download", counted)
    assert len(take_all(aligned, folder, ahead=ahead)) == 10
    assert len(most) == SHARDS
    assert max(most) <= 1 + ahead


def test_the_next_shard_comes_while_one_is_held_and_no_further_one(hub, aligned, folder):
    first, second, third, *_ = aligned.shards
    with ShardWindow(aligned, folder) as shards:
        shards.take(first)
        shards.take(second)
        assert on_disk(folder) == [first.name, second.name]
        assert ranges_of(hub, third)[2:] == [], "of the third, no more than the header was asked for"
        shards.done(first)
        shards.take(third)
        assert on_disk(folder) == [second.name, third.name]


def test_a_thread_waits_for_room_that_another_makes(aligned, folder):
    first, second, third, *_ = aligned.shards
    with ShardWindow(aligned, folder) as shards, ThreadPoolExecutor(1) as pool:
        shards.take(first)
        shards.take(second)
        waiting = pool.submit(shards.take, third)
        assert not waiting.done()
        shards.done(first)
        assert waiting.result(timeout=20).name == third.name


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_read_ahead_while_the_shards_are_finished_in_order(workers, aligned, folder, monkeypatch):
    most, real = [], window.download

    def counted(file, path, *, stop):
        most.append(len(on_disk(folder)) + 1)
        return real(file, path, stop=stop)

    monkeypatch.setattr(window, "download", counted)
    with ShardWindow(aligned, folder) as shards, ThreadPoolExecutor(workers) as pool:
        names = [info.name for shard in aligned.shards for info in shard.header.tensors]
        reads = dict(zip(names, [pool.submit(shards.reader.read, name) for name in names], strict=True))
        for shard in aligned.shards:
            for info in shard.header.tensors:
                assert torch.equal(reads[info.name].result(timeout=20), tensors()[info.name])
            assert shards.sha256(shard) == shard.remote.sha256
            shards.done(shard)
        assert shards.sha256(aligned.shards[0]) == aligned.shards[0].remote.sha256, "it is known to the end"
    assert len(most) == SHARDS
    assert max(most) <= 2


def test_several_threads_may_take_the_same_shard(aligned, folder):
    with ShardWindow(aligned, folder) as shards, ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(shards.take, [aligned.shards[0]] * 4))
        assert len(paths) == 1
        names = [info.name for info in aligned.shards[0].header.tensors] * 4
        for name, found in zip(names, pool.map(shards.reader.read, names), strict=True):
            assert torch.equal(found, tensors()[name])


def test_a_pair_is_streamed_with_no_more_of_the_base_than_is_read(hub, aligned, folder, tmp_path):
    made = write_checkpoint(tmp_path / "base", tensors(1), {}, shards=2)
    hub.create("org/base").commit_folder(made)
    base = open_source(resolve("org/base", weights="stream"))
    with ShardWindow(aligned, folder) as shards, RemoteReader(base) as partner:
        for shard in aligned.shards:
            shards.take(shard)
            for info in shard.header.tensors:
                found = shards.reader.read(info.name) - partner.read(info.name)
                assert torch.equal(found, tensors(0)[info.name] - tensors(1)[info.name])
            shards.done(shard)
    headers = sum(shard.header.length for shard in base.shards)
    assert hub.sent("/org/base/[0-9a-f]{64}$") == headers + base.total_bytes


# Taken up


@pytest.mark.parametrize("keep", [1, 20_000])
def test_a_connection_that_drops_is_taken_up_where_it_broke(keep, hub, aligned, folder):
    shard = aligned.shards[1]
    hub.faults.append(Fault(f"/{shard.remote.sha256}$", keep=keep, times=2))
    begin = len(hub.seen)
    assert len(take_all(aligned, folder)) == 10
    assert ranges_of(hub, shard, begin) == [
        f"bytes={number * keep}-{shard.header.size - 1}" for number in range(3)
    ]


def test_a_run_that_broke_off_goes_on_where_it_was(hub, aligned, folder):
    first, second, *later = aligned.shards
    hub.faults.append(Fault(f"/{second.remote.sha256}$", keep=500))
    with ShardWindow(aligned, folder) as shards:
        shards.take(first)
        shards.done(first)
        assert "broke off" in failure(AccessError, lambda: shards.take(second))
        assert "broke off" in failure(AccessError, lambda: shards.take(second))
    assert f"{second.name}.part" in on_disk(folder)
    assert (folder / f"{second.name}.part").stat().st_size == 1500
    hub.faults.clear()
    begin = len(hub.seen)
    assert len(take_all(aligned, folder, shards=[second, *later])) == 8
    assert ranges_of(hub, second, begin) == [f"bytes=1500-{second.header.size - 1}"]
    assert ranges_of(hub, first, begin) == []
    assert not folder.exists()


def test_a_shard_that_is_there_whole_is_not_downloaded_again(hub, aligned, folder, made):
    first, second, *_ = aligned.shards
    folder.mkdir(parents=True)
    (folder / first.name).write_bytes((made / first.name).read_bytes())
    spoilt = bytearray((made / second.name).read_bytes())
    spoilt[-1] ^= 1
    (folder / second.name).write_bytes(spoilt)
    begin = len(hub.seen)
    assert len(take_all(aligned, folder)) == 10
    assert ranges_of(hub, first, begin) == []
    assert ranges_of(hub, second, begin) == [f"bytes=0-{second.header.size - 1}"], "the control"


@pytest.mark.parametrize("left", [b"", b"x", b"\0" * 5000, b"\0" * 10_000_000])
def test_a_beginning_that_does_not_belong_to_the_file_is_given_up(left, aligned, folder):
    folder.mkdir(parents=True)
    (folder / f"{aligned.shards[0].name}.part").write_bytes(left)
    assert len(take_all(aligned, folder)) == 10


def test_what_is_left_of_other_shards_is_removed_and_what_is_not_ours_stays(aligned, folder):
    folder.mkdir(parents=True)
    for shard in aligned.shards:
        (folder / shard.name).write_bytes(b"x")
        (folder / f"{shard.name}.part").write_bytes(b"x")
    (folder / "notes.txt").write_text("mine")
    with ShardWindow(aligned, folder, shards=aligned.shards[3:]):
        assert not {name for name in on_disk(folder) if aligned.shards[0].name in name}
        assert not {name for name in on_disk(folder) if aligned.shards[2].name in name}
    assert len(take_all(aligned, folder, shards=aligned.shards[3:])) == 4
    assert on_disk(folder) == ["notes.txt"]


# Checked


def test_bytes_that_do_not_have_the_hash_the_hub_states_are_refused(hub, aligned, folder):
    shard = aligned.shards[0]
    span = f"bytes 0-{shard.header.size - 1}/{shard.header.size}"
    hub.faults.append(
        Fault(
            f"/{shard.remote.sha256}$",
            status=206,
            headers={"Content-Range": span},
            body=b"\0" * shard.header.size,
        )
    )
    with ShardWindow(aligned, folder) as shards:
        assert shard.remote.sha256 in failure(AccessError, lambda: shards.take(shard))
    assert not {name for name in on_disk(folder) if shard.name in name}, "they are not taken up by a rerun"
    hub.faults.clear()
    assert len(take_all(aligned, folder)) == 10


def small(hub, content=None):
    """The checkpoint once more, the first shard kept as a small file, for which no SHA-256 is stated."""
    repository = hub.repositories["org/aligned"]
    tree = repository.trees[repository.refs["main"]]
    name = min(name for name in tree if name.endswith(".safetensors"))
    tree[name] = hub_server.Blob(content or tree[name].content, large=False)
    return open_source(resolve("org/aligned", weights="stream"))


def test_a_file_without_a_stated_hash_is_downloaded_from_its_beginning(hub, made, folder):
    checkpoint = small(hub)
    shard = checkpoint.shards[0]
    assert shard.remote.sha256 is None
    folder.mkdir(parents=True)
    (folder / f"{shard.name}.part").write_bytes(b"x" * 100)
    assert len(take_all(checkpoint, folder)) == 10


def test_a_header_that_changed_after_the_plan_is_found(hub, made, folder):
    checkpoint = small(hub)
    shard = checkpoint.shards[0]
    content = (made / shard.name).read_bytes().replace(b"layers.0", b"layers.x")
    span = {"Content-Range": f"bytes 0-{len(content) - 1}/{len(content)}"}
    hub.faults.append(Fault(f"/resolve/.*{shard.name}$", status=206, headers=span, body=content))
    with ShardWindow(checkpoint, folder) as shards:
        assert "changed after its header" in failure(InputError, lambda: shards.take(shard))


def test_a_server_that_knows_no_ranges_may_still_send_a_file_whole(hub, aligned, folder, made):
    shard = aligned.shards[0]
    hub.faults.append(
        Fault(f"/{shard.remote.sha256}$", status=200, body=(made / shard.name).read_bytes(), times=1)
    )
    assert len(take_all(aligned, folder)) == 10
    hub.faults.append(Fault(f"/{shard.remote.sha256}$", status=200, body=b"short", times=1))
    with ShardWindow(aligned, folder) as shards:
        assert "5 bytes" in failure(InputError, lambda: shards.take(shard))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_resource_error_that_names_the_file(number, aligned, folder, monkeypatch):
    def fail(*values, **named):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(download, "read_range", fail)
    with ShardWindow(aligned, folder) as shards:
        assert aligned.shards[0].name in failure(ResourceError, lambda: shards.take(aligned.shards[0]))


# Closed


def test_leaving_stops_a_download_and_keeps_what_came(hub, aligned, folder, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.faults.append(Fault(f"/{aligned.shards[0].remote.sha256}$", silent=True))
    with ShardWindow(aligned, folder):
        while hub.faults[0].times == 1_000_000:
            threading.Event().wait(0.005)
    assert not [thread for thread in threading.enumerate() if "surgery-download" in thread.name]
    assert on_disk(folder) == [f"{aligned.shards[0].name}.part"]
    assert 1_000_000 - hub.faults[0].times < 3, "it was not tried to the end"


def test_closing_ends_the_waits_of_other_threads(hub, aligned, folder, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.faults.append(Fault(f"/{aligned.shards[0].remote.sha256}$", silent=True))
    begun, queued, waiting = aligned.shards[:3]
    with ShardWindow(aligned, folder) as shards, ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(shards.take, shard) for shard in (begun, queued, waiting)]
        while hub.faults[0].times == 1_000_000:
            threading.Event().wait(0.005)
        assert not any(future.done() for future in futures)
        shards.close()
        assert "stopped" in failure(AccessError, futures[0].result)
        for future in futures[1:]:
            assert "any more" in failure(AccessError, future.result)


def test_a_window_that_is_used_wrongly_says_so(aligned, folder):
    first, second, *_ = aligned.shards
    with ShardWindow(aligned, folder, shards=[first]) as shards:
        for use in (shards.take, shards.sha256, shards.done):
            with pytest.raises(ValueError, match="not among"):
                use(second)
        shards.done(first)
        for use in (shards.take, shards.done):
            with pytest.raises(ValueError, match="done before"):
                use(first)
    with pytest.raises(ValueError, match="ahead"):
        ShardWindow(aligned, folder, ahead=-1)


def test_a_folder_is_read_where_it_lies_and_is_not_deleted(hub, made, folder):
    checkpoint = open_checkpoint(made, "x")
    begin = len(hub.seen)
    assert len(take_all(checkpoint, folder)) == 10
    with ShardWindow(checkpoint, folder) as shards:
        assert shards.take(checkpoint.shards[4]) == checkpoint.shards[4].path, "there is nothing to wait for"
        assert shards.sha256(checkpoint.shards[0]) == file_sha256(checkpoint.shards[0].path)
    assert len(list(made.glob("*.safetensors"))) == SHARDS
    assert not folder.exists()
    assert len(hub.seen) == begin
