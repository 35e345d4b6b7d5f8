// The chat page: turns, files, sampling, streaming. What an answer looked at is look.js. Text of users and models
// reaches the page as text alone (textContent, append), never as markup.
import { Look } from "./look.js";

const $ = (id) => document.getElementById(id);
const composer = $("composer"), text = $("text"), main = $("main"), log = $("log");
const touch = matchMedia("(pointer: coarse)").matches; // nobody drags files there, and a focus opens the keyboard
const NAMES = { image: "pictures", video: "clips", audio: "sound" };
const ENDS = { stop: "finished", length: "cut: no more tokens", cancelled: "stopped", content_filter: "held back" };

let info = null; // what /look/info says of the model
let turns = []; // {role: "user", text, files} and {role: "assistant", text, ...}, in turn
let files = []; // attached: {kind, name, size, format, preview, data: a promise of the data URI}
let running = null; // the AbortController of the answer that comes

// --- the server

class Told extends Error {} // what the server says of a request

async function call(path, body, signal) {
  const key = sessionStorage.getItem("key");
  const headers = body ? { "Content-Type": "application/json" } : {};
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, signal, body: JSON.stringify(body) });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Told("The server cannot be reached. Is it still running?");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => ({}));
  $("key").hidden &&= response.status !== 401;
  throw new Told(said.error?.message ?? `The server answers ${response.status} ${response.statusText}`);
}

// The JSON of each event of a stream. Throws where the stream ends without saying so.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let rest = ""; ;) {
      const { value, done } = await reader.read().catch((error) => {
        throw error.name === "AbortError" ? error : new Told("The connection broke before the answer's end.");
      });
      const lines = (rest + (value ?? "\n")).split(/\r\n|\n/);
      rest = lines.pop();
      for (const line of lines) {
        const data = line.startsWith("data:") ? line.slice(5).trim() : "";
        if (data === "[DONE]") return;
        if (data) yield JSON.parse(data);
      }
      if (done) throw new Told("The connection ended before the answer did.");
    }
  } finally {
    reader.cancel().catch(() => {}); // it may have ended by itself
  }
}

async function connect() {
  $("retry").hidden = true;
  try {
    info = await (await call("look/info")).json();
    const models = (await (await call("v1/models")).json()).data;
    $("model").replaceChildren(...models.map(({ id }) => new Option(id)));
  } catch (error) {
    info = null;
    $("hello").textContent = $("key").hidden ? "Not connected" : "A key, please";
    $("hint").textContent = error.message;
    $("retry").hidden = !$("key").hidden;
    if (turns.length) say(error.message);
    return ready();
  }
  $("key").hidden = true;
  $("models").hidden = $("model").length < 2;
  $("name").hidden = !$("models").hidden;
  document.title = $("name").textContent = $("model").value;
  const reads = info.modalities, can = reads.map((kind) => NAMES[kind]);
  $("attach").hidden = !reads.length;
  $("chosen").accept = reads.map((kind) => `${kind}/*`).join();
  const most = `up to ${size(info.most_bytes)} in a chat`;
  $("attach").title = $("attach_what").textContent = "Attach";
  $("attach").setAttribute("aria-label", `Attach ${listed(can)}, ${most}`);
  $("hello").textContent = !info.chats ? "Begin a text"
    : can.length ? `Ask about ${listed(can, "or")}` : "Ask something";
  const how = touch ? "Attach files" : "Drop files anywhere, paste them or attach them";
  $("hint").textContent = !info.chats ? "This model was trained on plain text: it goes on with what you write."
    : can.length ? `${how}, ${most}. Then ask.` : "This model reads text alone.";
  composer.elements.max_tokens.placeholder = info.chats ? "no limit" : "16"; // as OpenAI has it
  text.placeholder = info.chats ? "Ask a question" : "Once upon a time";
  text.setAttribute("aria-label", info.chats ? "Message" : "Text to go on with");
  ready();
  if (!touch) text.focus();
}

// --- files

