// The API of `hstu-xd serve`, from its own description: what each operation takes, gives, and a try.

const byId = (id) => document.getElementById(id);
let description = {};

function element(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

function resolved(schema) {
  if (!schema?.$ref) return schema ?? {};
  return schema.$ref.split("/").slice(1).reduce((place, name) => place[name], description);
}

// The part of "this or nothing" that is this.
function plain(schema) {
  const found = resolved(schema);
  const some = found.anyOf?.find((one) => one.type !== "null");
  return some ? { ...resolved(some), default: found.default, description: found.description } : found;
}

function kind(schema) {
  const found = plain(schema);
  if (found.type === "array") return `list of ${kind(found.items)}`;
  if (found.type === "object" || found.properties) return found.title ?? "object";
  const bounds = [];
  if (found.enum) bounds.push(found.enum.join(" or "));
  if (found.minimum !== undefined) bounds.push(`at least ${found.minimum}`);
  if (found.maximum !== undefined) bounds.push(`at most ${found.maximum}`);
  if (found.maxLength !== undefined) bounds.push(`at most ${found.maxLength} characters`);
  return [found.type ?? "anything", ...bounds].join(", ");
}

function example(schema) {
  const found = plain(schema);
  if (found.default !== undefined && found.default !== null) return found.default;
  if (found.examples) return found.examples[0];
  if (found.type === "array") return [example(found.items)];
  if (found.properties) {
    const needed = (found.required ?? []).map((name) => [name, example(found.properties[name])]);
    return Object.fromEntries(needed);
  }
  return { integer: 1, number: 1, boolean: false }[found.type] ?? "";
}

function fields(schema, depth = 0) {
  const found = plain(schema);
  const inner = found.type === "array" ? plain(found.items) : found;
  const list = document.createElement("ul");
  for (const [name, field] of Object.entries(inner.properties ?? {})) {
    const row = element("li", "", "");
    const needed = inner.required?.includes(name) ? ", needed" : "";
    row.append(element("code", "", name), ` ${kind(field)}${needed}. ${plain(field).description ?? ""}`);
    if (depth < 4) row.append(fields(field, depth + 1));
    list.append(row);
  }
  return list.childElementCount ? list : "";
}

function parameters(operation) {
  const list = document.createElement("ul");
  for (const { name, in: place, required, schema, description: about } of operation.parameters ?? []) {
    const row = element("li", "", "");
    row.append(element("code", "", name), ` in the ${place}, ${kind(schema)}`);
    row.append(`${required ? ", needed" : ""}. ${about ?? ""}`);
    list.append(row);
  }
  return list.childElementCount ? list : "";
}

function answers(operation) {
  const list = document.createElement("ul");
  for (const [status, { description: about, content }] of Object.entries(operation.responses)) {
    const row = element("li", "", "");
    row.append(element("code", "", status), ` ${about}`);
    const schema = content?.["application/json"]?.schema;
    if (schema) row.append(fields(schema));
    list.append(row);
  }
  return list;
}

async function send(method, path, body) {
  const headers = {};
  if (byId("token").value) headers.authorization = `Bearer ${byId("token").value}`;
  if (body !== null) headers["content-type"] = "application/json";
  const answer = await fetch(path, { method, headers, body: body ?? undefined });
  const text = await answer.text();
  try {
    return `${answer.status}\n${JSON.stringify(JSON.parse(text), null, 2)}`;
  } catch {
    return `${answer.status}\n${text}`;
  }
}

// A form with the path, which is to be filled in, and the body.
function trial(method, path, schema) {
  const form = element("form", "trial", "");
  const place = Object.assign(element("input", "", ""), { value: path.slice(1) });
  place.setAttribute("aria-label", `path of ${method} ${path}`);
  form.append(place);
  let body = null;
  if (schema) {
    body = element("textarea", "", JSON.stringify(example(schema), null, 2));
    body.rows = 8;
    body.setAttribute("aria-label", `body of ${method} ${path}`);
    form.append(body);
  }
  form.append(element("button", "", `Send ${method}`));
  const told = element("pre", "", "");
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    try {
      told.textContent = await send(method, place.value, body?.value ?? null);
    } catch {
      told.textContent = "The service does not answer; is it still running?";
    }
  });
  const both = document.createElement("div");
  both.append(form, told);
  return both;
}

function shown(method, path, operation) {
  const part = document.createElement("details");
  const head = document.createElement("summary");
  head.append(element("code", "", `${method} ${path}`), ` ${operation.description ?? operation.summary}`);
  part.append(head);
  const schema = operation.requestBody?.content?.["application/json"]?.schema;
  const sections = [
    ["Parameters", parameters(operation)],
    ["Body", schema ? fields(schema) : ""],
    ["Answers", answers(operation)],
    ["Try it", trial(method, path, schema)],
  ];
  for (const [name, content] of sections) {
    if (content) part.append(element("h2", "", name), content);
  }
  return part;
}

async function start() {
  description = await (await fetch("openapi.json")).json();
  byId("title").textContent = `${description.info.title} ${description.info.version}: how to ask it`;
  byId("access").hidden = !description.components.securitySchemes;
  for (const [path, operations] of Object.entries(description.paths)) {
    for (const [method, operation] of Object.entries(operations)) {
      byId("operations").append(shown(method.toUpperCase(), path, operation));
    }
  }
}

start().catch(() => {
  byId("problem").textContent = "The service does not answer; is it still running?";
  byId("problem").hidden = false;
});
