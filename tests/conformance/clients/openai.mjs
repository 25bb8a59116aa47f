// OpenAI's own client for Node.js, unchanged and set up by OPENAI_BASE_URL and OPENAI_API_KEY alone. See trial.mjs.

import OpenAI from 'openai';

import { all, busy, messages, play, prompt, thrown, until } from './trial.mjs';

const openai = new OpenAI();
const talk = { model: 'llama2', messages, max_tokens: 20 };
const problem = async (call) => {
  const error = await thrown(call);
  return { name: error.constructor.name, status: error.status, code: error.code, message: error.message };
};

await play({
  chat: async () => ({
    whole: await openai.chat.completions.create(talk),
    chunks: await all(
      await openai.chat.completions.create({ ...talk, stream: true, stream_options: { include_usage: true } }),
    ),
  }),
  completions: async () => openai.completions.create({ model: 'llama2', prompt, max_tokens: 20 }),
  responses: async () => ({
    whole: await openai.responses.create({ model: 'llama2', input: prompt, max_output_tokens: 20 }),
    events: await all(
      await openai.responses.create({ model: 'llama2', input: prompt, max_output_tokens: 20, stream: true }),
    ),
  }),
  embeddings: async () => openai.embeddings.create({ model: 'simulated-embed', input: ['a', 'b'] }),
  models: async () => ({ list: await all(await openai.models.list()), one: await openai.models.retrieve('llama2') }),
  missing: async () => problem(() => openai.chat.completions.create({ ...talk, model: 'none' })),
  abort: async () => {
    const stream = await openai.chat.completions.create({ ...talk, max_tokens: 100000, stream: true });
    await stream[Symbol.asyncIterator]().next();
    const before = await busy();
    stream.controller.abort();
    await until(async () => !(await busy()));
    return { before };
  },
  refused: async () => problem(() => new OpenAI({ apiKey: 'wrong' }).models.list()),
});