const size = (bytes) => bytes < 1e6 ? `${Math.ceil(bytes / 1e3)} KB` : `${+(bytes / 1e6).toFixed(1)} MB`;
const listed = (words, and = "and") => words.join(", ").replace(/, ([^,]*)$/, ` ${and} $1`);

// What the files of the chat weigh, for each request carries all of them.
const held = () => [...turns.flatMap((turn) => turn.files ?? []), ...files].reduce((sum, file) => sum + file.size, 0);

function attach(list) {
  const odd = [];
  for (const file of info ? list : []) {
    const kind = file.type.split("/")[0], known = kind in NAMES;
    if (!known) odd.push(`${file.name} is no picture, clip or sound`);
    else if (!info.modalities.includes(kind)) odd.push(`${file.name}: this model reads no ${NAMES[kind]}`);
    else if (held() + file.size > info.most_bytes) {
      const has = size(held() + file.size), most = size(info.most_bytes);
      odd.push(`${file.name}: with it this chat has ${has} of files, and can have ${most}`);
    } else files.push(attached(file, kind));
  }
  say(odd.length ? `Left out: ${odd.join("; ")}.` : "");
  showFiles();
}

function attached(file, kind) {
  const data = new Promise((done, fail) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => fail(new Told(`${file.name} can no longer be read: attach it again`));
    reader.readAsDataURL(file);
  });
  data.catch(() => {}); // it is said when the file is sent
  const { name, size, type } = file, ending = name.includes(".") ? name.split(".").pop() : type.split("/")[1];
  return { kind, name, size, format: ending.toLowerCase(), preview: URL.createObjectURL(file), data };
}

function preview(file) {
  const shown = document.createElement(file.kind === "image" ? "img" : file.kind);
  shown.src = file.preview;
  if (file.kind === "image") shown.alt = file.name;
  else Object.assign(shown, { controls: true, preload: "metadata" }).setAttribute("aria-label", file.name);
  return shown;
}

function showFiles() {
  $("files").replaceChildren(...files.map((file) => {
    const [item, name, bytes] = ["li", "span", "small"].map((tag) => document.createElement(tag));
    bytes.textContent = size(file.size);
    name.append(file.name, bytes);
    const seen = preview(file);
    if (file.kind === "video") seen.controls = false; // too small for them
    item.append(seen, name, button("×", "quiet remove", () => {
      files = files.filter((other) => other !== file);
      URL.revokeObjectURL(file.preview);
      showFiles();
      text.focus();
    }, `Remove ${file.name}`));
    return item;
  }));
  ready();
}

function button(label, kind, click, name) {
  const made = document.createElement("button");
  Object.assign(made, { type: "button", className: kind, textContent: label, onclick: click });
  if (name) made.setAttribute("aria-label", name);
  return made;
}

// --- sampling: empty fields are not sent, so that the server's own values hold

const fields = [...$("sampling").querySelectorAll("[name]")];

function sampling() {
  const set = fields.filter((field) => field.value.trim());
  return Object.fromEntries(set.map((field) => [field.name, field.name !== "stop" ? Number(field.value)
    : field.value.split("\n").filter(Boolean).map((line) => line.replaceAll("\\n", "\n"))]));
}

function remember() {
  const values = Object.fromEntries(fields.map((field) => [field.name, field.value]));
  localStorage.setItem("sampling", JSON.stringify(values));
  summarize();
}

function summarize() {
  const set = fields.filter((field) => field.value.trim());
  const told = set.map((field) => `${field.name.replaceAll("_", " ")} ${field.value.trim().replaceAll("\n", " | ")}`);
  $("set").textContent = told.join(" · ");
  $("reset").disabled = !set.length;
}

function recall() {
  let kept = {};
  try { kept = JSON.parse(localStorage.getItem("sampling")) ?? {}; } catch { /* not ours: forget it */ }
  for (const field of fields) field.value = kept[field.name] ?? "";
  summarize();
}

// --- turns

