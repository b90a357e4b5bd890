// Classifies photographs with an .onnx file of export.py.  Photographs and model never leave the browser, which blocks other
// addresses by the Content-Security-Policy of index.html.
import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";

const BEST = 5, BAND = 256, ONE = 2 ** 22;  // classes shown; rows filtered at once, to save memory; Pillow's fixed-point 1
ort.env.wasm.numThreads = 1;  // more would need headers that a plain file server does not send
const [state, messages, results, files] = ["status", "messages", "results", "files"].map(id => document.getElementById(id));
let model = null, photographs = [], queue = Promise.resolve();

/** Per output pixel the first input pixel and the weights of Pillow's BILINEAR, a triangle that widens with the reduction.
    length: of the input.  start, side: the part of it that becomes `size` pixels.  block: so many input pixels are averaged
    before.  Weights are integers, in sum ONE. */
function triangles(length, start, side, size, block) {
  const scale = side / block / size, radius = Math.max(scale, 1);
  return Array.from({length: size}, (_, index) => {
    const centre = start / block + (index + 0.5) * scale, first = Math.max(0, Math.trunc(centre - radius + 0.5));
    const count = Math.min(Math.ceil(length / block), Math.trunc(centre + radius + 0.5)) - first;
    const triangle = Array.from({length: count}, (_, tap) => Math.max(0, 1 - Math.abs((tap + first - centre + 0.5) / radius)));
    const weights = triangle.flatMap(weight => Array(block).fill(weight)).slice(0, length - first * block);
    const sum = weights.reduce((total, weight) => total + weight);
    return [first * block, weights.map(weight => Math.round(weight / sum * ONE))];
  });
}

/** Filters the three colours of `lines` lines.  Strides are in array elements, from line to line and from pixel to pixel. */
function filter(windows, lines, from, [fromLine, fromPixel], to, [toLine, toPixel]) {
  for (let line = 0; line < lines; line++) {
    windows.forEach(([first, weights], index) => {
      let red = ONE / 2, green = ONE / 2, blue = ONE / 2, source = line * fromLine + first * fromPixel;
      for (const weight of weights) {
        red += weight * from[source];
        green += weight * from[source + 1];
        blue += weight * from[source + 2];
        source += fromPixel;
      }
      to.set([red / ONE, green / ONE, blue / ONE], line * toLine + index * toPixel);
    });
  }
}

/** RGB, Uint8Array (side, side, 3), and its side: data/pictures.py's read() for a File.  Rejects if it is no image. */
export async function read(file, storedSize) {
  const bitmap = await createImageBitmap(file, {colorSpaceConversion: "none", premultiplyAlpha: "none"});  // turned upright
  const {width, height} = bitmap, square = Math.min(width, height);
  const size = width === height && width <= storedSize ? width : storedSize;
  const context = new OffscreenCanvas(width, BAND).getContext("2d", {willReadFrequently: true});
  context.fillStyle = "white";
  const narrow = new Uint8Array(height * size * 3), pixels = new Uint8Array(size * size * 3);
  // Python lets large JPEGs be decoded at a half, a quarter or an eighth of their size, to which averages of blocks are close.
  const block = file.type === "image/jpeg" && [8, 4, 2].find(each => square >= each * Math.ceil(4 * size / 3)) || 1;
  const [columns, rows] = [width, height].map(length => triangles(length, (length - square) / 2, square, size, block));
  for (let top = 0; top < height; top += BAND) {
    context.fillRect(0, 0, width, BAND);  // under transparent pixels
    context.drawImage(bitmap, 0, -top);
    const lines = Math.min(BAND, height - top), band = context.getImageData(0, 0, width, lines).data;
    filter(columns, lines, band, [4 * width, 4], narrow.subarray(top * size * 3), [3 * size, 3]);
  }
  filter(rows, size, narrow, [3, 3 * size], pixels, [3, 3 * size]);
  bitmap.close();
  return [pixels, size];
}

/** Probabilities of the classes, Float32Array. */
async function classify(file) {
  const {session, metadata} = model;
  const [pixels, side] = await read(file, metadata.stored_size ?? metadata.image_size).catch(() => {
    throw new Error("no image that this browser can read. Choose a JPEG, PNG or WebP file.");
  });
  const area = side * side, planes = index => pixels[index % area * 3 + Math.floor(index / area)] / 255;
  const images = metadata.input === "uint8" ? new ort.Tensor("uint8", pixels, [1, side, side, 3])
    : new ort.Tensor("float32", Float32Array.from(pixels, (_, index) => planes(index)), [1, 3, side, side]);
  return (await session.run({images}, ["probabilities"])).probabilities.data;
}

