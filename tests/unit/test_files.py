"""Files that appear whole or not at all: what fails, or is cancelled, leaves what was there and nothing beside it."""

import os

import pytest
import torch
from membrane.core import files
from safetensors import safe_open


def write(path):
    files.write_whole(path, b"new")


def save(path):
    files.save_whole({"x": torch.ones(2)}, path, {"a": "b"})


def test_bytes_and_tensors(tmp_path):
    write(tmp_path / "a")
    save(str(tmp_path / "b"))
    assert (tmp_path / "a").read_bytes() == b"new"
    with safe_open(str(tmp_path / "b"), framework="pt") as file:
        assert file.metadata() == {"a": "b"} and torch.equal(file.get_tensor("x"), torch.ones(2))
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
@pytest.mark.parametrize("make", [write, save])
@pytest.mark.parametrize("old", [None, b"old"])
def test_what_is_not_finished_is_not_there(tmp_path, monkeypatch, error, make, old):
    path = tmp_path / "a"
    if old is not None:
        path.write_bytes(old)

    def interrupted(*places):
        raise error

    monkeypatch.setattr(files.os, "replace", interrupted)
    with pytest.raises(type(error)):
        make(str(path))
    assert os.listdir(tmp_path) == ([] if old is None else ["a"])
    assert old is None or path.read_bytes() == old


def test_an_error_while_it_is_written(tmp_path):
    with pytest.raises(ValueError, match="half way"), files.beside(tmp_path / "a") as path:
        with open(path, "wb") as file:
            file.write(b"half")
        raise ValueError("half way")
    assert os.listdir(tmp_path) == []


def test_no_folder(tmp_path):
    for make in (write, save):
        with pytest.raises(OSError):
            make(str(tmp_path / "nowhere" / "a"))


def test_tensors_of_any_layout_and_with_shared_memory(tmp_path):
    x = torch.arange(6.0).view(2, 3)
    files.save_whole({"x": x, "again": x, "turned": x.T, "part": x[:, 1:]}, str(tmp_path / "a"), {})
    with safe_open(str(tmp_path / "a"), framework="pt") as file:
        assert torch.equal(file.get_tensor("again"), x) and torch.equal(file.get_tensor("turned"), x.T)
        assert file.get_tensor("part").tolist() == [[1.0, 2.0], [4.0, 5.0]]
