// Ollama's own client for Node.js, unchanged. See trial.mjs.

import { Ollama } from 'ollama';

import { all, busy, key, messages, play, prompt, thrown, until, url } from './trial.mjs';

const ollama = new Ollama({ host: url, headers: { Authorization: `Bearer ${key}` } });
const options = { num_predict: 20, seed: 3 };
const problem = async (call) => {
  const { name, message, status_code } = await thrown(call);
  return { name, message, status_code };
};

await play({
  generate: async () => ({
    whole: await ollama.generate({ model: 'llama2', prompt, options }),
    parts: await all(await ollama.generate({ model: 'llama2', prompt, options, stream: true })),
  }),
  chat: async () => ({
    whole: await ollama.chat({ model: 'llama2', messages, options }),
    parts: await all(await ollama.chat({ model: 'llama2', messages, options, stream: true })),
  }),
  embed: async () => ({
    embed: await ollama.embed({ model: 'simulated-embed', input: ['a', 'b'] }),
    embeddings: await ollama.embeddings({ model: 'simulated-embed', prompt: 'a' }),
  }),
  models: async () => ({ list: await ollama.list(), show: await ollama.show({ model: 'llama2' }), ps: await ollama.ps() }),
  version: async () => ollama.version(),
  missing: async () => ({
    whole: await problem(() => ollama.generate({ model: 'none', prompt })),
    streamed: await problem(() => ollama.chat({ model: 'none', messages, stream: true })),
  }),
  abort: async () => {
    const stream = await ollama.generate({ model: 'llama2', prompt, options: { num_predict: 100000 }, stream: true });
    const parts = stream[Symbol.asyncIterator]();
    await parts.next();
    const before = await busy();
    stream.abort();
    await until(async () => !(await busy()));
    return { before, error: (await thrown(() => all(parts))).name };
  },
  manage: async () => {
    const writer = new Ollama({ host: url, headers: { Authorization: `Bearer ${process.env.WEFTLINE_WRITER}` } });
    const listed = (name) => async () => (await writer.list()).models.some((model) => model.name === `${name}:latest`);
    const steps = await all(await writer.pull({ model: 'fetched', stream: true }));
    await until(listed('fetched'));
    const copied = await writer.copy({ source: 'fetched', destination: 'fetched-too' });
    await until(listed('fetched-too'));
    const deleted = [await writer.delete({ model: 'fetched' }), await writer.delete({ model: 'fetched-too' })];
    return { steps, copied, deleted };
  },
  path: async () => new Ollama({ host: `${url}/k/${key}` }).generate({ model: 'llama2', prompt, options }),
  refused: async () => problem(() => new Ollama({ host: url }).list()),
});
