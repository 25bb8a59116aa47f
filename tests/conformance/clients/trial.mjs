// What the trials of the clients share. Each prints one line of JSON with what its client made of the gateway.
//
// Environment: WEFTLINE_URL, WEFTLINE_KEY, WEFTLINE_ENGINES (the engines' URLs, separated by commas).

export const url = process.env.WEFTLINE_URL;
export const key = process.env.WEFTLINE_KEY;
export const prompt = 'Why is the sky blue?';
export const messages = [{ role: 'user', content: prompt }];
const engines = process.env.WEFTLINE_ENGINES.split(',');

/** Everything an async iterable gives. */
export async function all(iterable) {
  const items = [];
  for await (const item of iterable) items.push(item);
  return items;
}

/** What is thrown by `call`. */
export async function thrown(call) {
  try {
    await call();
  } catch (error) {
    return error;
  }
  throw new Error('nothing was thrown');
}

/** Requests that the engines are busy with. */
export async function busy() {
  let total = 0;
  for (const engine of engines) {
    const { models } = await (await fetch(`${engine}/debug/slots`)).json();
    for (const slots of Object.values(models)) total += slots.busy;
  }
  return total;
}

/** Waits, 5 s at most, for something that no event tells of. */
export async function until(condition) {
  for (let i = 0; i < 500; i++) {
    if (await condition()) return;
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
  throw new Error(`not within 5 s: ${condition}`);
}

/** Plays the scenarios one after the other and prints what each returned, by its name. */
export async function play(scenarios) {
  const seen = {};
  for (const [name, scenario] of Object.entries(scenarios)) seen[name] = await scenario();
  console.log(JSON.stringify(seen));
}
