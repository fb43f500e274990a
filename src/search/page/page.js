// The search page: a question in the address bar or a picture in memory -> the API -> a grid of links.
//
// Whatever comes from the server or the user is put into the page as text or as an attribute, never as markup.

import { language, translate, words } from "./words.js";

const PAGE_SIZE = 40;
const KEPT_ANSWERS = 24; // that the back button shows at once
const OWN = new Set(["id", "row", "score", "image", "thumbnail", "text"]);
const THUMBNAIL = window.devicePixelRatio > 1.2 ? 512 : 256;

const $ = (id) => document.getElementById(id);
const form = $("form"), input = $("text"), grid = $("grid"), statusLine = $("status"), slider = $("weight");
const number = (value, digits = 0) =>
  new Intl.NumberFormat(language === "zh" ? "zh-CN" : "en", { minimumFractionDigits: digits, maximumFractionDigits: digits }).format(value);

let about = { rows: 0, fields: {}, examples: [], limits: { bytes: 32e6, depth: 5000 } };
const pictures = new Map(); // number -> {file, url}, uploaded since the page was loaded
const answers = new Map(); // question -> {results, milliseconds, ended}
let question = readAddress();
let answer = null;
let told = null; // the promise of `about`
let request = null; // AbortController of the one under way

// ---- the question --------------------------------------------------------------------------------------------------

function readAddress() {
  const given = new URLSearchParams(location.search);
  const filters = new Map();
  for (const [name, value] of given) {
    if (!["q", "row", "weight"].includes(name)) filters.set(name, [...(filters.get(name) || []), value]);
  }
  const weight = Number(given.get("weight") ?? 0.5);
  const row = /^\d{1,9}$/.test(given.get("row") || "") ? Number(given.get("row")) : null;
  return {
    text: (given.get("q") || "").trim(),
    row,
    upload: history.state?.upload ?? null,
    weight: weight >= 0 && weight <= 1 ? weight : 0.5,
    filters,
  };
}

function parameters({ text, row, weight, upload, filters }) {
  const given = new URLSearchParams();
  if (text) given.set("q", text);
  if (row !== null) given.set("row", row);
  if (text && (row !== null || upload !== null) && weight !== 0.5) given.set("weight", weight);
  for (const [name, values] of filters) for (const value of values) given.append(name, value);
  return given;
}

const address = (asked) => {
  const given = parameters(asked).toString();
  return given ? `/?${given}` : "/";
};
const key = (asked) => `${asked.upload ?? ""} ${address(asked)}`;
/** Browsers keep what has a version in its address. */
const thumbnail = (row, side) => `/api/thumbnail/${row}?side=${side}${about.version ? `&v=${about.version}` : ""}`;
const isAsked = ({ text, row, upload }) => Boolean(text) || row !== null || upload !== null;

/** Ask, with a new entry in the history or in place of this one. */
function ask(changes, { replace = false } = {}) {
  const asked = { ...question, ...changes };
  keepPlace();
  if (key(asked) === key(question)) replace = true;
  history[replace ? "replaceState" : "pushState"]({ upload: asked.upload }, "", address(asked));
  question = asked;
  if (!replace) scrollTo(0, 0);
  show();
}

function keepPlace() {
  history.replaceState({ ...history.state, y: scrollY }, "");
}

// ---- the server ----------------------------------------------------------------------------------------------------

class Refusal extends Error {}

