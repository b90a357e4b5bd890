"""Every data set comes out as the same kind of tensors; its files are not trusted; each fault is one line that names the file."""
import errno
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from http.client import IncompleteRead
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from helpers import draw, fails, folder, load_folder, make_images
from PIL import Image

from data import cifar, datasets, imagefolder, pictures, synthetic
from data.datasets import Split


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("a download was started though the files are there")
    monkeypatch.setattr(cifar, "download_url", refuse)


def refused(code, *words, **arguments):
    """Loading with `arguments` must fail so."""
    with fails(code, *words):
        datasets.load(**arguments)


# --- CIFAR: small files in the format of the originals


class Python2Pickler(pickle._Pickler):
    """Writes byte strings, as cPickle of Python 2 did in 2009."""
    dispatch = pickle._Pickler.dispatch.copy()

    def save_text(self, value):
        raw = value if isinstance(value, bytes) else value.encode("latin1")
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_text


def python2_pickle(value) -> bytes:
    """`value` as in a file of CIFAR, with the old name of numpy's module."""
    Python2Pickler(buffer := io.BytesIO(), protocol=2).dump(value)
    return buffer.getvalue().replace(b"numpy._core", b"numpy.core")


def pixels(count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


@pytest.fixture
def write_cifar(tmp_path, monkeypatch):
    """-> function(name, **replaced) that writes small files, with other content by name, and notes their checksums."""
    def write(name, **replaced):
        files = getattr(cifar, name.upper())
        labels, names = ("fine_labels", "fine_label_names") if name == "cifar100" else ("labels", "label_names")
        contents = {files.meta["filename"]: {names: [f"fine {k}" for k in range(100)], "coarse_label_names": ["coarse"] * 20}}
        for seed, (batch, _) in enumerate(files.train_list + files.test_list):
            contents[batch] = {"filenames": ["x.png"] * 200, labels: [index * 7 % 100 for index in range(200)],
                               "coarse_labels": [3] * 200, "data": pixels(200, seed)}
        (folder := tmp_path / files.base_folder).mkdir(exist_ok=True)
        contents = {batch: python2_pickle(content) for batch, content in contents.items()} | replaced
        for batch, content in contents.items():
            (folder / batch).write_bytes(content)
        sums = {batch: hashlib.md5(content).hexdigest() for batch, content in contents.items()}
        for table in ("train_list", "test_list"):
            monkeypatch.setattr(files, table, [[batch, sums[batch]] for batch, _ in getattr(files, table)])
        monkeypatch.setattr(files, "meta", files.meta | {"md5": sums[files.meta["filename"]]})
        return folder
    return write


@pytest.fixture
def cifar100(write_cifar):
    return write_cifar("cifar100")


@pytest.mark.parametrize("name, batches, mean", [("cifar10", 5, (0.4914, 0.4822, 0.4465)),
                                                 ("cifar100", 1, (0.5071, 0.4865, 0.4409))])
def test_cifar_is_read_from_the_standard_files(write_cifar, name, batches, mean):
    loaded = datasets.load(name, write_cifar(name).parent, val_size=0)
    rows = torch.from_numpy(np.concatenate([pixels(200, seed) for seed in range(batches)]))
    assert loaded.train.images.dtype == torch.uint8 and loaded.train.images.is_contiguous() and loaded.image_size == 32
    assert torch.equal(loaded.train.images.permute(0, 3, 1, 2).flatten(1), rows)
    assert torch.equal(loaded.train.images[..., 1].flatten(1), rows[:, 1024:2048]), "the green plane is not channel 1"
    assert loaded.train.labels.tolist() == batches * [index * 7 % 100 for index in range(200)]
    assert torch.equal(loaded.test.images.permute(0, 3, 1, 2).flatten(1), torch.from_numpy(pixels(200, batches)))
    assert loaded.classes[42] == "fine 42"
    assert loaded.mean == mean and loaded.selected_on == "test set" and loaded.val is loaded.test


@pytest.mark.parametrize("name, damage", [("train", "flipped"), ("test", "truncated"), ("meta", "missing")])
def test_a_damaged_cifar_file_is_named_and_left_alone(cifar100, name, damage):
    path, archive = cifar100 / name, cifar100.parent / "cifar-100-python.tar.gz"
    content, middle = path.read_bytes(), path.stat().st_size // 2  # of the pixels
    broken = content[:-100] if damage == "truncated" else content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1:]
    path.unlink() if damage == "missing" else path.write_bytes(broken)
    archive.write_bytes(b"not read, as the folder is there")
    refused(4, path, "delete", name="cifar100", data_dir=cifar100.parent)
    assert not path.exists() if damage == "missing" else path.read_bytes() == broken
    assert archive.read_bytes() == b"not read, as the folder is there"


