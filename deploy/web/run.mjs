// Runs an .onnx file in onnxruntime-web, for `export.py --check web`: node run.mjs FILE TYPE N,H,W,3 < images > logits
import {readFileSync} from "node:fs";
import * as ort from "onnxruntime-web/wasm";

const BATCH = 64, [path, type, shape] = process.argv.slice(2), [count, ...sides] = shape.split(",").map(Number);
ort.env.wasm.numThreads = 1;
const session = await ort.InferenceSession.create(readFileSync(path), {executionProviders: ["wasm"], logSeverityLevel: 4});
const input = new Uint8Array(readFileSync(0)).buffer, length = input.byteLength / count;
const Values = type === "uint8" ? Uint8Array : Float32Array;
for (let first = 0; first < count; first += BATCH) {
  const size = Math.min(BATCH, count - first);
  const values = new Values(input, first * length, size * length / Values.BYTES_PER_ELEMENT);
  const {logits} = await session.run({images: new ort.Tensor(type, values, [size, ...sides])});
  process.stdout.write(Buffer.from(logits.data.buffer, logits.data.byteOffset, logits.data.byteLength));
}
