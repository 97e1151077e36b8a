import json
import os
import stat

import pytest

from surgery.checkpoint.staging import JOURNAL, Staging, partial_of, refuse_existing
from surgery.errors import InputError, ResourceError, UsageError

RUN = {"inputs": "a", "options": {"rank": 6}}


def finish(output, fingerprint=RUN, *, overwrite=False, text="new"):
    with Staging(output, fingerprint, overwrite=overwrite) as staging:
        (staging.path / "surgery.json").write_text(text)
        staging.commit()


def test_the_output_appears_only_when_committed(tmp_path):
    output = tmp_path / "out"
    with Staging(output, RUN) as staging:
        (staging.path / "weights").write_text("w")
        assert not output.exists()
        staging.commit()
    assert sorted(file.name for file in output.iterdir()) == ["weights"]
    assert list(tmp_path.iterdir()) == [output]


def test_a_crash_leaves_what_the_same_run_takes_up(tmp_path):
    output = tmp_path / "out"
    with pytest.raises(RuntimeError), Staging(output, RUN) as staging:
        staging.record({"shard": "one"})
        raise RuntimeError("crash")
    with Staging(output, RUN) as again:
        assert again.entries == [{"shard": "one"}]


def test_a_line_cut_short_by_a_crash_is_ignored(tmp_path):
    output = tmp_path / "out"
    with pytest.raises(RuntimeError), Staging(output, RUN) as staging:
        staging.record({"shard": "one"})
        with open(staging.path / JOURNAL, "ab") as journal:
            journal.write(b'{"shard": "tw')
        raise RuntimeError("crash")
    with pytest.raises(RuntimeError), Staging(output, RUN) as again:
        assert again.entries == [{"shard": "one"}]
        again.record({"shard": "two"})
        raise RuntimeError("crash")
    lines = (partial_of(output) / JOURNAL).read_text().splitlines()
    assert [json.loads(line) for line in lines[1:]] == [{"shard": "one"}, {"shard": "two"}]


def test_another_run_is_refused_and_told_what_differs(tmp_path):
    output = tmp_path / "out"
    with pytest.raises(RuntimeError), Staging(output, RUN):
        raise RuntimeError("crash")
    with pytest.raises(UsageError, match="other options"), Staging(output, {**RUN, "options": {"rank": 7}}):
        pass
    assert partial_of(output).exists()
    with Staging(output, {**RUN, "options": {"rank": 7}}, overwrite=True) as staging:
        assert staging.entries == []


@pytest.mark.parametrize(
    ("error", "kept"),
    [(InputError("bad"), False), (ResourceError("full"), True), (KeyboardInterrupt(), True)],
)
def test_only_errors_that_a_rerun_cannot_cure_remove_the_partial_folder(tmp_path, error, kept):
    output = tmp_path / "out"
    with pytest.raises(type(error)), Staging(output, RUN):
        raise error
    assert partial_of(output).exists() is kept
    assert not output.exists()


def test_a_second_run_on_the_same_output_is_refused(tmp_path):
    with Staging(tmp_path / "out", RUN) as first:
        with pytest.raises(UsageError, match="another run is writing"), Staging(tmp_path / "out", RUN):
            pass
        assert first.path.exists()
    with Staging(tmp_path / "out", RUN):
        pass


def test_an_existing_output_is_replaced_only_when_asked_and_only_if_ours(tmp_path):
    output = tmp_path / "out"
    finish(output, text="old")
    with pytest.raises(UsageError, match="--overwrite"):
        finish(output)
    assert (output / "surgery.json").read_text() == "old"
    finish(output, overwrite=True)
    assert (output / "surgery.json").read_text() == "new"
    assert list(tmp_path.iterdir()) == [output]
    (output / "surgery.json").unlink()
    (output / "precious").write_text("mine")
    with pytest.raises(UsageError, match="did not write it"):
        finish(output, overwrite=True)
    assert (output / "precious").read_text() == "mine"


def test_a_failed_replacement_leaves_the_old_output_as_it_was(tmp_path):
    output = tmp_path / "out"
    finish(output, text="old")
    with pytest.raises(InputError), Staging(output, RUN, overwrite=True) as staging:
        (staging.path / "surgery.json").write_text("half")
        raise InputError("bad")
    assert (output / "surgery.json").read_text() == "old"


def test_an_empty_folder_may_be_the_output_and_a_file_may_not(tmp_path):
    (tmp_path / "empty").mkdir()
    finish(tmp_path / "empty")
    assert (tmp_path / "empty" / "surgery.json").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError):
        refuse_existing(tmp_path / "file", overwrite=True)


def test_a_partial_folder_of_someone_else_is_not_emptied(tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "precious").write_text("mine")
    with pytest.raises(UsageError, match="did not write"), Staging(tmp_path / "out", RUN):
        pass
    assert (partial / "precious").read_text() == "mine"


def test_the_output_has_the_mode_the_umask_gives(tmp_path):
    old = os.umask(0o027)
    try:
        finish(tmp_path / "out")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


def test_folders_are_exchanged_even_where_the_system_call_is_missing(tmp_path, monkeypatch):
    import ctypes
    import errno

    class NoExchange:
        def renameat2(self, *arguments):
            ctypes.set_errno(errno.EINVAL)
            return -1

    finish(tmp_path / "out", text="old")
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: NoExchange())
    finish(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "surgery.json").read_text() == "new"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
