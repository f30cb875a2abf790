// What the page asks the daemon to do.

import { setAttribute } from "./dom.js";

/** Asks for an operation; its answer, or an error with the daemon's words. */
export async function request(operation, body) {
  let response;
  try {
    response = await fetch(`/replicator/v1/${operation}`, {
      method: "POST",
      // The second one tells the daemon that no other page asks: none could add it.
      headers: { "Content-Type": "application/json", "X-Replicator-Console": "1" },
      body: JSON.stringify(body),
    });
  } catch {
    throw new Error("The daemon does not answer.");
  }
  const answer = await response.json().catch(() => null);
  if (!response.ok) {
    throw new Error(answer?.Message ?? `The daemon answered with status ${response.status}.`);
  }
  return answer;
}

/** Does something once at a time. The button keeps the focus meanwhile. */
export async function doing(button, does) {
  if (button.getAttribute("aria-disabled") === "true") return;
  setAttribute(button, "aria-disabled", "true");
  try {
    await does();
  } finally {
    setAttribute(button, "aria-disabled", null);
  }
}
