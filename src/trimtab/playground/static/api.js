// What the pages ask for.

export async function ask(path, body, more = {}) {
  const options = body === undefined ? more : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), ...more,
  };
  let answer;
  try {
    answer = await fetch(`api/${path}`, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The playground does not answer: is trimtab playground still running?");
  }
  if (!answer.ok) throw new Error(await reason(answer));
  return answer;
}

async function reason(answer) {
  try {
    return (await answer.json()).error;
  } catch {
    return `It failed (${answer.status}).`;
  }
}

export async function get(path) {
  return (await ask(path)).json();
}

export async function post(path, body, more) {
  return (await ask(path, body, more)).json();
}

// Server-sent events of an answer, one after the other.
export async function* events(path, body, signal) {
  const answer = await ask(path, body, { signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const told = JSON.parse(part.slice("data: ".length));
        if (told.kind === "error") throw new Error(told.message);
        yield told;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
