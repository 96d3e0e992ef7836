// Runs one model in Node: node run_node.mjs CLIENT MODEL OPTIONS, with ids as JSON on stdin; prints {output: [numbers]}.
import fs from "node:fs";
import path from "node:path";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [client, model, options] = [process.argv[2], process.argv[3], JSON.parse(process.argv[4])];
const { ids, mask, search } = JSON.parse(fs.readFileSync(0, "utf8"));
const require = createRequire(path.join(process.cwd(), "package.json"));
const shape = [ids.length, ids[0].length];
const int64 = (rows) => BigInt64Array.from(rows.flat().map(BigInt));

async function onnxruntimeNode() {
  const ort = require("onnxruntime-node");
  const session = await ort.InferenceSession.create(model);
  const feeds = {
    input_ids: new ort.Tensor("int64", int64(ids), shape),
    attention_mask: new ort.Tensor("int64", int64(mask), shape),
  };
  return session.run(feeds);
}

async function transformersJs() {
  const entry = require.resolve("@huggingface/transformers");
  const loaded = await import(pathToFileURL(entry));
  const library = loaded.AutoModel ? loaded : loaded.default;
  library.env.allowRemoteModels = false;
  library.env.localModelPath = path.dirname(model) + "/";
  const { task, ...rest } = options;
  const kinds = {
    "text-classification": library.AutoModelForSequenceClassification,
    "text2text-generation": library.AutoModelForSeq2SeqLM,
  };
  const kind = kinds[task] ?? library.AutoModel;
  const loadedModel = await kind.from_pretrained(path.basename(model), { dtype: "fp32", device: "cpu", ...rest });
  const feeds = {
    input_ids: new library.Tensor("int64", int64(ids), shape),
    attention_mask: new library.Tensor("int64", int64(mask), shape),
  };
  return task === "text2text-generation" ? { tokens: await loadedModel.generate({ ...feeds, ...search }) } : loadedModel(feeds);
}

try {
  const outputs = await (client === "onnxruntime-node" ? onnxruntimeNode() : transformersJs());
  const plain = {};
  for (const [name, tensor] of Object.entries(outputs)) plain[name] = Array.from(tensor.data, Number);
  process.stdout.write(JSON.stringify(plain));
} catch (error) {
  process.stdout.write(JSON.stringify({ error: String(error.message ?? error).split("\n")[0] }));
}
process.exit(0);
