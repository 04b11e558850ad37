"use strict";
// Clients choose the names of keys: nothing in this file turns text into HTML.

const SAMPLES = 60; // in a row of bars
const SVG = "http://www.w3.org/2000/svg";
const $ = (id) => document.getElementById(id);
const view = { sort: "rate", reverse: false, match: "", frozen: false, last: null };

// Numbers as text

function compact(n) {
  if (n === null || n === undefined) return "–";
  if (n < 9.95 && n !== Math.trunc(n)) return n.toFixed(1);
  if (n < 9999.5) return Math.round(n).toLocaleString("en-US");
  for (const unit of "kMGTP") {
    n /= 1000;
    if (n < 99.95) return n.toFixed(1) + unit;
    if (n < 999.5) return n.toFixed(0) + unit;
  }
  return n.toFixed(0) + "P";
}

function brief(seconds) { // at most six characters, as in fast-shm top
  if (seconds < 0.9995) return `${Math.round(seconds * 1000)}ms`;
  if (seconds < 59.95) return `${seconds.toFixed(1)}s`;
  seconds = Math.round(seconds);
  for (const [limit, big, small, of, part] of [
    [3600, "m", "s", 60, 1], [86400, "h", "m", 3600, 60], [8640000, "d", "h", 86400, 3600],
  ])
    if (seconds < limit)
      return `${Math.floor(seconds / of)}${big}${String(Math.floor((seconds % of) / part)).padStart(2, "0")}${small}`;
  return `${Math.round(seconds / 86400).toLocaleString("en-US")}d`;
}

function bytes(n) {
  if (n === null) return "?";
  let unit = 0;
  for (; n >= 1024 && unit < 4; unit++) n /= 1024;
  return `${n.toFixed(unit ? 1 : 0)} ${["B", "KiB", "MiB", "GiB", "TiB"][unit]}`;
}

const percent = (share) => `${(100 * share).toFixed(1)}%`;

// Bars: admitted below, denied on top, the newest at the right

function bars(svg, admitted, denied, height) {
  let most = 0;
  const samples = admitted.map((a, i) => [a, denied[i] || 0]).slice(-SAMPLES);
  for (const [a, d] of samples) most = Math.max(most, a + d);
  const paths = { a: "", d: "" };
  samples.forEach(([a, d], i) => {
    const x = SAMPLES - samples.length + i;
    const low = most ? (a / most) * height : 0, high = most ? (d / most) * height : 0;
    if (a) paths.a += `M${x} ${height}V${(height - Math.max(low, 0.7)).toFixed(2)}h.8V${height}z`;
    if (d) paths.d += `M${x} ${(height - low).toFixed(2)}V${Math.max(height - low - Math.max(high, 0.7), 0).toFixed(2)}h.8V${(height - low).toFixed(2)}z`;
  });
  if (!svg.firstChild) {
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("viewBox", `0 0 ${SAMPLES} ${height}`);
    for (const name of ["a", "d"]) {
      const path = document.createElementNS(SVG, "path");
      path.setAttribute("class", name);
      svg.append(path);
    }
  }
  svg.children[0].setAttribute("d", paths.a);
  svg.children[1].setAttribute("d", paths.d);
}

// Tables. Rows are kept by id, so that a selection stays.

const say = (text, kind) => ({ text, kind });
const rate = (n, kind) => say(compact(n), n ? kind : "zero");
const count = (n) => say(compact(n), n ? "" : "zero");
const history = (row, admitted, denied) => ({ bars: [admitted, denied] });
const ofMost = (n, most) => say(`${compact(n)} / ${most === null ? "?" : compact(most)}`, most !== null && n >= most ? "bad" : "");

function dollars(n) { // rounded down, as in fast-shm top
  if (n >= 1000) return `$${compact(n)}`;
  const places = n >= 1 ? 100 : 10000;
  const whole = Math.floor(n * places + 1e-9);
  return n && !whole ? "<$.0001" : `$${whole / places}`;
}

