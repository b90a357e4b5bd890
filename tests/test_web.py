"""deploy/web in a headless Chromium: pixels, classes and probabilities are Python's; a line for what cannot be read."""
import base64
import functools
import http.server
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from command import ROOT, succeeds
from exporting import CLASSES, needs_onnx
from helpers import make_images
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from data import pictures
from deploy import runtime

WEB = ROOT / "deploy" / "web"
RUNTIME = WEB / "node_modules" / "onnxruntime-web"
pytestmark = [needs_onnx, pytest.mark.skipif(CHROMIUM is None, reason="needs chromium"),
              pytest.mark.skipif(not RUNTIME.exists(), reason="needs npm ci --prefix deploy/web")]
IDLE = """new Promise(done => {
    const look = () => document.getElementById("results")?.ariaBusy === "false" ? done() : setTimeout(look, 10);
    look();
})"""
CARDS = """[...document.querySelectorAll("figure")].map(card => [card.querySelector("figcaption").textContent,
    [...card.querySelectorAll("li")].map(line => [...line.children].map(part => part.value ?? part.textContent))])"""
READ = """import("/classify.js").then(async page => {
    const bytes = Uint8Array.from(atob("%s"), letter => letter.charCodeAt(0));
    const [pixels, side] = await page.read(new File([bytes], "name", {type: "%s"}), %d);
    return [Array.from(pixels), side];
})"""
SIZES = (30, 20), (47, 61), (400, 300)


