"""Directories that are whole or not there, and their verification."""

import hashlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compression_manager.errors import CheckpointCorruptError, CheckpointError
from compression_manager.state import atomic_directory, verify_directory
from compression_manager.state import directory as directory_module
from compression_manager.state import files as files_module

FORMAT = "test.format"


def write(path, text="one", *, format_name=FORMAT, **options):
    with atomic_directory(path, format_name=format_name, **options) as folder:
        (folder / "data.txt").write_text(text)


def read(path):
    return (verify_directory(path, format_name=FORMAT).path("data.txt")).read_text()


def test_manifest_describes_every_file(tmp_path):
    write(tmp_path / "a", "content", version=3, metadata={"epoch": 4})
    manifest = verify_directory(tmp_path / "a", format_name=FORMAT, version=3)
    document = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert document["format"] == manifest.format_name == FORMAT
    assert document["version"] == manifest.version == 3
    assert document["metadata"] == manifest.metadata == {"epoch": 4}
    assert document["files"] == {
        "data.txt": {"size": 7, "sha256": hashlib.sha256(b"content").hexdigest()}
    }
    assert sorted(os.listdir(tmp_path / "a")) == ["data.txt", "manifest.json"]
    assert os.listdir(tmp_path) == ["a"]


def test_replaces_an_older_one_and_leaves_nothing_else(tmp_path):
    write(tmp_path / "a", "one")
    write(tmp_path / "a", "two")
    assert read(tmp_path / "a") == "two"
    assert os.listdir(tmp_path) == ["a"]


def test_the_working_directory_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(CheckpointError, match="the working directory"),
        atomic_directory(Path("."), format_name="test"),
    ):
        raise AssertionError("the body runs")
    assert list(Path.cwd().iterdir()) == []


def test_failure_in_the_body_leaves_the_old_one(tmp_path):
    write(tmp_path / "a", "one")

    def fail():
        with atomic_directory(tmp_path / "a", format_name=FORMAT) as folder:
            (folder / "data.txt").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert read(tmp_path / "a") == "one"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("failing", [1, 2])
def test_failing_rename_leaves_the_old_one(tmp_path, monkeypatch, failing):
    write(tmp_path / "a", "one")
    calls = []
    rename = os.rename

    def fail_once(source, target):
        calls.append(source)
        if len(calls) == failing:
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(directory_module.os, "rename", fail_once)
    with pytest.raises(CheckpointError, match="cannot write") as caught:
        write(tmp_path / "a", "two")
    assert isinstance(caught.value.__cause__, OSError)
    assert read(tmp_path / "a") == "one"
    assert os.listdir(tmp_path) == ["a"]


def test_at_every_system_call_one_version_is_readable(tmp_path, monkeypatch):
    """Whatever call the kill comes before, the old or the new version is found whole."""
    write(tmp_path / "a", "one")
    seen = []

    def spy(name):
        original = getattr(os, name)

        def call(*args, **kwargs):
            seen.append(read(tmp_path / "a"))
            return original(*args, **kwargs)

        return call

    for name in ("rename", "fsync", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, spy(name))
    write(tmp_path / "a", "two")
    assert len(seen) >= 7
    assert seen == sorted(seen)
    assert set(seen) == {"one", "two"}


def killed_between_renames(tmp_path, monkeypatch):
    """Leave what a kill after the first of the two renames leaves."""
    rename = os.rename

    def rename_then_die(source, target):
        rename(source, target)
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename_then_die)
        patch.setattr(files_module, "discard", lambda path: None)
        with pytest.raises(SystemExit):
            write(tmp_path / "a", "two")
    assert not (tmp_path / "a").exists()


def test_the_old_version_is_found_after_a_kill_between_the_renames(tmp_path, monkeypatch):
    write(tmp_path / "a", "one")
    killed_between_renames(tmp_path, monkeypatch)
    assert read(tmp_path / "a") == "one"
    write(tmp_path / "a", "three")
    assert read(tmp_path / "a") == "three"
    assert os.listdir(tmp_path) == ["a"]


def test_an_older_version_that_a_kill_left_is_removed_by_any_write(tmp_path):
    write(tmp_path / ".a.replaced", "one")
    write(tmp_path / "a", "two")
    write(tmp_path / ".b.replaced", "still needed")
    write(tmp_path / ".c.replaced", "other", format_name="other.format")
    (tmp_path / "c").mkdir()
    write(tmp_path / "d")
    assert sorted(os.listdir(tmp_path)) == [".b.replaced", ".c.replaced", "a", "c", "d"]
    assert read(tmp_path / "b") == "still needed"