@pytest.mark.parametrize("call", [b"cposix\nsystem\n", b"cbuiltins\nexec\n", b"cnumpy.core.multiarray\nfromfile\n"])
def test_a_cifar_pickle_cannot_run_code_even_with_the_right_checksum(cifar100, write_cifar, call):
    trap = cifar100.parent / "trap"
    argument = f"touch {trap}" if b"system" in call else f"open({str(trap)!r}, 'w')"
    evil = b"\x80\x02" + call + b"X" + struct.pack("<i", len(argument)) + argument.encode() + b"\x85R."
    write_cifar("cifar100", test=evil)
    refused(4, cifar100 / "test", call.decode().split()[1], name="cifar100", data_dir=cifar100.parent)
    assert not trap.exists(), "the pickle ran code"


@pytest.fixture
def offer(cifar100, monkeypatch):
    """-> function(share, error): what part of cifar-100-python.tar.gz a download gets, and how it ends.  Nothing is there yet."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.add(cifar100, cifar100.name)
    shutil.rmtree(cifar100)
    content = packed.getvalue()
    monkeypatch.setattr(cifar.CIFAR100, "tgz_md5", hashlib.md5(content).hexdigest())

    def offer(share=1.0, error=None):
        def download(url, root, filename, md5):
            assert url.startswith("https://") and md5 == cifar.CIFAR100.tgz_md5
            Path(root, filename).write_bytes(content[:int(share * len(content))])
            if error:
                raise error
        monkeypatch.setattr(cifar, "download_url", download)
    return offer


def test_absent_files_are_downloaded_once_and_unpacked_by_several_processes_at_once(offer, tmp_path):
    """A truncated archive is named and left alone."""
    place, archive = tmp_path / "new" / "sets", "cifar-100-python.tar.gz"
    for error in (None, AssertionError("a download was started though the archive is there")):
        offer(error=error)
        with ThreadPoolExecutor(6) as pool:
            loads = list(pool.map(lambda _: datasets.load("cifar100", place, val_size=0), range(6)))
        assert all(torch.equal(one.train.images, loads[0].train.images) for one in loads) and len(loads[0].test.labels) == 200
        assert sorted(os.listdir(place)) == ["cifar-100-python", archive]
        shutil.rmtree(place / "cifar-100-python")
    os.truncate(place / archive, 2000)
    refused(4, place / archive, "delete", name="cifar100", data_dir=place)
    assert os.listdir(place) == [archive] and (place / archive).stat().st_size == 2000


@pytest.mark.parametrize("error, code, words", [
    (URLError("no route"), 4, ["--dataset synthetic", "no route"]), (ConnectionResetError("cut"), 4, ["cut"]),
    (RuntimeError("wrong md5"), 4, ["https://", "wrong md5"]), (IncompleteRead(b""), 4, ["https://"]),
    (OSError(errno.ENOSPC, "No space left on device"), 8, ["No space left"])], ids=repr)
def test_a_failed_download_leaves_nothing_and_the_next_one_repairs_it(offer, tmp_path, error, code, words):
    offer(0.5, error)
    refused(code, "cifar-100-python.tar.gz", tmp_path, *words, name="cifar100", data_dir=tmp_path / "new")
    assert os.listdir(tmp_path / "new") == []
    offer()
    assert len(datasets.load("cifar100", tmp_path / "new", val_size=0).test.labels) == 200


@pytest.mark.parametrize("place", ["train", ""])
def test_nothing_is_downloaded_into_a_folder_of_other_images(offer, tmp_path, place):
    make_images(tmp_path / place, ["a"], 1, seed=0)
    (tmp_path / "table.csv").write_text("path,label,split\n")
    before = sorted(tmp_path.rglob("*"))
    offer()
    for data_dir in (tmp_path, tmp_path / "table.csv"):
        refused(2, data_dir, "--dataset imagefolder", name="cifar100", data_dir=data_dir)
    assert sorted(tmp_path.rglob("*")) == before


# --- CIFAR from other files


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_binary_version_is_read(tmp_path, name):
    folder, labels, train, test, names = cifar.BINARY[name]
    wanted, folder = np.arange(20, dtype=np.uint8) % 10, tmp_path / folder
    folder.mkdir()
    (folder / names).write_text("\n".join(f"class_{k}" for k in range(10)) + "\n\n")
    for seed, file in enumerate([*train, test]):
        rows = np.hstack([*[np.full((20, 1), 7, np.uint8)] * (labels - 1), wanted[:, None], pixels(20, seed)])
        (folder / file).write_bytes(content := rows.tobytes())
    loaded = datasets.load(name, tmp_path, val_size=0)
    assert loaded.train.labels.tolist() == wanted.tolist() * len(train) and loaded.classes[3] == "class_3"
    assert torch.equal(loaded.test.images.permute(0, 3, 1, 2).flatten(1), torch.from_numpy(pixels(20, len(train))))
    for damaged, word in ((content[:-1], folder / test), (b"\xff" * len(content), "255")):
        (folder / test).write_bytes(damaged)
        refused(4, word, name=name, data_dir=tmp_path)


def write_parquet(folder, label):
    """As in the repositories of Hugging Face: images as files, the names of the classes in the schema."""
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet
    features = {"img": {"_type": "Image"}, label: {"names": list("abc"), "_type": "ClassLabel"}}
    for kind, count in (("train", 9), ("test", 6)):
        images = []
        for k in range(count):
            buffer = io.BytesIO()
            Image.fromarray(pixels(1, k).reshape(32, 32, 3)).save(buffer, "PNG")
            images.append({"bytes": buffer.getvalue(), "path": None})
        table = pyarrow.table({"img": images, label: [k % 3 for k in range(count)], "coarse_label": [0] * count})
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        folder.mkdir(parents=True, exist_ok=True)
        parquet.write_table(table, folder / f"{kind}-00000-of-00001.parquet")


def test_parquet_files_are_read(tmp_path, monkeypatch):
    (damaged := tmp_path / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        patch.setitem(sys.modules, "pyarrow.parquet", None)
        refused(2, "pyarrow", damaged, name="cifar100", data_dir=tmp_path)
    write_parquet(tmp_path / "cifar100", "fine_label")
    refused(4, "Parquet", name="cifar100", data_dir=tmp_path)
    damaged.unlink()
    write_parquet(tmp_path / "plain_text", "label")
    for name in ("cifar100", "cifar10"):
        loaded = datasets.load(name, tmp_path, val_size=0)
        assert loaded.classes == ["a", "b", "c"] and loaded.test.labels.tolist() == [0, 1, 2, 0, 1, 2]
        assert torch.equal(loaded.train.images[8].flatten(), torch.from_numpy(pixels(1, 8)[0]))


# --- image folders


@pytest.fixture
def two_trees(tmp_path):
    folder(tmp_path / "train", cat=20, dog=10)
    folder(tmp_path / "test", cat=3, dog=4)
    return tmp_path


def as_set(*splits):
    """The images as bytes with their labels: what a split holds, in any order."""
    rows = [(image.numpy().tobytes(), label) for split in splits for image, label in zip(split.images, split.labels.tolist())]
    assert len(set(rows)) == len(rows), "an image occurs twice"
    return set(rows)


def test_a_folder_is_read_in_the_order_of_its_names(two_trees):
    loaded, said = load_folder(two_trees, val_size=0)
    paths = sorted((two_trees / "train").glob("*/*"))
    assert loaded.classes == ["cat", "dog"]
    assert loaded.train.labels.tolist() == [0] * 20 + [1] * 10 and loaded.test.labels.tolist() == [0] * 3 + [1] * 4
    assert np.array_equal(loaded.train.images.numpy(), np.stack([np.asarray(Image.open(path)) for path in paths]))
    assert said.splitlines()[-1] == "decoding 37 images: 100%" and len(said.splitlines()) == 8
    scaled = loaded.train.images.double() / 255
    torch.testing.assert_close(torch.tensor(loaded.mean).double(), scaled.mean((0, 1, 2)), rtol=0, atol=5.1e-5)
    torch.testing.assert_close(torch.tensor(loaded.std).double(), scaled.std((0, 1, 2), correction=0), rtol=0, atol=5.1e-5)


def test_a_channel_of_one_value_can_be_divided_by_its_deviation(two_trees):
    for path in two_trees.glob("*/*/*"):
        Image.new("RGB", (8, 8), (10, 20, 30)).save(path)
    loaded, _ = load_folder(two_trees)
    assert loaded.mean == (0.0392, 0.0784, 0.1176) and min(loaded.std) > 0


def test_images_of_several_sizes_need_an_image_size(two_trees):
    odd = two_trees / "test" / "dog" / "odd.png"
    draw(odd, (9, 8))
    first = two_trees / "train" / "cat" / "000.png"
    refused(2, f"{odd}: 9x8", f"{first}: 8x8", "--image-size", name="imagefolder", data_dir=two_trees)
    sizes = [load_folder(two_trees, image_size=size)[0].image_size for size in (8, 9, 8, 9)]
    assert sizes == [8, 9, 8, 9] and len(list(two_trees.glob(".fusekd*"))) == 2, "a cache for each size"
    refused(7, "10000000x10000000", "GiB", name="imagefolder", data_dir=two_trees, image_size=10**7)


@pytest.mark.parametrize("size, code, words", [((9, 8), 2, ["9x8", "000.png", "--image-size"]), ((7, 7), 2, ["7x7", "8x8"])])
def test_images_that_are_not_square_or_too_small(two_trees, size, code, words):
    for path in two_trees.glob("*/*/*"):
        draw(path, size)
    refused(code, *words, name="imagefolder", data_dir=two_trees)


def test_images_larger_than_asked_for_are_made_smaller(two_trees):
    for path in two_trees.glob("*/*/*"):
        draw(path, (12, 12))
    for size, stored in ((9, 9), (12, 12), (20, 12), (None, 12), (9, 9)):
        sized, said = load_folder(two_trees, image_size=size)
        assert sized.image_size == stored
    assert said == "", "each size has its cache"


def test_photographs_are_decoded_by_threads_into_the_same_places(two_trees):
    paths = sorted((two_trees / "train").glob("*/*"))
    wanted = np.stack([np.asarray(Image.open(path)).repeat(20, 1).repeat(20, 0) for path in paths])
    for path in two_trees.glob("*/*/*"):
        Image.open(path).resize((160, 160), Image.Resampling.NEAREST).save(path)
    loaded, _ = load_folder(two_trees, val_size=0)
    assert loaded.image_size == 160 and np.array_equal(loaded.train.images.numpy(), wanted)


def test_an_interruption_does_not_wait_for_the_photographs_that_are_left(two_trees, monkeypatch):
    class Interrupting(io.StringIO):
        def write(self, text):
            if text.startswith("decoding"):
                raise KeyboardInterrupt

    started, decode_into = [], pictures.decode_into
    for path in two_trees.glob("*/*/*"):
        Image.open(path).resize((160, 160)).save(path)
    monkeypatch.setattr(pictures, "decode_into", lambda *args: (started.append(1), time.sleep(0.02), decode_into(*args))[-1])
    monkeypatch.setattr(imagefolder, "ThreadPoolExecutor", lambda: ThreadPoolExecutor(2))
    with pytest.raises(KeyboardInterrupt), redirect_stdout(Interrupting()):
        datasets.load("imagefolder", two_trees, image_size=32)
    assert len(started) <= 37 / 2


# --- the cache of decoded images


def test_a_changed_folder_is_decoded_again(two_trees):
    path = two_trees / "train" / "cat" / "019.png"
    loads = [load_folder(two_trees, val_size=0)[0].train.images.clone()]
    for change in (lambda: draw(path, seed=5), lambda: path.rename(two_trees / "train" / "cat" / "0000.png")):
        change()
        loaded, said = load_folder(two_trees, val_size=0)
        assert "decoding" in said and not torch.equal(loaded.train.images, loads[-1]), "the old images came back"
        assert len(list(two_trees.glob(".fusekd*"))) == 1, "the outdated cache was kept"
        loads.append(loaded.train.images.clone())


@pytest.mark.parametrize("damage", ["flipped", "truncated", "foreign"])
def test_a_damaged_cache_is_decoded_again(two_trees, damage):
    first, _ = load_folder(two_trees)
    train, test = first.train.images, first.test.images.clone()  # not the cache itself, which is mapped
    cache, = two_trees.glob(".fusekd*")
    content = cache.read_bytes()
    middle = content.index(test.numpy().tobytes()) + 50
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]
    cache.write_bytes({"flipped": flipped, "truncated": content[:-300], "foreign": b""}[damage])
    if damage == "foreign":
        torch.save([torch.zeros(2, 8, 8, 3)], cache)
    second, said = load_folder(two_trees)
    assert "cache is damaged" in said and str(cache) in said
    assert torch.equal(train, second.train.images) and torch.equal(test, second.test.images)
    assert load_folder(two_trees)[1] == "", "the cache was not mended"


def test_without_room_for_the_cache_the_images_are_still_there(two_trees, monkeypatch):
    def full(path, content):
        raise OSError(errno.EROFS, "Read-only file system", str(path))
    monkeypatch.setattr(imagefolder, "write_atomic", full)
    loaded, said = load_folder(two_trees)
    assert len(loaded.test.labels) == 7 and str(two_trees) in said and "Read-only file system" in said


def test_of_several_processes_one_decodes_and_all_map_its_cache(two_trees, monkeypatch):
    decoded = []
    monkeypatch.setattr(imagefolder, "decode", lambda *given, decode=imagefolder.decode: decoded.append(0) or decode(*given))
    with ThreadPoolExecutor(6) as pool:  # of one process here: locks are of open files
        loads = list(pool.map(lambda _: load_folder(two_trees), range(6)))
    assert all(torch.equal(one.train.images, loads[0][0].train.images) for one, _ in loads)
    assert len(decoded) == 1 and not any("no cache" in said for _, said in loads), loads[0][1]
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if ".fusekd" in line]
    spans = [[int(end, 16) for end in line[0].split("-")] for line in maps]
    for split in (part for one, _ in loads for part in (one.train, one.val, one.test)):
        assert any(first <= split.stored.data_ptr() < last for first, last in spans), "a copy of the images"
    assert len(list(two_trees.glob(".fusekd*"))) == 1 and load_folder(two_trees)[1] == ""


def test_a_folder_too_small_for_a_test_split_says_so(tmp_path):
    refused(2, "a test split leaves a class without", "train and test", name="imagefolder",
            data_dir=folder(tmp_path, cat=1, dog=1), val_size=0)


def test_the_fingerprint_is_that_of_what_was_read(two_trees):
    assert datasets.load("synthetic", "").fingerprint.startswith("402c24"), "as in results/ablation-small"
    first = load_folder(two_trees, val_size=0)[0].fingerprint
    assert load_folder(two_trees, val_size=5, seed=3)[0].fingerprint == first
    draw(two_trees / "train" / "cat" / "000.png", seed=99)
    second = load_folder(two_trees)[0].fingerprint
    (two_trees / "train" / "cat" / "000.png").rename(two_trees / "train" / "dog" / "000.png")
    third = load_folder(two_trees)[0].fingerprint
    for tree in ("train", "test"):
        (two_trees / tree / "cat").rename(two_trees / tree / "cow")
    assert len({first, second, third, load_folder(two_trees)[0].fingerprint}) == 4


def test_progress_is_one_line_on_a_terminal():
    stream = io.StringIO()
    stream.isatty = lambda: True
    with redirect_stdout(stream):
        assert list(imagefolder.progress(range(300), 300, "decoding")) == list(range(300))
    said = stream.getvalue()
    assert said.count("\r") == 101 and said.count("\n") == 1 and said.endswith("\r\033[Kdecoding 300 images: 100%\n")


# --- the validation split


SIZES = [40, 3, 17, 1, 100, 8]


@pytest.fixture
def uneven():
    """Classes of the SIZES above, shuffled; each image is its own row number."""
    labels = torch.arange(6).repeat_interleave(torch.tensor(SIZES))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    return Split(torch.arange(len(labels)), labels)


@pytest.mark.parametrize("count", [1, 5, 17, 50, 150])
def test_the_split_is_stratified_and_complete(uneven, count):
    rest, drawn = datasets.divide(uneven, count, 3, list("abcdef"), "it", "mend it")
    assert len(drawn.labels) == count
    assert sorted(rest.images.tolist() + drawn.images.tolist()) == uneven.images.tolist()
    assert rest.images.diff().min() > 0 and drawn.images[1:].gt(drawn.images[:-1]).all(), "the order of the data set is lost"
    assert torch.equal(uneven.labels[drawn.images], drawn.labels)
    sizes, found = torch.tensor(SIZES), drawn.labels.bincount(minlength=6)
    shares = sizes * count / sum(SIZES)
    assert (found - shares).abs().max() < 1, f"{found} drawn of {shares}"
    assert (found < sizes).all(), f"no training image left in a class: {found} of {sizes}"
    more = (found < shares) & (found + 1 < sizes)
    assert not more.any() or (shares % 1)[found > shares].ge((shares % 1)[more].max()).all(), f"{found} drawn of {shares}"


def test_the_split_follows_its_seed_and_every_image_has_the_same_chance(uneven):
    def drawn_by(seed):
        return datasets.divide(uneven, 42, seed, list("abcdef"), "it", "mend it")[1].images

    first, times = drawn_by(3), torch.zeros(len(uneven.labels))
    torch.manual_seed(1)
    assert torch.equal(first, drawn_by(3)) and not torch.equal(first, drawn_by(4))
    for seed in range(400):
        times[drawn_by(seed)] += 1
    share = times[uneven.labels == 4] / 400
    assert 0.1 < share.min() and share.max() < 0.4, f"{share.min():.2f} to {share.max():.2f}, not 0.25"


@pytest.mark.parametrize("count", [164, 169, 5000])
def test_a_split_that_is_too_large_is_refused(uneven, count):
    with fails(2, "--val-size", count, "mend it"):
        datasets.divide(uneven, count, 3, list("abcdef"), "--val-size", "mend it")


def test_validation_size_and_seed(two_trees):
    everything = as_set(load_folder(two_trees, val_size=0)[0].train)
    default, _ = load_folder(two_trees)
    six, _ = load_folder(two_trees, val_size=6)
    other, _ = load_folder(two_trees, val_size=6, seed=1)
    assert default.selected_on == "validation split of 3 training images" and default.val.labels.tolist() == [0, 0, 1]
    assert six.val.labels.bincount().tolist() == [4, 2]
    for loaded in (default, six, other):
        assert as_set(loaded.train, loaded.val) == everything and loaded.train.images.is_contiguous()
    assert as_set(six.val) != as_set(other.val)
    assert len({(loaded.mean, loaded.std) for loaded in (default, six, other)}) == 1, "normalisation moves with the split"
    refused(2, "--val-size of 5000 leaves none of 30 images", name="imagefolder", data_dir=two_trees, val_size=5000)


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_split_without_an_image_is_named(tmp_path, split):
    for name in ("train", "val", "test"):
        folder(tmp_path / name, a=4, b=4)
    for path in (tmp_path / split[:4].replace("vali", "val")).rglob("*.png"):
        path.write_bytes(b"")
    refused(4, f"no {split} images", name="imagefolder", data_dir=tmp_path, unreadable="skip")


def test_images_that_are_added_hardly_change_the_splits(tmp_path):
    """Else a network would be tested, or its best epoch be selected, on images that it was trained on before."""
    folder(tmp_path, cat=60, dog=40)
    before, image = load_folder(tmp_path)[0], np.full((8, 8, 3), 77, np.uint8)
    Image.fromarray(image).save(tmp_path / "cat" / "aaa.png")
    after, _ = load_folder(tmp_path)
    for old, new in zip((before.test, before.val), (after.test, after.val)):
        assert len(as_set(new) - as_set(old)) <= 2, "one more, and one in place of another"
    frames = tmp_path / "frames"
    for k, path in enumerate(sorted(tmp_path.rglob("*.png"))):
        (place := frames / path.parent.name / f"video{k:03}").mkdir(parents=True)
        path.rename(place / "image.png")
    places, _ = load_folder(frames, image_size=None)
    assert places.test.rows.tolist() != list(range(len(places.test.rows))) and places.test.rows.max() > 50, "drawn from all"


def test_one_tree_gives_up_a_test_set_that_no_seed_moves(tmp_path):
    folder(tmp_path, cat=60, dog=40)
    by_seed = [load_folder(tmp_path, seed=seed)[0] for seed in (1, 2)]
    assert [len(part.labels) for part in (by_seed[0].train, by_seed[0].val, by_seed[0].test)] == [81, 9, 10]
    assert by_seed[0].test.labels.bincount().tolist() == [6, 4]
    assert torch.equal(by_seed[0].test.images, by_seed[1].test.images) and as_set(by_seed[0].val) != as_set(by_seed[1].val)
    assert by_seed[0].mean == by_seed[1].mean
    assert len(as_set(by_seed[0].train, by_seed[0].val, by_seed[0].test)) == 100
    on_test, _ = load_folder(tmp_path, val_size=0)
    assert torch.equal(on_test.test.images, by_seed[0].test.images) and on_test.val is on_test.test
    assert len(on_test.train.labels) == 90
    twenty, _ = load_folder(tmp_path, val_size=20)
    assert (len(twenty.train.labels), len(twenty.val.labels), len(twenty.test.labels)) == (70, 20, 10)


def test_images_are_weighed_before_they_go_to_the_gpu(two_trees, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    refused(7, "GiB free", "--device cpu", name="imagefolder", data_dir=two_trees, device="cuda")


# --- synthetic


@pytest.fixture(scope="module")
def drawn():
    return datasets.load("synthetic", "nowhere")


def test_synthetic_is_balanced_and_has_no_image_twice(drawn):
    assert drawn.train.images.shape == (9000, 32, 32, 3) and drawn.train.images.dtype == torch.uint8
    assert drawn.selected_on == "validation split of 1000 training images" and drawn.notes == []
    for split, count in ((drawn.train, 90), (drawn.val, 10), (drawn.test, 50)):
        assert split.labels.bincount(minlength=100).unique().tolist() == [count] and split.images.is_contiguous()
    assert len(set(drawn.classes)) == 100 and drawn.classes[42] == "star5_c"
    assert len(as_set(drawn.train, drawn.val, drawn.test)) == 15_000


def test_synthetic_bytes_depend_on_the_seed_alone():
    images, labels = synthetic.generate(300, 5)
    torch.manual_seed(9)
    torch.set_num_threads(2)
    try:
        again, again_labels = synthetic.generate(300, 5)
        assert torch.get_num_threads() == 2, "the caller's number of threads was changed"
    finally:
        torch.set_num_threads(1)
    assert torch.equal(images, again) and torch.equal(labels, again_labels)
    assert not torch.equal(images, synthetic.generate(300, 6)[0])


def test_synthetic_has_contrast_and_siblings_that_are_alike(drawn):
    """Measured: mean 0.453, deviation 0.193.  The middle of an image holds the object, in the colour of its superclass."""
    assert all(0.43 < value < 0.48 for value in drawn.mean) and all(0.17 < value < 0.22 for value in drawn.std)
    assert ((drawn.test.images == 0) | (drawn.test.images == 255)).float().mean() < 0.05, "too many values are black or full"
    middle = drawn.train.images[:, 8:24, 8:24].float().mean((1, 2)) / 255
    colours = torch.stack([middle[drawn.train.labels == label].mean(0) for label in range(100)])
    distance, superclass = torch.cdist(colours, colours), torch.arange(100) // synthetic.SIBLINGS
    assert drawn.classes == [f"{drawn.classes[5 * kind].partition('_')[0]}_{letter}" for kind in range(20) for letter in "abcde"]
    kin = superclass[:, None] == superclass
    siblings, strangers = distance[kin & ~torch.eye(100, dtype=torch.bool)].mean(), distance[~kin].mean()
    assert siblings < 0.75 * strangers, f"siblings {siblings:.3f}, strangers {strangers:.3f}"
