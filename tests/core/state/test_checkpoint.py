"""Checkpoints on disk."""

import hashlib
import json
import os

import pytest
import torch

from compression_manager.errors import CheckpointCorruptError, CheckpointError, ConfigError
from compression_manager.state import (
    IndexEntry,
    atomic_directory,
    find_checkpoint,
    read_checkpoint,
    read_index,
    write_checkpoint,
    write_index,
)


def save(root, step, value=0.0):
    path = root / f"step-{step:08d}"
    write_checkpoint(path, {"w": torch.tensor([value]), "step": step}, {"global_step": step})
    return path


def test_optimizer_continues_bit_identically(tmp_path):
    def make():
        torch.manual_seed(0)
        model = torch.nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        return model, torch.optim.Adam(model.parameters(), amsgrad=True)

    def train(model, optimizer, steps):
        for step in steps:
            torch.manual_seed(step)
            optimizer.zero_grad()
            model(torch.randn(2, 2, 5, 5)).square().mean().backward()
            optimizer.step()

    model, optimizer = make()
    train(model, optimizer, range(3))
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    write_checkpoint(tmp_path / "c", state, {"global_step": 3})
    train(model, optimizer, range(3, 6))

    other, other_optimizer = make()
    restored = read_checkpoint(tmp_path / "c")
    other.load_state_dict(restored["model"])
    other_optimizer.load_state_dict(restored["optimizer"])
    train(other, other_optimizer, range(3, 6))
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)


def test_tensors_own_their_memory_and_do_not_need_the_file(tmp_path):
    write_checkpoint(tmp_path / "c", {"a": torch.ones(3), "b": torch.zeros(5)})
    state = read_checkpoint(tmp_path / "c")
    assert state["a"].untyped_storage().nbytes() == 12
    assert state["a"].untyped_storage().data_ptr() != state["b"].untyped_storage().data_ptr()
    assert state["a"].data_ptr() % 64 == 0


def test_no_pickle_in_any_file(tmp_path):
    write_checkpoint(tmp_path / "c", {"a": torch.ones(3), "b": {1: (2, b"3")}})
    assert sorted(os.listdir(tmp_path / "c")) == [
        "manifest.json",
        "state.json",
        "tensors.safetensors",
    ]
    json.loads((tmp_path / "c" / "state.json").read_text())


def test_unknown_type_writes_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="plugins/x"):
        write_checkpoint(tmp_path / "new" / "c", {"plugins": {"x": object()}})
    assert os.listdir(tmp_path) == []


def replace_file(path, name, content):
    """Replace a file and its record, as an attacker would."""
    (path / name).write_bytes(content)
    document = json.loads((path / "manifest.json").read_text())
    document.pop("sha256")
    digest = hashlib.sha256(content).hexdigest()
    document["files"][name] = {"size": len(content), "sha256": digest}
    own = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({**document, "sha256": own}))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("state.json", b"[" * 200_000),
        ("state.json", b'{"$tuple": [' * 400 + b"]}" * 400),
        ("state.json", b"[]"),
        ("state.json", b'{"a": {"$tensor": "gone"}}'),
        ("state.json", b"\xff"),
        ("tensors.safetensors", b""),
        ("tensors.safetensors", b"\xff" * 40),
        ("tensors.safetensors", b"\x80\x04cos\nsystem\n"),
    ],
)
def test_hostile_content_is_refused(tmp_path, name, content):
    path = save(tmp_path, 1)
    replace_file(path, name, content)
    with pytest.raises(CheckpointCorruptError, match=name):
        read_checkpoint(path)


def test_missing_parts_are_named(tmp_path):
    with atomic_directory(tmp_path / "c", format_name="compression_manager.checkpoint") as folder:
        (folder / "state.json").write_text("{}")
    with pytest.raises(CheckpointCorruptError, match=r"does not list tensors\.safetensors"):
        read_checkpoint(tmp_path / "c")