function left(key) {
  if (key.remaining === null) return say("?", "zero");
  const kind = key.remaining === 0 ? "bad" : key.remaining < 0.2 * key.limit ? "warn" : "";
  if (key.usd) return say(`${dollars(key.remaining)} / ${dollars(key.limit)}`, kind);
  return say(`${compact(key.remaining)} / ${compact(key.limit)}`, kind);
}

function wait(key) {
  if (key.remaining === null) return say("?", "zero");
  if (key.retry_after === 0) return say("–", "zero");
  return say(key.retry_after === null ? "never" : brief(key.retry_after), "bad");
}

const sum = (one, other) => (one === null || other === null ? null : one + other);

const TABLES = {
  keys: {
    empty: () => (view.match ? "No key matches the filter." : "No key has consumed anything yet."),
    id: (k) => k.id,
    columns: [
      { title: "key", type: "text", sort: "key", width: "24%", cell: (k) => say(k.key, "name") },
      { title: "limiter", type: "text", sort: "limiter", width: "14%", cell: (k) => say(k.limiter) },
      { title: "calls/s", sort: "rate", width: "8%", cell: (k) => rate(k.rate) },
      { title: "denied/s", sort: "denied_rate", width: "8%", cell: (k) => rate(k.denied_rate, "bad") },
      { title: "admitted", sort: "admitted", width: "8%", cell: (k) => count(k.admitted) },
      { title: "denied", sort: "denied", width: "8%", cell: (k) => count(k.denied) },
      { title: "left", sort: "left", width: "10%", cell: left },
      { title: "wait", width: "7%", cell: wait },
      { title: "reset", width: "9%", cell: (k) => (k.reset_after === null ? say(k.usd ? "never" : "?", "zero") : say(k.reset_after ? brief(k.reset_after) : "–", k.reset_after ? "" : "zero")) },
      { title: "history", width: "12%", cell: (k) => history(k, k.admitted_history, k.denied_history) },
    ],
  },
  workers: {
    empty: () => "No process uses it now.",
    id: (w) => w.pid,
    columns: [
      { title: "pid", cell: (w) => say(String(w.pid)) },
      { title: "calls/s", cell: (w) => rate(sum(w.admitted.now, w.denied.now)) },
      { title: "denied/s", cell: (w) => rate(w.denied.now, "bad") },
      { title: "admitted", cell: (w) => count(w.admitted.total) },
      { title: "denied", cell: (w) => count(w.denied.total) },
      { title: "cpu", cell: (w) => (w.cpu_percent === null ? say("–", "zero") : say(`${Math.round(w.cpu_percent)}%`, w.cpu_percent < 1 ? "zero" : "")) },
      { title: "memory", cell: (w) => say(bytes(w.memory_bytes)) },
      { title: "attached", cell: (w) => say(brief(w.attached_seconds)) },
      { title: "history", cell: (w) => history(w, w.admitted.history, w.denied.history) },
      { title: "command", type: "text", cell: (w) => say(w.command === null ? "? (not visible from here)" : w.command, "command zero") },
    ],
  },
  limiters: {
    empty: () => "No limiter has been made yet.",
    id: (l) => l.name,
    columns: [
      { title: "limiter", type: "text", cell: (l) => say(l.name, "name") },
      { title: "limits", type: "text", cell: (l) => say(l.limits) },
      { title: "keys", cell: (l) => count(l.keys) },
      { title: "calls/s", cell: (l) => rate(l.rate) },
      { title: "denied/s", cell: (l) => rate(l.denied_rate, "bad") },
    ],
  },
  budgets: {
    empty: () => "",
    id: (b) => JSON.stringify([b.budget, b.key]),
    columns: [
      { title: "key", type: "text", cell: (b) => say(b.key, "name") },
      { title: "budget", type: "text", cell: (b) => say(b.budget) },
      { title: "spent", cell: (b) => say(b.shown.spent, b.spent ? "" : "zero") },
      { title: "reserved", cell: (b) => (b.reserved ? say(b.shown.reserved) : say("–", "zero")) },
      { title: "limit", cell: (b) => say(b.shown.limit) },
      { title: "used", meter: true, cell: (b) => ({ share: b.share, kind: b.remaining === 0 ? "bad" : b.warned || b.share > 0.8 ? "warn" : "" }) },
      { title: "warned", cell: (b) => (b.warned ? say("yes", "warn") : say("–", "zero")) },
      { title: "resets", cell: (b) => say(b.reset_after === null ? "never" : brief(b.reset_after)) },
    ],
  },
  permits: {
    empty: () => "",
    id: (p) => JSON.stringify([p.limiter, p.key]),
    columns: [
      { title: "key", type: "text", cell: (p) => say(p.key || "''", "name") },
      { title: "limiter", type: "text", cell: (p) => say(p.limiter) },
      { title: "in flight", cell: (p) => ofMost(p.in_flight, p.max_in_flight) },
      { title: "oldest", cell: (p) => (p.in_flight ? say(p.oldest_seconds ? brief(p.oldest_seconds) : "<1s") : say("–", "zero")) },
      { title: "dead", cell: (p) => rate(p.dead, "bad") },
      { title: "pids", type: "text", cell: (p) => say(p.pids.join(" ") || "–", "zero") },
    ],
  },
  pools: {
    empty: () => "",
    id: (p) => JSON.stringify([p.pool, p.endpoint]),
    columns: [
      { title: "endpoint", type: "text", cell: (p) => say(p.endpoint, "name") },
      { title: "pool", type: "text", cell: (p) => say(p.pool) },
      { title: "active", cell: (p) => ofMost(p.active, p.max_connections) },
      { title: "idle", cell: (p) => count(p.idle) },
      { title: "dead", cell: (p) => rate(p.dead, "bad") },
      { title: "pids", type: "text", cell: (p) => say(p.pids.join(" ") || "–", "zero") },
    ],
  },
  waiting: {
    empty: () => "",
    id: (w) => JSON.stringify([w.limiter, w.key, w.tenant, w.priority]),
    columns: [
      { title: "key", type: "text", cell: (w) => say(w.key || "''", "name") },
      { title: "limiter", type: "text", cell: (w) => say(w.limiter) },
      { title: "tenant", type: "text", cell: (w) => say(w.tenant || "–", "zero") },
      { title: "priority", cell: (w) => say(String(w.priority), w.priority ? "" : "zero") },
      { title: "callers", cell: (w) => count(w.callers) },
      { title: "longest", cell: (w) => (w.callers ? say(brief(w.longest_seconds)) : say("–", "zero")) },
      { title: "stale", cell: (w) => rate(w.stale, "bad") },
      { title: "pids", type: "text", cell: (w) => say(w.pids.join(" ") || "–", "zero") },
    ],
  },
  deployments: {
    empty: () => "",
    id: (d) => d.name,
    columns: [
      { title: "deployment", type: "text", cell: (d) => say(d.name, "name") },
      { title: "in flight", cell: (d) => count(d.in_flight) },
      { title: "calls/s", cell: (d) => rate(d.records.now) },
      { title: "latency", cell: (d) => (d.latency === null ? say("–", "zero") : say(brief(d.latency))) },
      { title: "success", cell: (d) => (d.records.total ? say(percent(d.success_rate), d.success_rate < 0.9 ? "bad" : d.success_rate < 0.99 ? "warn" : "") : say("–", "zero")) },
      { title: "cooldown", cell: (d) => (d.cooldown ? say(brief(d.cooldown), "bad") : say("–", "zero")) },
      { title: "history", cell: (d) => history(d, d.records.history, []) },
    ],
  },
};

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function makeHead(table, columns) {
  const row = element("tr");
  for (const column of columns) {
    const head = element("th", column.type);
    head.scope = "col";
    if (column.width) head.style.width = column.width;
    if (column.sort) {
      const button = element("button", "", column.title);
      button.type = "button";
      button.addEventListener("click", () => sortBy(column.sort));
      head.append(button);
      head.dataset.sort = column.sort;
    } else head.textContent = column.title;
    row.append(head);
  }
  const thead = element("thead");
  thead.append(row);
  table.append(thead, element("tbody"));
}

