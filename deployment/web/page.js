// The page to try a model: pictures in, answers out. It asks /predictions and /explanations of its own origin, as curl
// does, and models.json for the names of the models. No library, nothing from another server.

const MAX_BYTES = 15 * 1024 * 1024; // the server takes 16 MiB
const MAX_SIDE_PX = 4096; // of a picture that is made smaller here
const MAX_CARDS = 24;
const TRIES = 4;
const READ_BY_SERVER = /^image\/(jpeg|png|gif|webp|avif|bmp|tiff)$/;

const REFUSALS = {
  400: ["No picture arrived", "Send one picture at a time, as a file."],
  401: ["A key is needed", "Enter the key that you were given for this server."],
  403: ["The key does not fit", "Look whether it is the right one for this server."],
  404: ["There is no such model here", "Choose another one above."],
  408: ["The picture took too long to arrive", "Your connection may be slow: try a smaller picture."],
  413: ["The picture is too large", "Send one of at most 50 megapixels and 16 MB."],
  415: ["This is not a picture the model can read", "Send a JPEG, PNG, GIF, WEBP, AVIF, BMP or TIFF."],
  422: ["The picture is damaged", "Open it on your own machine, save it anew, and send that."],
  429: ["Too many pictures at once", "Wait a moment, then ask again."],
  500: ["Something broke on the server", "It is not your picture's fault. Its log knows more."],
  502: ["The model does not answer", "It may be starting anew. Ask again in a moment."],
  503: ["The model is busy", "Ask again in a moment."],
  504: ["The answer took too long", "The model is busy. Ask again in a moment."],
  507: ["The model does not answer", "It may be starting anew. Ask again in a moment."],
};
const UNREACHED = ["The server cannot be reached", "Look whether it is running and you are connected, then ask again."];
const COMES_BACK = new Set([429, 502, 503, 504, 507]);

const find = (selector, within = document) => within.querySelector(selector);
const say = (text) => { find("#said").textContent = text; };
let key = sessionStorage.getItem("marten-key") ?? "";
let afterKey = [];
let queue = Promise.resolve();

// ------------------------------------------------------------------------------------------------ the models

async function listModels() {
  let names = [];
  try {
    names = (await (await fetch("models.json", { cache: "no-store" })).json()).models ?? [];
  } catch { /* no list: the reader may type a name */ }
  const asked = new URLSearchParams(location.search).get("model");
  const chooser = find("#chooser");
  const label = Object.assign(document.createElement("label"), { htmlFor: "model", textContent: "Model", className: "soft" });
  const field = document.createElement(names.length ? "select" : "input");
  field.id = "model";
  field.append(...names.map((name) => new Option(name, name, false, name === asked)));
  if (!names.length) Object.assign(field, { value: asked ?? "", placeholder: "its name", autocapitalize: "none", spellcheck: false });
  chooser.replaceChildren(label, field);
}

const model = () => find("#model").value.trim();

// ------------------------------------------------------------------------------------------------ asking

/** Send bytes, try again where that helps, and come back with the answer or with a refusal; never throws. */
async function send(path, body, accept, tell) {
  for (let tried = 1; ; tried += 1) {
    const begun = performance.now();
    let answer = null;
    try {
      const headers = { "Content-Type": "application/octet-stream", Accept: accept };
      if (key) headers.Authorization = `Bearer ${key}`;
      answer = await fetch(path, { method: "PUT", body, headers });
      if (answer.ok) {
        const content = accept === "image/png" ? await answer.blob() : await answer.json();
        return { ok: true, content, answer, tookMs: performance.now() - begun };
      }
    } catch { answer = null; }
    if (tried >= TRIES || (answer && !COMES_BACK.has(answer.status))) return await refusal(answer);
    const asked = Number.parseInt(answer?.headers.get("Retry-After") ?? "", 10);
    const pauseS = Math.min(Number.isNaN(asked) ? 0.3 * 2 ** tried : asked, 10);
    tell(`${(answer ? REFUSALS[answer.status] : UNREACHED)[0]}. Trying again…`);
    await new Promise((resolve) => setTimeout(resolve, pauseS * 1000));
  }
}

async function refusal(answer) {
  const status = answer?.status ?? 0;
  let told = {};
  try { told = (await answer.json()) ?? {}; } catch { /* a refusal without words */ }
  const [title, advice] = answer ? REFUSALS[status] ?? [`The server refused (${status})`, ""] : UNREACHED;
  const id = told.request_id ?? answer?.headers.get("X-Request-Id") ?? "";
  return { ok: false, status, title, advice, message: told.message ?? "", id };
}

