// The page of `hstu-xd serve`: pick a user and a domain, see the history and what is recommended.

const TOP = 20;
// One colour a domain in the order of the catalogue, as in the reports; then hues far apart.
const COLOURS = ["#2f63e3", "#d42010", "#29a28f", "#85448f", "#ac9615", "#4aa6d6", "#6a705f"];
// A service that is busy is asked again so often, after the seconds that it names.
const ATTEMPTS = 5;
const byId = (id) => document.getElementById(id);
const colours = new Map();
let token = sessionStorage.getItem("token") ?? "";
let shown = "";
// Answers of a choice that another one has replaced are dropped.
let turn = 0;

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function answerOf(path, options) {
  for (let attempt = 1; ; attempt += 1) {
    let answer;
    try {
      answer = await fetch(path, options);
    } catch {
      throw new Refused(0, "The service does not answer; is it still running?");
    }
    const seconds = Number(answer.headers.get("retry-after"));
    if (answer.status !== 503 || !seconds || attempt === ATTEMPTS) return answer;
    await new Promise((again) => setTimeout(again, 1000 * seconds));
  }
}

async function call(path, body) {
  const headers = token ? { authorization: `Bearer ${token}` } : {};
  const options = { headers };
  if (body) {
    options.method = "POST";
    options.body = JSON.stringify(body);
    headers["content-type"] = "application/json";
  }
  const answer = await answerOf(path, options);
  const told = await answer.json().catch(() => ({}));
  if (!answer.ok) {
    throw new Refused(answer.status, told.error ?? `The service answered ${answer.status}.`);
  }
  return told;
}

// Runs one thing a person asked for, and says what went wrong with it.
async function attempt(action) {
  byId("problem").hidden = true;
  try {
    await action();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    byId("access").hidden = error.status !== 401;
    byId("problem").textContent = error.message;
    byId("problem").hidden = false;
  }
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

function coloured(made, domain) {
  made.style.setProperty("--domain", colours.get(domain) ?? "var(--faint)");
  return made;
}

function chosenDomain() {
  return document.querySelector("#domains input:checked")?.value;
}

async function showDomains() {
  const { domains } = await call("v1/domains");
  const labels = domains.map(({ name, items }, index) => {
    colours.set(name, COLOURS[index] ?? `hsl(${(index * 137) % 360} 55% 50%)`);
    const label = document.createElement("label");
    const radio = Object.assign(document.createElement("input"), {
      type: "radio",
      name: "domain",
      value: name,
      checked: index === 0,
    });
    const count = element("span", "side", `${items.toLocaleString()} items`);
    label.append(radio, coloured(element("span", "swatch", ""), name), name, " ", count);
    return label;
  });
  byId("domains").replaceChildren(byId("domains").querySelector("legend"), ...labels);
}

async function suggestUsers() {
  const prefix = encodeURIComponent(byId("user").value);
  const { users } = await call(`v1/users?limit=50&prefix=${prefix}`);
  const options = users.map((user) => Object.assign(document.createElement("option"), { value: user }));
  byId("users").replaceChildren(...options);
}

function when(timestamp) {
  // Logs count in seconds or in milliseconds; a number that is neither is shown as it is.
  const milliseconds = timestamp > 1e11 ? timestamp : timestamp * 1000;
  if (milliseconds < 3e11 || milliseconds > 8e15) return String(timestamp);
  return new Date(milliseconds).toISOString().slice(0, 16).replace("T", " ");
}

async function showHistory(user, mine) {
  const { events } = await call(`v1/users/${encodeURIComponent(user)}/history`);
  if (mine !== turn) return [];
  const rows = events.toReversed().map(({ item, domain, timestamp }) => {
    const row = coloured(document.createElement("li"), domain);
    row.dataset.domain = domain;
    row.append(element("span", "item", item), element("span", "side", `${domain} · ${when(timestamp)}`));
    return row;
  });
  byId("length").textContent = events.length
    ? `The latest ${events.length} events of ${user}, newest first.`
    : `${user} has no events; answers come from the learned initial states.`;
  byId("history").replaceChildren(...rows);
  return events;
}

async function showRecommendations(user, events, mine) {
  const domain = chosenDomain();
  const began = performance.now();
  const { recommendations } = await call("v1/recommend", { user, domains: [domain], k: TOP });
  if (mine !== turn) return;
  const taken = Math.round(performance.now() - began);
  const items = recommendations[0].items;
  const rows = items.map(({ item, score }) => {
    const row = document.createElement("li");
    const choice = coloured(element("button", "", ""), domain);
    choice.append(element("span", "item", item), element("span", "side", score.toFixed(4)));
    choice.title = `Append ${item} to the history of ${user}`;
    choice.addEventListener("click", () => attempt(() => append(user, item, events)));
    row.append(choice);
    return row;
  });
  byId("status").textContent = items.length
    ? `${items.length} of ${domain}, in ${taken} ms.`
    : `${user} has met every item of ${domain}.`;
  byId("recommendations").replaceChildren(...rows);
}

async function append(user, item, events) {
  // One unit of the log's own time after the last event, whatever that unit is.
  const last = events.at(-1)?.timestamp;
  const timestamp = last === undefined ? Math.floor(Date.now() / 1000) : last + 1;
  await call("v1/events", { events: [{ user, item, timestamp }] });
  await show(user);
}

async function show(user) {
  const mine = ++turn;
  shown = user;
  const events = await showHistory(user, mine);
  if (mine === turn) await showRecommendations(user, events, mine);
}

async function start() {
  await showDomains();
  byId("access").hidden = true;
  await suggestUsers();
}

byId("pick").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt(() => show(byId("user").value));
});
byId("domains").addEventListener("change", () => {
  if (shown) attempt(() => show(shown));
});
let typing;
byId("user").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => attempt(suggestUsers), 150);
});
byId("access").addEventListener("submit", (event) => {
  event.preventDefault();
  token = byId("token").value;
  sessionStorage.setItem("token", token);
  attempt(start);
});
attempt(start);
