// The HTTP interface as openapi.json describes it, without anything from other servers.

function element(name, text = "", attributes = {}) {
  const made = document.createElement(name);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// A schema in words; names of other schemas lead to them.
function typeOf(schema) {
  if (!schema) return document.createTextNode("");
  if (schema.$ref) {
    const name = schema.$ref.split("/").pop();
    return element("a", name, { href: `#${name}` });
  }
  const out = document.createElement("span");
  if (schema.anyOf) {
    schema.anyOf.forEach((part, i) => out.append(i ? " or " : "", typeOf(part)));
  } else if (schema.enum) {
    out.append(schema.enum.map((value) => JSON.stringify(value)).join(" | "));
  } else if (schema.const !== undefined) {
    out.append(JSON.stringify(schema.const));
  } else if (schema.type === "array") {
    if (schema.prefixItems) {
      out.append("[");
      schema.prefixItems.forEach((part, i) => out.append(i ? ", " : "", typeOf(part)));
      out.append("]");
    } else {
      out.append("list of ", typeOf(schema.items));
    }
  } else if (schema.type === "object" && schema.additionalProperties) {
    out.append("object of ", typeOf(schema.additionalProperties));
  } else {
    out.append(schema.format === "binary" ? "file" : schema.type ?? "anything");
  }
  return out;
}

function table(rows) {
  const made = document.createElement("table");
  const head = made.createTHead().insertRow();
  for (const title of ["name", "type", "meaning"]) head.append(element("th", title, { scope: "col" }));
  const body = made.createTBody();
  for (const { name, schema, required, description } of rows) {
    const row = body.insertRow();
    row.insertCell().append(element("code", name), required ? " (required)" : "");
    row.insertCell().append(typeOf(schema));
    const known = schema?.default ?? null;
    row.insertCell().textContent = [description ?? schema?.description ?? "", known === null ? "" : `default: ${JSON.stringify(known)}`]
      .filter(Boolean)
      .join("; ");
  }
  return made;
}

function fields(schema) {
  const required = new Set(schema.required ?? []);
  return Object.entries(schema.properties ?? {}).map(([name, part]) => ({ name, schema: part, required: required.has(name) }));
}

function operation(method, path, described) {
  const card = element("section", "", { class: "card" });
  const title = element("h2");
  title.append(element("span", method.toUpperCase(), { class: "method" }), element("code", path));
  card.append(title, element("p", described.description ?? described.summary ?? ""));
  const given = (described.parameters ?? []).map((p) => ({ ...p, name: `${p.name} (${p.in})` }));
  if (given.length) card.append(table(given));
  for (const [kind, body] of Object.entries(described.requestBody?.content ?? {})) {
    const line = element("p", `sends ${kind}: `, { class: "small" });
    if (body.schema.$ref) line.append(typeOf(body.schema));
    card.append(line);
    if (!body.schema.$ref) card.append(table(fields(body.schema)));
  }
  for (const [status, answer] of Object.entries(described.responses ?? {})) {
    const schema = answer.content?.["application/json"]?.schema;
    if (!/^2/.test(status)) continue;
    const line = element("p", `answers ${status}: `, { class: "small" });
    line.append(schema ? typeOf(schema) : Object.keys(answer.content ?? {}).join() || "a file, or nothing");
    card.append(line);
  }
  return card;
}

const content = document.getElementById("content");
const answer = await fetch("/openapi.json");
const api = await answer.json();
content.replaceChildren(...api.info.description.split("\n\n").map((text) => element("p", text.replaceAll("`", ""))));
const groups = new Map();
for (const [path, methods] of Object.entries(api.paths)) {
  for (const [method, described] of Object.entries(methods)) {
    const group = described.tags?.[0] ?? "other";
    groups.set(group, [...(groups.get(group) ?? []), operation(method, path, described)]);
  }
}
for (const [group, cards] of groups) content.append(element("h1", group), ...cards);
content.append(element("h1", "schemas"));
for (const [name, schema] of Object.entries(api.components.schemas)) {
  const card = element("section", "", { class: "card", id: name });
  card.append(element("h2", name), element("p", schema.description ?? ""), table(fields(schema)));
  content.append(card);
}