/** The bytes to send: the file itself, or, where the server would refuse it and the browser can read it, a JPEG of it. */
async function prepare(file) {
  const known = READ_BY_SERVER.test(file.type) || !file.type;
  if (known && file.size <= MAX_BYTES) return { body: file, note: "" };
  try {
    const whole = await createImageBitmap(file);
    const scale = Math.min(1, MAX_SIDE_PX / Math.max(whole.width, whole.height));
    const canvas = Object.assign(document.createElement("canvas"), { width: Math.round(whole.width * scale), height: Math.round(whole.height * scale) });
    canvas.getContext("2d").drawImage(whole, 0, 0, canvas.width, canvas.height);
    const body = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
    if (body) return { body, note: known ? "made smaller before it was sent" : "sent as a JPEG" };
  } catch { /* the browser cannot read it either: let the server say so */ }
  return { body: file, note: "" };
}

// ------------------------------------------------------------------------------------------------ one card

function newCard(file) {
  const card = find("#card").content.cloneNode(true).firstElementChild;
  const picture = find(".picture", card);
  picture.src = URL.createObjectURL(file);
  picture.alt = `Your picture, ${file.name}`;
  picture.addEventListener("error", () => { picture.hidden = true; find(".unshown", card).hidden = false; }, { once: true });
  const kilobytes = file.size / 1000;
  find("figcaption", card).textContent = `${file.name}, ${kilobytes < 1000 ? `${Math.ceil(kilobytes)} kB` : `${(kilobytes / 1000).toFixed(1)} MB`}`;
  find("main").classList.remove("fresh");
  find("#list").prepend(card);
  for (const old of [...find("#list").children].slice(MAX_CARDS)) {
    const { src, dataset } = find(".picture", old);
    [src, dataset.original, dataset.heat].filter(Boolean).forEach(URL.revokeObjectURL);
    old.remove();
  }
  return card;
}

async function ask(file, card) {
  const name = model();
  const article = find("article", card);
  const title = find("h3", card);
  article.className = "waiting";
  find(".again", card).hidden = true;
  find(".explained", card).textContent = find(".timing", card).textContent = "";
  title.textContent = "Asking…";
  if (!name) return showRefusal(file, card, { status: 0, title: "Which model?", advice: "Type its name above, then ask again.", message: "", id: "" });
  const { body, note } = await prepare(file);
  const told = await send(`predictions/${encodeURIComponent(name)}`, body, "application/json", (text) => { title.textContent = text; });
  if (note && !find("figcaption", card).textContent.includes(note)) find("figcaption", card).append(`; ${note}`);
  if (!told.ok) return showRefusal(file, card, told);
  article.className = "";
  showAnswer(card, told, name);
  showCommand(card, file, name);
  find(".look", card).hidden = false;
  find(".look", card).onclick = () => look(card, body, name);
}

function percent(share) {
  if (share > 0.9995 && share < 1) return "> 99.9 %";
  if (share < 0.0005 && share > 0) return "< 0.1 %";
  return `${(share * 100).toFixed(1)} %`;
}

function showAnswer(card, told, name) {
  const answer = told.content;
  const title = find("h3", card);
  const shares = Object.entries(answer).filter(([, value]) => typeof value === "number");
  if (Array.isArray(answer.embedding)) {
    title.textContent = `${answer.embedding.length} numbers`;
    find(".explained", card).textContent = `This model describes a picture by a list of numbers. They begin ${answer.embedding.slice(0, 4).map((x) => x.toFixed(3)).join(", ")}.`;
  } else if (shares.length === 1 && shares[0][0] === "score") {
    title.textContent = shares[0][1].toLocaleString("en", { maximumSignificantDigits: 4 });
    find(".explained", card).textContent = "This model answers with a score.";
  } else {
    title.textContent = shares[0]?.[0] ?? "No answer";
    const rest = 1 - shares.reduce((sum, [, share]) => sum + share, 0);
    const bars = shares.map(([label, share]) => bar(label, share, ""));
    if (rest > 0.00005) bars.push(bar("everything else", rest, "others"));
    find(".bars", card).replaceChildren(...bars);
  }
  find(".timing", card).textContent = timing(told);
  say(`${name} answers: ${title.textContent}${shares.length && shares[0][0] !== "score" ? `, ${percent(shares[0][1])}` : ""}`);
}

function bar(label, share, kind) {
  const row = Object.assign(document.createElement("li"), { className: kind });
  const drawn = document.createElement("i");
  drawn.style.setProperty("--share", Math.min(Math.max(share, 0), 1));
  drawn.ariaHidden = "true";
  row.append(Object.assign(document.createElement("span"), { textContent: label }), " ", Object.assign(document.createElement("b"), { textContent: percent(share) }), drawn);
  return row;
}