async function fetchJson(path, options = {}) {
  for (let attempt = 0; ; attempt++) {
    let response;
    try {
      response = await fetch(path, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refusal(words.offline);
    }
    if (response.status === 503 && attempt < 4) {
      await new Promise((done) => setTimeout(done, 1000 * (Number(response.headers.get("Retry-After")) || 1)));
      continue;
    }
    const content = await response.json().catch(() => ({}));
    if (!response.ok) throw new Refusal(content.error || `HTTP ${response.status}`);
    return content;
  }
}

function fetchPart(asked, offset, signal) {
  const given = parameters(asked);
  given.set("k", Math.min(PAGE_SIZE, about.limits.depth - offset));
  given.set("offset", offset);
  if (asked.upload === null) return fetchJson(`/api/search?${given}`, { signal });
  const { file } = pictures.get(asked.upload);
  return fetchJson(`/api/search?${given}`, { method: "POST", body: file, signal, headers: { "Content-Type": file.type || "application/octet-stream" } });
}

/** Show the answer to `question`, kept or fetched; y: where to scroll. */
async function show(y = null) {
  const asked = question;
  request?.abort();
  request = new AbortController();
  drawQuestion();
  hideMessage();
  if (asked.upload !== null && !pictures.has(asked.upload)) {
    answer = null;
    grid.replaceChildren();
    return fail(words.gone);
  }
  const kept = answers.get(key(asked));
  if (kept) {
    answer = kept;
    drawAnswer();
    if (y !== null) scrollTo(0, y);
    return;
  }
  await load(asked, 0, request.signal);
}

async function load(asked, offset, signal) {
  busy(true, offset);
  try {
    const [part] = await Promise.all([fetchPart(asked, offset, signal), told]);
    if (signal.aborted) return;
    const before = offset ? answer.results : [];
    const depth = offset + part.results.length;
    answer = {
      results: [...before, ...part.results],
      total: part.total,
      milliseconds: offset ? answer.milliseconds : part.milliseconds,
      ended: part.results.length < PAGE_SIZE || depth >= about.limits.depth,
    };
    answers.delete(key(asked));
    answers.set(key(asked), answer);
    if (answers.size > KEPT_ANSWERS) answers.delete(answers.keys().next().value);
    busy(false);
    drawAnswer(offset);
  } catch (error) {
    if (error.name === "AbortError" || signal.aborted) return;
    busy(false);
    answer = offset ? { ...answer, ended: true } : null; // no further attempt before "Try again"
    if (!offset) grid.replaceChildren();
    fail(error instanceof Refusal ? error.message : String(error), true);
  }
}

function loadMore() {
  if (!answer || answer.ended || !$("progress").hidden) return;
  load(question, answer.results.length, request.signal);
}

// ---- drawing -------------------------------------------------------------------------------------------------------

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function makeCross() {
  const cross = $("clear").querySelector("svg").cloneNode(true);
  cross.setAttribute("aria-hidden", "true");
  return cross;
}

function busy(is, offset = 0) {
  $("progress").hidden = !is;
  grid.setAttribute("aria-busy", String(is));
  grid.classList.toggle("waiting", is && !offset && grid.children.length > 0);
  if (!is) return;
  $("more").hidden = true;
  hideMessage();
  if (!offset) {
    statusLine.textContent = words.searching;
    if (!grid.children.length) grid.replaceChildren(...Array.from({ length: 12 }, makeGhost));
  }
}

function makeGhost() {
  const item = make("li", "ghost");
  item.setAttribute("aria-hidden", "true");
  item.append(make("span", "frame"), make("span", "caption"));
  return item;
}

function drawQuestion() {
  const { text, row, upload } = question;
  document.body.classList.toggle("home", !isAsked(question));
  document.title = text ? `${text.slice(0, 80)} – ${words.documentTitle}` : words.documentTitle;
  input.value = text;
  input.placeholder = row !== null || upload !== null ? words.placeholderMixed : words.placeholder;
  drawBox();
  const source = upload !== null ? pictures.get(upload)?.url : row !== null ? thumbnail(row, 128) : null;
  $("token").hidden = !source;
  if (source) $("token-image").src = source;
  else $("token-image").removeAttribute("src");
  drawSubject();
  drawFilters();
}

function drawBox() {
  form.classList.toggle("filled", Boolean(input.value) || !$("token").hidden);
  $("clear").hidden = !input.value;
}

async function drawSubject() {
  const { text, row, upload } = question;
  const picture = pictures.get(upload);
  $("subject").hidden = row === null && !picture;
  $("slider").hidden = !text;
  $("mixing-hint").hidden = Boolean(text);
  slider.value = question.weight;
  if ($("subject").hidden) return;
  $("subject-title").textContent = upload !== null ? words.yourPicture : words.moreLike;
  const link = $("subject-link"), image = $("subject-image");
  $("subject-facts").replaceChildren();
  if (upload !== null) {
    link.removeAttribute("href");
    image.src = picture.url;
    image.alt = words.yourPicture;
    $("subject-text").textContent = picture.file.name || "";
    return;
  }
  link.href = `/api/picture/${row}`;
  link.title = words.open;
  image.src = thumbnail(row, 512);
  const shown = findRow(row) || (await fetchJson(`/api/search?row=${row}&k=1`).then((found) => found.results.find((one) => one.row === row), () => null));
  if (question.row !== row) return;
  image.alt = shown?.text || "";
  $("subject-text").textContent = shown?.text || "";
  if (!shown) return;
  const facts = [["id", shown.id], ...Object.entries(shown).filter(([name]) => !OWN.has(name))].slice(0, 12);
  $("subject-facts").replaceChildren(...facts.map(([name, value]) => {
    const pair = make("div");
    const said = make("dd", "user", typeof value === "object" ? JSON.stringify(value) : String(value));
    pair.append(make("dt", "", name), said);
    return pair;
  }));
}

function findRow(row) {
  for (const { results } of answers.values()) {
    const found = results.find((one) => one.row === row);
    if (found) return found;
  }
  return null;
}

/** Tiles of the answer; from: how many of its results are in the grid already. */
function drawAnswer(from = 0) {
  busy(false);
  const shown = answer.results.slice(from).filter((one) => one.row !== question.row || question.upload !== null);
  const tiles = shown.map(makeTile);
  if (from) grid.append(...tiles);
  else grid.replaceChildren(...tiles);
  const total = number(answer.total);
  statusLine.textContent = isAsked(question) ? words.found(total, number(answer.milliseconds.total, answer.milliseconds.total < 10 ? 1 : 0)) : words.browse(total);
  $("more").hidden = answer.ended;
  if (!grid.children.length) fail(about.rows ? words.nothing : words.empty);
  markReachable();
  watch(); // a short page needs more at once
}

function makeTile(result) {
  const item = make("li"), link = make("a", "tile"), frame = make("span", "frame"), image = make("img");
  link.href = address({ ...question, text: "", upload: null, weight: 0.5, row: result.row });
  link.tabIndex = -1;
  link.dataset.row = result.row;
  const score = result.score === null ? "" : number(result.score, 3);
  link.setAttribute("aria-label", [result.text || String(result.id), score && words.score(score), words.moreLikeThis].filter(Boolean).join(". "));
  image.alt = "";
  image.loading = "lazy";
  image.decoding = "async";
  image.addEventListener("load", () => {
    image.classList.toggle("tiny", image.naturalWidth <= 64);
    image.classList.add("shown");
  });
  image.addEventListener("error", () => {
    const broken = make("span", "broken");
    broken.append($("message").querySelector("svg").cloneNode(true), make("span", "user", `${result.id}: ${words.unreadable}`));
    image.replaceWith(broken);
  });
  image.src = thumbnail(result.row, THUMBNAIL);
  frame.append(image, make("span", "like", words.moreLikeThis));
  if (score) frame.append(make("span", "score", score));
  const caption = make("span", "caption user", result.text || "");
  caption.dir = "auto";
  caption.title = result.text || "";
  link.append(frame, caption);
  item.append(link);
  return item;
}

function fail(text, again = false) {
  $("message").hidden = false;
  $("message").classList.toggle("bad", again);
  $("message-text").textContent = text;
  $("retry").hidden = !again;
  statusLine.textContent = "";
  $("more").hidden = true;
}

function hideMessage() {
  $("message").hidden = true;
}

// ---- filters -------------------------------------------------------------------------------------------------------

function drawFilters() {
  for (const menu of $("filters").children) {
    const values = question.filters.get(menu.dataset.name) || [];
    menu.classList.toggle("used", values.length > 0);
    for (const box of menu.querySelectorAll("input")) box.checked = values.includes(box.value);
  }
  const chosen = [...question.filters].flatMap(([name, values]) => values.map((value) => [name, value]));
  $("chosen").hidden = !chosen.length;
  $("chosen").replaceChildren(...chosen.map(([name, value]) => {
    const button = make("button");
    button.type = "button";
    button.append(make("span", "user", `${name}: ${value}`), makeCross());
    button.setAttribute("aria-label", words.removeFilter(`${name}: ${value}`));
    button.addEventListener("click", () => filter(name, value, false));
    return button;
  }));
}

function filter(name, value, is) {
  const filters = new Map(question.filters);
  const values = (filters.get(name) || []).filter((one) => one !== value);
  if (is) values.push(value);
  if (values.length) filters.set(name, values);
  else filters.delete(name);
  ask({ filters });
}

function makeMenus() {
  const menus = Object.entries(about.fields).filter(([, values]) => values.length > 1).map(([name, values]) => {
    const menu = make("details", "menu"), list = make("div", "values");
    menu.dataset.name = name;
    menu.append(make("summary", "user", name), list);
    list.setAttribute("role", "group");
    list.setAttribute("aria-label", name);
    for (const { value, count } of values) {
      const label = make("label"), box = make("input");
      box.type = "checkbox";
      box.value = value;
      box.addEventListener("change", () => filter(name, value, box.checked));
      label.append(box, make("span", "user", value));
      if (count !== null) label.append(make("small", "", number(count)));
      list.append(label);
    }
    menu.addEventListener("toggle", () => {
      if (menu.open) for (const other of $("filters").children) if (other !== menu) other.open = false;
    });
    return menu;
  });
  $("filters").replaceChildren(...menus);
}

// ---- pictures of the user's ----------------------------------------------------------------------------------------

function searchBy(file) {
  if (!file || (file.type && !file.type.startsWith("image/"))) return refuse(words.notPicture);
  if (file.size > about.limits.bytes) return refuse(words.tooLarge(number(about.limits.bytes / 1e6)));
  const name = pictures.size + 1;
  pictures.set(`${performance.timeOrigin}-${name}`, { file, url: URL.createObjectURL(file) });
  ask({ text: "", row: null, weight: 0.5, upload: `${performance.timeOrigin}-${name}` });
}

function refuse(text) {
  request?.abort();
  busy(false);
  grid.replaceChildren();
  answer = null;
  fail(text);
}

// ---- keys ----------------------------------------------------------------------------------------------------------

const tiles = () => [...grid.querySelectorAll(".tile")];

/** One tile can be reached with Tab; the arrows move on from there. */
function markReachable() {
  const all = tiles();
  if (all.length && !all.some((tile) => tile.tabIndex === 0)) all[0].tabIndex = 0;
}

function focusTile(tile) {
  for (const other of tiles()) other.tabIndex = -1;
  tile.tabIndex = 0;
  tile.focus();
  tile.scrollIntoView({ block: "nearest" });
}

function moveFrom(tile, name) {
  const all = tiles(), at = all.indexOf(tile);
  const columns = getComputedStyle(grid).gridTemplateColumns.split(" ").length;
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, ArrowDown: at + columns, ArrowUp: at - columns, Home: 0, End: all.length - 1 }[name];
  if (to < 0 && name === "ArrowUp") return input.focus();
  if (all[to]) focusTile(all[to]);
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const at = event.target, tile = at.closest?.(".tile"), open = document.querySelector(".menu[open]");
  if (event.key === "/" && !at.matches("input:not([type=checkbox], [type=range]), textarea")) {
    event.preventDefault();
    input.focus();
    input.select();
  } else if (event.key === "Escape" && open) {
    open.open = false;
    open.querySelector("summary").focus();
  } else if (event.key === "Escape" && at === input) {
    if (input.value) input.value = "";
    else if (!$("token").hidden) ask({ row: null, upload: null });
    else input.blur();
    event.preventDefault();
    drawBox();
  } else if (event.key === "Escape") {
    input.focus();
  } else if (tile && /^(Arrow|Home$|End$)/.test(event.key)) {
    event.preventDefault();
    moveFrom(tile, event.key);
  } else if (at === input && event.key === "ArrowDown" && tiles().length) {
    event.preventDefault();
    focusTile(tiles()[0]);
  }
});