function fill(name, rows) {
  const table = $(name), { columns, id, empty } = TABLES[name];
  if (!table.firstChild) makeHead(table, columns);
  const body = table.tBodies[0], known = new Map();
  for (const row of [...body.children]) row.dataset.id === undefined ? row.remove() : known.set(row.dataset.id, row);
  const shown = [], alike = new Map();
  for (const row of rows) {
    const times = alike.get(id(row)) || 0; // long keys that begin alike are shown alike
    alike.set(id(row), times + 1);
    const key = times ? `${id(row)} #${times}` : String(id(row));
    let line = known.get(key);
    known.delete(key);
    if (!line) {
      line = element("tr");
      line.dataset.id = key;
      for (const column of columns) line.append(element("td", column.type));
    }
    columns.forEach((column, at) => {
      const cell = line.children[at], what = column.cell(row);
      if (what.bars) {
        if (!cell.firstChild) {
          const svg = document.createElementNS(SVG, "svg");
          svg.setAttribute("class", "spark");
          cell.append(svg);
        }
        bars(cell.firstChild, ...what.bars, 20);
        return;
      }
      if (column.meter) {
        if (!cell.firstChild) {
          const bar = element("div", "bar");
          bar.append(element("div"));
          cell.append(bar, element("span"));
          cell.classList.add("meter");
        }
        cell.children[0].firstChild.style.width = `${Math.min(100 * what.share, 100)}%`;
        cell.children[0].firstChild.className = what.kind;
        cell.children[1].textContent = percent(what.share);
        return;
      }
      const style = [column.type, what.kind].filter(Boolean).join(" ");
      if (cell.className !== style) cell.className = style;
      if (cell.textContent !== what.text) cell.textContent = what.text;
      if (column.type === "text" && cell.title !== what.text) cell.title = what.text;
    });
    shown.push(line);
  }
  for (const line of known.values()) line.remove();
  shown.forEach((line, at) => { if (body.children[at] !== line) body.insertBefore(line, body.children[at] || null); });
  if (!shown.length) {
    const cell = element("td", "empty", empty());
    cell.colSpan = columns.length;
    const line = element("tr");
    line.append(cell);
    body.append(line);
  }
  const section = table.closest("section");
  if (section.classList.contains("optional")) section.hidden = !shown.length;
}