/** What the answer took as seen from here, and the parts of it that the server tells in Server-Timing. */
function timing({ answer, tookMs }) {
  const parts = Object.fromEntries([...(answer.headers.get("Server-Timing") ?? "").matchAll(/(\w+);dur=([\d.]+)/g)].map(([, part, ms]) => [part, Number(ms)]));
  const ms = (value) => `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
  const whole = `Answered in ${tookMs < 1000 ? ms(tookMs) : `${(tookMs / 1000).toFixed(1)} s`}`;
  if (parts.decode === undefined) return whole;
  const rest = Math.max(0, tookMs - parts.decode - parts.forward);
  return `${whole}: reading the picture ${ms(parts.decode)}, network ${ms(parts.forward)}, way and wait ${ms(rest)}`;
}

function showCommand(card, file, name) {
  const quoted = /^[\w.-]+$/.test(file.name) ? file.name : `'${file.name.replaceAll("'", "'\\''")}'`;
  const secret = key ? " -H \"Authorization: Bearer $MARTEN_KEY\"" : "";
  find("details", card).hidden = false;
  find("code", card).textContent = `curl -T ${quoted}${secret} ${new URL(`predictions/${encodeURIComponent(name)}`, location.href)}`;
}

function showRefusal(file, card, { status, title, advice, message, id }) {
  find("article", card).className = "refused";
  find("h3", card).textContent = title;
  find(".explained", card).textContent = advice;
  find(".timing", card).textContent = [message && `The server says: ${message}.`, id && `Request ${id}`].filter(Boolean).join(" ");
  say(`${title}. ${advice}`);
  const again = find(".again", card);
  again.hidden = false;
  again.onclick = () => ask(file, card);
  if (status === 401 || status === 403) {
    find("#key-form").hidden = false;
    find("#key").focus();
    afterKey.push(() => ask(file, card));
  }
}

/** Swap the picture for the one with the heat map, and back; asked for once, when first wanted. */
async function look(card, body, name) {
  const button = find(".look", card);
  const picture = find(".picture", card);
  const shown = button.getAttribute("aria-pressed") === "true";
  if (shown) {
    picture.src = picture.dataset.original;
    picture.alt = picture.dataset.alt;
  } else {
    if (!picture.dataset.heat) {
      button.disabled = true;
      say("Looking where the model looked");
      const told = await send(`explanations/${encodeURIComponent(name)}`, body, "image/png", say);
      button.disabled = false;
      if (!told.ok) {
        button.hidden = true;
        const why = told.status === 404 || told.status === 403 ? "This server does not show where the model looked." : `${told.title}. ${told.advice}`;
        find(".explained", card).textContent = why;
        find("article", card).focus();
        return say(why);
      }
      Object.assign(picture.dataset, { original: picture.src, alt: picture.alt, heat: URL.createObjectURL(told.content) });
    }
    picture.src = picture.dataset.heat;
    picture.hidden = false;
    find(".unshown", card).hidden = true;
    picture.alt = "Your picture as the model got it, under a heat map: brighter where it saw what it answers";
    say("The picture now shows where the model looked: brighter is more");
  }
  button.setAttribute("aria-pressed", String(!shown));
}

// ------------------------------------------------------------------------------------------------ pictures come in

/** Ask about files one after another: a phone's connection and a small server are both better off. */
function take(files) {
  const pictures = [...files];
  if (!pictures.length) return say("There was no picture in that");
  for (const file of pictures.reverse()) {
    const card = newCard(file);
    queue = queue.then(() => ask(file, card)).catch((error) => console.error(error));
  }
}

find("#choose").addEventListener("click", () => find("#files").click());
find("#photograph").addEventListener("click", () => find("#camera").click());
for (const input of [find("#files"), find("#camera")]) {
  input.addEventListener("change", () => { take(input.files); input.value = ""; });
}
addEventListener("paste", (event) => {
  if (event.target instanceof HTMLInputElement) return;
  if (event.clipboardData.files.length) { event.preventDefault(); take(event.clipboardData.files); }
  else say("There is no picture to paste");
});
let depth = 0;
const veil = (shown) => { find("#veil").hidden = !shown; };
addEventListener("dragenter", (event) => { if (event.dataTransfer.types.includes("Files")) { depth += 1; veil(true); } });
addEventListener("dragleave", () => { depth = Math.max(0, depth - 1); veil(depth > 0); });
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => { event.preventDefault(); depth = 0; veil(false); take(event.dataTransfer.files); });
find("#key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = find("#key").value;
  sessionStorage.setItem("marten-key", key);
  find("#key-form").hidden = true;
  find("#choose").focus();
  const waiting = afterKey;
  afterKey = [];
  for (const each of waiting) queue = queue.then(each);
});
listModels();
