"""Files of states: whole, small, and refused where they do not fit."""

import collections
import os

import pytest
import torch

from diffopt.multilevel import load, save
from multilevel.small_runs import same


def test_a_file_is_whole_and_small(tmp_path):
    file, big = tmp_path / "state.pt", torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    save(file, {"w": big[:5], "v": big[::50_000].requires_grad_()}, extra={"a": [1, 2.0, None, "b"]})
    assert file.stat().st_size < 10_000
    found, extra = load(file, {"w": torch.zeros(5), "v": torch.zeros(2)})
    assert same(found, {"w": big[:5], "v": big[::50_000]})
    assert extra == {"a": [1, 2.0, None, "b"]}
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_a_write_that_fails_leaves_the_old_file(monkeypatch, tmp_path):
    file = tmp_path / "state.pt"
    save(file, {"w": torch.ones(2)})

    def full(descriptor):
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        save(file, {"w": torch.zeros(2)})
    assert load(file, {"w": torch.zeros(2)})[0]["w"].tolist() == [1.0, 1.0]


def test_files_that_do_not_fit(tmp_path):
    file = tmp_path / "state.pt"
    save(file, {"w": torch.ones(2), "b": torch.ones(1)})
    with pytest.raises(ValueError, match=r"another program: they differ in \['b'\]"):
        load(file, {"w": torch.ones(2)})
    with pytest.raises(ValueError, match=r"\['w'\] of shape \(2,\)"):
        load(file, {"w": torch.ones(3), "b": torch.ones(1)})
    torch.save([1], file)
    with pytest.raises(ValueError, match="holds no state"):
        load(file, {"w": torch.ones(2)})
    with pytest.raises(TypeError, match=r"extra\['f'\]\[0\] must be made of tensors"):
        save(file, {}, extra={"f": [print]})
    for extra in (range(3), collections.OrderedDict(a=1), torch.Size([2])):  # would be written, and not be read
        with pytest.raises(TypeError, match=f"got {type(extra).__name__}"):
            save(file, {}, extra=extra)
    with pytest.raises(FileNotFoundError, match="make it first"):
        save(tmp_path / "none" / "state.pt", {})


@pytest.mark.parametrize(
    "damage", [lambda b: b"junk", lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"t" * 5000]
)
def test_a_damaged_file_is_called_so(damage, tmp_path):
    file = tmp_path / "state.pt"
    save(file, {"w": torch.ones(200)})
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"state.pt holds no state that `save` wrote, or is damaged"):
        load(file, {"w": torch.ones(200)})