function say(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

function ready() {
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  $("send").disabled = !info || !(text.value.trim() || files.length);
  $("empty").hidden = turns.length > 0;
  for (const turn of turns) {
    const last = turn === turns.at(-1) && !running;
    turn.article?.querySelector(".again")?.toggleAttribute("hidden", !last);
    turn.article?.querySelector(".on")?.toggleAttribute("hidden", !last || info?.chats !== false);
  }
}

// The messages of a chat completion. Media come first, as the models were trained.
async function messages(turns) {
  const parts = {
    image: (url) => ({ type: "image_url", image_url: { url } }),
    video: (url) => ({ type: "video_url", video_url: { url } }),
    audio: (url, format) => ({ type: "input_audio", input_audio: { data: url.slice(url.indexOf(",") + 1), format } }),
  };
  return Promise.all(turns.map(async ({ role, text, files }) => {
    if (!files?.length) return { role, content: text };
    const media = await Promise.all(files.map(async (file) => parts[file.kind](await file.data, file.format)));
    return { role, content: text ? [...media, { type: "text", text }] : media };
  }));
}

function question(turn) {
  const shown = document.createElement("article");
  shown.className = "question";
  shown.setAttribute("aria-label", "Question");
  if (turn.files.length) {
    const media = document.createElement("div");
    media.className = "media";
    media.append(...turn.files.map(preview));
    shown.append(media);
  }
  if (turn.text) shown.append(Object.assign(document.createElement("p"), { textContent: turn.text }));
  return shown;
}

function answer(given) {
  const article = $("answer").content.cloneNode(true).firstElementChild, said = article.querySelector(".said");
  const turn = { role: "assistant", text: "", article, tokens: 0, said: document.createElement("span") };
  const before = Object.assign(document.createElement("span"), { className: "given", textContent: given });
  if (!info.chats) said.append(before);
  said.append(turn.said);
  article.querySelector(".again").onclick = again;
  article.querySelector(".on").onclick = () => ask({ role: "user", text: given + turn.text, files: [] });
  return turn;
}

function send() {
  if (running || $("send").disabled) return;
  if (!composer.checkValidity()) {
    $("sampling").open = true;
    return composer.reportValidity();
  }
  const turn = { role: "user", text: info.chats ? text.value.trim() : text.value, files };
  [text.value, files] = ["", []];
  showFiles();
  ask(turn);
}

function again() {
  const turn = turns.at(-2);
  turns.at(-1).article.remove();
  turns.pop();
  ask(turn, false);
}

// Asks; where nothing comes of it, the question goes back to the composer.
async function ask(turn, fresh = true) {
  if (running) return;
  say("");
  if (fresh) {
    turns.push(turn);
    turn.article = info.chats ? question(turn) : null;
    if (turn.article) log.append(turn.article);
  }
  const made = answer(turn.text), said = made.article.querySelector(".said");
  const asked = turns.slice();
  turns.push(made);
  log.append(made.article);
  said.classList.add("running");
  running = new AbortController();
  ready();
  main.scrollTop = main.scrollHeight;
  const problem = await stream(made, asked, running.signal);
  running = null;
  said.classList.remove("running");
  const nothing = problem && !made.text;
  if (nothing) takeBack(turn, made, problem);
  else following(() => finish(made, asked, problem));
  ready();
}

async function stream(made, asked, signal) {
  const began = performance.now();
  try {
    const body = { model: $("model").value, stream: true, stream_options: { include_usage: true }, ...sampling() };
    const chats = info.chats, to = chats ? "v1/chat/completions" : "v1/completions";
    Object.assign(body, chats ? { messages: await messages(asked) } : { prompt: asked.at(-1).text });
    for await (const event of events(await call(to, body, signal))) {
      if (event.error) throw new Told(event.error.message ?? "The server ended the answer with an error.");
      const choice = event.choices?.[0], piece = chats ? choice?.delta?.content : choice?.text;
      if (event.usage) made.tokens = event.usage.completion_tokens;
      if (choice?.finish_reason) made.finish = choice.finish_reason;
      if (piece) add(made, piece, began);
    }
  } catch (error) {
    if (error.name === "AbortError") made.finish = "cancelled";
    else if (error instanceof Told) return error.message;
    else { console.error(error); return `The answer cannot be read: ${error.message}`; }
  } finally {
    made.seconds = (performance.now() - began) / 1000;
  }
}

// Changes the page; who was at its end stays there, who scrolled up reads on.
function following(change) {
  const at_end = main.scrollHeight - main.scrollTop - main.clientHeight < 60;
  change();
  if (at_end) main.scrollTop = main.scrollHeight;
}

function add(made, piece, began) {
  made.first ??= (performance.now() - began) / 1000;
  made.text += piece;
  following(() => made.said.append(piece)); // a node of its own, so that screen readers say what is new
}

function takeBack(turn, made, problem) {
  made.article.remove();
  turn.article?.remove();
  turns = turns.filter((other) => other !== turn && other !== made);
  text.value = text.value ? `${turn.text}\n${text.value}` : turn.text;
  files = [...turn.files, ...files];
  showFiles();
  say(problem);
  text.focus();
}

function finish(made, asked, problem) {
  const find = (name) => made.article.querySelector(name), told = [];
  const speed = +(made.tokens / made.seconds).toPrecision(2);
  if (made.tokens) told.push(`${made.tokens} ${made.tokens === 1 ? "token" : "tokens"}`, `${speed} tokens/s`);
  if (made.first !== undefined) told.push(`first after ${made.first.toFixed(1)} s`);
  told.push(problem ? "broken off" : ENDS[made.finish] ?? made.finish ?? "ended");
  find(".facts").textContent = made.text ? told.join(" · ") : ["(nothing)", ...told].join(" · ");
  made.said.normalize();
  find(".failed").textContent = problem ?? "";
  find(".failed").hidden = !problem;
  const pictures = asked.flatMap((turn) => turn.files ?? []).filter((file) => file.kind === "image");
  if (!pictures.length || !made.text) return;
  const looks = find(".looks");
  looks.hidden = false;
  looks.onclick = () => {
    made.look ??= new Look(made.article, pictures, async (wanted) => {
      const body = { messages: await messages(asked), answer: made.text, ...wanted };
      return (await call("look", body)).json();
    }, info.attention);
    looks.setAttribute("aria-expanded", made.look.toggle());
  };
}

function begin() {
  running?.abort();
  for (const turn of turns) for (const file of turn.files ?? []) URL.revokeObjectURL(file.preview);
  turns = [];
  log.replaceChildren();
  say("");
  ready();
  text.focus();
}

// --- what the user does

composer.onsubmit = (event) => { event.preventDefault(); send(); };
text.oninput = ready;
text.onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
};
document.onkeydown = (event) => { if (event.key === "Escape") running?.abort(); };
$("stop").onclick = () => { running?.abort(); text.focus(); };
$("new").onclick = begin;
$("retry").onclick = connect;
$("attach").onclick = () => $("chosen").click();
$("chosen").onchange = () => { attach($("chosen").files); $("chosen").value = ""; text.focus(); };
$("key").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("secret").value.trim());
  say("");
  connect();
};
$("sampling").oninput = remember;
$("reset").onclick = () => { for (const field of fields) field.value = ""; remember(); };
document.onpaste = (event) => {
  if (!event.clipboardData.files.length) return;
  event.preventDefault();
  attach(event.clipboardData.files);
};
const carries = (event) => event.dataTransfer?.types.includes("Files");
document.ondragover = (event) => { if (carries(event)) { event.preventDefault(); $("drop").hidden = false; } };
document.ondragleave = (event) => { if (!event.relatedTarget) $("drop").hidden = true; };
document.ondrop = (event) => {
  $("drop").hidden = true;
  if (!carries(event)) return;
  event.preventDefault();
  attach(event.dataTransfer.files);
  text.focus();
};

recall();
connect();