// The page

function state(text, kind) {
  $("state").textContent = text;
  $("state").className = `state ${kind}`;
}

function tell(messages) {
  const text = messages.map((each) => each.textContent).join("\n");
  if ($("messages").dataset.text === text) return; // or a screen reader would read it again
  $("messages").dataset.text = text;
  $("messages").replaceChildren(...messages);
}

function show(found) {
  view.last = found;
  const stats = found.segment, messages = [];
  document.title = `${found.name} – fast-shm`;
  $("name").textContent = found.name;
  document.body.classList.toggle("problem", Boolean(found.problem));
  if (view.frozen) state("frozen", "frozen");
  else if (found.problem) state("waiting", "waiting");
  else if (stats.unlinked) state("removed", "broken");
  else if (stats.damaged) state("damaged", "broken");
  else state("live", "");
  $("clock").textContent = new Date(found.taken * 1000).toLocaleTimeString("en-GB");
  $("about").textContent = stats ? `${found.workers.length} worker${found.workers.length === 1 ? "" : "s"}, made ${brief(stats.age_seconds)} ago` : "";
  if (found.notice) messages.push(element("p", "notice", found.notice));
  if (found.problem) messages.push(element("p", "", found.problem));
  for (const warning of found.warnings) messages.push(element("p", "", warning));
  tell(messages);
  $("admitted").textContent = compact(found.admitted.now);
  $("admitted-total").textContent = `${compact(found.admitted.total)} in all`;
  $("denied").textContent = compact(found.denied.now);
  $("denied").className = found.denied.now ? "bad" : "";
  $("denied-total").textContent = `${compact(found.denied.total)} in all`;
  bars($("admitted-chart"), found.admitted.history, [], 34);
  bars($("denied-chart"), found.denied.history.map(() => 0), found.denied.history, 34);
  const share = stats ? stats.occupancy : 0;
  $("used").textContent = stats ? percent(share) : "–";
  $("used-bar").style.width = `${Math.min(100 * share, 100)}%`;
  $("used-bar").className = share >= 0.95 ? "bad" : share >= 0.8 ? "warn" : "";
  $("used-of").textContent = stats ? `${stats.used.toLocaleString("en-US")} of ${stats.capacity.toLocaleString("en-US")}` : "";
  $("in-flight").textContent = compact(found.in_flight);
  const callers = found.callers ? `, ${compact(found.callers)} caller${found.callers === 1 ? " waits" : "s wait"}` : "";
  $("pooled").textContent = `${compact(found.pooled)} pooled connections${callers}`;
  for (const name of ["permits", "pools", "waiting", "budgets"]) {
    const total = found[`${name}_total`], most = found[name].length;
    $(`${name}-count`).textContent = most < total ? `${total.toLocaleString("en-US")}, the first ${most} shown` : "";
  }
  const memo = found.memo;
  const hits = memo === null ? null : memo.hit_rate === null ? memo.hit_rate_ever : memo.hit_rate;
  $("memo").textContent = hits === null ? "–" : percent(hits);
  $("memo-of").textContent = memo === null || hits === null ? "not used" : `hit, of ${compact(memo.lookups.now)} lookups/s`;
  const fitting = view.match ? `${found.keys_fitting.toLocaleString("en-US")} of ${found.keys_total.toLocaleString("en-US")} match` : found.keys_total.toLocaleString("en-US");
  $("keys-count").textContent = found.keys.length < found.keys_fitting ? `${fitting}, the first ${found.keys.length} shown` : fitting;
  for (const name of Object.keys(TABLES)) fill(name, found[name]);
  for (const head of $("keys").tHead.rows[0].children) {
    if (head.dataset.sort !== view.sort) head.removeAttribute("aria-sort");
    else head.setAttribute("aria-sort", ["left", "key", "limiter"].includes(view.sort) !== view.reverse ? "ascending" : "descending");
  }
}

