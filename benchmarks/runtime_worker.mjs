// runtime_worker.py for blocks in JavaScript: benchmarks.runtimes puts a block in place of OPENING and RUNNING.
import {readFileSync as readBytes, writeFileSync} from "node:fs";
import {createInterface} from "node:readline";

const [, , packageName, path, file, type, sides, written, seconds, calls] = process.argv;
const answer = (values) => console.log(JSON.stringify(values));
process.on("uncaughtException", (failure) => { answer({reason: String(failure)}); process.exit(); });
answer({version: JSON.parse(readBytes(`node_modules/${packageName}/package.json`)).version});
const [count, ...rest] = sides.split(",").map(Number), shape = [1, ...rest], input = new Uint8Array(readBytes(file)).buffer;
const Values = type === "uint8" ? Uint8Array : Float32Array, length = rest.reduce((one, other) => one * other);
OPENING
answer({opens: "yes"});
const run = async (images) => {
RUNNING
  return logits.data;
};
const found = [], end = Date.now() + 1000 * seconds;
for (let index = 0; index < count && Date.now() < end; index++) {
  found.push(new Float32Array(await run(new Values(input, index * length * Values.BYTES_PER_ELEMENT, length))));
}
writeFileSync(written, Buffer.concat(found.map((logits) => Buffer.from(logits.buffer))));
answer({images: found.length});
for await (const _ of createInterface({input: process.stdin})) {
  const times = [];
  for (let call = 0; call < calls; call++) {
    const start = performance.now();
    await run(new Values(input, 0, length));
    times.push(performance.now() - start);
  }
  const kept = times.slice(times.length / 3).sort((one, other) => one - other);
  answer({ms: kept[kept.length >> 1]});
}
process.exit();
