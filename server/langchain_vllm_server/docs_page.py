"""GET /docs: the description of the API as a page that needs nothing from elsewhere."""

from __future__ import annotations

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>langchain-vllm</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
  summary { cursor: pointer; padding: .4em 0 }
  code, td:first-child, b { font-family: ui-monospace, monospace }
  b { display: inline-block; width: 4em; color: #06c }
  table { border-collapse: collapse; margin: 0 0 1em 1.5em }
  td { border-top: 1px solid #ddd; padding: .2em 1em .2em 0; vertical-align: top }
</style>
<h1>langchain-vllm</h1>
<p>OpenAI's API as vLLM serves it. For programs: <a href="openapi.json">openapi.json</a>.</p>
<main></main>
<script>
  const make = (tag, text, ...children) => {
    const element = document.createElement(tag)
    if (text) element.textContent = text
    element.append(...children)
    return element
  }
  const named = (description, reference) => description.components.schemas[reference.split("/").pop()]
  const typeOf = schema => schema.$ref ? schema.$ref.split("/").pop()
    : schema.anyOf ? schema.anyOf.map(typeOf).join(" | ")
    : schema.enum ? schema.enum.map(value => JSON.stringify(value)).join(" | ")
    : schema.type === "array" ? `[${typeOf(schema.items || {})}]` : schema.type || "any"
  const rows = (description, schema) => Object.entries(schema.properties || {}).map(([name, field]) =>
    make("tr", "", make("td", name), make("td", typeOf(field)),
      make("td", (schema.required || []).includes(name) ? "required" : "default " + JSON.stringify(field.default))))
  fetch("openapi.json").then(answer => answer.json()).then(description => {
    for (const [path, methods] of Object.entries(description.paths))
      for (const [method, operation] of Object.entries(methods)) {
        const title = make("summary", "", make("b", method.toUpperCase()), make("code", path), " " + operation.summary)
        const body = operation.requestBody?.content["application/json"].schema.$ref
        const fields = body ? rows(description, named(description, body)) : []
        document.querySelector("main").append(make("details", "", title, make("table", "", ...fields)))
      }
  })
</script>
</html>
"""
