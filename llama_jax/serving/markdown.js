"use strict";

function appendElement(parent, tag, name = "") {
  const element = document.createElement(tag);
  if (name) element.className = name;
  parent.append(element);
  return element;
}

async function copyText(button, text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // navigator.clipboard exists only for https and localhost
    const area = appendElement(document.body, "textarea");
    area.value = text;
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  button.classList.add("done");
  setTimeout(() => button.classList.remove("done"), 1500);
}

function addCopyButton(parent, getText) {
  const button = appendElement(parent, "button", "copy");
  button.type = "button";
  button.setAttribute("aria-label", "Copy");
  button.addEventListener("click", () => copyText(button, getText()));
}

// Converts Markdown to elements. Their text is set as textContent, so that the output of a model is
// never parsed as HTML. Supports code blocks, inline code, bold, italics, lists, headings, quotes,
// rules and links; raw HTML, images and tables stay as text.
// From this depth on Markdown stays text, so that deep nesting can't overflow the stack.
const MAX_DEPTH = 12;
const SPANS = new RegExp([
  /\\(?<escaped>[!-/:-@[-`{-~])/,
  /(?<!`)(?<ticks>`{1,3})(?!`)(?<code>[^]*?[^`])\k<ticks>(?!`)/,
  /\*\*(?=\S)(?<strong>(?:[^*]|\*(?!\*))*?[^\s*]\*?)\*\*/,
  /\*(?=[^\s*])(?<em>[^*]*?[^\s*])\*(?!\*)/,
  /(?<!\w)__(?=\S)(?<strong2>(?:[^_]|_(?!_))*?\S)__(?!\w)/,
  /(?<!\w)_(?=[^\s_])(?<em2>[^_]*?[^\s_])_(?!\w)/,
  /\[(?<label>[^[\]]+)\]\((?<url>https?:\/\/[^\s()]+)\)/,
  /(?<plain>https?:\/\/[^\s<>()*`]*[^\s<>()*`.,;:!?'"\]])/,
].map(part => part.source).join("|"), "gu");

function renderSpans(parent, text, depth) {
  let end = 0;  // of the text that is rendered
  for (const match of depth < MAX_DEPTH ? text.matchAll(SPANS) : []) {
    const {escaped, code, strong, strong2, em, em2, label, url, plain} = match.groups;
    parent.append(text.slice(end, match.index), escaped ?? "");
    end = match.index + match[0].length;
    if (code !== undefined) appendElement(parent, "code").textContent = code.replace(/^ (.+) $/, "$1");
    else if (strong ?? strong2) renderSpans(appendElement(parent, "strong"), strong ?? strong2, depth + 1);
    else if (em ?? em2) renderSpans(appendElement(parent, "em"), em ?? em2, depth + 1);
    else if (url ?? plain) {
      const link = appendElement(parent, "a");
      Object.assign(link, {href: url ?? plain, target: "_blank", rel: "noopener noreferrer"});
      if (plain) link.textContent = plain;
      // The zero-width space prevents a link inside the link.
      else renderSpans(link, label.replaceAll("://", ":\u200b//"), depth + 1);
    }
  }
  parent.append(text.slice(end));
}

const FENCE = /^ {0,3}(`{3,}|~{3,})[^`]*$/;
const HEADING = /^ {0,3}(#{1,6}) +(.*)$/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const ITEM = /^( *)(?:[-*+]|(\d{1,9})[.)]) +(.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;

function renderBlocks(parent, lines, depth = 0) {
  const startsBlock = line => [FENCE, HEADING, RULE, ITEM, QUOTE].some(block => block.test(line));
  for (let i = 0; i < lines.length;) {
    const line = lines[i];
    let match;
    if (!line.trim()) {
      i++;
    } else if (depth < MAX_DEPTH && (match = FENCE.exec(line))) {
      const content = [];
      const closesFence = line => line.trim().startsWith(match[1]) && !/[^`~]/.test(line.trim());
      for (i++; i < lines.length && !closesFence(lines[i]); i++) content.push(lines[i]);
      i++;
      const box = appendElement(parent, "div", "code");
      appendElement(appendElement(box, "pre"), "code").textContent = content.join("\n");
      addCopyButton(box, () => content.join("\n"));
    } else if (depth < MAX_DEPTH && (match = HEADING.exec(line))) {
      const heading = appendElement(parent, `h${Math.min(6, match[1].length + 2)}`);
      renderSpans(heading, match[2].replace(/ #+ *$/, ""), depth);
      i++;
    } else if (depth < MAX_DEPTH && RULE.test(line)) {
      appendElement(parent, "hr");
      i++;
    } else if (depth < MAX_DEPTH && QUOTE.test(line)) {
      const content = [];
      for (; i < lines.length && (match = QUOTE.exec(lines[i])); i++) content.push(match[1]);
      renderBlocks(appendElement(parent, "blockquote"), content, depth + 1);
    } else if (depth < MAX_DEPTH && (match = ITEM.exec(line))) {
      const [, {length: indent}, number] = match;
      const list = appendElement(parent, number ? "ol" : "ul");
      if (number) list.start = number;
      while (i < lines.length && (match = ITEM.exec(lines[i]))
             && match[1].length <= indent + 1 && !match[2] === !number) {
        const content = [match[3]], width = lines[i].length - match[3].length;
        const isDeeper = line => /^ */.exec(line)[0].length > indent + 1;
        for (i++; i < lines.length; i++) {
          if (!lines[i].trim() && !isDeeper(lines[i + 1] ?? "")) break;
          const endsItem = startsBlock(lines[i]) || !lines[i - 1].trim();
          if (lines[i].trim() && !isDeeper(lines[i]) && endsItem) break;
          content.push(lines[i].slice(Math.min(width, /^ */.exec(lines[i])[0].length)));
        }
        // Blank lines between items do not end the list.
        let next = i;
        while (next < lines.length && !lines[next].trim()) next++;
        if (next < lines.length && ITEM.test(lines[next])) i = next;
        renderBlocks(appendElement(list, "li"), content, depth + 1);
      }
    } else {
      const content = [line];
      for (i++; lines[i]?.trim() && !startsBlock(lines[i]); i++) content.push(lines[i]);
      renderSpans(appendElement(parent, "p"), content.join("\n"), depth);
    }
  }
}

function renderMarkdown(element, text) {
  element.replaceChildren();
  renderBlocks(element, text.split("\n"));
}
