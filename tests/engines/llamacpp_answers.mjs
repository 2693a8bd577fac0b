// Answers requests with llama.cpp, as node-llama-cpp brings it, in a folder that has nothing of ours.
//
//     node llamacpp_answers.mjs JOB.json ANSWERS.json
//
// Run in the folder that node-llama-cpp is installed in. The job has requests: a GGUF file, an
// adapter's file or null, token ids and a text. Answers have the tokens that follow, each the
// likeliest, and those that llama.cpp makes of the text.

import {readFileSync, writeFileSync} from "node:fs";
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const here = createRequire(process.cwd() + "/");
const {getLlama} = await import(pathToFileURL(here.resolve("node-llama-cpp")));
const [jobFile, answersFile] = process.argv.slice(2);
const job = JSON.parse(readFileSync(jobFile, "utf8"));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: job.threads});
const answers = [];
for (const request of job.requests) {
    const model = await llama.loadModel({modelPath: request.model});
    const lora = request.adapter && {adapters: [{filePath: request.adapter, scale: 1}]};
    const context = await model.createContext({contextSize: 256, ...(lora ? {lora} : {})});
    const tokens = [];
    const sequence = context.getSequence();
    for await (const token of sequence.evaluate(request.tokens, {temperature: 0, yieldEogToken: true})) {
        tokens.push(token);
        if (tokens.length === job.new)
            break;
    }
    answers.push({tokens, text: model.tokenize(request.text, true)});
    await context.dispose();
    await model.dispose();
}
writeFileSync(answersFile, JSON.stringify(answers));
process.exit(0);