let timer = 0, requests = 0;

async function look() {
  clearTimeout(timer);
  const number = ++requests; // an answer that a later one has overtaken is not shown
  let pause = 1000;
  try {
    const query = new URLSearchParams({ sort: view.sort, reverse: view.reverse ? "1" : "0", match: view.match, top: "50" });
    const answer = await fetch(`api/snapshot?${query}`);
    if (!answer.ok) throw new Error(`${answer.status}: ${await answer.text()}`);
    const found = await answer.json();
    if (number !== requests || view.frozen) return;
    show(found);
    pause = Math.max(found.every * 1000, 200);
  } catch (error) {
    if (number !== requests || view.frozen) return;
    state(error instanceof TypeError ? "does not answer" : String(error.message), "broken");
    if (error instanceof TypeError) silent();
  }
  if (number === requests) timer = setTimeout(look, document.hidden ? 5000 : pause);
}

function silent() {
  const since = view.last ? ` The page shows the sample of ${$("clock").textContent}.` : "";
  document.body.classList.add("problem");
  tell([element("p", "", `fast-shm dashboard does not answer. If it has ended, start it again. If you reach it through a tunnel (ssh -L), check the tunnel.${since}`)]);
}

function freeze() {
  view.frozen = !view.frozen;
  $("freeze").textContent = view.frozen ? "Resume" : "Freeze";
  $("freeze").setAttribute("aria-pressed", String(view.frozen));
  if (view.frozen) {
    clearTimeout(timer);
    state("frozen", "frozen");
  } else look();
}

function changed() { // a frozen page has only the rows of its order and filter
  if (view.frozen) freeze();
  else look();
}

function sortBy(column) {
  view.reverse = column === view.sort ? !view.reverse : false;
  view.sort = column;
  changed();
}

$("freeze").setAttribute("aria-pressed", "false");
$("freeze").addEventListener("click", freeze);
$("filter").addEventListener("input", () => { view.match = $("filter").value; changed(); });
document.addEventListener("visibilitychange", () => { if (!document.hidden && !view.frozen) look(); });
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape" && event.target === $("filter")) {
    $("filter").value = view.match = "";
    $("filter").blur();
    changed();
  } else if (event.target.closest("input, button")) return;
  else if (event.key === "/") { event.preventDefault(); $("filter").focus(); }
  else if (event.key === " ") { event.preventDefault(); freeze(); }
});
look();
