// What llama.cpp makes of a GGUF file: tokens of texts, greedy continuations, next-token probabilities. CPU, one thread.
//
//     DYNLORA_NODE=FOLDER node scripts/llama_cpp/client.mjs < request.json > answer.json
//
// FOLDER holds node_modules with node-llama-cpp; scripts/llama_cpp/check makes it. The request:
//
//     model, adapter     paths; adapter may be absent, or {path, scale}
//     tokenize           texts; the answer has llama.cpp's ids, special tokens parsed, bos not added
//     generate           lists of token ids to continue, exactly as they are: whoever asks adds bos
//     context            tokens that there is room for; 512 or what the model was trained on, if that is less
//     max_tokens         of each continuation; it ends earlier at a token that llama.cpp takes for an end,
//     past_end           unless this is true
//     top                how many next-token probabilities, of the first new token; 0 for none
//
// The answer: {llama_cpp, architecture, add_bos, bos, eos, tokens: [[id]], generated: [{ids, text, top: [[id, p]]}]}

import {join, resolve} from "node:path";
import {text} from "node:stream/consumers";
import {pathToFileURL} from "node:url";

const folder = resolve(process.env.DYNLORA_NODE ?? join(import.meta.dirname, "..", "..", ".node"));
const entry = join(folder, "node_modules", "node-llama-cpp", "dist", "index.js");
const {getLlama} = await import(pathToFileURL(entry).href);

const request = JSON.parse(await text(process.stdin));
const adapter = typeof request.adapter === "string" ? {path: request.adapter, scale: 1} : request.adapter;

const llama = await getLlama({
    gpu: false, build: "never", progressLogs: false, logLevel: "warn", maxThreads: 1,
    logger: (level, message) => process.stderr.write(`${level}: ${message.trimEnd()}\n`)
});
const model = await llama.loadModel({modelPath: resolve(request.model), gpuLayers: 0});

const answer = {
    llama_cpp: llama.llamaCppRelease?.release,
    architecture: model.fileInfo.metadata.general.architecture,
    add_bos: model.tokens.shouldPrependBosToken,
    bos: model.tokens.bos,
    eos: model.tokens.eos,
    tokens: (request.tokenize ?? []).map((words) => [...model.tokenize(words, true)]),
    generated: []
};

// The cache is f32, since the default of f16 rounds keys and values, and a near tie may then fall the other way.
const context = (request.generate ?? []).length === 0 ? undefined : await model.createContext({
    contextSize: request.context ?? Math.min(512, model.trainContextSize), threads: 1, flashAttention: false,
    experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32",
    lora: adapter && {adapters: [{filePath: resolve(adapter.path), scale: adapter.scale}]}
});

for (const prompt of request.generate ?? []) {
    const sequence = context.getSequence();
    const ids = [], top = [];
    const options = {temperature: 0, yieldEogToken: true};
    const wanted = request.max_tokens ?? 32;
    const steps = sequence.evaluateWithMetadata(prompt, {probabilities: (request.top ?? 0) > 0}, options);
    for await (const {token, probabilities} of steps) {
        if (ids.length === 0 && probabilities != null)
            top.push(...[...probabilities].sort((a, b) => b[1] - a[1]).slice(0, request.top));
        ids.push(token);
        if (ids.length >= wanted || (!request.past_end && model.isEogToken(token)))
            break;
    }
    answer.generated.push({ids, text: model.detokenize(ids, true), top});
    sequence.dispose();
}

process.stdout.write(JSON.stringify(answer) + "\n");
await context?.dispose();
await model.dispose();
await llama.dispose();