class Server(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a copy of the page in `site`."""
    place = tmp_path_factory.mktemp("web")
    shutil.copytree(WEB, place / "site", ignore=shutil.ignore_patterns("node_modules", "model"))
    (place / "site" / "node_modules").symlink_to(WEB / "node_modules")
    return place


@pytest.fixture(scope="module")
def server(place):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=place / "site")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def browser(place):
    browser = Browser(place / "profile", "--host-resolver-rules=MAP insecure.test 127.0.0.1")
    yield browser
    browser.close()


@pytest.fixture
def page(browser, server):
    """The browser, which has asked for nothing but files of this page at the end."""
    browser.address = f"http://127.0.0.1:{server.server_port}/"
    browser.requested.clear()
    yield browser
    assert all(url.startswith((browser.address, "blob:", "data:")) for url in browser.requested), browser.requested


def export(trained, capsys, flags: str, output: Path) -> Path:
    """The .onnx file that export.py makes of a small trained run with these flags, in `output`."""
    out = succeeds(capsys, "export.py", f"{trained}/best.pt {flags} --output {output}")
    return Path(out.splitlines()[-1].split(": ")[0])


def cards(page) -> list:
    """(file name, [(class, percentage, probability)]) of each photograph on the page, once it has classified them."""
    page.evaluate(IDLE)
    return page.evaluate(CARDS)


def text(page, name: str) -> str:
    page.evaluate(IDLE)
    return page.evaluate(f"document.getElementById('{name}').innerText")


def turned(orientation: int) -> dict:
    """Options to save an image with this EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


def pictures_of_classes(folder: Path) -> tuple[list, list]:
    """100 PNG files of the stored size, and JPEG files of 3 other sizes in the 8 EXIF orientations, of all classes."""
    make_images(folder, CLASSES, 21, seed=2)
    sources = sorted(folder.rglob("*.png"), key=lambda path: path.stem)
    stored = [source.rename(folder / f"{index}.png") for index, source in enumerate(sources[:100])]
    resized = [folder / f"{index}.jpg" for index in range(24)]
    for index, path in enumerate(resized):
        image = Image.open(sources[100 + index]).resize(SIZES[index // 8], Image.Resampling.BICUBIC)
        image.save(path, quality=90, **turned(index % 8 + 1))
    return stored, resized


@pytest.mark.parametrize("flags, tolerance", [("--precision fp32", 1e-4), ("--precision fp32 --input float", 1e-4),
                                              ("--precision fp16", 1e-3), ("--precision int8", 1e-4)])
def test_classes_and_probabilities_are_those_of_python(place, trained, page, tmp_path, capsys, flags, tolerance):
    model = export(trained, capsys, flags, place / "site" / "model")
    stored, resized = pictures_of_classes(tmp_path)
    page.call("Page.navigate", url=page.address)
    page.evaluate(IDLE)
    page.drop(*stored, *resized)
    found = cards(page)
    assert text(page, "status").startswith(f"{model.name}: 6 classes") and text(page, "messages") == ""
    wanted = runtime.load(model)(np.stack([pictures.read(str(path), 16)[0] for path in stored + resized]))[0]
    for path, (name, lines), row in zip(stored + resized, found, wanted, strict=True):
        difference = max(abs(probability - row[CLASSES.index(label)]) for label, _, probability in lines)
        assert name == path.name and len(lines) == 5
        assert lines[0][0] == CLASSES[row.argmax()] and lines[0][1] == f"{100 * lines[0][2]:.2f} %"
        assert difference < (tolerance if path in stored else 0.02), name


def noise(width, height, channels=3):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8))


def differences(page, path: Path) -> np.ndarray:
    """Of the levels that the page's read() gives, to those of Python's."""
    kind = "image/jpeg" if path.suffix == ".jpg" else "image/png"
    pixels, side = page.evaluate(READ % (base64.b64encode(path.read_bytes()).decode(), kind, 16))
    wanted, _ = pictures.read(str(path), 16)
    assert side == len(wanted)
    return np.abs(np.reshape(pixels, wanted.shape) - wanted.astype(int))


def test_images_of_the_stored_size_or_smaller_keep_their_bytes(page, tmp_path):
    """No colour management, whatever an ICC profile or a gamma says."""
    info = PngInfo()
    info.add(b"gAMA", (100_000).to_bytes(4, "big"))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()  # and with green as its red:
    profile = profile.replace(b"rXYZ", b"----").replace(b"gXYZ", b"rXYZ").replace(b"----", b"gXYZ")
    page.call("Page.navigate", url=page.address)
    page.evaluate(IDLE)
    for number, (size, suffix, options) in enumerate([
            ((16, 16), "png", {}), ((12, 12), "png", {}), ((16, 16), "jpg", {}), ((16, 16), "png", {"icc_profile": profile}),
            ((16, 16), "jpg", {"icc_profile": profile}), ((16, 16), "png", {"pnginfo": info})]):
        path = tmp_path / f"{number}.{suffix}"
        noise(*size).save(path, **options)
        assert differences(page, path).max() == 0, path.name
    noise(16, 16, 4).save(tmp_path / "alpha.png")
    assert differences(page, tmp_path / "alpha.png").max() <= 1


@pytest.mark.parametrize("size", SIZES)
def test_photographs_are_turned_cropped_and_resized_within_a_level(page, tmp_path, size):
    """On average in large JPEGs, of which Python decodes half of the resolution or less."""
    page.call("Page.navigate", url=page.address)
    page.evaluate(IDLE)
    for orientation in range(1, 9):
        png, jpeg = tmp_path / f"{orientation}.png", tmp_path / f"{orientation}.jpg"
        noise(*size).save(png, **turned(orientation))
        noise(5, 4).resize(size, Image.Resampling.BICUBIC).save(jpeg, **turned(orientation))
        assert differences(page, png).max() <= 1 and differences(page, jpeg).mean() < 1, orientation


def test_what_cannot_be_read_is_one_line(place, trained, page, tmp_path, capsys):
    shutil.rmtree(place / "site" / "model", ignore_errors=True)
    model = export(trained, capsys, "", tmp_path / "exported")
    metadata = model.with_name(f"{model.name}.json")
    photograph, notes, other = tmp_path / "a.png", tmp_path / "notes.txt", tmp_path / "other.onnx"
    noise(30, 20).save(photograph)
    notes.write_text("no image")
    other.write_bytes(model.read_bytes())
    page.call("Page.navigate", url=page.address)
    page.evaluate(IDLE)

    page.drop(photograph)
    assert cards(page) == [] and text(page, "status").startswith("No model")
    page.choose(model, metadata)
    (name, _), = cards(page)  # the photograph that was there before
    assert name == "a.png" and text(page, "status").startswith(f"{model.name}: 6 classes, fp32.")
    assert text(page, "status").endswith("fp32.") and text(page, "messages") == ""

    for dropped, content, blamed, words in [
            ([model], None, model, metadata.name), ([metadata], None, metadata, "model is missing"),
            ([other], "no JSON", other, "no classes"), ([other], "{}", other, "no classes"),
            ([other], metadata.read_text().replace('"sha256": "', '"sha256": "0'), other, "SHA-256"),
            ([notes, photograph], None, notes, "no image")]:
        if content:
            dropped.append(other.with_name("other.onnx.json"))
            dropped[-1].write_text(content)
        page.drop(*dropped)
        assert [name for name, _ in cards(page)] == ["a.png"]
        line = text(page, "messages")
        assert line.startswith(f"{blamed.name}: ") and words in line and "\n" not in line, line

    page.address = page.address.replace("127.0.0.1", "insecure.test")  # where browsers have no crypto.subtle
    page.call("Page.navigate", url=page.address)
    page.requested.clear()
    page.evaluate(IDLE)
    page.drop(model, metadata, photograph)
    assert len(cards(page)) == 1 and "SHA-256 was not checked" in text(page, "status")
