// Puts the guide's unchanged Node client through one scenario and prints what came of it as one line of JSON.
//
//   node drive.js SCENARIO
//
// Environment: WEFTLINE_URL, WEFTLINE_CLIENT_ID, WEFTLINE_KEY_PATH, WEFTLINE_PROMPT, WEFTLINE_MODEL. Exits 0 if the
// scenario could be played, whatever the client made of it; 1 if not; 2 for an unknown scenario.
'use strict';

const crypto = require('crypto');
const OllamaClient = require('./ollama-client');
const OllamaConnectionPool = require('./ollama-connection-pool');

const prompt = process.env.WEFTLINE_PROMPT;
const model = process.env.WEFTLINE_MODEL;
const config = {
  serverUrl: process.env.WEFTLINE_URL,
  clientId: process.env.WEFTLINE_CLIENT_ID,
  privateKeyPath: process.env.WEFTLINE_KEY_PATH,
  reconnect: false,
};

/** A client that notes its events; 'error' must have a listener, or an EventEmitter throws. */
function recorded(overrides = {}) {
  const client = new OllamaClient({ ...config, ...overrides });
  const events = [];
  for (const name of ['connect', 'authenticated', 'auth_error', 'generation_start', 'token', 'generation_complete']) {
    client.on(name, (event) => events.push({ name, ...(event instanceof Error ? {} : event) }));
  }
  client.on('error', (error) => events.push({ name: 'error', code: error.code, message: error.message, id: error.id }));
  client.on('disconnect', ({ code }) => events.push({ name: 'disconnect', code }));
  return { client, events };
}

/** The next event of that name. (The one of 'events' rejects at an 'error', which here is only noted.) */
function next(client, name) {
  return new Promise((resolve) => client.once(name, resolve));
}

/** Connects, plays, closes, and waits for the line to be closed. */
async function session(play, overrides) {
  const { client, events } = recorded(overrides);
  await client.connect();
  const disconnected = next(client, 'disconnect');
  const outcome = await play(client, events);
  client.close();
  await disconnected;
  return { ...outcome, events };
}

/** The message of the error that a promise must be rejected with. */
async function rejection(promise) {
  try {
    await promise;
  } catch (error) {
    return error.message;
  }
  throw new Error('nothing was rejected');
}

const scenarios = {
  generate: () => session(async (client) => ({ result: await client.generate(prompt, model, { max_tokens: 8 }) })),

  concurrent: () =>
    session(async (client) => ({
      results: await Promise.all(
        Array.from({ length: 4 }, (_, number) => client.generate(`${number} ${prompt}`, model, { max_tokens: 8 }))
      ),
      left: client.activeRequests.size,
    })),

  models: () => session(async (client) => ({ models: await client.getModels() })),

  ping: () =>
    session(async (client) => {
      const pong = next(client, 'pong');
      await client.ping();
      return { pong: await pong };
    }),

  unknown_model: () =>
    session(async (client) => ({ message: await rejection(client.generate(prompt, 'no-such-model')) })),

  stop: () =>
    session(async (client) => {
      client.once('token', ({ id }) => client.stop(id));
      const result = await client.generate(prompt, model, { max_tokens: 500000 });
      const unknown = await rejection(client.stop('never-heard-of'));
      return { result, unknown };
    }),

  bad_key: async () => {
    const { privateKey } = crypto.generateKeyPairSync('rsa', { modulusLength: 2048 });
    const pem = privateKey.export({ type: 'pkcs8', format: 'pem' });
    const { client, events } = recorded({ privateKey: pem });
    const disconnected = next(client, 'disconnect');
    const message = await rejection(client.connect());
    await disconnected;
    return { message, events };
  },

  reconnect: () =>
    session(
      async (client) => {
        const reconnected = next(client, 'reconnect');
        client.ws.terminate();
        await reconnected;
        client.config.reconnect = false; // else close() would set off another one
        return { result: await client.generate(prompt, model, { max_tokens: 4 }) };
      },
      { reconnect: true, reconnectDelay: 10 }
    ),

  closed: () =>
    session(async (client) => {
      client.close();
      return { generate: await rejection(client.generate(prompt, model)), ping: await rejection(client.ping()) };
    }),

  pool: async () => {
    const pool = new OllamaConnectionPool(config, 2);
    await pool.initialize();
    const closed = pool.clients.map((client) => next(client, 'disconnect'));
    const results = await Promise.all([0, 1, 2].map((n) => pool.generate(`${n} ${prompt}`, model, { max_tokens: 4 })));
    pool.close();
    await Promise.all(closed);
    return { results };
  },
};

const scenario = scenarios[process.argv[2]];
if (!scenario) {
  console.error(`scenarios: ${Object.keys(scenarios).join(', ')}`);
  process.exitCode = 2;
} else {
  scenario().then(
    (outcome) => console.log(JSON.stringify(outcome)),
    (error) => {
      console.error(error);
      process.exit(1);
    }
  );
}