def test_damage_is_found_before_anything_is_parsed(tmp_path):
    path = save(tmp_path, 1)
    content = bytearray((path / "tensors.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "tensors.safetensors").write_bytes(content)
    with pytest.raises(CheckpointCorruptError, match=r"tensors\.safetensors is damaged"):
        read_checkpoint(path)


def test_finds_one_checkpoint_or_the_newest_of_several(tmp_path):
    paths = {step: save(tmp_path, step) for step in (9, 120, 30)}
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "notes.txt").touch()
    with atomic_directory(tmp_path / "z-converted", format_name="other"):
        pass
    temporary = tmp_path / ".step-00000999.tmp-0123456789abcdef"
    write_checkpoint(temporary, {}, {"global_step": 999})
    assert find_checkpoint(tmp_path) == paths[120]
    assert find_checkpoint(str(paths[9])) == paths[9]


def test_the_newest_is_by_step_and_not_by_name(tmp_path):
    write_checkpoint(tmp_path / "z", {}, {"global_step": 1})
    write_checkpoint(tmp_path / "a", {}, {"global_step": 2})
    assert find_checkpoint(tmp_path).name == "a"


def test_a_version_that_was_being_replaced_is_found(tmp_path):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    newest.rename(tmp_path / f".{newest.name}.replaced")
    assert read_checkpoint(find_checkpoint(tmp_path))["step"] == 2
    assert read_checkpoint(newest)["step"] == 2
    save(tmp_path, 2, value=5.0)
    assert read_checkpoint(find_checkpoint(tmp_path))["w"].tolist() == [5.0]
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000002"]


def test_damaged_newest_checkpoint_is_named_not_skipped(tmp_path):
    save(tmp_path, 1)
    (save(tmp_path, 2) / "manifest.json").write_text("{")
    with pytest.raises(CheckpointCorruptError, match="step-00000002"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("which", ["latest", "best"])
def test_no_checkpoint(tmp_path, which):
    (tmp_path / "model.pt").touch()
    for path in (tmp_path, tmp_path / "absent", tmp_path / "model.pt"):
        with pytest.raises(CheckpointError, match=path.name):
            find_checkpoint(path, which)


def test_unknown_choice(tmp_path):
    with pytest.raises(ConfigError, match="'best', 'latest'"):
        find_checkpoint(tmp_path, "newest")


@pytest.mark.parametrize("metadata", [{}, {"global_step": True}, {"global_step": 3.0}])
def test_checkpoint_without_step_cannot_be_compared(tmp_path, metadata):
    write_checkpoint(tmp_path / "a", {}, metadata)
    assert find_checkpoint(tmp_path / "a") == tmp_path / "a"
    with pytest.raises(CheckpointCorruptError, match="global_step"):
        find_checkpoint(tmp_path)


def test_best_is_what_the_index_says(tmp_path):
    paths = [save(tmp_path, step) for step in (1, 2)]
    entries = [
        IndexEntry("step-00000001", 0, 1, float("inf"), True),
        IndexEntry("step-00000002", 1, 2, None, False),
    ]
    write_index(tmp_path, entries)
    assert read_index(tmp_path) == entries
    assert find_checkpoint(tmp_path, "best") == paths[0]
    write_index(tmp_path, entries[1:])
    with pytest.raises(CheckpointError, match="no checkpoint the best"):
        find_checkpoint(tmp_path, "best")


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.update(format="x"),
        lambda document: document.update(version=2),
        lambda document: document.update(checkpoints=3),
        lambda document: document["checkpoints"][0].update(name="../elsewhere"),
        lambda document: document["checkpoints"][0].pop("epoch"),
        lambda document: document["checkpoints"][0].update(metric=[]),
    ],
)
def test_damaged_index(tmp_path, change):
    write_index(tmp_path, [IndexEntry("a", 0, 1, 0.5, True)])
    document = json.loads((tmp_path / "index.json").read_text())
    change(document)
    (tmp_path / "index.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointCorruptError, match=r"index\.json is damaged"):
        find_checkpoint(tmp_path, "best")
