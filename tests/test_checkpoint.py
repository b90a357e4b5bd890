"""A checkpoint is read back exactly, or refused by name; reading one never runs code."""
import hashlib
import io

import pytest
import torch
from helpers import Touch, fails

from rundir import checkpoint
from rundir.errors import Failure, Unwritable


def write(path):
    checkpoint.write(path, kind="weights", classes=["cat", "dog"], state_dict={"w": torch.arange(600.0)})
    return path


def test_a_file_is_that_of_torch_save_with_a_checksum(tmp_path):
    """Written piece by piece: from tensors of all sizes, and in one piece."""
    for weights in ({}, {"w": torch.arange(3.0)}, {str(size): torch.randn(size) for size in (1, 17, 4096, 100_000)}):
        checkpoint.write(tmp_path / "x.pt", kind="weights", state_dict=weights)
        whole = io.BytesIO()
        torch.save({"format": checkpoint.FORMAT, "kind": "weights", "state_dict": weights}, whole)
        data = whole.getvalue()[:-2] + (7 + 64).to_bytes(2, "little")  # a zip archive ends with the length of its comment
        assert (tmp_path / "x.pt").read_bytes() == data + b"sha256:" + hashlib.sha256(data).hexdigest().encode()
        assert checkpoint.read(tmp_path / "x.pt")["format"] == checkpoint.FORMAT and len(list(tmp_path.iterdir())) == 1


def test_no_flipped_bit_and_no_truncation_passes_unseen(tmp_path):
    good = write(tmp_path / "best.pt").read_bytes()
    wanted = checkpoint.read(tmp_path / "best.pt")["state_dict"]["w"]
    broken = tmp_path / "broken.pt"
    g = torch.Generator().manual_seed(0)
    caught = 0
    for _ in range(100):
        position, bit = torch.randint(len(good), (), generator=g).item(), torch.randint(8, (), generator=g).item()
        broken.write_bytes(good[:position] + bytes([good[position] ^ 1 << bit]) + good[position + 1:])
        try:
            assert torch.equal(checkpoint.read(broken)["state_dict"]["w"], wanted), f"bit {bit} of byte {position}"
        except Failure as failure:
            caught += 1
            assert failure.code == 5 and str(broken) in str(failure)
    assert caught > 75, f"only {caught} of 100 flips were noticed"
    for length in torch.randint(len(good), (25,), generator=g).tolist():
        broken.write_bytes(good[:length])
        with fails(5, "broken.pt"):
            checkpoint.read(broken)


@pytest.mark.parametrize("content", [
    lambda path: path.write_bytes(bytes(range(256))), lambda path: path.write_bytes(b""), lambda path: path.mkdir(),
    lambda path: None, lambda path: torch.save({"format": 1, "w": Touch(path.with_name("evil-was-here"))}, path),
    lambda path: torch.save({"w": torch.ones(2)}, path), lambda path: torch.save([1], path),
    lambda path: torch.save({"format": 99}, path)])
def test_foreign_files_are_refused_in_one_line(content, tmp_path):
    content(tmp_path / "x.pt")
    with fails(5, "x.pt"):
        checkpoint.read(tmp_path / "x.pt")
    assert not (tmp_path / "evil-was-here").exists()


def test_a_file_without_our_seal_is_checked_by_its_crcs(tmp_path):
    """torch.save's own files, and ours from before the seal."""
    torch.save({"format": 1, "w": torch.arange(600.0)}, tmp_path / "x.pt")
    good = (tmp_path / "x.pt").read_bytes()
    assert torch.equal(checkpoint.read(tmp_path / "x.pt")["w"], torch.arange(600.0))
    place = good.index(torch.arange(600.0).numpy().tobytes()) + 1000
    (tmp_path / "x.pt").write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1:])
    with fails(5, "x.pt: wrong checksum in ", "data/0"):
        checkpoint.read(tmp_path / "x.pt")
    assert torch.load(write(tmp_path / "best.pt"), weights_only=True)["classes"] == ["cat", "dog"], "torch reads a sealed file"


def test_the_writer_says_what_failed():
    def fail():
        raise Failure(8, "full", "wait")

    for use in (lambda writer: writer(print), lambda writer: writer.wait(), lambda writer: None):
        with pytest.raises(Failure, match="full"), checkpoint.Writer() as writer:
            writer(fail)
            use(writer)


@pytest.mark.parametrize("room", [100, 20_000, 40_900])
def test_a_failed_write_keeps_its_reason_and_counts_what_is_needed(tmp_path, monkeypatch, room):
    """Of a file that takes `room` bytes of 41 kB; torch.save itself would say "unexpected pos" of it."""
    class Full(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > room:
                raise OSError(28, "No space left on device")
            return super().write(data)

    monkeypatch.setattr("builtins.open", lambda path, mode: io.BufferedRandom(Full(path, mode)))
    with pytest.raises(Unwritable, match="No space left") as failure:
        checkpoint.write(tmp_path / "x.pt", weights=torch.ones(10_000))
    assert failure.value.needed == 40_000 and not list(tmp_path.iterdir())