// ---- what the user does --------------------------------------------------------------------------------------------

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = input.value.trim();
  if (matchMedia("(pointer: coarse)").matches) input.blur(); // puts a phone's keyboard away
  ask({ text });
});
input.addEventListener("input", drawBox);
$("clear").addEventListener("click", () => {
  input.value = "";
  input.focus();
  drawBox();
});
$("token-remove").addEventListener("click", () => {
  input.focus();
  ask({ row: null, upload: null, text: input.value.trim() });
});
$("upload").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  if ($("file").files.length) searchBy($("file").files[0]);
  $("file").value = "";
});
let sliding = 0;
slider.addEventListener("input", () => {
  clearTimeout(sliding);
  sliding = setTimeout(() => ask({ weight: Number(slider.value) }, { replace: true }), 120);
});
document.addEventListener("click", (event) => {
  for (const menu of document.querySelectorAll(".menu[open]")) if (!menu.contains(event.target)) menu.open = false;
  const link = event.target.closest?.("a.tile, .examples a, a.brand");
  if (!link || event.button || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
  event.preventDefault();
  if (link.matches(".tile")) ask({ text: "", upload: null, weight: 0.5, row: Number(link.dataset.row) });
  else if (link.matches(".brand")) ask({ text: "", row: null, upload: null, weight: 0.5, filters: new Map() });
  else ask({ text: link.textContent, row: null, upload: null });
});
$("retry").addEventListener("click", () => show());
$("more").addEventListener("click", loadMore);
for (const name of ["captions", "scores"]) {
  const box = $(name);
  box.checked = recall(name);
  const apply = () => grid.classList.toggle(`no-${name}`, !box.checked);
  box.addEventListener("change", () => {
    apply();
    remember(name, box.checked);
  });
  apply();
}

function recall(name) {
  try {
    return localStorage.getItem(name) !== "off";
  } catch {
    return true; // storage may be switched off
  }
}

function remember(name, is) {
  try {
    localStorage.setItem(name, is ? "on" : "off");
  } catch {
    // the choice lasts as long as the page
  }
}

document.addEventListener("paste", (event) => {
  const file = [...(event.clipboardData?.files || [])].find((one) => one.type.startsWith("image/"));
  if (!file) return;
  event.preventDefault();
  searchBy(file);
});
let dragged = 0; // elements that the pointer has entered and not left
const brings = (event) => [...(event.dataTransfer?.types || [])].some((kind) => kind === "Files" || kind === "text/uri-list");
document.addEventListener("dragenter", (event) => {
  if (!brings(event)) return;
  event.preventDefault();
  dragged++;
  $("drop").hidden = false;
});
document.addEventListener("dragover", (event) => brings(event) && event.preventDefault());
document.addEventListener("dragleave", (event) => {
  if (brings(event) && --dragged <= 0) endDrag();
});
document.addEventListener("drop", (event) => {
  if (!brings(event)) return;
  event.preventDefault();
  endDrag();
  searchBy(event.dataTransfer.files[0]);
});

function endDrag() {
  dragged = 0;
  $("drop").hidden = true;
}

addEventListener("popstate", () => {
  question = readAddress();
  show(history.state?.y ?? 0);
});
history.scrollRestoration = "manual";
let scrolled = 0;
addEventListener("scroll", () => {
  document.querySelector(".top").classList.toggle("stuck", scrollY > 8);
  watch();
  clearTimeout(scrolled);
  scrolled = setTimeout(keepPlace, 150);
}, { passive: true });

/** Get more where the end of the grid is near; the start page waits for the first scroll. */
function watch() {
  if (document.body.classList.contains("home") && scrollY === 0) return;
  if (document.querySelector(".more").getBoundingClientRect().top < innerHeight + 700) loadMore();
}

// ---- the start -----------------------------------------------------------------------------------------------------

async function start() {
  translate(document);
  grid.setAttribute("aria-label", words.grid);
  const y = history.state?.y ?? null;
  told = fetchJson("/api/about").then((found) => {
    about = found;
    for (const name of question.filters.keys()) if (!(name in about.fields)) question.filters.delete(name);
    makeMenus();
    drawFilters();
    $("lead").textContent = words.lead(number(about.rows));
    $("model").textContent = about.model ? words.model(about.model) : "";
    if (about.examples.length) {
      $("examples").replaceChildren(make("span", "", words.tryThis), ...about.examples.map((text) => {
        const link = make("a", "user", text);
        link.href = address({ ...question, text, row: null, upload: null, filters: new Map() });
        link.title = text;
        return link;
      }));
      $("examples").hidden = false;
    }
  }, () => null); // the search itself says what is wrong
  if (!isAsked(question) || question.filters.size) await told;
  await show(y);
  if (matchMedia("(pointer: fine)").matches && !isAsked(question)) input.focus({ preventScroll: true });
}

start();