def test_a_failing_write_after_such_a_kill_keeps_the_old_version(tmp_path, monkeypatch):
    write(tmp_path / "a", "one")
    killed_between_renames(tmp_path, monkeypatch)
    with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "a", format_name=FORMAT):
        1 / 0
    assert (tmp_path / "a" / "data.txt").read_text() == "one"


def test_next_write_cleans_up_after_killed_processes_but_not_live_ones(tmp_path):
    code = f"""
import os, pathlib
from compression_manager.state import atomic_directory
with atomic_directory(pathlib.Path({str(tmp_path / "a")!r}), format_name="test.format") as folder:
    (folder / "data.txt").write_text("half")
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    (left,) = tmp_path.iterdir()
    assert files_module.is_temporary(left.name)
    with atomic_directory(tmp_path / "live", format_name=FORMAT) as live:
        assert not left.exists()
        write(tmp_path / "b")
        assert live.is_dir()
    assert sorted(os.listdir(tmp_path)) == ["b", "live"]


def test_everything_is_synced_before_it_counts(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename

    def log_sync(descriptor):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def log_rename(source, target):
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", log_sync)
    monkeypatch.setattr(os, "rename", log_rename)
    write(tmp_path / "new" / "a")
    at = events.index("rename")
    assert {"data.txt", "manifest.json"} <= set(events[: at - 1])
    assert events[at - 1].startswith(".a.tmp-")
    assert events[at + 1 :] == ["new"]
    assert tmp_path.name in events[:at]


def test_files_get_the_mode_that_the_umask_allows(tmp_path):
    with atomic_directory(tmp_path / "a", format_name=FORMAT) as folder:
        save_file({"a": torch.ones(1)}, folder / "t.safetensors")
    (tmp_path / "plain").touch()
    expected = (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "a" / "t.safetensors").stat().st_mode == expected


@pytest.mark.parametrize("tensor_file", [True, False])
def test_full_disk_is_a_checkpoint_error_and_keeps_the_old_one(tmp_path, tensor_file):
    write(tmp_path / "a", "one")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        with atomic_directory(tmp_path / "a", format_name=FORMAT) as folder:
            if tensor_file:
                save_file({"a": torch.ones(9000)}, folder / "data.txt")
            else:
                (folder / "data.txt").write_text("x" * 9000)

    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot write") as caught:
            fill()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.__cause__ is not None
    assert read(tmp_path / "a") == "one"
    assert os.listdir(tmp_path) == ["a"]


def test_runtime_error_of_a_full_disk_is_a_checkpoint_error(tmp_path):
    with (
        pytest.raises(CheckpointError, match="no space"),
        atomic_directory(tmp_path / "a", format_name=FORMAT),
    ):
        raise RuntimeError("no space")
    assert os.listdir(tmp_path) == []


def fill_with(kind, path):
    if kind == "file":
        path.write_text("precious")
    elif kind == "other files":
        path.mkdir()
        (path / "precious").write_text("x")
    elif kind == "other format":
        write(path, format_name="other.format")
    elif kind == "foreign manifest":
        path.mkdir()
        (path / "manifest.json").write_text('{"name": "web app"}')
    elif kind == "ours and more":
        write(path)
        (path / "notes.txt").write_text("precious")


@pytest.mark.parametrize(
    "kind", ["file", "other files", "other format", "foreign manifest", "ours and more"]
)
def test_other_peoples_things_are_never_replaced(tmp_path, kind):
    path = tmp_path / "a"
    fill_with(kind, path)
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match="a is "):
        write(path, "two")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("kind", ["other files", "other format", "ours and more"])
def test_other_peoples_things_are_not_taken_for_a_version_that_a_kill_left(tmp_path, kind, there):
    if there:
        write(tmp_path / "a")
    fill_with(kind, tmp_path / ".a.replaced")
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match="is not replaced"):
        write(tmp_path / "a", "two")
    assert snapshot(tmp_path) == before


def snapshot(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def test_empty_directory_and_link_to_a_directory_are_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", "one")
    assert (tmp_path / "link").is_symlink()
    assert read(tmp_path / "link") == read(tmp_path / "real") == "one"


def test_foreign_directories_are_named_with_what_was_found(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.pt").touch()
    write(tmp_path / "converted", format_name="other.format")
    for name, found in {
        "absent": "does not exist",
        "empty": "it is empty",
        "file": "it is not a directory",
        "other": "it holds model.pt and no file manifest.json",
        "converted": "its format is 'other.format'",
    }.items():
        with pytest.raises(CheckpointError, match=found) as caught:
            verify_directory(tmp_path / name, format_name=FORMAT)
        assert not isinstance(caught.value, CheckpointCorruptError)
        assert FORMAT in str(caught.value)


def test_newer_versions_are_refused(tmp_path):
    write(tmp_path / "a", version=2)
    with pytest.raises(CheckpointError, match=r"version 2 .* up to 1"):
        verify_directory(tmp_path / "a", format_name=FORMAT)


def same_json(content, meaning):
    try:
        return json.loads(content) == meaning
    except ValueError:
        return False


def test_flipped_bits_are_found(tmp_path):
    write(tmp_path / "a", metadata={"global_step": 12})
    for name in ("data.txt", "manifest.json"):
        path = tmp_path / "a" / name
        content = path.read_bytes()
        meaning = json.loads(content) if name == "manifest.json" else None
        for bit in range(0, 8 * len(content), 3):  # every byte, and each of the 8 places
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            if not (meaning and same_json(flipped, meaning)):  # white space changed
                with pytest.raises(CheckpointCorruptError, match=name):
                    read(tmp_path / "a")
        path.write_bytes(content)


def forge(path, change):
    """Write a manifest with a valid digest, as an attacker would."""
    document = json.loads((path / "manifest.json").read_text())
    change(document)
    document.pop("sha256")
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({**document, "sha256": digest}))


RECORD = {"size": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "..", ".", "", "a/../../secret", "..\\secret", "c:x"]
)
def test_paths_out_of_the_directory_are_refused(tmp_path, name):
    (tmp_path / "secret").write_text("secret")
    write(tmp_path / "a")
    forge(tmp_path / "a", lambda document: document["files"].update({name: RECORD}))
    with pytest.raises(CheckpointCorruptError, match="not the name of a file"):
        verify_directory(tmp_path / "a", format_name=FORMAT)


@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "missing"])
def test_only_regular_files_are_read(tmp_path, kind):
    (tmp_path / "secret").write_text("secret")
    write(tmp_path / "a")
    path = tmp_path / "a" / "extra"
    if kind == "link":
        path.symlink_to(tmp_path / "secret")
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    forge(tmp_path / "a", lambda document: document["files"].update(extra=RECORD))
    with pytest.raises(CheckpointCorruptError, match="extra is"):
        verify_directory(tmp_path / "a", format_name=FORMAT)


def test_linked_manifest_is_refused(tmp_path):
    write(tmp_path / "a")
    (tmp_path / "a" / "manifest.json").rename(tmp_path / "elsewhere.json")
    (tmp_path / "a" / "manifest.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CheckpointError, match=r"no file manifest\.json"):
        verify_directory(tmp_path / "a", format_name=FORMAT)


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.update(version=True),
        lambda document: document.update(version=0),
        lambda document: document.update(metadata=[]),
        lambda document: document.update(files=[]),
        lambda document: document["files"].update({"x": 3}),
        lambda document: document["files"].update({"x": {"size": 3}}),
        lambda document: document["files"].update({"x": {"size": True, "sha256": "0"}}),
    ],
)
def test_malformed_manifests_are_refused(tmp_path, change):
    write(tmp_path / "a")
    forge(tmp_path / "a", change)
    with pytest.raises(CheckpointCorruptError, match=r"manifest\.json is damaged"):
        verify_directory(tmp_path / "a", format_name=FORMAT)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b"9" * 5000])
def test_unreadable_manifests_are_refused(tmp_path, content):
    write(tmp_path / "a")
    (tmp_path / "a" / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointCorruptError, match=r"manifest\.json is damaged"):
        verify_directory(tmp_path / "a", format_name=FORMAT)


def test_truncated_and_unlisted_files(tmp_path):
    write(tmp_path / "a", "content")
    (tmp_path / "a" / "unlisted").write_text("ignored")
    assert read(tmp_path / "a") == "content"
    (tmp_path / "a" / "data.txt").write_text("conten")
    with pytest.raises(CheckpointCorruptError, match=r"data\.txt has 6 bytes"):
        read(tmp_path / "a")