/** Replaces the model by the one of two Files.  Keeps it if this fails. */
async function open(file, description) {
  if (!description) throw new Error(`its metadata is missing. Drop ${file.name} and ${file.name}.json together.`);
  const metadata = await description.text().then(JSON.parse).catch(() => ({}));
  const missing = ["classes", "image_size", "input", "sha256"].find(key => !metadata?.[key]);
  if (missing) throw new Error(`${description.name} has no ${missing}. Drop the file that export.py wrote beside the model.`);
  const bytes = await file.arrayBuffer();
  const digest = crypto.subtle && new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  if (digest && Array.from(digest, byte => byte.toString(16).padStart(2, "0")).join("") !== metadata.sha256) {
    throw new Error(`its SHA-256 is not that of ${description.name}. Copy both files again.`);
  }
  const session = await ort.InferenceSession.create(bytes, {executionProviders: ["wasm"], logSeverityLevel: 4});
  await model?.session.release();
  model = {session, metadata};
  state.textContent = `${file.name}: ${metadata.classes.length} classes, ${metadata.precision}.`
    + (digest ? "" : " Its SHA-256 was not checked: that needs https or localhost.");
}

function show(file, probabilities) {
  const card = document.getElementById("result").content.cloneNode(true);
  card.querySelector("img").src = URL.createObjectURL(file);
  card.querySelector("figcaption").textContent = file.name;
  for (const index of Array.from(probabilities.keys()).sort((a, b) => probabilities[b] - probabilities[a]).slice(0, BEST)) {
    const line = document.getElementById("line").content.cloneNode(true), [name, percentage] = line.querySelectorAll("span");
    name.textContent = model.metadata.classes[index];
    percentage.textContent = `${(100 * probabilities[index]).toFixed(2)} %`;
    line.querySelector("meter").value = probabilities[index];
    card.querySelector("ol").append(line);
  }
  results.append(card);
}

/** Runs `work` for a file; a failure becomes one line on the page. */
async function attempt(file, work) {
  try {
    await work();
  } catch (failure) {
    const textContent = `${file.name}: ${String(failure.message ?? failure).split("\n")[0]}`;
    messages.append(Object.assign(document.createElement("li"), {textContent}));
  }
}

/** Opens the models among these Files and classifies the photographs.  A model alone classifies those that are shown again. */
async function take(chosen) {
  messages.replaceChildren();
  const [models, descriptions] = [/\.onnx$/i, /\.json$/i].map(suffix => chosen.filter(file => suffix.test(file.name)));
  for (const file of models) {
    await attempt(file, () => open(file, descriptions.find(description => description.name === `${file.name}.json`)));
  }
  for (const file of descriptions.filter(description => !models.some(model => description.name === `${model.name}.json`))) {
    await attempt(file, () => { throw new Error("its model is missing. Drop both files together."); });
  }
  const others = chosen.filter(file => !/\.(onnx|json)$/i.test(file.name));
  if (others.length) photographs = others;
  if (!model) state.textContent = "No model yet. Drop a best-*.onnx file together with its .onnx.json file.";
  for (const image of results.querySelectorAll("img")) URL.revokeObjectURL(image.src);
  results.replaceChildren();
  for (const file of model ? photographs : []) {
    await attempt(file, async () => show(file, await classify(file)));
  }
}

/** The last model that export.py wrote to this page's folder model/, and its metadata; nothing if there is none. */
async function stored() {
  const get = async name => (await fetch(`model/${encodeURIComponent(name)}`, {cache: "no-cache"})).blob();
  const table = await fetch("model/export.csv", {cache: "no-cache"});
  const name = table.ok && (await table.text()).match(/^[^,\n]+\.onnx(?=,)/gm)?.at(-1);
  return name ? Promise.all([name, `${name}.json`].map(async name => new File([await get(name)], name))) : [];
}

/** Takes these Files, or a promise of them, after those before. */
function later(chosen) {
  results.ariaBusy = "true";
  const mine = queue = queue.then(async () => take(await chosen)).finally(() => results.ariaBusy = String(queue !== mine));
}

later(stored().catch(() => []));
files.addEventListener("change", () => {
  later([...files.files]);
  files.value = "";  // so that the same file can be chosen again
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  addEventListener(kind, event => {
    event.preventDefault();
    document.body.classList.toggle("over", kind === "dragover");
    if (kind === "drop") later([...event.dataTransfer.files]);
  });
}
