// Renders the subset of Markdown that models write as DOM nodes. Model output is only ever set as
// textContent, so it cannot become HTML.

const MAX_DEPTH = 6; // of nested quotes and lists; deeper ones are shown as plain text

const FENCE = /^ {0,3}(`{3,}|~{3,}) *([\w+#.-]*)/;
const HEADING = /^ {0,3}(#{1,6}) +(.*)$/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)]) +/;
const TABLE_RULE = /^ *\|?( *:?-+:? *\|)+( *:?-+:? *)?$/;

// lengths are limited, so that matching takes linear time
const INLINE = new RegExp(
  [
    "(?<ticks>`{1,3})(?<code>[^\\n]{1,2000}?)\\k<ticks>(?!`)",
    "\\*\\*(?<bold>[^\\s*](?:[^\\n]{0,2000}?[^\\s])?)\\*\\*",
    "(?<![\\w*])\\*(?<italic>[^\\s*](?:[^*\\n]{0,2000}?[^\\s*])?)\\*(?![\\w*])",
    "(?<![\\w_])_(?<italic_>[^\\s_](?:[^_\\n]{0,2000}?[^\\s_])?)_(?![\\w_])",
    "~~(?<struck>[^\\n]{1,2000}?)~~",
    "\\[(?<label>[^\\]\\n]{1,500})\\]\\((?<target>https?://[^\\s)]{1,2000})\\)",
    "(?<url>https?://[^\\s<>()]{1,2000}[^\\s<>().,;:!?'\"])",
  ].join("|"),
  "g",
);

const sources = new WeakMap(); // node -> its Markdown source

/** Show `text` in `target`. Unchanged blocks keep their nodes, which makes streaming cheap. */
export function showMarkdown(target, text) {
  const blocks = parse(text.split("\n"), 0);
  blocks.forEach((block, i) => {
    const old = target.children[i];
    if (old !== undefined && sources.get(old) === block.source) return;
    const node = block.build();
    sources.set(node, block.source);
    if (old === undefined) target.append(node);
    else old.replaceWith(node);
  });
  while (target.children.length > blocks.length) target.lastElementChild.remove();
}

function element(name, ...children) {
  const node = document.createElement(name);
  node.append(...children);
  return node;
}

// -- blocks: [{source, build}] ----------------------------------------------------------------

function parse(lines, depth) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const [end, build] = block(lines, at, depth);
    blocks.push({ source: lines.slice(at, end).join("\n"), build });
    at = end;
  }
  return blocks;
}

/** The block that starts at a line: [index of the line after it, function that builds its node]. */
function block(lines, at, depth) {
  const line = lines[at];
  let found;
  if ((found = FENCE.exec(line))) return fence(lines, at, found[1], found[2]);
  if ((found = HEADING.exec(line))) {
    const [, marks, title] = found; // h1 and h2 are the page's own
    return [at + 1, () => element(`h${Math.min(6, marks.length + 2)}`, ...inline(title))];
  }
  if (RULE.test(line)) return [at + 1, () => element("hr")];
  if (depth < MAX_DEPTH) {
    if (QUOTE.test(line)) return quote(lines, at, depth);
    if (ITEM.test(line)) return list(lines, at, depth);
  }
  if (line.includes("|") && TABLE_RULE.test(lines[at + 1] ?? "")) return table(lines, at);
  let end = at + 1;
  while (end < lines.length && !beginsBlock(lines[end])) end += 1;
  return [end, () => element("p", ...inline(lines.slice(at, end).join("\n")))];
}

function beginsBlock(line) {
  return !line.trim() || [FENCE, HEADING, RULE, QUOTE, ITEM].some((one) => one.test(line));
}

function fence(lines, at, marks, language) {
  let end = at + 1;
  const isClosing = (line) => line.trim().startsWith(marks) && !line.trim().replaceAll(marks[0], "");
  while (end < lines.length && !isClosing(lines[end])) end += 1;
  const code = lines.slice(at + 1, end).join("\n");
  return [Math.min(end + 1, lines.length), () => codeBlock(code, language)];
}

function codeBlock(code, language) {
  const head = element("div", element("span", language || "text"));
  head.className = "code-head";
  if (navigator.clipboard) {
    const copy = element("button", "Copy");
    copy.type = "button";
    copy.addEventListener("click", async () => {
      await navigator.clipboard.writeText(code);
      copy.textContent = "Copied";
    });
    head.append(copy);
  }
  const pre = element("pre", element("code", code));
  pre.tabIndex = 0; // allows scrolling with the keyboard
  const box = element("div", head, pre);
  box.className = "code";
  return box;
}

function quote(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return [end, () => element("blockquote", ...parse(inner, depth + 1).map((one) => one.build()))];
}

function list(lines, at, depth) {
  const [, { length: indent }, mark] = ITEM.exec(lines[at]);
  const isOrdered = /\d/.test(mark);
  const items = [];
  let end = at;
  while (end < lines.length) {
    const found = ITEM.exec(lines[end]);
    const leading = /^ */.exec(lines[end])[0].length;
    if (found && leading <= indent + 1) {
      if (leading < indent || /\d/.test(found[2]) !== isOrdered) break;
      items.push([lines[end].slice(found[0].length)]);
    } else if (!lines[end].trim()) {
      const next = lines.slice(end + 1, end + 3).find((line) => line.trim()) ?? "";
      if (/^ */.exec(next)[0].length <= indent && !ITEM.test(next)) break;
      items.at(-1).push("");
    } else if (leading > indent || !beginsBlock(lines[end])) {
      // an unindented line continues the paragraph before it; after a blank line it starts a block
      if (leading <= indent && !lines[end - 1].trim()) break;
      items.at(-1).push(lines[end].slice(Math.min(leading, indent + 2 + (isOrdered ? 1 : 0))));
    } else {
      break;
    }
    end += 1;
  }
  return [
    end,
    () => {
      const node = element(isOrdered ? "ol" : "ul", ...items.map((one) => listItem(one, depth)));
      if (isOrdered) node.start = parseInt(mark, 10);
      return node;
    },
  ];
}

function listItem(lines, depth) {
  const nodes = parse(lines, depth + 1).map((one) => one.build());
  // an item with a single paragraph is shown without <p>
  if (nodes[0]?.tagName === "P") nodes.splice(0, 1, ...nodes[0].childNodes);
  return element("li", ...nodes);
}

function table(lines, at) {
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end += 1;
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|");
  const row = (line, name) =>
    element("tr", ...cells(line).map((cell) => element(name, ...inline(cell.trim()))));
  return [
    end,
    () => {
      const body = lines.slice(at + 2, end).map((line) => row(line, "td"));
      const box = element(
        "div",
        element("table", element("thead", row(lines[at], "th")), element("tbody", ...body)),
      );
      box.className = "table";
      return box;
    },
  ];
}

// -- inline -----------------------------------------------------------------------------------

/** Nodes of inline text. */
function inline(text, depth = 0) {
  if (depth >= MAX_DEPTH) return [text];
  const nodes = [];
  let at = 0;
  for (const found of text.matchAll(INLINE)) {
    nodes.push(text.slice(at, found.index));
    nodes.push(inlineNode(found.groups, depth));
    at = found.index + found[0].length;
  }
  nodes.push(text.slice(at));
  return nodes;
}

function inlineNode(found, depth) {
  if (found.code !== undefined) return element("code", found.code.trim() || found.code);
  if (found.bold !== undefined) return element("strong", ...inline(found.bold, depth + 1));
  if (found.struck !== undefined) return element("s", ...inline(found.struck, depth + 1));
  const italic = found.italic ?? found.italic_;
  if (italic !== undefined) return element("em", ...inline(italic, depth + 1));
  const link = element("a", found.label ?? found.url);
  link.href = found.target ?? found.url; // http or https: the expression matches no other
  link.title = link.href;
  link.target = "_blank";
  link.rel = "noopener noreferrer nofollow";
  return link;
}
