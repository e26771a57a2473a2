// Compiles Flux with InfluxData's own front end: node flux_check.mjs FOLDER-OF-THE-PACKAGE < {name: script} > {name: valid}.
// The package is written for bundlers; here its glue is given the compiled module by hand.
import { readFileSync } from "node:fs";
import { join } from "node:path";

const folder = process.argv[2];
const glue = readFileSync(join(folder, "flux-lsp-browser_bg.js"), "utf8");
const names = [...glue.matchAll(/^export (?:function|class) (\w+)/gm)].map((match) => match[1]);
const wasm = { memory: { buffer: new ArrayBuffer(0) } }; // empty: the glue looks again once there is a memory
const body = glue.replace(/^import .*$/m, "").replace(/^export /gm, "");
const api = new Function("wasm", "module", `${body}; return { ${names.join(", ")} };`)(wasm, undefined);
const binary = readFileSync(join(folder, "flux-lsp-browser_bg.wasm"));
const { instance } = await WebAssembly.instantiate(binary, { "./flux-lsp-browser_bg.js": api });
Object.assign(wasm, instance.exports);

const answers = {};
for (const [name, script] of Object.entries(JSON.parse(readFileSync(0, "utf8")))) {
  const flux = new api.Flux(script);
  answers[name] = flux.is_valid();
}
process.stdout.write(JSON.stringify(answers));
