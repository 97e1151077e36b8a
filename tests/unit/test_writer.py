import errno
import hashlib
import json
import os
import stat

import pytest
import torch
from safetensors.torch import load_file

from surgery.checkpoint.header import build_header
from surgery.checkpoint.writer import ShardFile, copy_file, index_bytes, write_file
from surgery.editing import as_bytes
from surgery.errors import OutputError, ResourceError

TENSORS = {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}


def header():
    rows = [("a", "F32", (2, 3), 24), ("b", "BF16", (5,), 10)]
    return build_header(rows, {"format": "pt"})


def test_a_shard_reads_back_in_the_safetensors_library(tmp_path):
    head = header()
    with ShardFile(tmp_path / "m.safetensors", head, len(head) + 34) as shard:
        for tensor in TENSORS.values():
            shard.write(as_bytes(tensor))
        written = shard.close()
    found = load_file(tmp_path / "m.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    content = (tmp_path / "m.safetensors").read_bytes()
    assert (written.size, written.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_a_shard_that_is_too_short_is_an_error(tmp_path):
    head = header()
    with ShardFile(tmp_path / "m.safetensors", head, len(head) + 34) as shard, pytest.raises(OutputError):
        shard.close()


def test_files_have_the_mode_the_umask_gives(tmp_path):
    old = os.umask(0o022)
    try:
        write_file(tmp_path / "small", b"x")
        copy_file(tmp_path / "small", tmp_path / "copy")
        with ShardFile(tmp_path / "shard", b"", 0) as shard:
            shard.close()
    finally:
        os.umask(old)
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("small", "copy", "shard")} == {0o644}


def test_a_disk_that_fills_up_is_a_resource_error(tmp_path):
    class Full:
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self):
            pass

    with ShardFile(tmp_path / "m", b"", 4) as shard:
        shard._file.close()
        shard._file = Full()
        with pytest.raises(ResourceError, match="filled up"):
            shard.write(memoryview(b"1234"))


def test_a_copy_follows_links(tmp_path):
    (tmp_path / "blob").write_bytes(b"content")
    (tmp_path / "link").symlink_to(tmp_path / "blob")
    written = copy_file(tmp_path / "link", tmp_path / "sub" / "copy")
    assert not (tmp_path / "sub" / "copy").is_symlink()
    assert written.sha256 == hashlib.sha256(b"content").hexdigest()


def test_an_index_counts_bytes_and_keeps_other_metadata():
    document = json.loads(
        index_bytes({"s1": ["b"], "s2": ["a"]}, 34, {"total_size": 1, "total_parameters": 11})
    )
    assert document == {
        "metadata": {"total_size": 34, "total_parameters": 11},
        "weight_map": {"a": "s2", "b": "s1"},
    }
