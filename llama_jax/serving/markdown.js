"use strict";

function make(parent, tag, name = "") {
  const element = document.createElement(tag);
  if (name) element.className = name;
  parent.append(element);
  return element;
}

async function copy(button, text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // only https and this machine have a clipboard
    const area = make(document.body, "textarea");
    area.value = text;
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  button.classList.add("done");
  setTimeout(() => button.classList.remove("done"), 1500);
}

function addCopy(parent, text) {
  const button = make(parent, "button", "copy");
  button.type = "button";
  button.setAttribute("aria-label", "Copy");
  button.addEventListener("click", () => copy(button, text()));
}

// Markdown becomes elements whose text is set as text: nothing that a model writes is HTML.
// Code blocks, inline code, bold, italics, lists, headings, quotes, rules and links; no raw HTML,
// images or tables, which stay as they are written.
// Deeper than this it stays text, so that no answer exhausts the stack.
const DEPTH = 12;
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

function spans(parent, text, depth) {
  let done = 0;
  for (const found of depth < DEPTH ? text.matchAll(SPANS) : []) {
    const {escaped, code, strong, strong2, em, em2, label, url, plain} = found.groups;
    parent.append(text.slice(done, found.index), escaped ?? "");
    done = found.index + found[0].length;
    if (code !== undefined) make(parent, "code").textContent = code.replace(/^ (.+) $/, "$1");
    else if (strong ?? strong2) spans(make(parent, "strong"), strong ?? strong2, depth + 1);
    else if (em ?? em2) spans(make(parent, "em"), em ?? em2, depth + 1);
    else if (url ?? plain) {
      const link = make(parent, "a");
      Object.assign(link, {href: url ?? plain, target: "_blank", rel: "noopener noreferrer"});
      if (plain) link.textContent = plain;
      else spans(link, label.replaceAll("://", ":\u200b//"), depth + 1);
    }
  }
  parent.append(text.slice(done));
}

const FENCE = /^ {0,3}(`{3,}|~{3,})[^`]*$/;
const HEAD = /^ {0,3}(#{1,6}) +(.*)$/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const ITEM = /^( *)(?:[-*+]|(\d{1,9})[.)]) +(.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;

function blocks(parent, lines, depth = 0) {
  const starts = line => [FENCE, HEAD, RULE, ITEM, QUOTE].some(kind => kind.test(line));
  for (let i = 0; i < lines.length;) {
    const line = lines[i];
    let found;
    if (!line.trim()) {
      i++;
    } else if (depth < DEPTH && (found = FENCE.exec(line))) {
      const inside = [];
      const closes = line => line.trim().startsWith(found[1]) && !/[^`~]/.test(line.trim());
      for (i++; i < lines.length && !closes(lines[i]); i++) inside.push(lines[i]);
      i++;
      const box = make(parent, "div", "code");
      make(make(box, "pre"), "code").textContent = inside.join("\n");
      addCopy(box, () => inside.join("\n"));
    } else if (depth < DEPTH && (found = HEAD.exec(line))) {
      spans(make(parent, `h${Math.min(6, found[1].length + 2)}`), found[2].replace(/ #+ *$/, ""), depth);
      i++;
    } else if (depth < DEPTH && RULE.test(line)) {
      make(parent, "hr");
      i++;
    } else if (depth < DEPTH && QUOTE.test(line)) {
      const inside = [];
      for (; i < lines.length && (found = QUOTE.exec(lines[i])); i++) inside.push(found[1]);
      blocks(make(parent, "blockquote"), inside, depth + 1);
    } else if (depth < DEPTH && (found = ITEM.exec(line))) {
      const [, {length: indent}, number] = found;
      const list = make(parent, number ? "ol" : "ul");
      if (number) list.start = number;
      while (i < lines.length && (found = ITEM.exec(lines[i]))
             && found[1].length <= indent + 1 && !found[2] === !number) {
        const inside = [found[3]], width = lines[i].length - found[3].length;
        const deeper = line => /^ */.exec(line)[0].length > indent + 1;
        for (i++; i < lines.length; i++) {
          if (!lines[i].trim() && !deeper(lines[i + 1] ?? "")) break;
          const ends = starts(lines[i]) || !lines[i - 1].trim();
          if (lines[i].trim() && !deeper(lines[i]) && ends) break;
          inside.push(lines[i].slice(Math.min(width, /^ */.exec(lines[i])[0].length)));
        }
        // A blank line between items leaves them one list.
        let next = i;
        while (next < lines.length && !lines[next].trim()) next++;
        if (next < lines.length && ITEM.test(lines[next])) i = next;
        blocks(make(list, "li"), inside, depth + 1);
      }
    } else {
      const inside = [line];
      for (i++; lines[i]?.trim() && !starts(lines[i]); i++) inside.push(lines[i]);
      spans(make(parent, "p"), inside.join("\n"), depth);
    }
  }
}

function markdown(element, text) {
  element.replaceChildren();
  blocks(element, text.split("\n"));
}
